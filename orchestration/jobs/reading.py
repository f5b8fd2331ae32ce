"""The reading's task: take every batch of the plan without a model, as `tinyemo stream` does.

It answers before a GPU hour is spent: does the data flow fast enough, and is every record where the plan says?
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from orchestration.data.ledger import Ledger, check_ledger, read_ledger
from orchestration.data.plan import shuffle_quality
from orchestration.data.stream import Stream
from orchestration.jobs.checkpoints import StageState, read_curve
from orchestration.jobs.results import StreamResult
from orchestration.jobs.worker import Point, Stage
from orchestration.recipe import Recipe
from tinyemo.errors import TrainingError


@dataclass
class ReadingState:
    """State of a rank while it reads.

    Attributes:
        ledger: lines of this rank; None without a ledger.
        half: step from which reading is timed: what was read ahead while the workers came up would flatter the rate.
        half_at: time at which that step came.
    """

    ledger: Ledger | None
    half: int
    half_at: float
    engine: None = None
    step: int = 0


def build(stage: Stage, device: torch.device) -> ReadingState:
    """Return the state of a reading; `stage.job` is the run's S3 folder, or None without a ledger."""
    import ray.train

    context = ray.train.get_context()
    attempt, rank = context.get_experiment_name(), context.get_world_rank()
    ledger = Ledger(stage.job, attempt=attempt, rank=rank) if stage.job is not None else None
    return ReadingState(ledger, (stage.start_step + stage.num_steps) // 2, time.perf_counter())


def take_step(state: ReadingState, batch: Any, *, is_logged: bool) -> Point:
    """Note which records this rank got."""
    if batch.step == state.half:
        state.half_at = time.perf_counter()
    if state.ledger is not None:
        state.ledger.add(batch.epoch, batch.step, batch.ids)
    state.step = batch.step + 1
    return {}


def rates(state: ReadingState, elapsed_s: float) -> dict[str, float]:
    """Return no figures."""
    return {}


def measure(state: ReadingState, stage: Stage, epoch: int, step: int) -> dict[str, float]:
    """Return no figures."""
    return {}


def save(state: ReadingState, folder: Path) -> None:
    """Write the ledger's lines to S3."""
    if state.ledger is not None:
        state.ledger.flush()


def load(state: ReadingState, folder: Path) -> None:
    """Read nothing."""


def finish(state: ReadingState, stage: Stage, folder: Path) -> dict[str, Any]:
    """Return the rate of the second half, samples per second, and the number of samples of this attempt."""
    size = stage.streams["train"].plan.global_batch_size
    return {
        "samples_per_s": (state.step - state.half) * size / (time.perf_counter() - state.half_at),
        "num_samples": (state.step - stage.start_step) * size,
    }


def stage(plan: Stream, recipe: Recipe, folder: str, *, has_ledger: bool) -> Stage:
    """Return the only stage of a reading."""
    return Stage(__name__, "read", recipe, {"train": plan}, folder if has_ledger else None, prefix="")


def conclude(plan: Stream, recipe: Recipe, state: StageState, folder: str, *, has_ledger: bool) -> StreamResult:
    """Return the result of a finished reading."""
    first_s = [point["train/first_batch_s"] for _, point in read_curve(state.folder) if "train/first_batch_s" in point]
    return StreamResult(
        name=recipe.name,
        folder=folder,
        num_steps=plan.num_steps,
        num_samples=state.metrics["num_samples"],
        samples_per_s=state.metrics["samples_per_s"],
        first_batch_s=first_s[-1],
        shuffle=shuffle_quality(plan.plan),
        ledger=asdict(check_ledger(read_ledger(folder), plan, plan.num_steps)) if has_ledger else None,
    )


def require_exact(result: StreamResult) -> None:
    """Raise TrainingError where a ledger is not the plan."""
    found = result.ledger or {}
    if any(found.get(key) for key in ("num_wrong_steps", "num_lost", "num_doubled")):
        raise TrainingError(
            f"the ledger of {result.folder} is not the plan: {found['num_wrong_steps']} steps differ, "
            f"{found['num_lost']} records lost, {found['num_doubled']} doubled; please report it"
        )
