"""The subject of a report: a model or a family, and everything that S3 and MLflow store about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.report.documents import ModelDocuments, read_documents
from orchestration.report.promotion import CHAMPION, RUNS, find_version
from orchestration.search.trials import TrialRecord, objectives, read_records
from orchestration.services import storage, tracking
from orchestration.use.locations import digest_of_export, find_export
from tinyemo.errors import DataError
from tinyemo.families import FAMILY
from tinyemo.measures.intervals import wilson_interval

BYTES_PER_WEIGHT = 2
"""bf16, the type that models are used in."""


@dataclass(frozen=True)
class SizeFacts:
    """One size of a family.

    Attributes:
        note: what is not real about it; empty otherwise.
        accuracy: value, low and high of top-1 on `data`; the run's own test with a binomial interval where there is no
            evaluation; None for a reasoning model.
        weights_gib: language model and encoder in bf16, computed from their number of parameters.
        peak_gib: most memory of a rank in training; None where it was not measured.
        worker_hours: wall clock from start to end of the training run, times its workers.
    """

    name: str
    run: str
    note: str
    data: str
    accuracy: tuple[float, float, float] | None
    weights_gib: float | None
    peak_gib: float | None
    worker_hours: float | None
    rate: str
    is_champion: bool


@dataclass(frozen=True)
class Subject:
    """A model and what is known about it.

    Attributes:
        location: of its files; empty for a family of reasoning models.
        result, claim, card: result.json, run.json and the card of the export; empty where there is none.
        run: its MLflow run; None for a local folder.
        versions: registered versions made from the run, the newest first.
        family: name of the family that it is the best or a part of, empty if none; with `sizes`.
        search: name of the search that it won, empty if none; with `trials` by the metric `search_metric`.
    """

    name: str
    location: str
    digest: str
    folder: str
    result: dict[str, Any]
    claim: dict[str, Any]
    card: dict[str, Any]
    documents: ModelDocuments
    run: tracking.RunInfo | None = None
    versions: list[tracking.ModelVersion] = field(default_factory=list)
    family: str = ""
    sizes: list[SizeFacts] = field(default_factory=list)
    search: str = ""
    search_metric: str = ""
    trials: list[TrialRecord] = field(default_factory=list)

    @property
    def marks(self) -> list[str]:
        """Cautions to print beside every figure: random weights, generated data or answers; empty if all is real."""
        models = [document["model"] for document in self.documents.evaluations[:1]]
        found = marks_of(self.card, self.result, *models)
        if any(model.get("is_random_weights") for model in models) and not any("random" in mark for mark in found):
            found.append("random weights")
        return found


def marks_of(*sources: dict[str, Any]) -> list[str]:
    """Return what is not real about a model, by its card and its result."""
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= {key: value for key, value in source.items() if isinstance(value, str | bool)}
    found = []
    if merged.get("llm_weights") == "random":
        found.append("random LLM weights")
    if "random" in (merged.get("encoder_weights"), merged.get("vision_weights")):
        found.append("random vision encoder")
    is_generated = merged.get("generated") is True or merged.get("is_generated_data") is True
    if is_generated or "generated" in (merged.get("data"), merged.get("answers")):
        found.append("generated data")
    if "templates" in str(merged.get("answers", "")):
        found.append("answers from templates")
    return found


def find_subject(location: str, runs: str = RUNS) -> Subject:
    """Return what a location means: a registered version, an S3 or local folder, or a finished run, family or search.

    Raises:
        DataError: nothing is there, or the run is not finished.
        TinyEmoError: S3 or MLflow does not answer.
    """
    if Path(location).is_dir():
        return _of_export(str(Path(location).absolute()))
    from cluster.environment import load_platform_environment

    load_platform_environment()
    if location.startswith("models:/"):
        source = find_version(location, runs).source
        return _of_run(source.rpartition("/")[0])
    if location.startswith("s3://"):
        folder = location.rstrip("/").rpartition("/")[0]
        has_run = storage.exists(f"{folder}/result.json")
        return _of_run(folder) if has_run else _of_export(location.rstrip("/"))
    if ":/" in location:
        raise DataError(f"{location}: give a run, a family, models:/NAME@ALIAS, s3://... or a folder")
    folder = f"{runs.rstrip('/')}/{location}"
    if storage.exists(f"{folder}/family.json"):
        best = storage.read_json(f"{folder}/family.json").get("champion")
        return _of_run(f"{runs}/{best}") if best else _of_reasoner_family(folder)
    if not storage.exists(f"{folder}/result.json"):
        raise DataError(f"{location} is no finished run or family in {runs}, and no folder: see `tinyemo runs list`")
    winners = storage.read_json(f"{folder}/result.json").get("winners")
    if winners:  # a search
        best = max(winners, key=lambda winner: winner["val_top1_accuracy"] or 0.0)["name"]
        folder = f"{runs}/{best}"
    return _of_run(folder)


def _of_export(location: str) -> Subject:
    found = find_export(location, "projector")
    name = found.rstrip("/").rpartition("/")[2]
    return Subject(name, found, digest_of_export(found), found, {}, {}, _card(found), read_documents(found))


def _of_run(folder: str) -> Subject:
    result = _json(f"{folder}/result.json")
    claim = _json(f"{folder}/run.json")
    run_id = result.get("run_id") or claim.get("mlflow_run_id")
    if not result or not run_id:
        raise DataError(f"{folder} holds no finished run of a model: see `tinyemo runs list`")
    run = tracking.run_info(run_id)
    location = result["model"]
    subject = Subject(
        name=result["name"],
        location=location,
        digest=digest_of_export(location),
        folder=folder,
        result=result,
        claim=claim,
        card=_card(location),
        documents=read_documents(folder),
        run=run,
        versions=tracking.versions_of_run(run_id),
    )
    return Subject(**subject.__dict__ | _of_parent(run))


def _of_reasoner_family(folder: str) -> Subject:
    """Return a family of reasoning models, which has no best size: its sizes side by side."""
    claim = _json(f"{folder}/run.json")
    run = tracking.run_info(claim["mlflow_run_id"])
    return Subject(
        name=run.name, location="", digest="", folder=folder, result={}, claim=claim, card={},
        documents=read_documents(folder), run=run, family=run.name, sizes=_sizes(folder, run),
    )  # fmt: skip


def _of_parent(run: tracking.RunInfo) -> dict[str, Any]:
    """Return the fields of a Subject that its parent run in MLflow fills: family or search."""
    parent_id = run.tags.get("mlflow.parentRunId")
    if not parent_id:
        return {}
    parent = tracking.run_info(parent_id)
    kind, folder = parent.tags.get("kind", ""), parent.tags.get("folder", "")
    if kind.endswith("family") and folder:
        return {"family": parent.name, "sizes": _sizes(folder, parent)}
    if kind == "search" and folder:
        from orchestration.recipe import Recipe

        recipe = Recipe.model_validate(_json(f"{folder}/run.json")["recipe"])
        metric = objectives(recipe.search)[0]
        return {"search": parent.name, "search_metric": metric, "trials": read_records(folder)}
    return {}


def _sizes(folder: str, parent: tracking.RunInfo) -> list[SizeFacts]:
    champion = _json(f"{folder}/family.json").get("champion")
    children = tracking.find_runs(parent_run_id=parent.run_id)
    order = {size: place for place, size in enumerate(FAMILY)}
    found = []
    for child in children:
        result = _json(f"{child.tags.get('folder', '')}/result.json") if child.tags.get("folder") else {}
        if result:
            found.append(_size(child, result, parent, is_champion=child.name == champion))
    return sorted(found, key=lambda size: (order.get(size.name, len(order)), size.name))


def _size(run: tracking.RunInfo, result: dict[str, Any], parent: tracking.RunInfo, *, is_champion: bool) -> SizeFacts:
    name = str(result["llm"])
    for size in FAMILY:  # a reasoning model's `llm` is a place; its run is named after the size
        name = size if run.name.endswith(f"-{size}") else name
    accuracy: tuple[float, float, float] | None = None
    data = ""
    if "test_top1_accuracy" in result:
        value, number = float(result["test_top1_accuracy"]), int(result["num_test"])
        low, high = wilson_interval(value * number, number)
        accuracy, data = (value, float(low), float(high)), f"its test split, {number} images"
    measured = read_documents(run.tags["folder"]).of_digest(digest_of_export(result["model"])).measured()
    seen = [entry for entry in measured if not entry.get("is_zero_shot")] or measured
    if seen:
        top1 = seen[0]["metrics"]["top1_accuracy"]
        accuracy, data = (top1["value"], top1["low"], top1["high"]), seen[0]["name"]
    peaks = [value for key, value in parent.metrics.items()
             if key.startswith(f"{name}/") and key.endswith("/peak_memory_bytes")]  # fmt: skip
    hours = (run.ended_at - run.started_at) / 3600 if run.ended_at else None
    workers = int(run.params.get("workers.num_workers", "1"))
    rate = f"{result['samples_per_s']:,.0f} samples/s" if "samples_per_s" in result else ""
    parameters = FAMILY[name].total_parameters if name in FAMILY else None
    return SizeFacts(
        name=name,
        run=run.name,
        note=", ".join(marks_of(result)),
        data=data,
        accuracy=accuracy,
        weights_gib=parameters * BYTES_PER_WEIGHT / 2**30 if parameters else None,
        peak_gib=max(peaks) / 2**30 if peaks else None,
        worker_hours=hours * workers if hours is not None else None,
        rate=rate,
        is_champion=is_champion,
    )


def _card(location: str) -> dict[str, Any]:
    """Return the card of an exported projector, empty for other exports."""
    if location.startswith("s3://"):
        return dict(_json(f"{location}/config.json").get("card") or {})
    path = Path(location) / "config.json"
    return dict(json.loads(path.read_text()).get("card") or {}) if path.is_file() else {}


def _json(uri: str) -> dict[str, Any]:
    try:
        found = storage.read_json(uri)
    except storage.MissingObjectError:
        return {}
    return found if isinstance(found, dict) else {}


def is_champion(subject: Subject) -> bool:
    """Return True if the alias champion points to a version made from the subject's run."""
    for version in subject.versions:
        found = tracking.model_version(version.name, f"@{CHAMPION}")
        if found is not None and found.version == version.version:
            return True
    return False
