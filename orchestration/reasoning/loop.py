"""The loop of one rank over one stage of the reasoning model: build, restore, loop over the stream, report."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from orchestration.reasoning.first_rank import build_on_first_rank, give_freed_memory_back
from orchestration.reasoning.steps import Inputs, mean_loss, take_step
from orchestration.reasoning.throughput import Meter
from orchestration.reasoning.weights import TRAINED_WEIGHTS, build_for_stage
from orchestration.recipe import Recipe
from orchestration.recipe.stage_config import StageConfig
from orchestration.services import storage
from orchestration.services.engine import Engine, load_engine, save_engine, start_engine, trained_state_dict
from orchestration.streaming.ordered_stream import Waits
from orchestration.streaming.record_stream import RecordPlan, build_record_dataset, open_record_stream
from tinyemo.reasoner.flops import flop_model
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.trained import parameter_groups

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


@dataclass(frozen=True)
class StageJob:
    """What every rank gets to know of a stage.

    Attributes:
        stage: name of the stage in the recipe.
        plan: of the records that it trains on.
        validation: of the records that it is measured on after each epoch; None for none.
        weights: S3 folder of each earlier stage's trained weights, by its name.
        resume_from: S3 folder of a checkpoint, or None for a fresh start.
        start_step: optimizer steps done in that checkpoint.
    """

    recipe: Recipe
    stage: str
    plan: RecordPlan
    validation: RecordPlan | None
    weights: dict[str, str]
    resume_from: str | None = None
    start_step: int = 0

    @property
    def config(self) -> StageConfig:
        """The stage's section."""
        return self.recipe.stages[self.stage]

    def datasets(self) -> dict[str, ray.data.Dataset]:
        """The records from `start_step` on, and those of validation."""
        found = {"samples": build_record_dataset(self.plan, self.start_step)}
        return found | ({"validation": build_record_dataset(self.validation, 0)} if self.validation else {})


def stage_loop_per_worker(config: dict[str, Any]) -> None:
    """Train one stage on this rank; every rank takes the steps of the plan, and `report` is a barrier."""
    import ray.train
    from ray.train.torch import get_device

    job: StageJob = config["job"]
    recipe, plan = job.recipe, job.plan
    rank, device = ray.train.get_context().get_world_rank(), get_device()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING)
    use_threads(recipe)
    give_freed_memory_back(at_once=True)
    model = build_on_first_rank(lambda: build_for_stage(recipe, job.stage, job.weights), job.config, recipe.train.seed)
    meter = Meter(flop_model(model), device, plan.world_size)
    engine = start_stage(model, recipe, job.config, num_steps=plan.num_steps, world_size=plan.world_size)
    # Whoever asks for ZeRO 3 is short of memory: on a CPU that saves 40 % of it for a fifth more time.
    give_freed_memory_back(at_once=recipe.engine.zero_stage == 3)
    preprocessing, image_token_id = model.config.encoder_spec.preprocessing, model.config.image_token_id
    inputs = Inputs(preprocessing, device, image_token_id, has_images=job.config.images)
    step = restore(engine, job)
    stream = Waits(open_record_stream(ray.train.get_dataset_shard("samples"), plan, rank=rank, start_step=step))
    curve: list[dict[str, float]] = []
    meter.skip()

    for batch in stream:
        parts = inputs.micro_batches(batch, job.config.micro_batch_size)
        # Adam's moments are there from the second step on.
        point, work = take_step(engine, parts, batch.step, recipe.train.seed, counts_memory=batch.step == 1)
        curve.append({**point, "train/step_s": meter.add(work)})
        step = batch.step + 1
        is_epoch_end = step % plan.steps.steps_per_epoch == 0 or step == plan.num_steps
        if is_epoch_end or is_due(recipe.checkpoint.every_steps, step):
            curve.append({"step": step, **meter.take(), "train/wait_share": stream.take_share()})
        if is_epoch_end and job.validation is not None:
            shard = ray.train.get_dataset_shard("validation")
            records = open_record_stream(shard, job.validation, rank=rank, start_step=0)
            curve.append({"step": step, "val/loss": mean_loss(engine, inputs, records, job.config.micro_batch_size)})
            meter.skip()
        if step < plan.num_steps and (is_epoch_end or is_due(recipe.checkpoint.every_steps, step)):
            report(engine, step, curve)
            curve = []
            meter.skip()
    report_end(engine, step, curve)


def is_due(every_steps: int, step: int) -> bool:
    """Whether a checkpoint is written after this many steps, in mid-epoch too."""
    return every_steps > 0 and step % every_steps == 0


def use_threads(recipe: Recipe) -> None:
    """On a CPU, as many threads in this process as Ray set CPUs aside for it; more would fight with the other ranks."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(recipe.workers.cpus_per_worker)))


def start_stage(model: Reasoner, recipe: Recipe, stage: StageConfig, *, num_steps: int, world_size: int) -> Engine:
    """The engine of a stage: AdamW over what the stage trains, the connector at its own rate, under the schedule."""
    groups = parameter_groups(
        model, learning_rate=stage.learning_rate, connector_learning_rate=stage.connector_learning_rate
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay, fused=True)

    def schedule(wrapped: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: stage.rate_factor(step, num_steps))

    return start_engine(
        model,
        recipe.engine,
        optimizer,
        schedule,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        world_size=world_size,
    )


def report(engine: Engine, step: int, curve: list[dict[str, float]]) -> None:
    """Checkpoint to S3, every rank its own part, and metrics to the driver's run; a barrier."""
    import ray.train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_engine(engine, folder)
        if torch.distributed.get_rank() == 0:
            (folder / PROGRESS).write_text(json.dumps({"step": step}))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": step, "curve": curve, **_shown(curve), "is_final": False}, checkpoint=checkpoint)


def _shown(curve: list[dict[str, float]]) -> dict[str, float]:
    """The newest figures of a curve under the names that the driver's progress line has."""
    newest: dict[str, float] = {}
    for point in curve:
        newest |= point
    names = {"loss": "train/loss", "val_loss": "val/loss", "tokens_per_s": "train/tokens_per_s"}
    return {name: newest[key] for name, key in names.items() if key in newest}


def report_end(engine: Engine, step: int, curve: list[dict[str, float]]) -> None:
    """The stage's last word: what it trained, whole."""
    import ray.train

    weights = trained_state_dict(engine)
    with tempfile.TemporaryDirectory() as name:
        if torch.distributed.get_rank() == 0:
            save_file(weights, Path(name) / TRAINED_WEIGHTS)
        checkpoint = ray.train.Checkpoint.from_directory(name) if torch.distributed.get_rank() == 0 else None
        ray.train.report({"step": step, "curve": curve, "is_final": True}, checkpoint=checkpoint)


def restore(engine: Engine, job: StageJob) -> int:
    """Steps done in the checkpoint that the job names, the engine restored to it; 0 for a fresh start."""
    if job.resume_from is None:
        return 0
    with _downloaded(job.resume_from) as folder:
        load_engine(engine, folder)
        step = int(json.loads((folder / PROGRESS).read_text())["step"])
    logger.info("resumed at step %d", step)
    return step


@contextmanager
def _downloaded(uri: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        storage.download_folder(uri, Path(name))
        yield Path(name)
