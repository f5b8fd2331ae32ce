"""The job behind `tinyemo evaluate RECIPE`: every data set and taxonomy in one pass, then measures, leakage and files.

    models, data -> label vectors -> one pass of scoring -> measures with intervals -> leakage
    -> evaluation.json and scores -> MLflow

Results of a model in S3 go below its run's folder, those of a local folder to an output folder.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.data.manifest import Manifest, load_manifest, parquet_bytes
from orchestration.evaluate.evaluation_recipe import EvaluatedData, EvaluationRecipe, TrainData
from orchestration.evaluate.group_file import clusters_of, join_groups, names_of_images, read_groups, source_images
from orchestration.evaluate.leakage import Leakage, find_leakage
from orchestration.evaluate.scoring import (
    FeatureRows,
    Scoring,
    open_rows,
    require_encoder,
    score_all,
    scores_table,
    text_vectors,
)
from orchestration.recipe import CheckpointConfig
from orchestration.services import storage, tracking
from orchestration.use.locations import digest_of_export, fetch_export, find_export
from tinyemo.config import PUBLISHED_TEMPERATURES
from tinyemo.errors import ConfigError, DataError
from tinyemo.measures.accuracy import Measures, Outcomes, measure, outcomes_of
from tinyemo.measures.comparison import compare_accuracy
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES, Taxonomy, canonical_word, find_taxonomy

logger = logging.getLogger(__name__)

Advance = Callable[[str, int, int], None]
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Model:
    """A projector with where it comes from.

    Attributes:
        location: S3 folder of the export, or a local folder.
        run_folder: S3 folder of its run; None where it has none.
    """

    projector: MetricProjector
    location: str
    run_folder: str | None

    @property
    def card(self) -> dict[str, Any]:
        """Card of the projector, which says where its weights come from."""
        return self.projector.card

    @property
    def name(self) -> str:
        """Name of its run, or of its folder."""
        return str(self.card.get("run") or Path(self.location).name)

    def document(self) -> dict[str, Any]:
        """Return `model` of evaluation.json."""
        labels = self.projector.labels
        assert labels is not None
        return {
            "location": self.location,
            "run": self.card.get("run"),
            "run_id": self.card.get("mlflow_run_id"),
            "size": self.card.get("llm", labels.llm),
            "is_random_weights": labels.llm_weights == "random" or self.card.get("encoder_weights") == "random",
            "is_generated_data": self.card.get("data") == "generated",
            "digest": digest_of_export(self.location),
        }


def open_model(location: str) -> Model:
    """Load a projector, and find the folder of its run.

    Raises:
        DataError: nothing is there.
        TinyEmoError: S3 or MLflow does not answer.
    """
    found = find_export(location, "projector")
    projector = MetricProjector.from_pretrained(fetch_export(found, "projector"))
    if ":/" in found and not found.startswith("s3://"):
        candidate = f"{CheckpointConfig().root}/{projector.card.get('run')}/projector"
        found = candidate if projector.card.get("run") and storage.list_prefix(candidate) else found
    is_run = found.startswith("s3://") and found.endswith("/projector")
    return Model(projector, found, found.rsplit("/", 1)[0] if is_run else None)


@dataclass(frozen=True)
class Entry:
    """One data set with the labels that are told apart on it by one model.

    Attributes:
        words: C labels.
        taxonomy: name of the taxonomy, or `own words`.
        places: stored label -> place among the words; labels that are not here have no image under the map.
        synonyms: taxonomy whose synonyms may stand for a label.
    """

    name: str
    config: EvaluatedData
    rows: FeatureRows
    words: tuple[str, ...]
    taxonomy: str
    places: dict[str, int]
    synonyms: Taxonomy | None


def evaluate(
    recipe: EvaluationRecipe, *, output: Path | None = None, advance: Advance | None = None
) -> list[dict[str, Any]]:
    """Evaluate every model of a recipe, and return and store a document for each, as docs/evaluation.md describes it.

    Args:
        recipe: of the evaluation; it names at least one model.
        output: local folder for the files; None stores those of a model in S3 below its run's folder, and no others.
        advance: progress callback.

    Raises:
        ConfigError: the recipe names no model, or fields do not go with a model or data.
        TinyEmoError: a model or data cannot be read, or S3, Ray or MLflow fails.
    """
    if not recipe.models:
        raise ConfigError("models: names none; give a projector in the recipe, or with --projector")
    models = [open_model(location) for location in recipe.models]
    baseline = open_model(recipe.baseline) if recipe.baseline else None
    everyone = [*models, *([baseline] if baseline else [])]
    sources = {name: source_rows(config, everyone, advance) for name, config in recipe.data.items()}
    entries = [
        [entry_of(name, config, sources[name], model) for name, config in recipe.data.items()] for model in everyone
    ]
    for model, own in zip(everyone, entries, strict=True):
        for entry in own:
            require_encoder(model.projector, entry.rows)
    wanted = [
        Scoring(f"{place}/{entry.name}", entry.rows, model.projector, _texts(recipe, model, entry))
        for place, (model, own) in enumerate(zip(everyone, entries, strict=True))
        for entry in own
    ]
    scored = score_all(wanted, advance)
    found: list[list[_Scored]] = [
        [outcomes_on(recipe, model, entry, *scored[f"{place}/{entry.name}"]) for entry in own]
        for place, (model, own) in enumerate(zip(everyone, entries, strict=True))
    ]
    documents = []
    for place, model in enumerate(models):
        folder = output / model.name if output is not None and len(models) > 1 else output
        against = (baseline, found[-1]) if baseline is not None else None
        documents.append(_conclude(recipe, model, found[place], against, folder, advance))
    return documents


def source_rows(config: EvaluatedData, models: Sequence[Model], advance: Advance | None) -> FeatureRows:
    """Return the feature rows of an entry; images are encoded first, by the encoder of the first model."""
    location = config.dataset
    if location.startswith("s3://"):
        manifest = load_manifest(location)
        if manifest.kind != "features":
            location = _encode(manifest, models[0], advance)
    return open_rows(location, (config.split,))


def _encode(images: Manifest, model: Model, advance: Advance | None) -> str:
    from orchestration.data.features import make_features
    from orchestration.use.predict import choose_own_encoder

    choice, spec = choose_own_encoder(model.projector)
    name = f"{images.name}-{spec.info.name.rsplit('/', 1)[-1]}"
    root = images.uri.rsplit("/", 2)[0]
    return make_features(images.uri, choice, name=name, root=root, has_patches=False, advance=advance).manifest.uri


def entry_of(name: str, config: EvaluatedData, rows: FeatureRows, model: Model) -> Entry:
    """Return which stored label stands for which word.

    Raises:
        ConfigError: no label of the data set has an image among the words.
    """
    own = rows.manifest.taxonomy if rows.manifest else _own_taxonomy(model)
    target = config.taxonomy or (find_taxonomy(config.words) if config.words else own)
    words = target.words
    if config.only_left_out:
        left_out = [word for word in str(model.card.get("leave_out", "")).split(",") if word in words]
        if len(left_out) < 2:
            raise ConfigError(
                f"data.{name}.only_left_out: the card of {model.name} names {len(left_out)} labels that were left out "
                "of training and are among the words; at least 2"
            )
        words = tuple(left_out)
    place = {word: number for number, word in enumerate(words)}
    images = own.maps.get(target.name) if config.taxonomy and target.name != own.name else None
    images = {word: word for word in own.words} if images is None else images
    places = {word: place[image] for word, image in images.items() if image in place}
    if not places:
        raise ConfigError(f"data.{name}: no label of {own.name} stands for one of {', '.join(words)}")
    return Entry(name, config, rows, words, target.name, places, target if target.synonyms else TAXONOMIES["parrott"])


def _own_taxonomy(model: Model) -> Taxonomy:
    """Return the taxonomy that a model was trained on, for a file of features that names none."""
    name, labels = model.card.get("taxonomy"), model.card.get("labels")
    if isinstance(name, str) and name in TAXONOMIES:
        return TAXONOMIES[name]
    if isinstance(labels, str):
        return find_taxonomy(labels.split(","))
    raise ConfigError("the model's card names no taxonomy: name the data set's labels in `words`")


def _texts(recipe: EvaluationRecipe, model: Model, entry: Entry) -> Any:
    synonyms = entry.synonyms if recipe.has_synonyms else None
    return text_vectors(model.projector, entry.words, recipe.templates, synonyms)


@dataclass(frozen=True)
class _Scored:
    """One model's scores on one entry, without the rows whose label has no image."""

    entry: Entry
    ids: pa.ChunkedArray
    scores: NDArray[np.float32]
    outcomes: Outcomes
    num_left_out: int


def outcomes_on(
    recipe: EvaluationRecipe, model: Model, entry: Entry, table: pa.Table, scores: NDArray[np.float32]
) -> _Scored:
    encoded = table["label"].combine_chunks().dictionary_encode()
    lookup = np.array([entry.places.get(canonical_word(word or ""), -1) for word in encoded.dictionary.to_pylist()])
    targets = lookup[np.asarray(encoded.indices.fill_null(0))] if len(lookup) else np.full(table.num_rows, -1)
    kept = targets >= 0
    if not kept.any():
        raise DataError(f"data.{entry.name}: none of {table.num_rows} rows has one of {', '.join(entry.words)}")
    if not kept.all():
        table, scores, targets = table.filter(pa.array(kept)), scores[kept], targets[kept]
    temperature = recipe.temperature or PUBLISHED_TEMPERATURES.get(str(model.card.get("loss")), 0.07)
    outcomes = outcomes_of(scores, targets, temperature)
    return _Scored(entry, table["id"], scores, outcomes, int((~kept).sum()))


def _conclude(
    recipe: EvaluationRecipe,
    model: Model,
    found: Sequence[_Scored],
    against: tuple[Model, Sequence[_Scored]] | None,
    output: Path | None,
    advance: Advance | None,
) -> dict[str, Any]:
    """Measure, compare, look for leakage; store the files of one model and return its document."""
    place = str(output) if output else model.run_folder and f"{model.run_folder}/evaluations/{recipe.name}"
    train = _train_rows(recipe, model)
    document: dict[str, Any] = {
        "kind": "evaluation",
        "name": recipe.name,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": tracking.git_state()["git_commit"],
        "model": model.document(),
        "recipe": recipe.model_dump(mode="json"),
        "data": [],
        "comparisons": [],
        "published": [figure.model_dump(mode="json") for figure in recipe.published],
    }
    # Two entries over the same rows share their leakage.
    leaks: dict[str, Leakage] = {}
    for number, scored in enumerate(found):
        groups, clusters = _groups(scored)
        rows = scored.entry.rows
        key = f"{rows.uri} {scored.entry.config.split}"
        if key not in leaks:
            leaks[key] = find_leakage(rows, train, recipe.leakage)
        measures = measure(
            scored.outcomes, scored.entry.words, clusters, top_ks=recipe.top_ks, num_resamples=recipe.num_resamples,
            level=recipe.level, seed=recipe.seed,
        )  # fmt: skip
        table = scores_table(scored.ids, scored.outcomes.targets, scored.entry.words, scored.scores, groups)
        uri = _put(place, f"{scored.entry.name}.parquet", parquet_bytes(table)) if place else None
        document["data"].append(_data_document(model, scored, measures, leaks[key], uri))
        if against is not None:
            document["comparisons"].append(_comparison(recipe, scored, against, number, clusters))
        if advance is not None:
            advance("measure", number + 1, len(found))
    if place:
        _put(place, EVALUATION, json.dumps(document, indent=1).encode())
    if model.run_folder and os.environ.get("MLFLOW_TRACKING_URI"):
        document["mlflow_run"] = _log(recipe, model, document, place)
    return document


def _groups(scored: _Scored) -> tuple[pa.Table | None, NDArray[Any] | None]:
    config, rows = scored.entry.config, scored.entry.rows
    if config.groups is None:
        return None, None
    images = source_images(rows.manifest)
    groups = join_groups(scored.ids, names_of_images(images) if images else {}, read_groups(config.groups))
    return groups, clusters_of(groups, config.cluster_by, config.groups) if config.cluster_by else None


def _train_rows(recipe: EvaluationRecipe, model: Model) -> list[FeatureRows]:
    """Return the rows that a model was trained on; none where nothing is known of them."""
    named = recipe.train
    if not named:
        uri = str(model.card.get("data_uri") or "")
        if not uri.startswith("s3://") or not os.environ.get("AWS_ENDPOINT_URL"):
            return []
        named = (TrainData(dataset=uri),)
    found = []
    for data in named:
        splits = list(data.splits)
        if data.dataset.startswith("s3://"):
            try:
                manifest = load_manifest(data.dataset, "features")
            except DataError as error:
                if recipe.train:
                    raise
                logger.warning("leakage is not checked: %s", error)
                return []
            splits = [split for split in splits if split in manifest.splits]
        found.append(open_rows(data.dataset, splits))
    return found


def _data_document(
    model: Model, scored: _Scored, measures: Measures, leakage: Leakage, uri: str | None
) -> dict[str, Any]:
    entry, rows = scored.entry, scored.entry.rows
    trained = {word for word in str(model.card.get("labels", "")).split(",") if word}
    trained -= set(str(model.card.get("leave_out", "")).split(","))
    unseen = [word for word in entry.words if word not in trained]
    return {
        "name": entry.name,
        "uri": rows.uri,
        "digest": rows.digest,
        "split": entry.config.split if rows.manifest else None,
        "taxonomy": entry.taxonomy,
        "labels": list(entry.words),
        "unseen_labels": unseen,
        "is_zero_shot": bool(unseen) or rows.digest != model.card.get("data_digest"),
        "num_images": measures.num_images,
        "num_left_out": scored.num_left_out,
        "cluster_by": entry.config.cluster_by,
        "num_clusters": measures.num_clusters,
        "metrics": {name: asdict(value) for name, value in measures.metrics.items()},
        "per_class": [asdict(row) for row in measures.per_class],
        "confusion": measures.confusion,
        "reliability": [asdict(row) for row in measures.reliability],
        "leakage": leakage.document(),
        "scores": uri,
    }


def _comparison(
    recipe: EvaluationRecipe,
    scored: _Scored,
    against: tuple[Model, Sequence[_Scored]],
    number: int,
    clusters: NDArray[Any] | None,
) -> dict[str, Any]:
    """Compare a model with the baseline on the rows that both were scored on."""
    baseline, others = against
    other = others[number]
    if not scored.ids.equals(other.ids):
        raise DataError(f"data.{scored.entry.name}: the model and the baseline tell apart other labels on other rows")
    found = compare_accuracy(
        scored.outcomes.is_right, other.outcomes.is_right, clusters, num_resamples=recipe.num_resamples,
        level=recipe.level, seed=recipe.seed,
    )  # fmt: skip
    return {"baseline": baseline.location, "data": scored.entry.name, **asdict(found)}


def _put(place: str, name: str, data: bytes) -> str:
    if place.startswith("s3://"):
        storage.write_bytes(f"{place}/{name}", data)
    else:
        Path(place).mkdir(parents=True, exist_ok=True)
        (Path(place) / name).write_bytes(data)
    return f"{place}/{name}"


def leakage_mark(leakage: dict[str, Any]) -> str:
    """Return the words that stand beside every figure of a data set; empty where it was checked and is clean."""
    if not leakage["is_checked"]:
        return "leakage not checked"
    return f"LEAKAGE: {sum(leakage['counts'].values())} images seen in training" if leakage["has_leakage"] else ""


def caution(document: dict[str, Any]) -> str:
    """Return what is not real about a model, for titles and tables; empty otherwise."""
    model = document["model"]
    found = [("random weights", model["is_random_weights"]), ("generated data", model["is_generated_data"])]
    return ", ".join(text for text, is_so in found if is_so)


def draw(document: dict[str, Any], folder: Path) -> None:
    """Write the confusion matrix and the reliability plot of every data set as PNG files."""
    from orchestration.plots import plot_confusion, plot_reliability

    for data in document["data"]:
        notes = [text for text in (caution(document), leakage_mark(data["leakage"])) if text]
        title = f"{document['model']['run'] or document['name']} on {data['name']}, {data['num_images']} images"
        title += f" ({'; '.join(notes)})" if notes else ""
        plot_confusion(data["confusion"], data["labels"], folder / f"{data['name']}-confusion.png", title)
        error = data["metrics"]["expected_calibration_error"]["value"]
        plot_reliability(data["reliability"], error, folder / f"{data['name']}-reliability.png", title)


def _log(recipe: EvaluationRecipe, model: Model, document: dict[str, Any], place: str | None) -> str:
    """Write the evaluation into an MLflow run, a child of the model's own; return the address of its page."""
    marks = {data["name"]: leakage_mark(data["leakage"]) for data in document["data"]}
    tags = {
        "evaluation": recipe.name,
        "evaluated_model": model.location,
        "leakage": "; ".join(f"{name}: {mark}" for name, mark in marks.items() if mark) or "none",
        **({"caution": caution(document)} if caution(document) else {}),
    }
    parent = str(model.card.get("mlflow_run_id") or "") or None
    with (
        tracking.open_run(
            recipe.experiment, f"{model.name}-{recipe.name}", params=document["recipe"], tags=tags, parent_run_id=parent
        ) as run,
        tempfile.TemporaryDirectory() as name,
    ):
        for data in document["data"]:
            dataset = (f"{Path(data['uri']).parent.name}-{data['split']}", data["digest"])
            run.log_dataset(*dataset, data["uri"], data["num_images"], "test")
            run.log_metrics_of(_metrics(data), dataset)
        (Path(name) / EVALUATION).write_text(json.dumps(document, indent=1))
        draw(document, Path(name) / "plots")
        run.log_artifact(Path(name) / EVALUATION)
        run.log_artifact(Path(name) / "plots", "plots")
        run.describe(f"Evaluation {recipe.name} of {model.name}.", {"model": model.location, "files": place or ""})
    return run.url


def _metrics(data: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for name, interval in data["metrics"].items():
        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            if interval[part] is not None:
                metrics[f"{data['name']}/{name}{suffix}"] = interval[part]
    return metrics
