"""The only module that talks to MLflow. The driver opens runs; workers and callbacks write metrics into them.

MLflow's client takes 1.5 s to import, so it is imported inside functions and `require_server` checks the server without
it. Every function that talks to the server raises PlatformError, in one line, where it does not answer or refuses.

A run ends FINISHED, FAILED or KILLED. There is no signal handler in this module: Ctrl-C raises KeyboardInterrupt, and
`ray.init` sets the handler that turns SIGTERM (`ray job stop`, Kubernetes) into SystemExit, so connect to Ray before
`open_run`. A driver that got SIGKILL leaves its run RUNNING; the next start ends it with `end_run` or goes on with it.

The files of a finished model are stored once, in the run's S3 folder. MLflow refers to them: `RunHandle.refer` names
the folder, `log_model` and `register` point to it, and `download_artifacts` fetches from it.
"""

from __future__ import annotations

import atexit
import getpass
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestration.services import storage
from tinyemo.errors import (
    AssetError,
    ConfigError,
    LostLeaseError,
    PlatformError,
    StorageError,
    TinyEmoError,
    TrainingError,
    one_line,
)

logger = logging.getLogger(__name__)

# MLflow's limits; a test compares them.
METRICS_PER_REQUEST, TEXTS_PER_REQUEST = 1000, 100
PARAM_CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 6000, 8000, 36
MAX_RUNS = 50_000
HEALTH_TIMEOUT_S = 5.0
# MLflow's defaults retry for four minutes; these give up after about ten seconds. A variable that the user set wins.
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Metrics in the queue of a driver that died would be lost.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
URI_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")
ADVICE = "start one with `tinyemo platform up` or set MLFLOW_TRACKING_URI"
# Without these, MLflow's UI opens an experiment on its page for language model traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
UI_QUERY = "?workflowType=machine_learning"

Points = Sequence[tuple[int, Mapping[str, float]]]
"""(step, metrics by `split/name`), in any order."""


def require_server() -> str:
    """Return the address in MLFLOW_TRACKING_URI once an MLflow server has answered there, without importing MLflow.

    Raises:
        ConfigError: the variable is not set or is no http address.
        PlatformError: the server does not answer within seconds, or is no MLflow server.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    shown = public_address(uri)
    if not uri:
        raise ConfigError(f"no MLflow server: {ADVICE}")
    if urlsplit(uri).scheme not in ("http", "https"):
        raise ConfigError(f"MLFLOW_TRACKING_URI must be an http or https address, got {shown!r}")
    try:
        with urllib.request.urlopen(f"{shown}/health", timeout=HEALTH_TIMEOUT_S) as response:
            is_mlflow = response.read(64).strip() == b"OK"
    except urllib.error.HTTPError as error:
        hint = "; start it with --allowed-hosts naming this host" if error.code == 403 else ""
        raise PlatformError(f"MLflow at {shown} answers HTTP {error.code} to a health check{hint}") from error
    except (OSError, ValueError) as error:
        raise PlatformError(f"no MLflow server answers at {shown} ({one_line(error)}): {ADVICE}") from error
    if not is_mlflow:
        raise PlatformError(f"what answers at {shown} is no MLflow server: {ADVICE}")
    return uri


def public_address(uri: str) -> str:
    """Return an address without its user name and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


@contextmanager
def _client(action: str) -> Iterator[Any]:
    """Give MLflow's client to a block, and turn what MLflow and the network raise in it into a PlatformError."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError(f"cannot {action}: MLFLOW_TRACKING_URI is not set in this process")
    client = _cached_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except (MlflowException, OSError) as error:
        try:
            require_server()
            advice = ""
        except TinyEmoError:
            advice = "; give the same command again once it answers"
        message = f"MLflow at {public_address(uri)} failed to {action}: {one_line(error)}{advice}"
        raise PlatformError(message) from error


@lru_cache(maxsize=4)
def _cached_client(uri: str) -> Any:
    os.environ.update(CLIENT_DEFAULTS | dict(os.environ))
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _tolerated(error_code: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != error_code:
            raise


@dataclass(frozen=True)
class RunInfo:
    """Facts that MLflow has about a run.

    Attributes:
        status: RUNNING, FINISHED, FAILED or KILLED.
        metrics: the last value of each metric.
        url: address of the run's page in the UI.
        started_at, ended_at: seconds since 1970; None for a run that has not ended.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    url: str
    experiment_id: str
    started_at: float = 0.0
    ended_at: float | None = None


def _info(run: Any) -> RunInfo:
    server = public_address(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return RunInfo(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        url=f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{UI_QUERY}",
        experiment_id=run.info.experiment_id,
        started_at=run.info.start_time / 1000,
        ended_at=run.info.end_time / 1000 if run.info.end_time else None,
    )


@dataclass(frozen=True)
class RunLogger:
    """Writes metrics into a run from any process that has MLFLOW_TRACKING_URI, each (key, step) once.

    An attempt that goes on from a checkpoint repeats steps that were logged already. The first call with a key reads
    which of its steps the run has; after that a call costs one request. Pickles without what it has read.
    """

    run_id: str
    _logged_steps: dict[str, set[int]] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the run's id alone."""
        return RunLogger, (self.run_id,)

    def log_curve(self, points: Points) -> None:
        """Log the metrics that the run does not have at their steps yet, 1,000 a request."""
        now_ms = int(time.time() * 1000)
        with _client("log metrics") as client:
            from mlflow.entities import Metric

            unread = {key for _, row in points for key in row} - self._logged_steps.keys()
            known = client.get_run(self.run_id).data.metrics if unread else {}
            for key in unread:
                history = client.get_metric_history(self.run_id, key) if key in known else []
                self._logged_steps[key] = {entry.step for entry in history}
            missing = {
                (key, step): Metric(key, float(value), now_ms, step)
                for step, row in points
                for key, value in row.items()
                if step not in self._logged_steps[key]
            }
            metrics = list(missing.values())
            for first in range(0, len(metrics), METRICS_PER_REQUEST):
                batch = metrics[first : first + METRICS_PER_REQUEST]
                client.log_batch(self.run_id, metrics=batch)
                for metric in batch:
                    self._logged_steps[metric.key].add(metric.step)


@dataclass(frozen=True)
class RunHandle:
    """A run that the driver has open.

    Attributes:
        url: address of the run's page in the UI.
        logger: writes metrics into this run; can be sent to another process.
    """

    run_id: str
    url: str
    experiment_id: str
    logger: RunLogger

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics of one step."""
        self.logger.log_curve([(step, metrics)])

    def log_metrics_of(self, metrics: Mapping[str, float], dataset: tuple[str, str]) -> None:
        """Log metrics that belong to one version of a data set: its name and digest, as given to `log_dataset`."""
        name, digest = dataset[0], dataset[1][:DIGEST_CHARACTERS]
        with _client("log metrics") as client:
            from mlflow.entities import Metric

            place, now_ms = {"dataset_name": name, "dataset_digest": digest}, int(time.time() * 1000)
            entries = [Metric(key, float(value), now_ms, 0, **place) for key, value in metrics.items()]
            for first in range(0, len(entries), METRICS_PER_REQUEST):
                client.log_batch(self.run_id, metrics=entries[first : first + METRICS_PER_REQUEST])

    def log_dataset(self, name: str, digest: str, uri: str, num_rows: int, context: str) -> None:
        """Name a data set that the run reads.

        Args:
            name: of the data set.
            digest: of its manifest. MLflow keeps 36 characters; the whole digest stands in source and profile.
            uri: address of the data set.
            num_rows: rows that the run reads of it.
            context: what the rows are for: "train", "val" or "test".
        """
        with _client(f"log the data set {name}") as client:
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
        """Store a file, or all files of a folder, under `folder` of the run's artifacts.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        if not path.exists():
            raise FileNotFoundError(path)
        log_artifact(self.run_id, path, folder)

    def log_text(self, text: str, file: str) -> None:
        """Store a text as a file of the run's artifacts, for instance `evaluation/rows.json`."""
        with _client(f"store {file}") as client:
            client.log_text(self.run_id, text, file)

    def refer(self, artifact_path: str, uri: str) -> None:
        """Let `runs:/RUN/artifact_path` mean the S3 folder `uri`, without storing its files a second time.

        Args:
            artifact_path: one name, for instance "model".
            uri: `s3://...`.
        """
        self.set_tags({f"stored.{artifact_path}": uri})

    def log_model(
        self,
        name: str,
        uri: str,
        metrics: Mapping[str, float],
        *,
        dataset: tuple[str, str],
        step: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Make an MLflow LoggedModel for files in S3, with metrics that belong to it and to one version of the data.

        The metrics become the run's too, so they are logged here alone. The second call with a name does nothing.

        Args:
            name: of the model, for instance "projector".
            uri: address of its files.
            metrics: by `split/name`.
            dataset: name and digest, as given to `log_dataset`, that the metrics were measured on.
            step: optimizer steps that the model was trained for.
            params: nested tables, see `flatten`.

        Returns:
            The model's id.
        """
        with _client(f"log the model {name}") as client:
            from mlflow.entities import LoggedModelOutput, Metric

            outputs = client.get_run(self.run_id).outputs
            for output in outputs.model_outputs if outputs else []:
                if client.get_logged_model(output.model_id).name == name:
                    return str(output.model_id)
            texts = flatten(dict(params or {}))
            tags = {"uri": uri, "mlflow.user": user_name(), "mlflow.note.content": f"The files are in `{uri}`."}
            model = client.create_logged_model(self.experiment_id, name, self.run_id, tags, texts, "tinyemo")
            place = (int(time.time() * 1000), step, model.model_id, dataset[0], dataset[1][:DIGEST_CHARACTERS])
            entries = [Metric(key, float(value), *place, self.run_id) for key, value in metrics.items()]
            client.log_batch(self.run_id, metrics=entries)
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def describe(self, summary: str, facts: Mapping[str, Any]) -> None:
        """Write the run's description, which the UI shows on its page: a summary, a table, and the command.

        Args:
            summary: Markdown; what the run is and what came out.
            facts: for instance data, result, checkpoint and export; an empty value is left out.
        """
        rows = [f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")]
        table = "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        note = f"{summary}\n\n{table}\n\nMade by `{command}`"
        self.set_tags({"mlflow.note.content": note})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        with _client("set tags") as client:
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
    """Open a run for the length of a with-block; call it in the driver, after it has connected to Ray.

    The run ends FINISHED; FAILED where an exception leaves the block (the tag `error` holds it, in one line); KILLED
    at KeyboardInterrupt and SystemExit, which Ray raises at SIGTERM.

    Args:
        experiment: created where it does not exist.
        name: of the run.
        params: the recipe; see `flatten`.
        tags: are set beside git commit, dirty flag and user.
        parent_run_id: the run that becomes this one's parent.
        resume_run_id: the run to go on with, instead of creating one; its params must be the same.

    Raises:
        TrainingError: the run to resume does not exist, or has other params.
    """
    require_server()
    tags = identity_tags() | tags
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    texts = flatten(params)
    opened: list[RunInfo] = []

    def start() -> None:
        with _client(f"open run {name}") as client:
            if resume_run_id is None:
                opened.append(_create(client, experiment, name, tags))
            else:
                opened.append(_resume(client, resume_run_id, texts, tags))
            new = {key: text for key, text in texts.items() if key not in opened[0].params}
            _log_texts(client, opened[0].run_id, new, {})

    closed: list[str] = []

    def close(error: BaseException) -> None:
        # SystemExit too: Ray turns SIGTERM into it. GeneratorExit comes where a KeyboardInterrupt left the block.
        is_stopped = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        for run in opened:
            if run.run_id not in closed:
                _close_after(error, run, "KILLED" if is_stopped else "FAILED")
                closed.append(run.run_id)

    try:
        try:
            _finish(start)
            info = opened[0]
            yield RunHandle(info.run_id, info.url, info.experiment_id, RunLogger(info.run_id))
        except LostLeaseError:
            raise  # the run belongs to another driver now
        except BaseException as error:
            close(error)
            raise
    except (KeyboardInterrupt, SystemExit) as error:
        close(error)  # a second signal came before the run was closed
        raise
    _finish(lambda: end_run(info.run_id, "FINISHED"))


def _finish(request: Callable[[], None]) -> None:
    """Make a request in a thread and wait for it: a signal interrupts the main thread alone, so the request ends."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(request).result()


def end_run(run_id: str, status: str, *, error: str | None = None) -> None:
    """End a run as FINISHED, FAILED or KILLED; `error` says why, in one line."""
    with _client(f"end run {run_id}") as client:
        client.set_terminated(run_id, status)
        if error is not None:
            client.set_tag(run_id, "error", error[:TAG_CHARACTERS])


def _close_after(error: BaseException, run: RunInfo, status: str) -> None:
    try:
        _finish(lambda: end_run(run.run_id, status, error=f"{type(error).__name__}: {one_line(error)}"))
    except TinyEmoError as failure:  # must not hide the error that ends the run
        logger.error("run %s may still be shown as RUNNING: %s", run.url, failure)


def find_run(experiment: str, name: str, *, parent_run_id: str | None = None) -> RunInfo | None:
    """Return the newest run of exactly this name, whatever its status, or None.

    Args:
        experiment: to look in.
        name: of the run.
        parent_run_id: look only among the children of this run.
    """
    quote = '"' if "'" in name else "'"
    found = find_runs(
        f"attributes.run_name = {quote}{name}{quote}", experiment=experiment, parent_run_id=parent_run_id, limit=1
    )
    return found[0] if found else None


def registered_versions(run_id: str) -> list[str]:
    """Return "NAME version N" of every registered model version that was made from a run."""
    return [str(version) for version in versions_of_run(run_id)]


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        source: address of its files.
        run_id: the run that made it.
        url: address of its page in the UI.
    """

    name: str
    version: str
    source: str
    run_id: str
    tags: dict[str, str]
    url: str

    def __str__(self) -> str:
        """Return `NAME version N`."""
        return f"{self.name} version {self.version}"


def _version(found: Any) -> ModelVersion:
    server = public_address(os.environ.get("MLFLOW_TRACKING_URI", ""))
    url = f"{server}/#/models/{found.name}/versions/{found.version}{UI_QUERY}"
    return ModelVersion(found.name, str(found.version), str(found.source), found.run_id, dict(found.tags or {}), url)


def versions_of_run(run_id: str) -> list[ModelVersion]:
    """Return the registered versions that were made from a run, the newest first."""
    with _client("look for registered models") as client:
        found = client.search_model_versions(f"run_id = '{run_id}'")
    return sorted((_version(item) for item in found), key=lambda item: -int(item.version))


def model_version(name: str, version: str) -> ModelVersion | None:
    """Return a version of a registered model, by its number or as `@ALIAS`; None where there is none."""
    require_server()
    with (
        _client(f"look up {name} {version}") as client,
        # MLflow answers the one for a model or version, the other for an alias that does not exist.
        _tolerated("RESOURCE_DOES_NOT_EXIST"),
        _tolerated("INVALID_PARAMETER_VALUE"),
    ):
        if version.startswith("@"):
            return _version(client.get_model_version_by_alias(name, version[1:]))
        return _version(client.get_model_version(name, version))
    return None


def move_alias(name: str, alias: str, version: str) -> None:
    """Point an alias of a registered model to a version; only `orchestration.report.promotion` calls this."""
    with _client(f"move {alias} of {name}") as client:
        client.set_registered_model_alias(name, alias, version)


def tag_version(version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Set or replace tags of a version of a registered model."""
    with _client(f"tag {version}") as client:
        for key, text in tags.items():
            client.set_model_version_tag(version.name, version.version, key, text)


def run_info(run_id: str) -> RunInfo:
    """Return the facts about a run.

    Raises:
        PlatformError: there is no such run, or the server does not answer.
    """
    with _client(f"look up run {run_id}") as client:
        return _info(client.get_run(run_id))


def log_artifact(run_id: str, path: Path, folder: str | None = None) -> None:
    """Store a file, or all files of a folder, under `folder` of a run's artifacts; the run may be finished."""
    with _client(f"store {path.name}") as client:
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(run_id, str(path), folder)


def delete_run(run_id: str) -> None:
    """Delete a run; nothing happens if MLflow has no such run or has deleted it before."""
    with (
        _client(f"delete run {run_id}") as client,
        _tolerated("RESOURCE_DOES_NOT_EXIST"),
        _tolerated("INVALID_PARAMETER_VALUE"),
        _tolerated("INVALID_STATE"),
    ):
        client.delete_run(run_id)


def find_runs(
    condition: str = "", *, experiment: str | None = None, parent_run_id: str | None = None, limit: int = MAX_RUNS
) -> list[RunInfo]:
    """Return runs that are not deleted, the newest first.

    Args:
        condition: MLflow's filter, for instance "tags.kind = 'trial'".
        experiment: name of the only one to look in; None looks in all.
        parent_run_id: look only among the children of this run.
        limit: the most runs to return, at most MAX_RUNS.
    """
    require_server()
    if parent_run_id is not None:
        parent = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
        condition = f"{condition} and {parent}" if condition else parent
    with _client("look for runs") as client:
        if experiment is None:
            experiments = client.search_experiments()
        else:
            experiments = [found] if (found := client.get_experiment_by_name(experiment)) else []
        ids, order = [item.experiment_id for item in experiments], ["attributes.start_time DESC"]
        runs = client.search_runs(ids, condition, max_results=limit, order_by=order) if ids else []
    return [_info(run) for run in runs]


def record_run(
    parent: RunHandle,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: dict[str, str],
    points: Points,
    status: str,
    started_at: float,
    ended_at: float,
    run_id: str | None = None,
) -> None:
    """Write a child run of something that is over, with its own times.

    Args:
        parent: the open run that it belongs to.
        name: of the new run.
        params: see `flatten`.
        tags: of the new run.
        points: its metrics.
        status: FINISHED, FAILED or KILLED.
        started_at: seconds since 1970.
        ended_at: seconds since 1970.
        run_id: a run that was left half written, to be completed instead of creating one.
    """
    with _client(f"record run {name}") as client:
        if run_id is None:
            tags = tags | {"mlflow.parentRunId": parent.run_id}
            created = client.create_run(parent.experiment_id, int(started_at * 1000), tags, name)
            run_id = str(created.info.run_id)
        _log_texts(client, run_id, flatten(params), {})
        RunLogger(run_id).log_curve(points)
        client.set_terminated(run_id, status, int(ended_at * 1000))


def register(
    run_id: str,
    source: str,
    name: str,
    *,
    tags: dict[str, str],
    card: str = "",
    model_id: str | None = None,
) -> str:
    """Register a model's folder as a new version of a registered model; no alias moves, see `tinyemo promote`.

    Args:
        run_id: the run that made the model.
        source: `s3://...`, or the path of a folder in the run's artifacts.
        name: of the registered model, created where it does not exist.
        tags: of the version.
        card: Markdown; which run, data and code made the version.
        model_id: id of its LoggedModel, see `RunHandle.log_model`.

    Returns:
        The version, "1" for the first.

    Raises:
        AssetError: the run holds no such folder.
    """
    require_server()
    with _client(f"register {name}") as client:
        if not source.startswith("s3://"):
            if not client.list_artifacts(run_id, source):
                raise AssetError(f"run {run_id} holds no artifact {source!r} to register as {name}")
            source = f"runs:/{run_id}/{source}"
        with _tolerated("RESOURCE_ALREADY_EXISTS"):
            client.create_registered_model(name)
        made = client.create_model_version(name, source, run_id, tags, description=card, model_id=model_id)
    return str(made.version)


def download_artifacts(uri: str, folder: Path | None = None) -> Path:
    """Fetch an artifact file or folder and return its local path.

    Args:
        uri: `runs:/RUN/PATH`, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `mlflow-artifacts:/PATH`.
        folder: to write to; None makes a temporary one that is removed when the process ends.

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
        with _client("download") as client:
            source = _source_of(client, uri)
            if not source.startswith("s3://"):
                from mlflow.artifacts import download_artifacts as download

                place = {"dst_path": str(folder), "tracking_uri": server, "registry_uri": server}
                path = Path(download(artifact_uri=source, **place))
        if source.startswith("s3://") and storage.exists(source):
            path = folder / Path(source).name
            storage.download_file(source, path)
        elif source.startswith("s3://"):
            storage.download_folder(source, folder)
            path = folder
    except (PlatformError, StorageError) as error:
        raise AssetError(f"cannot load {uri}: {error}") from error
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise AssetError(f"cannot load {uri}: MLflow at {public_address(server)} holds no file there")
    return path


def _source_of(client: Any, uri: str) -> str:
    """Return the S3 address behind an address of MLflow's, or the same address where MLflow holds the files."""
    scheme, _, path = uri.partition(":/")
    name, _, rest = path.partition("/")
    if scheme == "models" and (rest.isdigit() or "@" in name):
        alias = name.partition("@")[2]
        version = (
            client.get_model_version_by_alias(name.partition("@")[0], alias)
            if alias
            else client.get_model_version(name, rest)
        )
        return _source_of(client, str(version.source))
    if scheme == "runs" and rest:
        head, _, tail = rest.partition("/")
        stored = client.get_run(name).data.tags.get(f"stored.{head}")
        if stored:
            return f"{stored}/{tail}".rstrip("/")
    return uri


@contextmanager
def system_metrics(run_id: str | None, node: str) -> Iterator[None]:
    """Log this node's use of CPU, memory, disk, network and GPUs as `system/NODE/...` while the block runs.

    One process of each node calls it. MLflow's own monitor samples in a thread every ten seconds and sends a request.

    Args:
        run_id: the run to log to; None logs nothing.
        node: name of the node, without slashes.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if run_id is None or not uri:
        yield
        return
    _cached_client(uri)  # sets the client's defaults
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, node_id=node, resume_logging=True, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a recipe as MLflow's params: nested tables as dotted keys, lists as JSON, values cut to MLflow's limit."""
    texts: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            texts |= flatten(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, list | tuple | dict) else str(value)
            texts[f"{prefix}{key}"] = text[:PARAM_CHARACTERS]
    return texts


def git_state() -> dict[str, str]:
    """Return the tags `git_commit` and `git_dirty` ("true", "false") of the code that runs.

    Where the code lies in no git checkout, as in a Ray job's working directory, they come from TINYEMO_GIT_COMMIT and
    TINYEMO_GIT_DIRTY, which can be set when the job is submitted; else they are "unknown". An untracked file counts as
    dirty.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        # A copy in site-packages may lie inside a checkout that it does not belong to.
        git("ls-files", "--error-unmatch", here.name)
        is_dirty = "true" if git("status", "--porcelain") else "false"
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": is_dirty}
    except (OSError, subprocess.SubprocessError):
        return {
            "git_commit": os.environ.get("TINYEMO_GIT_COMMIT") or "unknown",
            "git_dirty": os.environ.get("TINYEMO_GIT_DIRTY") or "unknown",
        }


def identity_tags() -> dict[str, str]:
    """Return tags that say who runs which code; the UI has columns for the names that begin with `mlflow.`."""
    git = git_state()
    return git | {
        "mlflow.user": user_name(),
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git["git_commit"],
    }


def user_name() -> str:
    """Return the name of the user whose process this is."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        return str(os.getuid())


def _create(client: Any, experiment: str, name: str, tags: dict[str, str]) -> RunInfo:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        with _tolerated("RESOURCE_ALREADY_EXISTS"):
            client.create_experiment(experiment)
        found = client.get_experiment_by_name(experiment)
    for key, value in EXPERIMENT_TAGS.items():
        if found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    cut = {key: text[:TAG_CHARACTERS] for key, text in tags.items()}
    return _info(client.create_run(found.experiment_id, tags=cut, run_name=name))


def _resume(client: Any, run_id: str, params: dict[str, str], tags: dict[str, str]) -> RunInfo:
    run = None
    with _tolerated("RESOURCE_DOES_NOT_EXIST"):
        run = client.get_run(run_id)
    if run is None or run.info.lifecycle_stage == "deleted":
        name = params.get("name", "NAME")
        raise TrainingError(
            f"there is no run {run_id} in MLflow to resume, but S3 still has the files of {name}: remove them with "
            f"`tinyemo runs rm {name}`, or start the recipe under another name with --set name=..."
        )
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


def _log_texts(client: Any, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    entries = [Param(key, text) for key, text in params.items()]
    marks = [RunTag(key, text[:TAG_CHARACTERS]) for key, text in tags.items()]
    for first in range(0, max(len(entries), len(marks)), TEXTS_PER_REQUEST // 2):
        batch = slice(first, first + TEXTS_PER_REQUEST // 2)
        client.log_batch(run_id, params=entries[batch], tags=marks[batch])
