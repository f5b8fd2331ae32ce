"""The loop of one rank that only takes batches: what training would see of the data, without a model."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.recipe import Recipe
from orchestration.streaming.ledger import Ledger
from orchestration.streaming.ordered_stream import Waits
from orchestration.streaming.record_stream import RecordPlan, build_record_dataset, open_record_stream

if TYPE_CHECKING:
    import ray.data

PROGRESS = "progress.json"


@dataclass(frozen=True)
class StreamJob:
    """What every rank gets to know of a run that only reads.

    Attributes:
        folder: S3 folder of the run.
        has_ledger: whether ranks write down which record was in which step.
        resume_from: S3 folder of a checkpoint, or None for a fresh start.
        start_step: steps done in that checkpoint.
    """

    recipe: Recipe
    plan: RecordPlan
    folder: str
    has_ledger: bool
    resume_from: str | None = None
    start_step: int = 0

    def datasets(self) -> dict[str, ray.data.Dataset]:
        """The records from `start_step` on."""
        return {"samples": build_record_dataset(self.plan, self.start_step)}


def stream_loop_per_worker(config: dict[str, Any]) -> None:
    """Take every batch of the plan on this rank; `report` is a barrier."""
    import ray.train

    job: StreamJob = config["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    ledger = Ledger(job.folder, attempt=context.get_experiment_name(), rank=rank)
    samples = ray.train.get_dataset_shard("samples")
    stream = Waits(open_record_stream(samples, job.plan, rank=rank, start_step=job.start_step))
    # What was read ahead while the workers came up would flatter the rate: the second half of the steps is timed.
    half = (job.start_step + job.plan.num_steps) // 2
    half_at, step = time.perf_counter(), job.start_step

    for batch in stream:
        if step == half:
            half_at = time.perf_counter()
        step = batch.step + 1
        if job.has_ledger:
            ledger.add(batch.epoch, batch.step, batch.ids)
        every = job.recipe.checkpoint.every_steps
        if (every and step % every == 0) or step % job.plan.steps.steps_per_epoch == 0:
            ledger.flush()
            _report(job, rank, {"step": step, "is_final": False})
    ledger.flush()
    size = job.plan.steps.global_batch_size
    figures = {
        "first_batch_s": stream.first_s,
        "samples_per_s": (step - half) * size / (time.perf_counter() - half_at),
        "num_samples": (step - job.start_step) * size,
    }
    _report(job, rank, {"step": step, "is_final": True, **figures})


def _report(job: StreamJob, rank: int, metrics: dict[str, Any]) -> None:
    """A checkpoint that holds how far the run is, and metrics; a barrier."""
    import ray.train

    epoch, step = divmod(metrics["step"], job.plan.steps.steps_per_epoch)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / PROGRESS).write_text(json.dumps({"epoch": epoch, "step": step}))
        checkpoint = ray.train.Checkpoint.from_directory(name) if rank == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint)
