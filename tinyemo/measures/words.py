"""Vocabulary words nearest to projected images, and the words that tell two groups of images apart.

A projected image lies in the embedding space of the language model, so the words around it say what the projector
makes of the image. The words that separate groups are found by the log-odds ratio with an informative Dirichlet prior
(Monroe et al., 2008, doi 10.1093/pan/mpn018), over images of the same labels in both groups.

Shape letters: M images, V words, H width, k nearest words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tinyemo.measures.discoveries import Finding, adjust_p
from tinyemo.measures.gaps import Bools, Floats, Ints
from tinyemo.measures.groups import CANDIDATE_P, MIN_IMAGES, groups_of, is_explained
from tinyemo.measures.scored import UNKNOWN, ScoredData
from tinyemo.measures.spurious import bins_of

NUM_NEAREST = 20
PRIOR_STRENGTH = 500.0
"""Words of the prior, spread over the vocabulary as all images use it."""
MIN_USES = 10
"""Images near a word, in both groups together, for the word to be tested."""
MAX_PER_STRATUM = 200
"""Images of a label in each group of a comparison."""
NUM_MATCHED_BINS = 8
"""Bins of a covariate that images are matched by."""
ROWS_PER_PRODUCT = 512


@dataclass(frozen=True)
class Vocabulary:
    """Words of the embedding table that stand for themselves, with their unit vectors.

    Attributes:
        words: V texts.
        vectors: (V, H) float32 of length 1.
    """

    words: tuple[str, ...]
    vectors: NDArray[np.float32]


def nearest_words(embeds: NDArray[Any], vocabulary: Vocabulary, k: int = NUM_NEAREST) -> Ints:
    """Return (M, k) numbers of the words nearest to each projected image, the nearest first."""
    k = min(k, len(vocabulary.words))
    parts = [np.empty((0, k), np.int64)]
    for start in range(0, len(embeds), ROWS_PER_PRODUCT):
        cosines = embeds[start : start + ROWS_PER_PRODUCT].astype(np.float32) @ vocabulary.vectors.T
        top = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(cosines, top, 1), axis=1, kind="stable")
        parts.append(np.take_along_axis(top, order, 1))
    return np.concatenate(parts)


def words_of_labels(
    nearest: Ints, label: Ints, labels: Sequence[str], vocabulary: Vocabulary, num_words: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """Return for each label the words that are near most of its images, and the share of the images for each word."""
    found = {}
    for place, name in enumerate(labels):
        rows = nearest[label == place]
        uses = np.bincount(rows.ravel(), minlength=len(vocabulary.words))
        top = np.argsort(-uses, kind="stable")[:num_words]
        found[name] = [
            {"word": vocabulary.words[word], "share": float(uses[word] / len(rows))} for word in top if uses[word]
        ]
    return found


@dataclass(frozen=True)
class WordTest:
    """Words that were tested, with the first group's log-odds less the second's; all (T,)."""

    words: Ints
    log_odds: Floats
    z: Floats
    p: Floats


def log_odds(first: Ints, second: Ints, prior: Floats, *, min_uses: int = MIN_USES) -> WordTest:
    """Compare how often each word is used in two groups.

    Args:
        first, second: (V,) uses.
        prior: (V,) pseudo-counts, each above 0.
        min_uses: words that are used less in both together are left out.
    """
    ratio = _log_odds(first, prior) - _log_odds(second, prior)
    z = ratio / np.sqrt(1 / (first + prior) + 1 / (second + prior))
    kept = np.flatnonzero(first + second >= min_uses)
    return WordTest(kept, ratio[kept], z[kept], 2 * stats.norm.sf(np.abs(z[kept])))


def _log_odds(uses: Ints, prior: Floats) -> Floats:
    return np.asarray(np.log((uses + prior) / (uses.sum() + prior.sum() - uses - prior)))


def find_separating_words(
    data: ScoredData, column: str, nearest: Ints, vocabulary: Vocabulary, *, alpha: float = 0.05, seed: int = 0
) -> list[Finding]:
    """Return for each group one finding about the words that its images have nearer than the rest.

    Its p is that of the hypothesis that no word separates the two (Simes' test over the words).

    Args:
        data: M images.
        column: of groups.
        nearest: (M, k), see `nearest_words`.
        vocabulary: the words.
        alpha: false discovery rate among the words that a finding names.
        seed: of the draw of images.

    Raises:
        DataError: see `groups_of`.
    """
    kept, _ = groups_of(data, column)
    codes, names = data.groups[column].codes, data.groups[column].names
    uses = np.bincount(nearest.ravel(), minlength=len(vocabulary.words))
    prior = PRIOR_STRENGTH * (uses + 0.5) / (uses.sum() + 0.5 * len(uses))
    findings = []
    for place in kept:
        other = names[1 - place] if len(names) == 2 else "the rest"
        sides = (codes == place, (codes != place) & (codes != UNKNOWN))
        rows = matched_rows(data, *sides, data.label, seed)
        if len(rows[0]) < MIN_IMAGES:
            continue
        counts = _uses(nearest, rows, len(uses))
        test = log_odds(*counts, prior)
        if not len(test.words):
            continue
        q = adjust_p(test.p)
        order = np.argsort(test.p, kind="stable")
        named = [_word(test, row, q, vocabulary, counts, len(rows[0])) for row in order[:20] if q[row] <= alpha]
        more = ", ".join([row["word"] for row in named if row["log_odds"] > 0][:5])
        less = ", ".join([row["word"] for row in named if row["log_odds"] < 0][:5])
        title = (
            f"near images of {column}={names[place]} and not of {other} with the same labels: "
            f"{more or '-'}; the other way round: {less or '-'}"
        )
        strongest = order[0]
        effect = float(test.log_odds[strongest])
        half = 1.96 * abs(effect / float(test.z[strongest])) if test.z[strongest] else float("nan")
        finding = Finding(
            part="words", title=title, data=data.name, group=f"{column}={names[place]}", other=other,
            metric="separating_words", effect=effect, low=effect - half, high=effect + half, p=float(q.min()),
            num_images=2 * len(rows[0]), details={"words": named, "num_tested": len(q)},
        )  # fmt: skip
        if finding.p <= CANDIDATE_P:
            finding = _adjusted(finding, data, sides, nearest, prior, int(test.words[strongest]), seed)
        findings.append(finding)
    return findings


def _uses(nearest: Ints, rows: tuple[Ints, Ints], num_words: int) -> tuple[Ints, Ints]:
    first, second = (np.bincount(nearest[part].ravel(), minlength=num_words) for part in rows)
    return first, second


def _adjusted(
    finding: Finding,
    data: ScoredData,
    sides: tuple[Bools, Bools],
    nearest: Ints,
    prior: Floats,
    strongest: int,
    seed: int,
) -> Finding:
    """Return the finding with its test repeated on images that also have the same covariates, one after the other."""
    explained: list[str] = []
    for name, values in data.covariates.items():
        bins = bins_of(values, NUM_MATCHED_BINS)
        rows = matched_rows(data, *sides, data.label * (int(bins.max()) + 1) + bins, seed)
        if len(rows[0]) < MIN_IMAGES:
            continue
        counts = _uses(nearest, rows, len(prior))
        test = log_odds(*counts, prior)
        p = float(adjust_p(test.p).min()) if len(test.p) else 1.0
        effect = float((_log_odds(counts[0], prior) - _log_odds(counts[1], prior))[strongest])
        if finding.adjusted_p is None or p > finding.adjusted_p:
            finding = replace(finding, adjusted_effect=effect, adjusted_p=p)
        if is_explained(finding.effect, effect, p):
            explained.append(name)
    return replace(finding, explained_by=", ".join(explained) or None)


def _word(
    test: WordTest, row: int, q: Floats, vocabulary: Vocabulary, counts: Sequence[Ints], num_images: int
) -> dict[str, Any]:
    word = test.words[row]
    return {
        "word": vocabulary.words[word],
        "log_odds": float(test.log_odds[row]),
        "q": float(q[row]),
        "share": float(counts[0][word] / num_images),
        "share_of_other": float(counts[1][word] / num_images),
    }


def matched_rows(data: ScoredData, first: Bools, second: Bools, strata: Ints, seed: int) -> tuple[Ints, Ints]:
    """Return as many images of each stratum from the one group as from the other, at most one of a cluster in each."""
    rng = np.random.default_rng(seed)
    chosen: tuple[list[Ints], list[Ints]] = ([], [])
    pools = [_one_of_each_cluster(rng.permutation(np.flatnonzero(side)), data.clusters) for side in (first, second)]
    for stratum in range(int(strata.max()) + 1):
        rows = [pool[strata[pool] == stratum] for pool in pools]
        size = min(len(rows[0]), len(rows[1]), MAX_PER_STRATUM)
        for side, part in zip(chosen, rows, strict=True):
            side.append(part[:size])
    return np.concatenate(chosen[0]), np.concatenate(chosen[1])


def _one_of_each_cluster(rows: Ints, clusters: Ints | None) -> Ints:
    if clusters is None:
        return rows
    return rows[np.unique(clusters[rows], return_index=True)[1]]
