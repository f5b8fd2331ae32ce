"""MLflow, and only here: the driver opens runs, everything else hands figures to them.

MLflow's client takes 1.5 s to import, so the first call that needs it imports it. Nothing here writes to stdout. Every
function raises the errors of `require_server` where no server answers.
A run that this module opened ends FINISHED, FAILED or KILLED. One case is left out: a driver that got SIGKILL ends
nothing; its run stays RUNNING until the next start finds it with `find_run` and takes it over with `resume_run_id`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestration.services.interruption import held_signals, sigterm_interrupts
from orchestration.services.provenance import git_state, identity_tags
from orchestration.services.tracking_client import Points, RunLogger, open_client
from orchestration.services.tracking_server import one_line, public_address, require_server
from tinyemo.errors import AssetError, ConfigError, PlatformError, TinyEmoError, TrainingError

logger = logging.getLogger(__name__)

# MLflow's limits; a test compares them.
TEXTS_PER_REQUEST = 100
PARAM_CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 6000, 8000, 36
URI_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")

__all__ = ["RunHandle", "RunInfo", "RunLogger", "download_artifacts", "find_run", "flatten",
           "git_state", "open_run", "register_projector", "require_server"]  # fmt: skip


@dataclass(frozen=True)
class RunInfo:
    """What MLflow knows about a run."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    """The last value of each."""
    url: str


@dataclass(frozen=True)
class RunHandle:
    """An open run, in the driver's hands. Each method raises PlatformError where MLflow does not answer or refuses."""

    run_id: str
    url: str
    """The run's page in the UI."""

    @property
    def logger(self) -> RunLogger:
        """Writes metrics into this run from another process."""
        return RunLogger(self.run_id)

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics of one step."""
        self.logger.log_curve([(step, metrics)])

    def log_curve(self, points: Points) -> None:
        """Log metrics of many steps; see `RunLogger`."""
        self.logger.log_curve(points)

    def log_dataset(self, name: str, digest: str, uri: str, num_rows: int, context: str) -> None:
        """Name the data that the run reads.

        Args:
            name: of the data set.
            digest: of its manifest. MLflow keeps 36 characters; the whole digest stands in source and profile.
            uri: where it lies.
            num_rows: that the run reads of it.
            context: what for: "train", "val" or "test".
        """
        with open_client(f"log the data set {name}") as client:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                name=name,
                digest=digest[:DIGEST_CHARACTERS],
                source_type=urlsplit(uri).scheme or "local",
                source=json.dumps({"uri": uri, "digest": digest}),
                profile=json.dumps({"num_rows": num_rows, "digest": digest}),
            )
            entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
            client.log_inputs(self.run_id, datasets=[entry])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file under `folder` of the run's artifacts.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(path)
        with open_client(f"store {path.name}") as client:
            client.log_artifact(self.run_id, str(path), folder)

    def log_artifacts(self, folder: Path, artifact_path: str) -> None:
        """Store all files of `folder` under `artifact_path` of the run's artifacts.

        Raises:
            NotADirectoryError: there is no such folder.
        """
        if not folder.is_dir():
            raise NotADirectoryError(folder)
        with open_client(f"store the folder {folder.name}") as client:
            client.log_artifacts(self.run_id, str(folder), artifact_path)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set or replace tags."""
        with open_client("set tags") as client:
            _log_texts(client, self.run_id, {}, tags)


@contextmanager
def open_run(
    experiment: str,
    name: str,
    *,
    params: dict[str, Any],
    tags: dict[str, str],
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
) -> Iterator[RunHandle]:
    """Open a run for the length of a with-block; only the driver does.

    It ends FINISHED; FAILED where an exception leaves the block (tag `error` says which, in one line); KILLED at
    KeyboardInterrupt, SystemExit and SIGTERM, which raises `Interrupted` in the main thread, so finally-blocks run.

    Args:
        experiment: created where there is none.
        name: of the run.
        params: the recipe; nested tables become dotted keys, long values are cut to MLflow's limit.
        tags: beside git commit and dirty flag, which are set here.
        parent_run_id: the run that this one is a child of.
        resume_run_id: goes on in this run instead of creating one. Its params must be the same.

    Raises:
        TrainingError: the run to resume does not exist, or has other params.
    """
    require_server()
    tags = identity_tags() | tags
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    texts = flatten(params)
    info = None
    with sigterm_interrupts():
        try:
            with held_signals(), open_client(f"open run {name}") as client:
                if resume_run_id is None:
                    info = _create(client, experiment, name, tags)
                else:
                    info = _resume(client, resume_run_id, texts, tags)
            _open_runs.append(info)
            with open_client("log params") as client:
                _log_texts(client, info.run_id, {key: texts[key] for key in texts.keys() - info.params.keys()}, {})
            yield RunHandle(info.run_id, info.url)
        except (KeyboardInterrupt, SystemExit, GeneratorExit) as error:
            # SystemExit too: Ray turns SIGTERM into it, and Ray Train ends an aborted run with sys.exit(0).
            _close_after(error, info, "KILLED")
            raise
        except BaseException as error:
            _close_after(error, info, "FAILED")
            raise
        finally:
            if info in _open_runs:
                _open_runs.remove(info)
        with held_signals(), open_client(f"close run {name}") as client:
            client.set_terminated(info.run_id, "FINISHED")


_open_runs: list[RunInfo] = []


def fail_open_runs(error: BaseException) -> None:
    """End what this process has open as FAILED, for a thread that ends the process because the main thread hangs."""
    for run in reversed(_open_runs):
        _close_after(error, run, "FAILED")


def find_run(experiment: str, name: str, *, parent_run_id: str | None = None) -> RunInfo | None:
    """The newest run of this name, whatever its status; None where there is none.

    Args:
        experiment: to look in.
        name: of the run, exactly.
        parent_run_id: only among the children of this run.
    """
    require_server()
    quote = '"' if "'" in name else "'"
    condition = f"attributes.run_name = {quote}{name}{quote}"
    if parent_run_id is not None:
        condition += f" and tags.`mlflow.parentRunId` = '{parent_run_id}'"
    with open_client(f"look for run {name}") as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([found.experiment_id], condition, max_results=1, order_by=order)
    return _info(runs[0]) if runs else None


def register_projector(
    run_id: str, artifact_path: str, name: str, *, alias: str = "champion", tags: dict[str, str]
) -> str:
    """Register an artifact folder of a run as a new version of a model and point an alias to it.

    The folder is what `MetricProjector.save_pretrained` wrote; `MetricProjector.from_pretrained` loads what
    `download_artifacts("models:/NAME@champion")` brings. MLflow's own model flavours are not involved.

    Args:
        run_id: the run that holds the artifact.
        artifact_path: of the folder in the run.
        name: of the registered model, created where there is none.
        alias: moved to the new version.
        tags: of the version.

    Returns:
        The version, "1" for the first.

    Raises:
        AssetError: the run holds no such folder.
    """
    require_server()
    with open_client(f"register {name}") as client:
        if not client.list_artifacts(run_id, artifact_path):
            raise AssetError(f"run {run_id} holds no artifact {artifact_path!r} to register as {name}")
        with _tolerated("RESOURCE_ALREADY_EXISTS"):
            client.create_registered_model(name)
        source = f"runs:/{run_id}/{artifact_path}"
        version = str(client.create_model_version(name, source, run_id, tags=tags).version)
        client.set_registered_model_alias(name, alias, version)
    return version


def download_artifacts(uri: str, folder: Path | None = None) -> Path:
    """Bring an artifact file or folder from MLflow; returns its local path.

    Args:
        uri: `runs:/RUN/PATH`, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `mlflow-artifacts:/PATH`.
        folder: to write to; a temporary one that goes when the process ends where it is None.

    Raises:
        ConfigError: the address has none of these forms, or there is no server address.
        AssetError: there is no such artifact.
        PlatformError: there is no server; see `require_server`.
    """
    if not uri.startswith(URI_SCHEMES):
        raise ConfigError(f"an MLflow address starts with {', '.join(URI_SCHEMES)}; got {uri!r}")
    server = require_server()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tinyemo-artifacts-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with open_client("download"):
            from mlflow.artifacts import download_artifacts as download

            path = Path(download(artifact_uri=uri, dst_path=str(folder), tracking_uri=server, registry_uri=server))
    except PlatformError as error:
        raise AssetError(f"{uri} is not to be had: {error}") from error
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise AssetError(f"{uri} is not to be had: MLflow at {public_address(server)} holds no file there")
    return path


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe as MLflow's params: nested tables as dotted keys, lists as JSON, values cut to MLflow's limit."""
    texts: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            texts |= flatten(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, list | tuple | dict) else str(value)
            texts[f"{prefix}{key}"] = text[:PARAM_CHARACTERS]
    return texts


@contextmanager
def _tolerated(error_code: str) -> Iterator[None]:
    """Pass over MLflow's error of this code: another driver may have been faster."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != error_code:
            raise


def _create(client: Any, experiment: str, name: str, tags: dict[str, str]) -> RunInfo:
    """A new run with its tags; the experiment is created where there is none."""
    if client.get_experiment_by_name(experiment) is None:
        with _tolerated("RESOURCE_ALREADY_EXISTS"):
            client.create_experiment(experiment)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    cut = {key: text[:TAG_CHARACTERS] for key, text in tags.items()}
    return _info(client.create_run(experiment_id, tags=cut, run_name=name))


def _resume(client: Any, run_id: str, params: dict[str, str], tags: dict[str, str]) -> RunInfo:
    """The run, RUNNING again. TrainingError where it does not exist or where a param has another value."""
    run = None
    with _tolerated("RESOURCE_DOES_NOT_EXIST"):
        run = client.get_run(run_id)
    if run is None:
        raise TrainingError(f"there is no run {run_id} to resume: start the recipe under another name")
    info = _info(run)
    changed = [key for key, text in params.items() if info.params.get(key, text) != text]
    if changed:
        listed = ", ".join(f"{key} was {info.params[key]}, is {params[key]}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise TrainingError(f"run {info.name} had another recipe ({listed}{more}): undo that or rename the recipe")
    if "error" in info.tags:
        client.delete_tag(run_id, "error")
    num_resumes = int(info.tags.get("num_resumes", "0")) + 1
    _log_texts(client, run_id, {}, tags | {"num_resumes": str(num_resumes)})
    client.update_run(run_id, status="RUNNING")  # last: where one of these fails, the run stays ended
    return info


def _close_after(error: BaseException, run: RunInfo | None, status: str) -> None:
    """End the run with the error's one line in tag `error`; a failure of that is logged and never hides the error."""
    if run is None:  # it was never opened
        return
    with held_signals():
        try:
            with open_client("close the run") as client:
                client.set_terminated(run.run_id, status)
                client.set_tag(run.run_id, "error", f"{type(error).__name__}: {one_line(error)}")
        except TinyEmoError as failure:
            logger.error("run %s may still be shown as RUNNING: %s", run.url, failure)


def _log_texts(client: Any, run_id: str, params: dict[str, str], tags: dict[str, str]) -> None:
    """Log params and tags, at most 100 a request; tags are cut to MLflow's limit."""
    from mlflow.entities import Param, RunTag

    entries = [Param(key, text) for key, text in params.items()]
    marks = [RunTag(key, text[:TAG_CHARACTERS]) for key, text in tags.items()]
    for first in range(0, max(len(entries), len(marks)), TEXTS_PER_REQUEST // 2):
        batch = slice(first, first + TEXTS_PER_REQUEST // 2)
        client.log_batch(run_id, params=entries[batch], tags=marks[batch])


def _info(run: Any) -> RunInfo:
    server = public_address(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return RunInfo(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        url=f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
    )
