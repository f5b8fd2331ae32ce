"""One stage under Ray Train: attempts that go on from the last checkpoint until the final report is in S3.

Only a lost process or node, a preemption or a broken network starts another attempt. Ray Train's own retries would
also repeat errors that no retry mends, so they are off and attempts are counted here.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestration.data.stream import configure_ray_data
from orchestration.jobs.checkpoints import Curve, StageState, delete_old_attempts, read_curve, read_state
from orchestration.jobs.lease import Lease
from orchestration.jobs.worker import Stage, train_loop_per_worker
from orchestration.services import storage
from orchestration.services.ray_cluster import last_line, require_cluster, wait_for_resources
from orchestration.services.tracking import RunLogger
from tinyemo.errors import PlatformError, StorageError, TinyEmoError, TrainingError

logger = logging.getLogger(__name__)

POLL_S = 1.0
Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with ("RUN STAGE", steps done, steps in all, newest figures) at every log."""
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.OwnerDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RpcError,
    ConnectionError,
    TimeoutError,
    storage.NoAnswerError,
)
"""Errors of a lost process, a lost node or the network."""
LOST_NAMES = re.compile(
    r"^(WorkerHealthCheck|WorkerGroupStartup|Dist(Network|Backend|Store)Error|\w*CollectiveTimeout)"
)
LOST_TEXT = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|preempt", re.IGNORECASE)
"""Messages of a collective whose peer has gone: torch raises plain RuntimeError for gloo."""
LOST_S3 = re.compile(
    r"AWS Error (NETWORK_CONNECTION|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|SLOW_DOWN|THROTTLING)"
)
"""Messages of a request that S3 did not answer: pyarrow, which stores Ray Train's checkpoints, raises plain OSError."""
_WRAPPERS = ("cause", "_base_exc", "controller_failure")


class ReportCallback(UserCallback):
    """Record each report; runs in Ray Train's controller.

    Attributes:
        folder: S3 folder of the stage.
        prefix: stands for `train/` in MLflow, so that two stages of a run do not share a curve.
        lease: of the run; a driver that lost it writes nothing more.
    """

    def __init__(
        self, folder: str, run_logger: RunLogger | None, prefix: str = "train", lease: Lease | None = None
    ) -> None:
        self.folder = folder
        self.run_logger = run_logger
        self.prefix = prefix
        self.lease = lease

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Store figures, and name the checkpoint as the newest once all ranks have uploaded their parts."""
        report = dict(metrics[0])
        step, is_final = int(report["step"]), bool(report.pop("is_final"))
        curve: Curve = [(int(point.pop("step")), point) for point in report.pop("curve", [])]
        for _, point in curve:
            report |= point
        if curve:
            self._write(f"{self.folder}/curve/{curve[0][0]:09d}-{step:09d}.json", curve)
        self._write(f"{self.folder}/progress.json", report)
        if checkpoint is not None:
            state = StageState(self.folder, f"s3://{checkpoint.path}", step, is_final, report)
            self._write(f"{self.folder}/latest.json", asdict(state))
        self._log(curve)

    def _write(self, uri: str, document: Any) -> None:
        (self.lease.write_json if self.lease is not None else storage.write_json)(uri, document)

    def _log(self, curve: Curve) -> None:
        if self.run_logger is None:
            return
        try:
            self.run_logger.log_curve(self._renamed(curve))
        except PlatformError as error:
            logger.warning("this part of the curve is not in MLflow before the stage's end: %s", error)

    def complete(self) -> None:
        """Send what MLflow did not take while the stage ran; the driver calls it at the stage's end.

        Raises:
            PlatformError: MLflow does not answer; the same command later makes up for it.
        """
        if self.run_logger is not None:
            self.run_logger.log_curve(self._renamed(read_curve(self.folder)))

    def _renamed(self, curve: Curve) -> Curve:
        return [(step, {k.replace("train/", f"{self.prefix}/"): v for k, v in row.items()}) for step, row in curve]


def run_stage(stage: Stage, callback: ReportCallback, progress: Progress | None = None) -> StageState:
    """Run a stage on every worker until its final report is in S3, from the newest checkpoint there if one exists.

    Raises:
        TrainingError: workers were lost more than workers.max_failures times, or a worker raised.
        PlatformError: the Ray cluster is gone, or MLflow does not answer at the stage's end; the same command goes on.
        TinyEmoError: raised by a worker, unchanged.
    """
    failures, folder = 0, callback.folder
    while True:
        state = read_state(folder)
        is_final = state is not None and state.is_final
        if is_final:
            callback.complete()
        if callback.lease is not None:
            callback.lease.check()  # A driver that lost its lease must not delete its successor's checkpoints.
        delete_old_attempts(folder, state)
        if state is not None and is_final:
            return state
        if state is not None:
            logger.warning("going on from step %d of %s", state.step, folder)
            stage = replace(stage, resume_from=state.checkpoint, start_step=state.step)
        try:
            with _watched(stage, folder, progress):
                _run_attempt(stage, callback, is_restart=failures > 0 or state is not None)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            _raise_if_ours(error)
            require_cluster(error)
            failures += 1
            allowed = stage.recipe.workers.max_failures
            logger.warning("attempt failed (%d of %d allowed): %s", failures, allowed, last_line(error))
            if failures > allowed:
                raise TrainingError(
                    f"training failed {failures} times, at last: {last_line(error)}; "
                    "run the same command again to go on, or see the logs in the Ray dashboard"
                ) from error


def attempt_name(folder: str) -> str:
    """Return a name that sorts after those of a run's earlier attempts, also where this node's clock is behind.

    Args:
        folder: S3 folder of the stage; the ledger of attempts that left nothing there lies beside it.
    """
    names = " ".join(storage.list_prefix(folder.rsplit("/", 1)[0]))
    earlier = [int(number) for number in re.findall(r"/attempt-(\d+)", names)]
    return f"attempt-{max([int(time.time() * 1000), *(number + 1 for number in earlier)])}"


def _run_attempt(stage: Stage, callback: ReportCallback, *, is_restart: bool) -> None:
    workers, is_gpu = stage.recipe.workers, stage.device == "gpu"
    # Ray Train passes this variable on to its controller; a report waits for the poll before the next one.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    bucket, key = storage.parse_s3_uri(callback.folder)
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": 1.0} if is_gpu else {})
    name = f"{stage.recipe.name} {stage.name}"
    wait_for_resources(
        [resources] * workers.num_workers, workers.start_timeout_s, name, logger.warning, may_rejoin=is_restart
    )
    data_config = configure_ray_data()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"stage": stage},
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo", timeout_s=int(workers.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=is_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=attempt_name(callback.folder),
            storage_path=f"{bucket}/{key}",
            storage_filesystem=storage.filesystem(),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=stage.recipe.checkpoint.keep),
            callbacks=[callback],
        ),
        datasets=stage.datasets(),
        dataset_config=data_config,
    )
    with _interruptible():
        trainer.fit()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C in the block, and take Ray Train's handler of a dead trainer away after it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:  # Ray Train ends a run that it aborted so, with exit code 0.
        raise KeyboardInterrupt("stopped by a signal") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def _watched(stage: Stage, folder: str, progress: Progress | None) -> Iterator[None]:
    """Call `progress` from a thread for each new report of the stage while the block runs."""
    if progress is None:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        seen = -1
        while not stop.wait(POLL_S):
            try:
                report = storage.read_json(f"{folder}/progress.json")
            except StorageError:
                continue  # No report yet, or S3 is away: the trainer's own reads will say what to do.
            if report["step"] > seen:
                seen = report["step"]
                progress(f"{stage.recipe.name} {stage.name}", seen, report["num_steps"], _figures(report))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _figures(report: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in report.items() if "/" in key}


def _raise_if_ours(error: BaseException) -> None:
    """Return where another attempt may mend `error`; raise where no attempt would.

    Raises:
        TinyEmoError: raised by our code in a worker or in the controller, in one line.
        TrainingError: any other exception of a worker; its traceback goes to the log.
    """
    for one in unwrapped(error):
        if isinstance(one, TinyEmoError) and not isinstance(one, storage.NoAnswerError):
            # Ray mixes its own class into ours and prints a remote traceback: keep our class and our line.
            kind = next(k for k in type(one).__mro__ if k.__module__ == TinyEmoError.__module__)
            raise kind(str(getattr(one, "cause", one)).strip().splitlines()[0]) from error
    failures = getattr(error, "worker_failures", None) or {0: error}
    # Peers of a rank that raised lose their connection: one error that is none of the network's decides.
    defects = [one for one in failures.values() if not any(is_lost(inner) for inner in unwrapped(one))]
    if not defects:
        return
    logger.error("a worker failed:\n%s", error)
    cause = list(unwrapped(defects[0]))[-1]
    raise TrainingError(
        f"a worker raised {type(cause).__name__}: {last_line(cause)}; no retry mends that, the traceback stands above"
    ) from error


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that a process, a node or a connection was lost."""
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" in str(error):
        return False  # The actor's own constructor raised.
    if isinstance(error, LOST) or LOST_NAMES.match(type(error).__name__):
        return True
    pattern = LOST_S3 if isinstance(error, OSError) else LOST_TEXT
    return isinstance(error, OSError | RuntimeError) and bool(pattern.search(str(error)))


def unwrapped(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and, innermost last, every error that it wraps."""
    todo, seen = [error], set[int]()
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        wrapped = [one.__cause__, one.__context__, *(getattr(one, name, None) for name in _WRAPPERS)]
        wrapped += getattr(one, "worker_failures", {}).values()
        todo += [inner for inner in wrapped if isinstance(inner, BaseException)]
