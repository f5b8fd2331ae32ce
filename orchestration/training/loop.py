"""The training loop of one rank: build, restore, loop over the stream, report."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestration.recipe import Recipe
from orchestration.services import storage
from orchestration.services.engine import Engine, build_engine, full_state_dict, load_engine, save_engine, train_step
from orchestration.streaming.feature_stream import Batch, StreamPlan, build_dataset, open_stream
from orchestration.streaming.ordered_stream import Waits
from tinyemo.errors import TrainingError
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.metrics import confusion_matrix
from tinyemo.objective import Objective, build_objective
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

BEST_WEIGHTS = "best.safetensors"
PROGRESS = "progress.json"


@dataclass(frozen=True)
class TrainJob:
    """What every rank gets to know of a run.

    Attributes:
        words: of the taxonomy, in the order of the labels' indices.
        resume_from: S3 folder of a checkpoint, or None for a fresh start.
        start_step: optimizer steps done in that checkpoint.
    """

    recipe: Recipe
    plan: StreamPlan
    labels: LabelEmbeddings
    words: tuple[str, ...]
    resume_from: str | None = None
    start_step: int = 0

    def datasets(self) -> dict[str, ray.data.Dataset]:
        """The samples from `start_step` on."""
        return {"samples": build_dataset(self.plan, self.start_step)}


@dataclass(frozen=True)
class Progress:
    """How far a run is, and its best epoch so far by validation."""

    step: int = 0
    best_step: int = 0
    best_epoch: int = 0
    best_top1_accuracy: float = -1.0

    def is_beaten_by(self, metrics: dict[str, float]) -> bool:
        """Whether a validation is at least as accurate: of equal epochs the later, which has seen more, is kept."""
        return metrics["val/top1_accuracy"] >= self.best_top1_accuracy


def build_projector(recipe: Recipe) -> MetricProjector:
    """The projector of a recipe with its seeded initial weights, equal on every rank."""
    torch.manual_seed(recipe.train.seed)
    return MetricProjector(recipe.projector)


def objective_of(recipe: Recipe, labels: LabelEmbeddings, words: tuple[str, ...]) -> Objective:
    """What a recipe trains its projector on."""
    return build_objective(
        recipe.loss,
        labels,
        words,
        synonyms_probability=recipe.labels.synonyms_probability,
        seed=recipe.train.seed,
        taxonomy=recipe.labels.resolved(TAXONOMIES["ekman"]),
        taxonomy_augmentation=recipe.labels.taxonomy_augmentation,
    )


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train one recipe on this rank; every rank takes the steps of the plan, and `report` is a barrier."""
    import ray.train
    from ray.train.torch import get_device

    job: TrainJob = config["job"]
    recipe, plan = job.recipe, job.plan
    rank, device = ray.train.get_context().get_world_rank(), get_device()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING)
    objective = objective_of(recipe, job.labels, job.words).to(device)
    engine = build_engine(
        build_projector(recipe),
        recipe.engine,
        recipe.optimizer,
        num_steps=int(plan.train.order.num_rows * recipe.train.num_epochs) // recipe.train.global_batch_size,
        global_batch_size=recipe.train.global_batch_size,
        world_size=plan.world_size,
    )
    progress, best = restore(engine, job)
    stream = Waits(open_stream(ray.train.get_dataset_shard("samples"), plan, rank=rank, start_step=progress.step))
    validation: list[Batch] = []
    curve: list[dict[str, float]] = []
    confusion = torch.zeros(len(job.words), len(job.words), dtype=torch.int64)
    started_at = time.perf_counter()
    epoch_ends = plan.train.steps_of_epoch_ends()

    for batch in stream:
        if batch.split == "validation":
            validation.append(batch)
        elif batch.split == "test":
            # Read once, after the last step, by the weights that validation chose.
            confusion += evaluate(recipe, best, objective, [batch])[0]
        else:
            curve.append(take_step(engine, objective, batch, device))
            progress = replace(progress, step=batch.step + 1)
            is_epoch_end = progress.step in epoch_ends
            metrics: dict[str, float] = {}
            if is_epoch_end:
                metrics, progress, best = validate(engine, job, objective, validation, progress, best)
            if is_epoch_end or _is_due(recipe.checkpoint.every_steps, progress.step):
                rate = recipe.train.global_batch_size * len(curve) / (time.perf_counter() - started_at)
                speed = {"train/samples_per_s": rate, "train/wait_share": stream.take_share()}
                report(engine, progress, best, {**metrics, **speed, "curve": curve})
                curve, started_at = [], time.perf_counter()
    report_end(progress, best, confusion, rank)


def _is_due(every_steps: int, step: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def take_step(engine: Engine, objective: Objective, batch: Batch, device: torch.device) -> dict[str, float]:
    """One optimizer step; its loss and learning rate.

    Raises:
        TrainingError: the loss is not finite, on every rank at the same step, with the samples of this rank.
    """
    rate = engine.get_lr()[0]
    features = torch.tensor(batch.features).to(device=device, dtype=next(engine.module.parameters()).dtype)
    loss = objective.step_loss(engine, features, batch.labels, batch.step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"train/loss is {value} at step {batch.step}; this rank's samples: {', '.join(batch.ids)}. "
            "Lower optimizer.max_lr or look at these rows"
        )
    train_step(engine, loss)
    return {"step": batch.step, "train/loss": value, "train/learning_rate": rate}


def validate(
    engine: Engine,
    job: TrainJob,
    objective: Objective,
    validation: list[Batch],
    progress: Progress,
    best: dict[str, Tensor],
) -> tuple[dict[str, float], Progress, dict[str, Tensor]]:
    """Metrics of the epoch that ended, and the best weights so far; without validation rows the newest are the best."""
    weights = full_state_dict(engine)
    epoch = job.plan.train.steps_of_epoch_ends().index(progress.step) + 1
    if not validation:
        return {}, replace(progress, best_step=progress.step, best_epoch=epoch), weights
    confusion, cross_entropy = evaluate(job.recipe, weights, objective, validation)
    total = int(confusion.sum())
    metrics = {
        "val/top1_accuracy": int(confusion.diagonal().sum()) / total,
        "val/cross_entropy": cross_entropy / total,
        "val/num_samples": total,
    }
    if not progress.is_beaten_by(metrics):
        return metrics, progress, best
    return (
        metrics,
        replace(
            progress,
            best_step=progress.step,
            best_epoch=epoch,
            best_top1_accuracy=metrics["val/top1_accuracy"],
        ),
        weights,
    )


@torch.no_grad()
def evaluate(
    recipe: Recipe, weights: dict[str, Tensor], objective: Objective, batches: list[Batch]
) -> tuple[Tensor, float]:
    """Confusion (C, C) int64 and summed cross-entropy (nats, temperature 0.07) over all ranks' rows."""
    projector = MetricProjector(recipe.projector).eval()
    projector.load_state_dict(weights)
    label_embeds = objective.label_embeds.cpu()
    num_classes = len(label_embeds)
    sums = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64)
    for batch in batches:
        if not batch.ids:
            continue
        labels = torch.tensor(batch.labels)
        scores = projector(torch.tensor(batch.features).float()) @ label_embeds.T
        sums[:-1] += confusion_matrix(labels, scores.argmax(dim=1), num_classes).flatten()
        sums[-1] += F.cross_entropy(scores / 0.07, labels, reduction="sum").double()
    sums = sums.to(objective.label_embeds.device)
    torch.distributed.all_reduce(sums)
    return sums[:-1].round().long().reshape(num_classes, num_classes).cpu(), float(sums[-1])


def report(engine: Engine, progress: Progress, best: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """Checkpoint to S3, every rank its own part, and metrics to the driver's run; a barrier."""
    import ray.train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_engine(engine, folder)
        if torch.distributed.get_rank() == 0:
            _write_progress(folder, progress, best)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({**metrics, **asdict(progress), "is_final": False}, checkpoint=checkpoint)


def report_end(progress: Progress, best: dict[str, Tensor], confusion: Tensor, rank: int) -> None:
    """The run's last word: the chosen weights and what they do on the test rows."""
    import ray.train

    with tempfile.TemporaryDirectory() as name:
        if rank == 0:
            _write_progress(Path(name), progress, best)
        checkpoint = ray.train.Checkpoint.from_directory(name) if rank == 0 else None
        ray.train.report({**asdict(progress), "confusion": confusion.tolist(), "is_final": True}, checkpoint=checkpoint)


def _write_progress(folder: Path, progress: Progress, best: dict[str, Tensor]) -> None:
    (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
    if best:
        save_file(best, folder / BEST_WEIGHTS)


def restore(engine: Engine, job: TrainJob) -> tuple[Progress, dict[str, Tensor]]:
    """Progress and best weights of the checkpoint that the job names, the engine restored to it; else a fresh start."""
    if job.resume_from is None:
        return Progress(), {}
    with _downloaded(job.resume_from) as folder:
        load_engine(engine, folder)
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
        weights = folder / BEST_WEIGHTS
        best = load_file(weights) if weights.exists() else {}
    logger.info("resumed at step %d", progress.step)
    return progress, best


@contextmanager
def _downloaded(uri: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        storage.download_folder(uri, Path(name))
        yield Path(name)
