"""One phase of a run under Ray Train: attempts that go on from the last checkpoint until the final report is in S3.

Ray Train's own retries would also repeat errors that no retry mends (a corrupt shard, a loss that is not finite), so a
phase has them off and counts attempts itself. `latest.json` beside the attempts names the newest checkpoint that every
rank has uploaded; it is written by the controller after the report is complete, so an attempt that died while uploading
leaves the one before.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train
from ray.train import ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestration.jobs.stage_state import Curve, PhaseState, read_curve, read_state
from orchestration.services import storage
from orchestration.services.ray_cluster import last_line, require_cluster
from orchestration.services.tracking import RunLogger
from orchestration.streaming.ordered_stream import configure_ray_data
from tinyemo.errors import PlatformError, StorageError, TinyEmoError, TrainingError

logger = logging.getLogger(__name__)

POLL_S = 1.0


class ReportCallback(UserCallback):
    """Runs in Ray Train's controller: names the checkpoint as the newest, keeps the curve, shows it in MLflow.

    Attributes:
        folder: S3 folder of the phase.
        prefix: what stands for `train/` in MLflow, so that two phases of a run do not share a curve.
    """

    def __init__(self, folder: str, run_logger: RunLogger | None, prefix: str = "train") -> None:
        self.folder = folder
        self.run_logger = run_logger
        self.prefix = prefix

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called once all ranks have reported and the checkpoint is whole."""
        report = dict(metrics[0])
        step, is_final = int(report["step"]), bool(report.pop("is_final"))
        curve: Curve = [(int(point.pop("step")), point) for point in report.pop("curve", [])]
        if not is_final:
            curve.append((step, {k: float(v) for k, v in report.items() if k.startswith(("val/", "train/"))}))
        if curve:
            storage.write_json(f"{self.folder}/curve/{curve[0][0]:09d}.json", curve)
        state = PhaseState(self.folder, f"s3://{checkpoint.path}", step, is_final, report)
        storage.write_json(f"{self.folder}/latest.json", asdict(state))
        if self.run_logger is not None:
            try:
                self.run_logger.log_curve(self._renamed(curve))
            except PlatformError as error:
                logger.warning("this part of the curve is not in MLflow before the phase's end: %s", error)

    def complete(self) -> None:
        """Called by the driver once the phase has ended: what MLflow did not take while it ran is sent again.

        Raises:
            PlatformError: MLflow does not answer; the same call later makes up for it.
        """
        if self.run_logger is not None:
            self.run_logger.log_curve(self._renamed(read_curve(self.folder)))

    def _renamed(self, curve: Curve) -> Curve:
        return [(step, {k.replace("train/", f"{self.prefix}/"): v for k, v in row.items()}) for step, row in curve]


if TYPE_CHECKING:
    # A phase knows no job from inside: a projector's run need not wait for what a language model's imports.
    from orchestration.reasoning.evaluate import EvaluateJob
    from orchestration.reasoning.loop import StageJob
    from orchestration.streaming.loop import StreamJob
    from orchestration.training.loop import TrainJob

    Job = TrainJob | StreamJob | StageJob | EvaluateJob
Loop = Callable[[dict[str, Any]], None]


def run_phase(
    job: Job,
    loop: Loop,
    callback: ReportCallback,
    *,
    on_report: Callable[[PhaseState], None] | None = None,
) -> PhaseState:
    """Run `loop` on every worker until the final report is in S3, from the newest checkpoint there if one exists.

    Raises:
        TrainingError: workers were lost more than workers.max_failures times, or the run cannot go on.
        PlatformError: the Ray cluster is gone, or MLflow does not answer at the phase's end; the same call goes on.
        TinyEmoError: what a worker raised and no retry would mend.
    """
    failures, folder = 0, callback.folder
    while True:
        state = read_state(folder)
        if state is not None and state.is_final:
            callback.complete()
            return state
        if state is not None:
            logger.warning("going on from step %d of %s", state.step, folder)
            job = replace(job, resume_from=state.checkpoint, start_step=state.step)
        try:
            with _watched(folder, on_report):
                _run_attempt(job, loop, callback)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            # A lost worker, a controller that S3 kept waiting for too long or that is lost with its node: all mend by
            # another attempt, as long as there is a cluster.
            cause = find_cause([error, *getattr(error, "worker_failures", {}).values()])
            if cause is not None:
                raise cause from error
            if isinstance(error, ray.exceptions.RayTaskError):
                raise  # a defect of ours, with its traceback
            require_cluster(error)
            failures += 1
            allowed = job.recipe.workers.max_failures
            logger.warning("attempt failed (%d of %d allowed): %s", failures, allowed, last_line(error))
            if failures > allowed:
                raise TrainingError(
                    f"training failed {failures} times, at last: {last_line(error)}; "
                    "run the same command again to go on, or see the logs in the Ray dashboard"
                ) from error


def _run_attempt(job: Job, loop: Loop, callback: ReportCallback) -> None:
    recipe = job.recipe
    has_gpus = ray.cluster_resources().get("GPU", 0) >= recipe.workers.num_workers
    bucket, key = storage.parse_s3_uri(callback.folder)
    data_config = configure_ray_data()
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if has_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.workers.num_workers,
            use_gpu=has_gpus,
            resources_per_worker={"CPU": recipe.workers.cpus_per_worker} | ({"GPU": 1} if has_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{int(time.time() * 1000)}",
            storage_path=f"{bucket}/{key}",
            storage_filesystem=storage.filesystem(),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.checkpoint.keep),
            callbacks=[callback],
        ),
        datasets=job.datasets(),
        dataset_config=data_config,
    )
    with _interruptible():
        trainer.fit()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C in the block is KeyboardInterrupt again, and after it Ray Train's handler for a dead trainer is gone."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:  # how Ray Train ends a run that it aborted, with exit code 0
        raise KeyboardInterrupt("stopped by a signal") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def _watched(folder: str, on_report: Callable[[PhaseState], None] | None) -> Iterator[None]:
    """Call `on_report` in a thread for each new state of the phase while the block runs."""
    if on_report is None:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        seen = -1
        while not stop.wait(POLL_S):
            try:
                state = read_state(folder)
            except StorageError:
                continue  # the trainer's own reads will say it, with what to do
            if state is not None and state.step > seen and not state.is_final:
                seen = state.step
                on_report(state)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def find_cause(errors: list[BaseException]) -> TinyEmoError | None:
    """The first of our own errors among `errors` and what they wrap, if any."""
    seen: set[int] = set()
    while errors:
        error = errors.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, TinyEmoError):
            # Ray's mixture of its own error and ours prints a remote traceback, and Ray Data adds lines of its own to
            # ours: say our line alone.
            kind = next(k for k in type(error).__mro__ if k.__module__ == TinyEmoError.__module__)
            inner = getattr(error, "cause", error)
            found: TinyEmoError = kind(str(inner).strip().splitlines()[0])
            return found
        wrapped = [error.__cause__, error.__context__, *(getattr(error, name, None) for name in _WRAPPERS)]
        errors += [inner for inner in wrapped if isinstance(inner, BaseException)]
    return None


_WRAPPERS = ("cause", "base_exception", "_base_exception", "controller_failure")
