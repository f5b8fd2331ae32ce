"""The projector's task: its module, the loss of a step, validation by epoch, the test, and the exported model.

Shape letters: B rows of a rank, C classes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestration.assets.labels import label_embeddings
from orchestration.jobs.checkpoints import Done, StageState, read_curve
from orchestration.jobs.results import TrainResult, notes
from orchestration.jobs.worker import Point, Stage, require_finite
from orchestration.plots import plot_confusion, plot_curves
from orchestration.recipe import Recipe
from orchestration.services import storage, tracking
from orchestration.services.engine import Engine, build_engine, full_state_dict, train_step
from tinyemo.encoders import UNKNOWN, card_entries
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.metrics import confusion_matrix, scores_from_confusion
from tinyemo.objective import Objective, build_objective
from tinyemo.projector import CardValue, MetricProjector
from tinyemo.taxonomies import TAXONOMIES

if TYPE_CHECKING:
    from orchestration.jobs.prepare import Preparation

BEST_WEIGHTS, BEST = "best.safetensors", "best.json"


@dataclass(frozen=True)
class Best:
    """The best epoch so far by validation."""

    best_step: int = 0
    best_epoch: int = 0
    best_top1_accuracy: float = -1.0


@dataclass
class ProjectorState:
    """State of a rank while a stage runs.

    Attributes:
        weights: of the best epoch, on the CPU in fp32; empty before the first.
        validation: this rank's validation batches, read once.
    """

    engine: Engine
    objective: Objective
    device: torch.device
    best: Best
    weights: dict[str, Tensor]
    validation: list[Any]
    num_samples: int = 0


def build_projector(recipe: Recipe) -> MetricProjector:
    """Return a recipe's projector with its seeded initial weights, equal on every rank."""
    torch.manual_seed(recipe.train.seed)
    return MetricProjector(recipe.projector)


def objective_of(recipe: Recipe, labels: LabelEmbeddings, words: tuple[str, ...]) -> Objective:
    """Return the objective that a recipe trains its projector on."""
    return build_objective(
        recipe.loss,
        labels,
        words,
        synonyms_probability=recipe.labels.synonyms_probability,
        seed=recipe.train.seed,
        taxonomy=recipe.labels.resolved(TAXONOMIES["ekman"]),
        taxonomy_augmentation=recipe.labels.taxonomy_augmentation,
    )


def build(stage: Stage, device: torch.device) -> ProjectorState:
    """Return the engine around a fresh projector, and its objective."""
    recipe, (labels, words) = stage.recipe, stage.job
    engine = build_engine(
        build_projector(recipe),
        recipe.engine,
        recipe.optimizer,
        num_steps=stage.num_steps,
        global_batch_size=recipe.train.global_batch_size,
        world_size=recipe.workers.num_workers,
    )
    return ProjectorState(engine, objective_of(recipe, labels, words).to(device), device, Best(), {}, [])


def take_step(state: ProjectorState, batch: Any, *, is_logged: bool) -> Point:
    """Take one optimizer step; return its loss, nats, and learning rate."""
    state.num_samples += len(batch.global_labels)
    return train_batch(state.engine, state.objective, batch, state.device, measures_norm=is_logged)


def train_batch(
    engine: Engine, objective: Objective, batch: Any, device: torch.device, *, measures_norm: bool = False
) -> Point:
    """Take one optimizer step over a batch; see `take_step`.

    Raises:
        TrainingError: the loss is not finite, on every rank at the same step; on a GPU the log raises it.
    """
    rate = engine.get_lr()[0]
    features = batch.features.to(device, next(engine.module.parameters()).dtype, non_blocking=True)
    loss = objective.step_loss(engine, features, batch.global_labels.numpy(), batch.step)
    if device.type == "cpu":  # Reading a loss on a GPU would wait for it.
        require_finite(float(loss.detach()), batch.step, batch.ids, "Lower optimizer.max_lr")
    norm = train_step(engine, loss, measures_norm=measures_norm)
    point = {"train/loss": loss.detach(), "train/learning_rate": rate}
    return point if norm is None else {**point, "train/gradient_norm": norm}


def rates(state: ProjectorState, elapsed_s: float) -> dict[str, float]:
    """Return samples per second over all ranks."""
    num_samples, state.num_samples = state.num_samples, 0
    return {"train/samples_per_s": num_samples / elapsed_s} if num_samples else {}


def measure(state: ProjectorState, stage: Stage, epoch: int, step: int) -> dict[str, float]:
    """Validate the epoch that ended and keep its weights where none before was better.

    Of equally accurate epochs the later, which has seen more, is kept. Without validation rows the newest are the best.
    """
    weights = full_state_dict(state.engine)
    if "validation" not in stage.streams:
        state.best, state.weights = Best(step, epoch), weights
        return {}
    state.validation = state.validation or list(stage.batches("validation"))
    confusion, cross_entropy = evaluate(stage.recipe, weights, state.objective, state.validation)
    total = int(confusion.sum())
    accuracy = int(confusion.diagonal().sum()) / total
    if accuracy >= state.best.best_top1_accuracy:
        state.best, state.weights = Best(step, epoch, accuracy), weights
    return {
        "val/top1_accuracy": accuracy,
        "val/cross_entropy": cross_entropy / total,
        "val/num_samples": total,
        "val/best_epoch": state.best.best_epoch,
    }


@torch.no_grad()
def evaluate(
    recipe: Recipe, weights: dict[str, Tensor], objective: Objective, batches: Iterable[Any]
) -> tuple[Tensor, float]:
    """Return confusion (C, C) int64 and summed cross-entropy (nats, temperature 0.07) over all ranks' rows."""
    device = objective.label_embeds.device
    projector = MetricProjector(recipe.projector).eval()
    projector.load_state_dict(weights)
    projector.to(device)
    num_classes = len(objective.label_embeds)
    sums = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=device)
    for batch in batches:
        is_real = batch.is_real
        if not is_real.any():
            continue
        labels = batch.labels[is_real].to(device)
        scores = projector(batch.features[is_real].to(device).float()) @ objective.label_embeds.T
        sums[:-1] += confusion_matrix(labels, scores.argmax(dim=1), num_classes).flatten()
        sums[-1] += F.cross_entropy(scores / 0.07, labels, reduction="sum").double()
    torch.distributed.all_reduce(sums)
    return sums[:-1].round().long().reshape(num_classes, num_classes).cpu(), float(sums[-1])


def save(state: ProjectorState, folder: Path) -> None:
    """Write the best epoch and its weights on rank 0."""
    if torch.distributed.get_rank() == 0:
        (folder / BEST).write_text(json.dumps(asdict(state.best)))
        if state.weights:
            save_file(state.weights, folder / BEST_WEIGHTS)


def load(state: ProjectorState, folder: Path) -> None:
    """Read what `save` wrote."""
    state.best = Best(**json.loads((folder / BEST).read_text()))
    if (folder / BEST_WEIGHTS).exists():
        state.weights = load_file(folder / BEST_WEIGHTS)


def finish(state: ProjectorState, stage: Stage, folder: Path) -> dict[str, Any]:
    """Return the best epoch, and the confusion of the test rows, read once by the weights that validation chose."""
    if "test" not in stage.streams:
        return asdict(state.best)
    confusion, _ = evaluate(stage.recipe, state.weights, state.objective, stage.batches("test"))
    return {**asdict(state.best), "confusion": confusion.tolist()}


# What the driver asks of a task, in this order.


def tags(plan: Preparation) -> dict[str, str]:
    """Return the tags of the MLflow run."""
    recipe, manifest = plan.recipe, plan.manifest
    return {
        "llm": recipe.labels.llm,
        "llm_weights": recipe.labels.llm_weights,
        "data": manifest.data,
        "data.digest": manifest.digest,
        "zero_stage": str(recipe.engine.zero_stage),
        "num_workers": str(recipe.workers.num_workers),
        "encoder": str(manifest.encoder or UNKNOWN),
    }


def log_inputs(run: tracking.RunHandle, plan: Preparation) -> None:
    """Name the data set in the MLflow run, once per split: MLflow keeps one input for each name and digest."""
    manifest, selection = plan.manifest, plan.selection
    for split, rows in (("train", selection.whole), ("test", selection.test)):
        run.log_dataset(f"{manifest.name}-{split}", manifest.digest, manifest.uri, len(rows), split)


def stages(plan: Preparation) -> list[str]:
    """Return the names of the stages, in order."""
    return ["select", "refit"] if plan.recipe.train.refit else ["select"]


def stage(plan: Preparation, name: str, done: dict[str, Done], folder: str) -> Stage:
    """Return a stage, given the outcomes of earlier ones: a refit trains as long as the best epoch took."""
    recipe, is_refit = plan.recipe, name == "refit"
    num_epochs = recipe.train.num_epochs
    if is_refit:
        num_epochs = min(float(done["select"].state.metrics["best_epoch"]), num_epochs)
    streams = plan.streams(num_epochs=num_epochs, is_refit=is_refit, is_tested=is_refit or not recipe.train.refit)
    job = (label_embeddings(recipe.labels), plan.words)
    return Stage(__name__, name, recipe, streams, job, prefix="refit" if is_refit else "train")


def conclude(plan: Preparation, run: tracking.RunHandle, done: dict[str, Done], folder: str) -> TrainResult:
    """Log the test, plots and the exported projector; return the result."""
    final = list(done.values())[-1].state
    result = _result(plan, run, final, done["select"].state, f"{folder}/projector")
    confusion = torch.tensor(result.test_confusion)
    recalls = scores_from_confusion(confusion, result.words).per_class_recall
    run.log_metrics(
        {f"test/recall_{word}": recall for word, recall in recalls.items() if recall is not None}, step=final.step
    )
    suffix = f" ({notes(result)})" if notes(result) else ""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        plot_confusion(
            confusion, result.words, here / "confusion.png", f"{result.name}: {result.num_test} test images{suffix}"
        )
        plot_curves(_curves(done["select"].state.folder), here / "curves.png", f"{result.name}{suffix}")
        for plot in ("confusion.png", "curves.png"):
            run.log_artifact(here / plot, "plots")
    exported = ray.remote(num_cpus=0)(export).remote(plan.recipe, final.checkpoint, _card(plan, result), result.model)
    ray.get(exported)
    run.refer("projector", result.model)
    manifest = plan.manifest
    run.log_model(
        "projector",
        result.model,
        {"test/top1_accuracy": result.test_top1_accuracy, "test/num_samples": result.num_test},
        dataset=(f"{manifest.name}-test", manifest.digest),
        step=final.step,
    )
    run.describe(
        f"Metric projector for {result.llm}: test top-1 {result.test_top1_accuracy:.4f} on {result.num_test} images"
        f"{suffix}, best epoch {result.best_epoch}.",
        {"data": manifest.uri, "checkpoint": final.checkpoint, "export": result.model},
    )
    return result


def export(recipe: Recipe, checkpoint: str, card: dict[str, CardValue], uri: str) -> None:
    """Store the chosen projector with its label embeddings in an S3 folder; runs as a Ray task."""
    projector = MetricProjector(recipe.projector)
    projector.load_state_dict(load_safetensors(storage.read_bytes(f"{checkpoint}/{BEST_WEIGHTS}")))
    with tempfile.TemporaryDirectory() as name:
        projector.save_pretrained(Path(name), labels=label_embeddings(recipe.labels), card=card)
        storage.upload_folder(Path(name), uri)


def _result(
    plan: Preparation, run: tracking.RunHandle, final: StageState, selected: StageState, model: str
) -> TrainResult:
    recipe, rows = plan.recipe, plan.rows(is_refit=False)
    scores = scores_from_confusion(torch.tensor(final.metrics["confusion"]), plan.words)
    assert scores.num_samples == len(plan.selection.test)
    best = float(selected.metrics["best_top1_accuracy"])
    rates = [point["train/samples_per_s"] for _, point in read_curve(final.folder) if "train/samples_per_s" in point]
    return TrainResult(
        name=recipe.name,
        run_id=run.run_id,
        run_url=run.url,
        llm=recipe.labels.llm,
        llm_weights=recipe.labels.llm_weights,
        hidden_size=recipe.projector.hidden_size,
        data=plan.manifest.data,
        num_train=len(plan.selection.whole) if recipe.train.refit else len(rows["train"]),
        num_validation=len(rows["validation"]),
        num_test=scores.num_samples,
        best_epoch=int(selected.metrics["best_epoch"]),
        val_top1_accuracy=best if best >= 0 else None,
        test_top1_accuracy=scores.top1_accuracy,
        test_confusion=scores.confusion,
        words=list(plan.words),
        samples_per_s=statistics.median(rates),
        model=model,
        encoder_weights="real" if plan.manifest.encoder is None else plan.manifest.encoder.weights,
    )


def _curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in read_curve(folder):
        for key in ("train/loss", "val/top1_accuracy"):
            if key in metrics:
                curves.setdefault(key, []).append((step, metrics[key]))
    return curves


def _card(plan: Preparation, result: TrainResult) -> dict[str, CardValue]:
    recipe = plan.recipe
    return {
        "run": result.name,
        "mlflow_run_id": result.run_id,
        "recipe_digest": recipe.digest(),
        "llm": recipe.labels.llm,
        "llm_weights": recipe.labels.llm_weights,
        "llm_seed": recipe.labels.seed,
        "template": recipe.labels.template,
        "taxonomy": plan.taxonomy.name,
        "labels": ",".join(plan.taxonomy.words),
        "leave_out": ",".join(plan.selection.left_out_words),
        "loss": recipe.loss.name,
        "data": result.data,
        "data_uri": plan.manifest.uri,
        "data_digest": plan.manifest.digest,
        "num_train": result.num_train,
        "test_top1_accuracy": result.test_top1_accuracy,
        "num_test": result.num_test,
        **card_entries(plan.manifest.encoder),
    }
