"""Made data with a bias of known kind, size and place: what the parts of the bias report must find, and must not.

Images are points in an embedding space around the vectors of their label words; a model's score is the cosine with a
label word. Every kind but "none" plants one thing:

    shift       images of a group are moved towards other labels        found by: groups
    word        a label word lies near a group's words, and the          found by: association
                group's images are moved towards the label word
    cluster     a region of the space that no column names has a lower   found by: slices
                recall (halved by default)
    brightness  dark images are moved towards other labels, and one      found by: spurious; the gap of the group
                group has more dark images                               must be explained by brightness

Run: python benchmarks/planted_bias.py --kind shift --effect 0.3 --seed 7

Shape letters: N images, C labels, H width.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from tinyemo.measures.association import WordGroups, find_score_ties, find_word_associations, unit
from tinyemo.measures.discoveries import Finding, decide
from tinyemo.measures.groups import find_gaps
from tinyemo.measures.scored import Column, ScoredData
from tinyemo.measures.slices import Slice, find_slices
from tinyemo.measures.spurious import find_spurious
from tinyemo.measures.words import Vocabulary, find_separating_words, nearest_words

Kind = Literal["none", "shift", "word", "cluster", "brightness"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
WIDTH = 64
NUM_VOCABULARY = 400
NUM_GROUP_WORDS = 10
NOISE = 1.0
SIGNAL = 3.2
PLANTED_LABEL = 2
DEFAULT_EFFECTS: dict[Kind, float] = {"none": 0.0, "shift": 0.25, "word": 0.5, "cluster": 0.5, "brightness": 0.4}
"""Recall lost by the planted group, region or by dark images (of shift and cluster as a share of the recall); for
"word", the share of the label word's vector that points to the group's words, and a quarter of it the images' pull to
the label word."""


@dataclass(frozen=True)
class Planted:
    """Data with what was planted in it.

    Attributes:
        data: images with groups "country" (the planted one), "camera" and "season" (which are noise), and covariates.
        in_plant: (N,) images that the bias was planted in; none for "none".
        label_vectors: (C, H).
        words: of two groups.
        vocabulary: words of the table, with the labels and the group words.
    """

    kind: Kind
    effect: float
    data: ScoredData
    in_plant: NDArray[np.bool_]
    label_vectors: NDArray[np.float64]
    words: WordGroups
    vocabulary: Vocabulary


def plant(
    kind: Kind, *, seed: int, effect: float | None = None, num_images: int = 4000, images_per_author: int = 1
) -> Planted:
    """Make data with one planted bias.

    Args:
        kind: what is planted.
        seed: of everything that is drawn.
        effect: its size, see DEFAULT_EFFECTS.
        num_images: N.
        images_per_author: images of an author look alike and share their country; above 1 they come with clusters.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    effect = DEFAULT_EFFECTS[kind] if effect is None else effect
    vocabulary, label_vectors, words = _table(rng, effect if kind == "word" else 0.0)
    author = np.arange(num_images) // images_per_author
    num_authors = int(author[-1]) + 1
    label = rng.integers(len(LABELS), size=num_images)
    country = (rng.random(num_authors) < 0.3).astype(np.int64)[author]
    camera = rng.integers(3, size=num_authors)[author]
    season = rng.integers(4, size=num_images)
    region = rng.random(num_images) < 0.12
    brightness = np.clip(rng.normal(0.5, 0.15, num_images) - (kind == "brightness") * 0.12 * country, 0, 1)
    darkness = np.clip((0.55 - brightness) / 0.3, 0, 1)
    noise = rng.normal(size=(num_images, WIDTH)) * NOISE
    if images_per_author > 1:  # an author's images share half of their noise
        noise = np.sqrt(0.5) * noise + np.sqrt(0.5) * (rng.normal(size=(num_authors, WIDTH)) * NOISE)[author]
    # What images look like for other reasons lies across the label words, so that it favours no label.
    basis = np.linalg.qr(np.concatenate([label_vectors, rng.normal(size=(3, WIDTH))]).T)[0].T
    appearance = dict(zip(("country", "region", "brightness"), basis[len(LABELS) :], strict=True))
    features = SIGNAL * label_vectors[label] + noise + 2.0 * np.outer(brightness - 0.5, appearance["brightness"]) / 0.15
    lost = {
        "shift": effect * country, "cluster": effect * region, "brightness": effect * darkness,
    }.get(kind, np.zeros(num_images))  # fmt: skip
    if kind == "shift":
        features += 2.0 * np.outer(country, appearance["country"])
    if kind == "cluster":
        features += 5.0 * np.outer(region, appearance["region"])
    if kind == "word":
        pulled = 0.25 * effect * SIGNAL * country
        features += pulled[:, None] * label_vectors[PLANTED_LABEL]
    is_moved = rng.random(num_images) < lost  # a moved image looks like one of another label
    other = (label + rng.integers(1, len(LABELS), size=num_images)) % len(LABELS)
    features += is_moved[:, None] * SIGNAL * (label_vectors[other] - label_vectors[label])
    embeds = unit(features)
    scores = (embeds @ unit(label_vectors).T).astype(np.float32)
    chances = np.exp(scores.astype(np.float64) / 0.1)
    data = ScoredData(
        name="planted",
        labels=LABELS,
        label=label,
        scores=scores,
        confidence=(chances / chances.sum(1, keepdims=True)).max(1),
        groups={
            "country": Column(country, ("north", "south")),
            "camera": Column(camera, ("a", "b", "c")),
            "season": Column(season, ("spring", "summer", "autumn", "winter")),
        },
        covariates={
            "brightness": brightness,
            "saturation": np.clip(rng.normal(0.4, 0.1, num_images), 0, 1),
            "size": rng.normal(12.0, 0.5, num_images),
        },
        clusters=author if images_per_author > 1 else None,
        embeds=features.astype(np.float32),
    )
    planted_rows = {
        "shift": country == 1, "word": country == 1, "cluster": region, "brightness": darkness > 0.5,
    }.get(kind, np.zeros(num_images, bool))  # fmt: skip
    return Planted(kind, effect, data, planted_rows, label_vectors, words, vocabulary)


def _table(rng: np.random.Generator, tie: float) -> tuple[Vocabulary, NDArray[np.float64], WordGroups]:
    """Return a vocabulary of random vectors, the label words among them and the words of two groups."""
    vectors = unit(rng.normal(size=(NUM_VOCABULARY, WIDTH)))
    count = len(LABELS)
    first = slice(count, count + NUM_GROUP_WORDS)
    second = slice(count + NUM_GROUP_WORDS, count + 2 * NUM_GROUP_WORDS)
    towards = unit(vectors[first].mean(0))
    vectors[PLANTED_LABEL] = unit((1 - tie) * vectors[PLANTED_LABEL] + tie * towards)
    names = [*LABELS, *(f"north{n}" for n in range(NUM_GROUP_WORDS)), *(f"south{n}" for n in range(NUM_GROUP_WORDS))]
    names += [f"word{n}" for n in range(NUM_VOCABULARY - len(names))]
    words = WordGroups("country", "north", "south", vectors[first], vectors[second])
    return Vocabulary(tuple(names), vectors.astype(np.float32)), vectors[:count], words


@dataclass(frozen=True)
class Outcome:
    """Findings of a bias report on planted data.

    Attributes:
        findings: decided.
        is_found: the right part found the plant.
        misplaced: findings that blame anything that was not planted.
    """

    findings: list[Finding]
    is_found: bool
    misplaced: list[Finding]


def report(planted: Planted, *, alpha: float = 0.05, seed: int = 0) -> Outcome:
    """Run every part on planted data, and judge its findings.

    The right part is the one named above. A finding is misplaced if it blames another group, label, region or covariate
    than the planted one; also one that blames a group for what is only brightness. That the same planted group also
    shows in another part (its images have other nearest words, say) is not misplaced.
    """
    data = planted.data
    findings = [finding for column in data.groups for finding in find_gaps(data, column)]
    findings += [finding for column in data.groups for finding in find_score_ties(data, column)]
    embeds = unit(data.embeds)  # type: ignore[arg-type]
    size = np.maximum(np.bincount(data.label, minlength=len(LABELS)), 1)
    means = np.stack([np.bincount(data.label, column, len(LABELS)) for column in embeds.T], 1) / size[:, None]
    findings += find_word_associations(data.name, LABELS, planted.label_vectors, means, planted.words)
    findings += find_spurious(data)
    rows = np.random.default_rng(seed).permutation(len(data))[:2000]
    near = nearest_words(embeds[rows], planted.vocabulary)
    findings += [
        finding
        for column in data.groups
        for finding in find_separating_words(data.take(rows), column, near, planted.vocabulary)
    ]
    slices = find_slices(data, seed=seed)
    decided = decide([*findings, *(each.finding for each in slices)], alpha=alpha)
    decided_slices = decided[len(findings) :]
    found = [one for one in decided if one.is_significant and _is_the_plant(planted, one, slices, decided_slices)]
    misplaced = [one for one in decided if one.is_blamed and not _may_name(planted, one, slices, decided_slices)]
    return Outcome(decided, bool(found), misplaced)


def _is_the_plant(planted: Planted, one: Finding, slices: list[Slice], decided: list[Finding]) -> bool:
    """Return whether a significant finding is the right part's finding of what was planted."""
    if planted.kind == "shift":
        return one.part == "groups" and one.group.startswith("country=") and one.metric == "recall" and one.is_blamed
    if planted.kind == "word":
        named = one.metric.partition(":")
        return one.part == "association" and named[0] in ("table", "score") and named[2] == LABELS[PLANTED_LABEL]
    if planted.kind == "cluster":
        return one.part == "slices" and one.is_blamed and _overlap(planted, one, slices, decided) > 0.5
    if planted.kind == "brightness":
        return one.part == "spurious" and one.group == "brightness" and one.metric == "error"
    return False


def _may_name(planted: Planted, one: Finding, slices: list[Slice], decided: list[Finding]) -> bool:
    """Return whether a finding blames what was planted, in whatever part."""
    if planted.kind in ("shift", "word"):
        names_group = one.group.startswith("country=") or (one.part == "association" and one.group == "north")
        if planted.kind == "word" and one.part == "association":
            return names_group and one.metric.endswith(f":{LABELS[PLANTED_LABEL]}")
        return names_group and one.part in ("groups", "words")
    return _is_the_plant(planted, one, slices, decided)


def _overlap(planted: Planted, one: Finding, slices: list[Slice], decided: list[Finding]) -> float:
    """Return the share of a slice and of the plant that lie in both (Jaccard)."""
    number = next((place for place, finding in enumerate(decided) if finding is one), None)
    if number is None:
        return 0.0
    inside = np.zeros(len(planted.data), bool)
    inside[slices[number].rows] = True
    return float((inside & planted.in_plant).sum() / max((inside | planted.in_plant).sum(), 1))


def main() -> None:
    """Plant a bias and print what the report says of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="shift")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--effect", type=float, help="default: " + ", ".join(f"{k} {v}" for k, v in DEFAULT_EFFECTS.items())
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--images-per-author", type=int, default=1)
    given = parser.parse_args()
    planted = plant(
        given.kind, seed=given.seed, effect=given.effect, num_images=given.images,
        images_per_author=given.images_per_author,
    )  # fmt: skip
    outcome = report(planted)
    print(f"recall {planted.data.is_right.mean():.3f} of {len(planted.data)} images; found: {outcome.is_found}")
    for finding in sorted(outcome.findings, key=lambda one: one.q):
        if finding.is_significant:
            mark = "MISPLACED " if finding in outcome.misplaced else ""
            reason = f" (explained by {finding.explained_by})" if finding.explained_by else ""
            print(f"  {mark}q {finding.q:.2g} {finding.part}: {finding.title}{reason}")


if __name__ == "__main__":
    main()
