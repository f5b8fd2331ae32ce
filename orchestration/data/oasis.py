"""OASIS as instruct data: conversations written by templates from photographs and what people felt about them.

norms.csv holds, for each photograph, the mean valence (1 very negative to 7 very positive) and arousal (1 low to 7
high) of about a hundred raters. The circumplex model of affect (Russell, 1980) lays emotions out over these two axes.
Of Mikels' eight words we give one to each quadrant:

    valence           calm            aroused
    positive          contentment     excitement (amusement, awe)
    negative          sadness         fear (anger, disgust)

Two ratings cannot tell apart the words of one quadrant, so those in brackets are never given, and never offered beside
the one that is. A photograph that is neither positive nor negative, or neither calm nor aroused, has no emotion: it
gets a caption and a question about its sentiment, which is `neutral` in the first case.

Everything is a function of the norms and the rules: which split (by theme, so that no theme is in two), which wording
(by hash of the record's id), which labels are offered.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, model_validator

from orchestration.assets.catalogue import get_asset, read_provenance
from orchestration.assets.sources import OASIS_COLUMNS, OASIS_IMAGES, OASIS_NORMS
from tinyemo.config import Section
from tinyemo.errors import DataError
from tinyemo.taxonomies import TAXONOMIES

if TYPE_CHECKING:
    from orchestration.data.ingest import IngestReport
    from orchestration.data.manifest import Advance

SOURCE = "oasis-template"
TAXONOMY = "mikels"
SCALE = (1.0, 7.0)

Quadrant = tuple[Literal["positive", "negative"], Literal["calm", "aroused"]]
QUADRANTS: dict[Quadrant, tuple[str, ...]] = {
    ("positive", "aroused"): ("excitement", "amusement", "awe"),
    ("positive", "calm"): ("contentment",),
    ("negative", "aroused"): ("fear", "anger", "disgust"),
    ("negative", "calm"): ("sadness",),
}
"""The words of each quadrant; the first one is given."""
SUBJECTS = {"Person": "a person", "Animal": "an animal", "Object": "an object", "Scenery": "a scene"}

CAPTION_QUESTIONS = (
    "Describe the image.",
    "What does this photograph show?",
    "Give this picture a short caption.",
    "What is the subject of this image?",
)
CAPTION_ANSWERS = (
    "A photograph with the theme {theme}.",
    "The photograph shows {subject}; its theme is {theme}.",
    "The picture is about {theme}; its subject is {subject}.",
    "This picture was filed under {theme}.",
)
EMOTION_QUESTIONS = (
    "Which emotion does this photograph evoke?",
    "What would most people feel when they look at this picture?",
    "What is the dominant emotion of this image?",
    "Name the feeling that this photograph brings about.",
)
EMOTION_ANSWERS = (
    "It evokes {emotion}.",
    "Most people would feel {emotion}.",
    "The dominant emotion is {emotion}.",
    "The feeling that fits best is {emotion}.",
)
SENTIMENT_QUESTIONS = (
    "What is the sentiment of this image?",
    "Is the sentiment of this photograph positive, negative or neutral?",
    "What kind of feelings does this picture leave: positive, negative or neutral ones?",
)
SENTIMENT_ANSWERS = (
    "The sentiment is {sentiment}.",
    "Its sentiment is {sentiment}: people found it {pleasantness}.",
    "On the whole {sentiment}.",
)
REASONING_REQUESTS = (
    "Explain which emotion this image evokes and why, then choose one of the labels.",
    "Reason about what in this photograph moves its viewers, and choose the label that fits best.",
    "Give the reasons for the emotion that this picture brings about, then name its label.",
)
REASONING_ANSWERS = (
    "The photograph shows {subject}, with the theme {theme}. People found it {pleasantness} and {intensity}, which is "
    "how {emotion} feels.",
    "The theme of this picture is {theme}. It is {intensity} to look at, and viewers judged it {pleasantness}; "
    "together that is {emotion}.",
    "Viewers of this picture, whose theme is {theme}, found it {pleasantness} and {intensity}. A picture that is both "
    "evokes {emotion}.",
)

T = TypeVar("T")


class OasisRules(Section):
    """Rules that turn ratings into emotions and themes into splits; part of the data set's manifest."""

    negative_below: float = Field(3.5, ge=SCALE[0], le=SCALE[1])
    """Mean valence below which a photograph is negative."""
    positive_above: float = Field(4.5, ge=SCALE[0], le=SCALE[1])
    """Mean valence above which it is positive. The scale's middle is 4, a mean of a hundred ratings is sure to 0.1."""
    calm_below: float = Field(3.6, ge=SCALE[0], le=SCALE[1])
    """Mean arousal below which it is calm. The ratings' median is 3.7: few photographs reach the scale's middle, 4."""
    aroused_above: float = Field(3.8, ge=SCALE[0], le=SCALE[1])
    """Mean arousal above which it is aroused."""
    num_offered: tuple[int, int] = (3, 5)
    """Fewest and most labels that a reasoning record offers."""
    state_label: Literal["always", "train", "never"] = "always"
    """Where a reasoning record states the right label before it asks: always as published, in train only, or never."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Chance of a theme to be in validation."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Chance of a theme to be in test."""
    seed: NonNegativeInt = 0
    """Of splits, wordings and offered labels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.negative_below > self.positive_above or self.calm_below > self.aroused_above:
            raise ValueError("negative_below and calm_below must not lie above positive_above and aroused_above")
        # The smallest quadrant to choose from leaves five words of other quadrants.
        if not 2 <= self.num_offered[0] <= self.num_offered[1] <= 6:
            raise ValueError(f"num_offered: {self.num_offered} must be two numbers from 2 to 6, the smaller one first")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing for train")
        return self


@dataclass(frozen=True)
class Photograph:
    """One row of norms.csv."""

    image: str
    """File name."""
    theme: str
    category: str
    """Person, Animal, Object or Scenery."""
    valence: float
    """Mean over raters, 1 to 7."""
    arousal: float
    """Mean over raters, 1 to 7."""


def read_photographs(folder: Path) -> list[Photograph]:
    """Return every photograph of the asset's folder, in the order of its table.

    Raises:
        DataError: the table is not that of OASIS.
    """
    path = folder / OASIS_NORMS
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [_photograph(row) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a table of {', '.join(OASIS_COLUMNS)} ({error!r}): get the asset again"
        ) from error


def _photograph(row: dict[str, str]) -> Photograph:
    found = Photograph(
        row["image"], row["theme"], row["category"], float(row["valence_mean"]), float(row["arousal_mean"])
    )
    if not all(SCALE[0] <= value <= SCALE[1] for value in (found.valence, found.arousal)):
        raise ValueError(f"{found.image} has a rating outside {SCALE}")
    if found.category not in SUBJECTS:
        raise ValueError(f"{found.image} has the category {found.category!r}")
    return found


def sentiment_of(photograph: Photograph, rules: OasisRules) -> Literal["positive", "negative", "neutral"]:
    """Return the sentiment that a photograph's valence stands for."""
    if photograph.valence < rules.negative_below:
        return "negative"
    return "positive" if photograph.valence > rules.positive_above else "neutral"


def quadrant_of(photograph: Photograph, rules: OasisRules) -> Quadrant | None:
    """Return a photograph's quadrant of valence and arousal; None in the middle of either."""
    sentiment = sentiment_of(photograph, rules)
    if sentiment == "neutral" or rules.calm_below <= photograph.arousal <= rules.aroused_above:
        return None
    return sentiment, "calm" if photograph.arousal < rules.calm_below else "aroused"


def split_of(theme: str, rules: OasisRules) -> str:
    """Return the split that all photographs of a theme are in."""
    place = _hash(rules.seed, "split", theme) / 2**64
    if place < rules.test_fraction:
        return "test"
    return "validation" if place < rules.test_fraction + rules.validation_fraction else "train"


def build_records(photographs: Iterable[Photograph], rules: OasisRules) -> Iterator[dict[str, Any]]:
    """Yield LLaVA records: for each photograph a caption, a question about sentiment or emotion and, where it has an
    emotion, one that reasons."""
    for photograph in photographs:
        quadrant = quadrant_of(photograph, rules)
        emotion = QUADRANTS[quadrant][0] if quadrant else None
        words = _words(photograph, rules, emotion)
        yield _caption(photograph, rules, emotion, words)
        yield _sentiment_question(photograph, rules, emotion, words)
        if quadrant is not None:
            yield _reasoning(photograph, rules, quadrant, words)


def _words(photograph: Photograph, rules: OasisRules, emotion: str | None) -> dict[str, str]:
    sentiment = sentiment_of(photograph, rules)
    strength = "very " if abs(photograph.valence - 4) > 2 else ""
    pleasantness = {"positive": "pleasant", "negative": "unpleasant", "neutral": "neither pleasant nor unpleasant"}
    return {
        "theme": f'"{photograph.theme.lower()}"',
        "subject": SUBJECTS[photograph.category],
        "sentiment": sentiment,
        "pleasantness": f"{'' if sentiment == 'neutral' else strength}{pleasantness[sentiment]}",
        "intensity": "calm" if photograph.arousal < rules.calm_below else "stirring",
        "emotion": emotion or "",
    }


def _caption(photograph: Photograph, rules: OasisRules, emotion: str | None, words: dict[str, str]) -> dict[str, Any]:
    sample_id = _sample_id(photograph, "caption")
    question = _choose(rules.seed, sample_id, "question", CAPTION_QUESTIONS)
    answer = _choose(rules.seed, sample_id, "answer", CAPTION_ANSWERS).format(**words)
    return _record(photograph, rules, sample_id, "caption", emotion, question, answer)


def _sentiment_question(
    photograph: Photograph, rules: OasisRules, emotion: str | None, words: dict[str, str]
) -> dict[str, Any]:
    """Return a question about the emotion or, for every second photograph and those without one, the sentiment."""
    sample_id = _sample_id(photograph, "sqa")
    is_about_emotion = emotion is not None and _hash(rules.seed, "kind", sample_id) % 2 == 0
    questions, answers = (
        (EMOTION_QUESTIONS, EMOTION_ANSWERS) if is_about_emotion else (SENTIMENT_QUESTIONS, SENTIMENT_ANSWERS)
    )
    question = _choose(rules.seed, sample_id, "question", questions)
    answer = _choose(rules.seed, sample_id, "answer", answers).format(**words)
    return _record(photograph, rules, sample_id, "sqa", emotion, question, answer)


def _reasoning(photograph: Photograph, rules: OasisRules, quadrant: Quadrant, words: dict[str, str]) -> dict[str, Any]:
    """Return a record in the published form (arXiv 2410.07062): labels offered, the right one stated, reasons."""
    sample_id = _sample_id(photograph, "reasoning")
    emotion = words["emotion"]
    offered = offered_labels(sample_id, quadrant, rules)
    lines = [
        _choose(rules.seed, sample_id, "question", REASONING_REQUESTS),
        f"Labels: [{', '.join(offered)}]",
    ]
    is_train = split_of(photograph.theme, rules) == "train"
    if rules.state_label == "always" or (rules.state_label == "train" and is_train):
        lines.append(f"The correct label is {emotion}.")
    reasons = _choose(rules.seed, sample_id, "answer", REASONING_ANSWERS).format(**words)
    answer = f"Reasoning: {reasons}\nPredicted Label: {emotion}"
    return _record(photograph, rules, sample_id, "reasoning", emotion, "\n".join(lines), answer)


def offered_labels(sample_id: str, quadrant: Quadrant, rules: OasisRules) -> list[str]:
    """Return the quadrant's word and some of other quadrants, in an order that gives nothing away."""
    fewest, most = rules.num_offered
    count = fewest + _hash(rules.seed, "count", sample_id) % (most - fewest + 1)
    others = [word for other, found in QUADRANTS.items() if other != quadrant for word in found]
    others.sort(key=lambda word: _hash(rules.seed, "other", sample_id, word))
    offered = [QUADRANTS[quadrant][0], *others[: count - 1]]
    return sorted(offered, key=lambda word: _hash(rules.seed, "order", sample_id, word))


def _record(
    photograph: Photograph,
    rules: OasisRules,
    sample_id: str,
    task: str,
    emotion: str | None,
    question: str,
    answer: str,
) -> dict[str, Any]:
    return {
        "id": sample_id,
        "image": photograph.image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
        "split": split_of(photograph.theme, rules),
        "task": task,
        "label": emotion,
        "source": SOURCE,
    }


def _sample_id(photograph: Photograph, task: str) -> str:
    return f"oasis/{Path(photograph.image).stem}/{task}"


def _hash(seed: int, *parts: str) -> int:
    text = "\0".join((str(seed), *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _choose(seed: int, sample_id: str, purpose: str, options: Sequence[T]) -> T:
    return options[_hash(seed, purpose, sample_id) % len(options)]


def describe_rules(rules: OasisRules) -> dict[str, Any]:
    """Return the manifest's facts about how the records were made, beside the rules of the ingest itself."""
    return {
        "answers": "templates",
        "emotion_rule": {
            "model": "circumplex: one word of Mikels for each quadrant of mean valence and mean arousal (1 to 7)",
            "quadrants": {f"{valence}_{arousal}": words[0] for (valence, arousal), words in QUADRANTS.items()},
            "never_given": sorted(word for words in QUADRANTS.values() for word in words[1:]),
            "no_emotion": "between negative_below and positive_above, or between calm_below and aroused_above",
            **rules.model_dump(mode="json"),
        },
        "splits": "by hash of the theme: no theme is in two",
    }


def ingest_oasis(
    *,
    name: str = "oasis",
    root: str,
    rules: OasisRules = OasisRules(),
    is_forced: bool = False,
    advance: Advance | None = None,
) -> IngestReport:
    """Store OASIS as instruct records under `<root>/<name>/<version>`; see `ingest_instruct`.

    Args:
        name: the data set's name in S3.
        root: `s3://bucket/folder`.
        rules: by which emotions, splits and wordings are chosen.
        is_forced: upload again even where the version is there.
        advance: told about progress, for instance to draw a bar.

    Raises:
        AssetError: no source of the photographs answers.
        TinyEmoError: see `ingest_instruct`.
    """
    from orchestration.data.ingest import ingest_instruct
    from orchestration.data.ingest_rules import IngestRules

    folder = get_asset("oasis")
    note = read_provenance(folder)
    source = {key: note[key] for key in ("asset", "source", "revision", "rows", "content_sha256")}
    with tempfile.TemporaryDirectory(prefix="tinyemo-oasis-") as scratch:
        path = Path(scratch) / "oasis.jsonl"
        records = build_records(read_photographs(folder), rules)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return ingest_instruct(
            path,
            folder / OASIS_IMAGES,
            name=name,
            root=root,
            rules=IngestRules(taxonomy=TAXONOMIES[TAXONOMY]),
            source=source,
            extra_rules=describe_rules(rules),
            is_forced=is_forced,
            advance=advance,
        )
