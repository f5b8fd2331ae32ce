"""The job behind `tinyemo bias MODEL`: inputs, parts, decisions over all tests, and files.

model, data, groups -> scores and a sample of features -> parts -> findings -> bias.json, review.toml -> MLflow
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.bias.bias_inputs import (
    BiasData,
    DataChoice,
    load_data,
    project,
    read_vocabulary,
    read_word_groups,
)
from orchestration.bias.bias_review import (
    DECISIONS,
    REVIEW,
    changes,
    decide_findings,
    merge_review,
    parse_review,
    review_text,
)
from orchestration.bias.image_covariates import CHANGES, changed, read_images
from orchestration.evaluate.evaluate_job import Advance, Model, open_model
from orchestration.evaluate.scoring import score_rows, text_vectors
from orchestration.services import storage, tracking
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.images import read_pixels
from tinyemo.measures.association import find_score_ties, find_word_associations
from tinyemo.measures.counterfactuals import find_flips
from tinyemo.measures.discoveries import Finding, decide
from tinyemo.measures.groups import MIN_IMAGES, compare_all_sets, find_gaps, group_table
from tinyemo.measures.scored import ScoredData
from tinyemo.measures.slices import find_slices
from tinyemo.measures.spurious import find_spurious, predicts_label
from tinyemo.measures.words import find_separating_words, nearest_words, words_of_labels

logger = logging.getLogger(__name__)

BIAS = "bias.json"
MAX_WORD_IMAGES = 5000
MAX_FLIPPED = 20_000
TEMPLATES = ("word", "emotion", "image", "scene", "spaced")


@dataclass(frozen=True)
class BiasOptions:
    """Options of a report.

    Attributes:
        name: of the report; its folder below the run.
        alpha: chance of any false blame in the report.
        word_groups: TOML file of word groups; None for gender.
        num_scenes: images whose scene is changed and encoded again; 0 for none.
        experiment: of MLflow.
    """

    name: str = "bias"
    alpha: float = 0.05
    word_groups: Path | None = None
    num_scenes: int = 0
    seed: int = 0
    experiment: str = "tinyemo"


def report_bias(
    location: str,
    choices: Sequence[DataChoice],
    options: BiasOptions,
    *,
    output: Path | None = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Look for bias in a projector, and store and return the document of docs/bias.md.

    Args:
        location: of the projector.
        choices: data sets.
        options: of the report.
        output: folder for the files; None stores those of a model in S3 below its run's folder, and no others.
        advance: progress callback.

    Raises:
        ConfigError, DataError: the input cannot be used.
        TinyEmoError: S3, Ray or MLflow fails.
    """
    model = open_model(location)
    place = place_of(model, options.name, output)
    loaded = [load_data(model, choice, seed=options.seed, advance=advance) for choice in choices]
    findings: list[Finding] = []
    sections: dict[str, Any] = {"words": {}, "groups": [], "slices": [], "spurious": [], "notes": []}
    for number, data in enumerate(loaded):
        found, section = _parts(model, data, options)
        findings += found
        for key, value in section.items():
            sections[key] = sections[key] | value if isinstance(value, dict) else sections[key] + value
        if advance is not None:
            advance("measure", number + 1, len(loaded))
    findings += compare_all_sets([data.scored for data in loaded])
    if not findings:
        raise DataError("nothing could be tested: give data with groups, more images, or a model with a real table")
    rows = [finding.document() for finding in decide(findings, alpha=options.alpha)]
    earlier = read_report(place) if place else None
    document = {
        "kind": "bias",
        "name": options.name,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": tracking.git_state()["git_commit"],
        "model": model.document(),
        "data": [_data_document(data) for data in loaded],
        "alpha": options.alpha,
        "num_tests": len(rows),
        "findings": rows,
        **sections,
        "association": [row for row in rows if row["part"] == "association"],
        "counterfactuals": [row for row in rows if row["part"] == "counterfactuals"],
        "changes": changes(rows, earlier["findings"]) if earlier else [],
    }
    review = merge_review(rows, read_review(place) if place else {})
    if place:
        put(place, BIAS, json.dumps(document, indent=1).encode())
        put(place, REVIEW, review_text(review).encode())
    if os.environ.get("MLFLOW_TRACKING_URI"):
        store_decisions(location, review)
    if model.run_folder and os.environ.get("MLFLOW_TRACKING_URI"):
        document["mlflow_run"] = _log(model, document, review, options, place)
    return document | {"review": review, "place": place}


def _parts(model: Model, data: BiasData, options: BiasOptions) -> tuple[list[Finding], dict[str, Any]]:
    """Return the findings and the figures of one data set."""
    scored, sample = data.scored, data.sample
    sampled = scored.take(sample)
    embeds = project(model.projector, data.features[:MAX_FLIPPED])
    findings: list[Finding] = []
    for column in scored.groups:
        findings += find_gaps(scored, column)
        findings += find_score_ties(scored, column)
    findings += find_spurious(scored)
    section: dict[str, Any] = {
        "groups": [_group_rows(scored, column) for column in scored.groups],
        "spurious": [{"data": scored.name, "balanced_accuracy": predicts_label(scored)}] if scored.covariates else [],
        "notes": list(data.notes),
    }
    found, words, notes = _language(model, sampled, embeds, options)
    findings += found
    section["words"], section["notes"] = {scored.name: words}, section["notes"] + notes
    slices = find_slices(_with_embeds(sampled, data.features), seed=options.seed)
    findings += [each.finding for each in slices]
    ids = data.ids.take(sample)
    section["slices"] = [
        {"id": each.finding.id, "num_images": len(each.rows), "examples": ids.take(each.rows[:10]).to_pylist()}
        for each in slices
    ]
    findings += _exchanges(model, data, sampled.take(np.arange(len(embeds))))
    if options.num_scenes:
        try:
            findings += _scenes(model, data, options)
        except (AssetError, ConfigError) as error:
            section["notes"].append(f"no scene is changed: {error}")
    return findings, section


def _with_embeds(data: ScoredData, features: NDArray[Any]) -> ScoredData:
    from dataclasses import replace

    return replace(data, embeds=features)


def _language(
    model: Model, sampled: ScoredData, embeds: NDArray[np.float32], options: BiasOptions
) -> tuple[list[Finding], dict[str, Any], list[str]]:
    """Return what the language model's table says: word associations, nearest words and separating words."""
    from orchestration.assets.labels import table_of

    labels = model.projector.labels
    assert labels is not None
    if labels.llm_weights == "random":
        return [], {}, ["words and word associations are left out: the label embeddings are random"]
    try:
        table = table_of(model.projector)
        vocabulary = read_vocabulary(table)
        pairs = read_word_groups(options.word_groups, table, labels.template)
    except AssetError as error:
        return [], {}, [f"words and word associations are left out: {error}"]
    label = sampled.label[: len(embeds)]
    means = np.full((len(sampled.labels), embeds.shape[1]), np.nan)
    for place in range(len(sampled.labels)):
        if (label == place).any():
            means[place] = embeds[label == place].mean(0)
    vectors = text_vectors(model.projector, sampled.labels).numpy()
    findings = [
        finding
        for pair in pairs
        for finding in find_word_associations(sampled.name, sampled.labels, vectors, means, pair)
    ]
    if vocabulary is None:
        return findings, {}, []
    few = sampled.take(np.arange(min(len(embeds), MAX_WORD_IMAGES)))
    near = nearest_words(embeds[: len(few)], vocabulary)
    for column, values in few.groups.items():
        sizes = np.bincount(values.codes[values.codes >= 0], minlength=2)
        if (sizes >= MIN_IMAGES).any() and sizes.sum() - sizes.min() >= MIN_IMAGES:
            findings += find_separating_words(few, column, near, vocabulary, alpha=options.alpha, seed=options.seed)
    return findings, words_of_labels(near, few.label, few.labels, vocabulary), []


def _exchanges(model: Model, data: BiasData, sampled: ScoredData) -> list[Finding]:
    """Return how often the label flips with another template, or with a synonym in place of one label word."""
    labels, words = model.projector.labels, data.entry.words
    assert labels is not None
    variants: dict[str, Any] = {}
    try:
        for template in TEMPLATES:
            if template != labels.template:
                variants[f"template {template}"] = text_vectors(model.projector, words, (template,))
        synonyms = data.entry.synonyms.synonyms if data.entry.synonyms else {}
        for place, word in enumerate(words):
            if other := next((text for text in synonyms.get(word, ()) if text not in words), None):
                exchanged = [*words[:place], other, *words[place + 1 :]]
                variants[f"{other} for {word}"] = text_vectors(model.projector, exchanged)
    except (AssetError, DataError) as error:
        logger.warning("some words are not exchanged: %s", error)
    if not variants:
        return []
    scores = score_rows(model.projector, data.features[: len(sampled)], *variants.values())
    return [
        finding
        for change, found in zip(variants, scores, strict=True)
        for finding in find_flips(sampled, change, found.argmax(1))
    ]


def _scenes(model: Model, data: BiasData, options: BiasOptions) -> list[Finding]:
    """Return how often the label flips when an image is made darker, smaller and so on, and encoded again."""
    import torch

    from orchestration.assets.model_files import open_choice
    from orchestration.use.predict import choose_own_encoder

    if data.images is None:
        raise ConfigError(f"the images of {data.scored.name} are not known")
    choice, spec = choose_own_encoder(model.projector)
    encoder = open_choice(choice, spec, "cuda" if torch.cuda.is_available() else "cpu", None)
    rows = np.random.default_rng(options.seed).permutation(len(data.scored))[: options.num_scenes]
    splits = sorted({part.split for part in data.entry.rows.parts})
    ids = data.ids.take(rows).to_pylist()
    files = read_images(data.images, splits, set(ids))
    rows = rows[[name in files for name in ids]]
    pictures = [files[name] for name in ids if name in files]
    texts = text_vectors(model.projector, data.entry.words)

    def labels_after(change: str | None) -> NDArray[np.int64]:
        pixels = [
            torch.from_numpy(read_pixels(changed(one, change) if change else one, spec.preprocessing).copy())
            for one in pictures
        ]
        features = encoder.encode(torch.stack(pixels)).pooled.float().numpy()
        [scores] = score_rows(model.projector, features, texts)
        return np.asarray(scores.argmax(1), np.int64)

    part = data.scored.take(rows)
    return [finding for change in CHANGES for finding in find_flips(part, change, labels_after(change))]


def _group_rows(data: ScoredData, column: str) -> dict[str, Any]:
    table = group_table(data, column)
    rows = [
        {
            "group": name,
            "count": int(table.count[place]),
            "accuracy": _number(table.accuracy[place]),
            "calibration": _number(table.calibration[place]),
            "recall": {word: _number(value) for word, value in zip(data.labels, table.recall[place], strict=True)},
            "precision": {
                word: _number(value) for word, value in zip(data.labels, table.precision[place], strict=True)
            },
        }
        for place, name in enumerate(table.names)
    ]
    return {"data": data.name, "column": column, "rows": rows}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _data_document(data: BiasData) -> dict[str, Any]:
    return {
        "name": data.scored.name,
        "uri": data.entry.rows.uri,
        "digest": data.entry.rows.digest,
        "num_images": len(data.scored),
        "num_sampled": len(data.sample),
        "labels": list(data.scored.labels),
        "groups": {name: list(column.names) for name, column in data.scored.groups.items()},
        "covariates": list(data.scored.covariates),
        "accuracy": float(data.scored.is_right.mean()),
    }


def place_of(model: Model, name: str, output: Path | None) -> str | None:
    """Return the folder of a report's files; None where it is only printed."""
    return str(output) if output is not None else model.run_folder and f"{model.run_folder}/bias/{name}"


def put(place: str, name: str, data: bytes) -> None:
    """Write a file into a folder of this machine or S3."""
    if place.startswith("s3://"):
        storage.write_bytes(f"{place}/{name}", data)
        return
    Path(place).mkdir(parents=True, exist_ok=True)
    (Path(place) / name).write_bytes(data)


def _get(place: str, name: str) -> str | None:
    try:
        return (
            storage.read_bytes(f"{place}/{name}") if place.startswith("s3://") else (Path(place) / name).read_bytes()
        ).decode()
    except (storage.MissingObjectError, FileNotFoundError):
        return None


def read_report(place: str) -> dict[str, Any] | None:
    """Return the report that lies in a folder, or None."""
    text = _get(place, BIAS)
    found: dict[str, Any] | None = None if text is None else json.loads(text)
    return found


def read_review(place: str) -> dict[str, dict[str, Any]]:
    """Return the decisions that lie in a folder, by finding; none where there are none."""
    text = _get(place, REVIEW)
    return {} if text is None else parse_review(text, f"{place}/{REVIEW}")


def decide_on_report(
    location: str, name: str, output: Path | None, decisions: Sequence[str], note: str
) -> dict[str, Any]:
    """Store decisions on the findings of a report, and return the report with its review.

    Raises:
        DataError: there is no report.
        ConfigError: a decision names no finding.
    """
    place = place_of(open_model(location), name, output)
    document = read_report(place) if place else None
    if place is None or document is None:
        raise DataError(f"there is no bias report {name!r} of {location}: make one with tinyemo bias MODEL --data ...")
    review = list(read_review(place).values())
    if decisions:
        review = decide_findings(review, decisions, note)
        put(place, REVIEW, review_text(review).encode())
    store_decisions(location, review)
    return document | {"review": review, "place": place}


def store_decisions(location: str, review: Sequence[dict[str, Any]]) -> None:
    """Tag the version of a registered model with the decisions on it; other models have no version."""
    if not location.startswith("models:/"):
        return
    counts = {name: sum(row["decision"] == name for row in review) for name in DECISIONS}
    confirmed = {row["id"]: row["effect"] for row in review if row["decision"] == "confirmed"}
    tags = {"bias_review": json.dumps(counts), "bias_confirmed": json.dumps(confirmed)}
    name, _, version = location.removeprefix("models:/").partition("/")
    name, at, alias = name.partition("@")
    found = tracking.model_version(name, f"@{alias}" if at else version)
    if found is not None:
        tracking.tag_version(found, tags)


def _log(
    model: Model, document: dict[str, Any], review: Sequence[dict[str, Any]], options: BiasOptions, place: str | None
) -> str:
    """Write the report into an MLflow run, a child of the model's own; return the address of its page."""
    open_ones = sum(row["decision"] == "open" for row in review)
    tags = {
        "bias": options.name,
        "bias_findings": str(len(review)),
        "bias_open": str(open_ones),
        "model": model.location,
    }
    parent = str(model.card.get("mlflow_run_id") or "") or None
    params = {"alpha": options.alpha, "data": [data["uri"] for data in document["data"]], "seed": options.seed}
    with (
        tracking.open_run(
            options.experiment, f"{model.name}-{options.name}", params=params, tags=tags, parent_run_id=parent
        ) as run,
        tempfile.TemporaryDirectory() as folder,
    ):
        (Path(folder) / BIAS).write_text(json.dumps(document, indent=1))
        (Path(folder) / REVIEW).write_text(review_text(review))
        run.log_artifact(Path(folder) / BIAS)
        run.log_artifact(Path(folder) / REVIEW)
        run.describe(f"Bias report of {model.name}.", {"model": model.location, "files": place or ""})
    return run.url


def family_curves(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each finding that is significant in any size of a family as a curve over the sizes."""
    names = {row["id"] for document in documents for row in document["findings"] if row["is_significant"]}
    return list(_curves(sorted(names), documents))


def _curves(names: Sequence[str], documents: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    by_size = [(doc["model"]["size"], {row["id"]: row for row in doc["findings"]}) for doc in documents]
    for name in names:
        points = [(size, rows[name]) for size, rows in by_size if name in rows]
        keys = ("effect", "low", "high", "q", "is_significant", "explained_by")
        yield {"id": name, "sizes": [{"size": size, **{key: row[key] for key in keys}} for size, row in points]}
