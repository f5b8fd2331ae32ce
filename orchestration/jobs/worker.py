"""THE loop of one rank: build, restore, step, log, measure, checkpoint, end. Every stage of every model runs it.

What differs between models is a task: a module with the functions of `Task`. Logging and checkpoints are separate
clocks. Ranks agree on both without a collective per step: each time they log, they share how long a step takes and
derive the next step to log from that.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import ray.data
import ray.train
import torch
from ray.train.torch import get_device

from orchestration.data.stream import Waits
from orchestration.jobs.checkpoints import PROGRESS, restored
from orchestration.recipe import Recipe
from orchestration.services.engine import Engine, save_engine
from orchestration.services.tracking import system_metrics
from tinyemo.errors import TrainingError

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
"""Seconds between two logs where train.log_every_steps is not set."""
REPORT_GAP_S = 1.0
"""Reports that follow each other faster would wait for Ray Train's controller, which polls once a second."""
Point = dict[str, Any]
"""Figures of one step by metric key: floats, or tensors () on the device that are read when they are logged."""


class State(Protocol):
    """State that a task keeps on a rank while a stage runs."""

    engine: Engine | None


class Task(Protocol):
    """The functions of a task module; every rank calls each of them at the same steps."""

    def build(self, stage: Stage, device: torch.device) -> Any:
        """Return the task's `State`: model, engine and whatever a step needs."""

    def take_step(self, state: Any, batch: Any, *, is_logged: bool) -> Point:
        """Take one step over this rank's batch; `is_logged` says that costly figures are wanted."""

    def rates(self, state: Any, elapsed_s: float) -> dict[str, float]:
        """Return figures of the steps since the last call."""

    def measure(self, state: Any, stage: Stage, epoch: int, step: int) -> dict[str, float]:
        """Return validation figures after an epoch."""

    def save(self, state: Any, folder: Path) -> None:
        """Write what the engine does not hold."""

    def load(self, state: Any, folder: Path) -> None:
        """Read what `save` wrote."""

    def finish(self, state: Any, stage: Stage, folder: Path) -> dict[str, Any]:
        """Write the stage's outcome and return its final figures."""


@dataclass(frozen=True)
class Stage:
    """Everything a rank needs to run one stage; pickled to the workers.

    Attributes:
        task: name of the module with the functions of `Task`.
        name: of the stage, unique in the run.
        streams: by name; "train" is stepped through, the task reads the others.
        job: what the task itself needs.
        device: "gpu" or "cpu", decided once per run.
        prefix: stands for `train/` in MLflow, so that two stages in one MLflow run do not share a curve; empty for a
            stage whose figures stay in S3.
        run_id: MLflow run that the use of each node is logged to; None for none.
        params: of the stage's own MLflow run, a child of the recipe's; None for a stage without one.
        tags: likewise.
        resume_from: S3 folder of a checkpoint, or None for a fresh start.
        start_step: optimizer steps done in that checkpoint.
    """

    task: str
    name: str
    recipe: Recipe
    streams: dict[str, Any]
    job: Any
    device: str = "cpu"
    prefix: str = "train"
    run_id: str | None = None
    params: dict[str, Any] | None = None
    tags: dict[str, str] = field(default_factory=dict)
    resume_from: str | None = None
    start_step: int = 0

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole stage."""
        return int(self.streams["train"].num_steps)

    def functions(self) -> Task:
        """Return the task module."""
        found: Any = importlib.import_module(self.task)
        return cast(Task, found)

    def datasets(self) -> dict[str, ray.data.Dataset]:
        """Return the Ray Data pipelines of the streams, "train" from `start_step` on."""
        return {
            name: stream.dataset(self.start_step if name == "train" else 0) for name, stream in self.streams.items()
        }

    def batches(self, name: str, start_step: int = 0) -> Iterator[Any]:
        """Return this rank's batches of a stream."""
        rank = ray.train.get_context().get_world_rank()
        shard = ray.train.get_dataset_shard(name)
        found: Iterator[Any] = self.streams[name].batches(shard, rank=rank, start_step=start_step)
        return found


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Run one stage on this rank, and log the use of its node from the node's first rank."""
    stage: Stage = config["stage"]
    context = ray.train.get_context()
    node = f"node{context.get_node_rank()}"
    with system_metrics(stage.run_id if context.get_local_rank() == 0 else None, node):
        run_steps(stage, get_device())


def run_steps(stage: Stage, device: torch.device) -> None:
    """Take every step of a stage on this rank; `report` is a barrier."""
    task = stage.functions()
    set_up_process(stage, device)
    state = task.build(stage, device)
    step = restore(stage, state)
    epoch_ends = stage.streams["train"].epoch_ends()
    batches = Waits(stage.batches("train", step))
    log = Log(stage, device, step)
    every_steps = stage.recipe.checkpoint.every_steps

    for batch in batches:
        log.add(batch, task.take_step(state, batch, is_logged=log.is_due(batch.step + 1)))
        step = batch.step + 1
        is_epoch_end = step in epoch_ends
        is_checkpoint = is_epoch_end or (every_steps > 0 and step % every_steps == 0)
        if log.is_due(step) or is_checkpoint:
            elapsed_s = log.read(step)
            waits = {"train/wait_share": batches.take_share(), "train/first_batch_s": batches.first_s}
            log.put(step, {**task.rates(state, elapsed_s), **waits})
            is_checkpoint |= log.is_checkpoint_late
        if is_epoch_end:
            log.put(step, task.measure(state, stage, epoch_ends.index(step) + 1, step))
        if is_checkpoint and step < stage.num_steps:
            report(stage, state, log, step)
        elif log.is_sent:
            report_figures(stage, log, step)
    report(stage, state, log, step, is_final=True)


def set_up_process(stage: Stage, device: torch.device) -> None:
    """Let rank 0 speak, and on a CPU use as many threads as Ray set CPUs aside; more would fight with other ranks."""
    is_first = torch.distributed.get_rank() == 0
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING)
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(stage.recipe.workers.cpus_per_worker)))


def restore(stage: Stage, state: State) -> int:
    """Restore the state from the stage's checkpoint; return the steps done in it, 0 for a fresh start."""
    if stage.resume_from is None:
        return 0
    context = ray.train.get_context()
    with restored(
        stage.resume_from,
        state.engine,
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world_size=context.get_world_size(),
    ) as folder:
        stage.functions().load(state, folder)
        step = int(json.loads((folder / PROGRESS).read_text())["step"])
    logger.info("resumed at step %d", step)
    return step


def require_finite(loss: float, step: int, ids: list[str], advice: str) -> None:
    """Raise TrainingError with the step and this rank's samples where a loss is not finite."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"train/loss is {loss} at step {step}; this rank's samples: {', '.join(ids)}. {advice} or look at them"
        )


class Log:
    """Figures that were not sent yet, and the steps at which all ranks send them.

    Attributes:
        curve: points that the next report carries.
        is_sent: whether the last `read` came at a time to send a report without a checkpoint.
        is_checkpoint_late: whether checkpoint.every_minutes have passed at the last `read`.
    """

    def __init__(self, stage: Stage, device: torch.device, step: int) -> None:
        self.curve: list[dict[str, float]] = []
        self.is_sent = self.is_checkpoint_late = False
        self._every_steps = stage.recipe.train.log_every_steps
        self._checkpoint_s = 60 * stage.recipe.checkpoint.every_minutes or math.inf
        self._device = device
        self._pending: list[tuple[int, list[str], Point]] = []
        self._next = step + (self._every_steps or 1)
        self._sent_at = self._saved_at = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Start the clock of steps again: what came since the last call is no training."""
        self._began_at = self._step_began_at = time.perf_counter()

    def add(self, batch: Any, point: Point) -> None:
        """Keep the figures of a step; tensors stay on the device."""
        now = time.perf_counter()
        self._pending.append((batch.step, batch.ids, {**point, "train/step_s": now - self._step_began_at}))
        self._step_began_at = now

    def put(self, step: int, figures: dict[str, float]) -> None:
        """Add figures that are not those of one step."""
        if figures:
            self.curve.append({"step": step, **figures})

    def is_due(self, step: int) -> bool:
        """Return whether all ranks log after `step` steps."""
        return step >= self._next

    def read(self, step: int) -> float:
        """Read pending figures from the device and agree on the next log; return the seconds the steps took.

        Raises:
            TrainingError: a loss is not finite; every rank raises at the same step.
        """
        for at, ids, point in self._pending:
            self.curve.append({"step": at, **{key: float(value) for key, value in point.items()}})
            require_finite(self.curve[-1].get("train/loss", 0.0), at, ids, "Lower the learning rate")
        now = time.perf_counter()
        elapsed_s = now - self._began_at
        clocks = torch.tensor([elapsed_s, now - self._sent_at, now - self._saved_at], device=self._device)
        torch.distributed.all_reduce(clocks)
        mean_s, sent_s, saved_s = (float(value) / torch.distributed.get_world_size() for value in clocks)
        num_steps = max(1, len(self._pending))
        self._pending = []
        self._next = step + (self._every_steps or min(10_000, max(1, round(LOG_EVERY_S * num_steps / mean_s))))
        self.is_sent = self._every_steps is not None or sent_s > REPORT_GAP_S
        self.is_checkpoint_late = saved_s > self._checkpoint_s
        return elapsed_s

    def take(self, *, is_saved: bool) -> list[dict[str, float]]:
        """Return the curve to send and start the clocks again."""
        curve, self.curve = self.curve, []
        self._sent_at = time.perf_counter()
        self.is_sent = False
        if is_saved:
            self._saved_at = self._sent_at
        return curve


def report_figures(stage: Stage, log: Log, step: int) -> None:
    """Send figures without a checkpoint."""
    ray.train.report(_document(stage, step, log.take(is_saved=False)))
    log.restart()


def report(stage: Stage, state: State, log: Log, step: int, *, is_final: bool = False) -> None:
    """Store a checkpoint in S3, every rank its own part, and send figures; a barrier.

    The final checkpoint holds the outcome of the stage in place of the engine.
    """
    task, figures = stage.functions(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if is_final:
            figures = {**task.finish(state, stage, folder), "is_final": True}
        elif state.engine is not None:
            save_engine(state.engine, folder)
        task.save(state, folder)
        if torch.distributed.get_rank() == 0:
            (folder / PROGRESS).write_text(json.dumps({"step": step}))
        checkpoint = ray.train.Checkpoint.from_directory(folder) if any(folder.iterdir()) else None
        ray.train.report({**_document(stage, step, log.take(is_saved=True)), **figures}, checkpoint=checkpoint)
    log.restart()


def _document(stage: Stage, step: int, curve: list[dict[str, float]]) -> dict[str, Any]:
    return {"step": step, "num_steps": stage.num_steps, "curve": curve, "is_final": False}
