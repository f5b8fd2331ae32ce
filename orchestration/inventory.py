"""Runs and data sets in S3: list them with their state, and delete one.

A run or a data set that something else was made from is never deleted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestration.jobs.lease import read_lease
from orchestration.services import storage, tracking
from tinyemo.errors import DataError, StorageError, TrainingError

KEEP_LEFTOVERS_S = 86_400.0
"""An ingest that is at work writes more often than once a day."""


@dataclass(frozen=True)
class RunSummary:
    """State of one run in S3.

    Attributes:
        kind: train, family, tune or stream.
        state: running, stopped or finished.
        stage, step: stage and optimizer step of the newest checkpoint; None before the first one.
        num_steps: optimizer steps of that stage, if its checkpoint says so.
        heartbeat_age_s: seconds since the driver renewed its lease; None if it left no lease.
        holder: driver that holds the run; empty if none does.
        num_bytes: bytes of all files in S3.
        run_id: MLflow run.
        data: digest of each data set that it reads, by name.
        made_from: names of runs that it needs: parts of a family or search, and runs whose files its recipe names.
    """

    name: str
    folder: str
    kind: str
    state: str
    stage: str | None
    step: int | None
    num_steps: int | None
    heartbeat_age_s: float | None
    holder: str
    num_bytes: int
    run_id: str | None
    experiment: str
    data: dict[str, str]
    made_from: tuple[str, ...]


@dataclass(frozen=True)
class DatasetSummary:
    """State of one data set in S3.

    Attributes:
        kind: features, images or instruct; incomplete if no version was finished.
        version: newest version.
        rows: records of each split.
        num_bytes: bytes of all files of all versions in S3.
        digests: digest of each version.
        used_by: names of the runs that read any version.
    """

    name: str
    uri: str
    kind: str
    version: str | None
    num_versions: int
    rows: dict[str, int]
    num_bytes: int
    digests: tuple[str, ...]
    used_by: tuple[str, ...]


def list_runs(root: str) -> list[RunSummary]:
    """Return the runs under an S3 folder, sorted by name."""
    files = _by_name(root)
    claims = {name: _read(f"{root}/{name}/run.json", paths) for name, paths in files.items()}
    recipes = {name: json.dumps(claim.get("recipe", {})) for name, claim in claims.items()}
    found = []
    for name, paths in files.items():
        kind = str(claims[name].get("kind", "train"))
        needed = {other for other in re.findall(rf"{re.escape(root)}/([^/\"]+)", recipes[name]) if other in files}
        if kind in ("family", "tune"):
            needed |= {other for other in files if other.startswith(f"{name}-")}
        found.append(_summarize_run(f"{root}/{name}", kind, paths, claims[name], sorted(needed)))
    return found


def list_datasets(root: str, runs: Iterable[RunSummary] = ()) -> list[DatasetSummary]:
    """Return the data sets under an S3 folder, sorted by name; `runs` are those that may read them."""
    readers = list(runs)
    found = []
    for name, paths in _by_name(root).items():
        folder = f"{root}/{name}"
        manifests = {uri.split("/")[-2]: _read(uri, paths) for uri in paths if uri.endswith("/manifest.json")}
        newest = _read(f"{folder}/latest.json", paths).get("version")
        manifest = manifests.get(str(newest), {})
        digests = tuple(str(item.get("digest")) for item in manifests.values())
        found.append(
            DatasetSummary(
                name=name,
                uri=folder,
                kind=str(manifest.get("kind", "incomplete")),
                version=newest,
                num_versions=len(manifests),
                rows={split: int(counts["rows"]) for split, counts in manifest.get("splits", {}).items()},
                num_bytes=sum(paths.values()),
                digests=digests,
                used_by=tuple(run.name for run in readers if set(run.data.values()) & set(digests)),
            )
        )
    return found


def find_run(root: str, name: str) -> RunSummary:
    """Return one run of `list_runs`; DataError if there is none of that name."""
    found = {run.name: run for run in list_runs(root)}
    if name not in found:
        raise DataError(f"no run {name} at {root}: see `tinyemo runs list`")
    return found[name]


def find_dataset(root: str, name: str, runs_root: str) -> DatasetSummary:
    """Return one data set of `list_datasets`; DataError if there is none of that name."""
    found = {dataset.name: dataset for dataset in list_datasets(root, list_runs(runs_root))}
    if name not in found:
        raise DataError(f"no data set {name} at {root}: see `tinyemo datasets list`")
    return found[name]


def deletable_runs(root: str, name: str) -> list[RunSummary]:
    """Return the runs to delete for `name`: the run itself, after the parts of a family or search.

    Raises:
        DataError: if there is no such run.
        TrainingError: if a run of these is in progress, or another run or a registered model was made from it.
    """
    runs = {run.name: run for run in list_runs(root)}
    chosen = find_run(root, name)
    parts = [runs[part] for part in chosen.made_from if chosen.kind in ("family", "tune")]
    doomed = [*parts, chosen]
    for run in doomed:
        if run.state == "running":
            raise TrainingError(f"{run.name} is in progress: stop its driver first ({run.holder})")
        names = {item.name for item in doomed}
        users = [other.name for other in runs.values() if run.name in other.made_from and other.name not in names]
        models = tracking.registered_versions(run.run_id) if run.run_id else []
        if users or models:
            raise TrainingError(f"{run.name} cannot be deleted: {', '.join([*users, *models])} was made from it")
    return doomed


def delete_runs(runs: Iterable[RunSummary]) -> None:
    """Delete runs from MLflow and from S3; `deletable_runs` says which may go."""
    for run in runs:
        if run.run_id:
            # Stages and trials are child runs in MLflow without a folder of their own.
            for child in tracking.find_runs(parent_run_id=run.run_id):
                tracking.delete_run(child.run_id)
            tracking.delete_run(run.run_id)
        storage.delete_prefix(run.folder)


def delete_dataset(dataset: DatasetSummary) -> None:
    """Delete all versions of a data set from S3.

    Raises:
        DataError: if a run reads it.
    """
    if dataset.used_by:
        raise DataError(f"{dataset.name} cannot be deleted: {', '.join(dataset.used_by)} was made from it")
    storage.delete_prefix(dataset.uri)


def clean_up(runs_root: str, datasets_root: str) -> int:
    """Delete what nothing reads any more; return the number of bytes that this freed.

    These are checkpoints that no `latest.json` of a run names, unless its driver is alive, and folders of an ingest
    that was cut off (`.staging-*`) or refused (`failed-*`), once nothing has changed in them for a day.
    """
    doomed: dict[str, int] = {}
    for name, paths in _by_name(runs_root).items():
        lease = read_lease(f"{runs_root}/{name}")
        states = [_read(uri, paths) for uri in paths if uri.endswith("/latest.json")]
        if (lease is None or not lease.is_alive) and all("checkpoint" in state for state in states):
            kept = tuple(f"{state['checkpoint']}/" for state in states)
            doomed |= {u: n for u, n in paths.items() if re.search(r"/attempt-\d+/", u) and not u.startswith(kept)}
    for paths in _by_name(datasets_root).values():
        leftovers = {uri: match[0] for uri in paths if (match := re.match(r".*/(\.staging|failed)-[^/]+", uri))}
        old = {folder for folder in set(leftovers.values()) if storage.newest_age_s(folder) > KEEP_LEFTOVERS_S}
        doomed |= {uri: paths[uri] for uri, folder in leftovers.items() if folder in old}
    for uri in doomed:
        storage.delete(uri)
    return sum(doomed.values())


def _by_name(root: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for uri, num_bytes in storage.list_prefix(root).items():
        name, _, rest = uri.removeprefix(f"{root}/").partition("/")
        if rest:
            found[name][uri] = num_bytes
    return dict(sorted(found.items()))


def _read(uri: str, paths: dict[str, int]) -> dict[str, Any]:
    if uri not in paths:
        return {}
    try:
        document = storage.read_json(uri)
    except StorageError:
        storage.exists(uri)  # raises if S3 cannot be read; a torn file counts as empty
        return {}
    return document if isinstance(document, dict) else {}


def _summarize_run(
    folder: str,
    kind: str,
    paths: dict[str, int],
    claim: dict[str, Any],
    made_from: list[str],
) -> RunSummary:
    states = [(uri.split("/")[-2], _read(uri, paths)) for uri in paths if uri.endswith("/latest.json")]
    open_states = [item for item in states if not item[1].get("is_final")]
    stage, newest = (open_states or states)[-1] if states else (None, {})
    lease = read_lease(folder) if f"{folder}/lease.json" in paths else None
    is_finished = bool({f"{folder}/result.json", f"{folder}/family.json"} & set(paths))
    return RunSummary(
        name=folder.rsplit("/", 1)[-1],
        folder=folder,
        kind=kind,
        state="finished" if is_finished else "running" if lease is not None and lease.is_alive else "stopped",
        stage=stage,
        step=newest.get("step"),
        num_steps=newest.get("num_steps"),
        heartbeat_age_s=None if lease is None else lease.age_s,
        holder="" if lease is None else lease.holder,
        num_bytes=sum(paths.values()),
        run_id=claim.get("mlflow_run_id"),
        experiment=claim.get("recipe", {}).get("experiment", ""),
        data=dict(claim.get("data", {})),
        made_from=tuple(made_from),
    )
