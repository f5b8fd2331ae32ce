"""The main job's driver once all is checked: train phase after phase, test once, record."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors

from orchestration.assets.labels import label_embeddings
from orchestration.jobs.attempts import ReportCallback, run_phase
from orchestration.jobs.lease import write_claim
from orchestration.jobs.stage_state import PhaseState, read_curve
from orchestration.plots import plot_confusion, plot_curves
from orchestration.recipe import to_toml
from orchestration.services import storage, tracking
from orchestration.services.ray_cluster import connect
from orchestration.streaming.feature_stream import StreamPlan
from orchestration.training.loop import BEST_WEIGHTS, TrainJob, train_loop_per_worker
from orchestration.training.prepare import Preparation
from orchestration.training.result import OnReport, TrainResult, notes
from tinyemo.encoders import UNKNOWN, card_entries
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.metrics import scores_from_confusion
from tinyemo.projector import CardValue, MetricProjector


def run_training(
    preparation: Preparation,
    claim: str | None,
    folder: str,
    *,
    parent_run_id: str | None = None,
    on_report: OnReport | None = None,
) -> TrainResult:
    """Run what `prepare` found, from where an earlier call left it.

    Args:
        claim: the MLflow run that holds the name, None where the name is free.
        folder: of the run in S3.

    Raises:
        TinyEmoError: see `orchestration.training.train.train`.
    """
    recipe = preparation.recipe
    labels = label_embeddings(recipe.labels)
    connect()
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json"),
        tags=_tags(preparation),
        parent_run_id=parent_run_id,
        resume_run_id=claim,
    ) as run:
        if claim is None:
            write_claim(folder, recipe, preparation.data_digests(), run.run_id)
        _log_inputs(run, preparation)
        final, selected = _run_phases(preparation, labels, folder, run, on_report)
        result = _result(preparation, run, final, selected)
        _log_results(preparation, labels, folder, run, final, result)
        storage.write_json(f"{folder}/result.json", asdict(result))
    return result


def _run_phases(
    preparation: Preparation, labels: LabelEmbeddings, folder: str, run: tracking.RunHandle, on_report: OnReport | None
) -> tuple[PhaseState, PhaseState]:
    """(the phase that was tested, the phase that chose the epoch); the same one without refit."""
    recipe = preparation.recipe

    def phase(name: str, plan: StreamPlan) -> PhaseState:
        job = TrainJob(recipe, plan, labels, preparation.words)
        callback = ReportCallback(f"{folder}/{name}", run.logger, prefix="train" if name == "select" else name)
        watch = (lambda state: on_report(name, state)) if on_report else None
        return run_phase(job, train_loop_per_worker, callback, on_report=watch)

    selected = phase("select", preparation.plan(num_epochs=recipe.train.num_epochs, is_refit=False))
    if not recipe.train.refit:
        return selected, selected
    num_epochs = min(float(selected.metrics["best_epoch"]), recipe.train.num_epochs)
    return phase("refit", preparation.plan(num_epochs=num_epochs, is_refit=True)), selected


def _tags(preparation: Preparation) -> dict[str, str]:
    recipe, manifest = preparation.recipe, preparation.manifest
    return {
        "llm": recipe.labels.llm,
        "llm_weights": recipe.labels.llm_weights,
        "data": manifest.data,
        "data.digest": manifest.digest,
        "zero_stage": str(recipe.engine.zero_stage),
        "num_workers": str(recipe.workers.num_workers),
        "encoder": str(manifest.encoder or UNKNOWN),
    }


def _log_inputs(run: tracking.RunHandle, preparation: Preparation) -> None:
    manifest = preparation.manifest
    selection = preparation.selection
    for split, rows in (("train", selection.whole), ("test", selection.test)):
        # A name a split: MLflow keeps one input for each name and digest.
        run.log_dataset(f"{manifest.name}-{split}", manifest.digest, manifest.uri, len(rows), split)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "recipe.toml"
        path.write_text(to_toml(preparation.recipe))
        run.log_artifact(path)


def _result(preparation: Preparation, run: tracking.RunHandle, final: PhaseState, selected: PhaseState) -> TrainResult:
    recipe = preparation.recipe
    confusion = torch.tensor(final.metrics["confusion"])
    scores = scores_from_confusion(confusion, preparation.words)
    plan = preparation.plan(num_epochs=recipe.train.num_epochs, is_refit=False)
    assert scores.num_samples == len(preparation.selection.test)
    best = float(selected.metrics["best_top1_accuracy"])
    return TrainResult(
        name=recipe.name,
        run_id=run.run_id,
        run_url=run.url,
        llm=recipe.labels.llm,
        llm_weights=recipe.labels.llm_weights,
        hidden_size=recipe.projector.hidden_size,
        data=preparation.manifest.data,
        num_train=len(preparation.selection.whole) if recipe.train.refit else plan.train.order.num_rows,
        num_validation=len(plan.splits["validation"]),
        num_test=scores.num_samples,
        best_epoch=int(selected.metrics["best_epoch"]),
        val_top1_accuracy=best if best >= 0 else None,
        test_top1_accuracy=scores.top1_accuracy,
        test_confusion=scores.confusion,
        words=list(preparation.words),
        samples_per_s=_samples_per_s(final),
        encoder_weights="real" if preparation.manifest.encoder is None else preparation.manifest.encoder.weights,
    )


def _samples_per_s(final: PhaseState) -> float:
    """Rate of the last epoch that was trained."""
    rates = [
        metrics["train/samples_per_s"] for _, metrics in read_curve(final.folder) if "train/samples_per_s" in metrics
    ]
    return rates[-1]


def _log_results(
    preparation: Preparation,
    labels: LabelEmbeddings,
    folder: str,
    run: tracking.RunHandle,
    final: PhaseState,
    result: TrainResult,
) -> None:
    recalls = scores_from_confusion(torch.tensor(result.test_confusion), result.words).per_class_recall
    run.log_metrics(
        {
            "test/top1_accuracy": result.test_top1_accuracy,
            "test/num_samples": result.num_test,
            **{f"test/recall_{word}": recall for word, recall in recalls.items() if recall is not None},
        },
        step=final.step,
    )
    suffix = f" ({notes(result)})" if notes(result) else ""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        title = f"{result.name}: {result.num_test} test images{suffix}"
        plot_confusion(torch.tensor(result.test_confusion), result.words, here / "confusion.png", title)
        plot_curves(_curves(f"{folder}/select"), here / "curves.png", f"{result.name}{suffix}")
        projector = MetricProjector(preparation.recipe.projector)
        projector.load_state_dict(load_safetensors(storage.read_bytes(f"{final.checkpoint}/{BEST_WEIGHTS}")))
        projector.save_pretrained(here / "projector", labels=labels, card=_card(preparation, result))
        run.log_artifacts(here / "projector", "projector")
        for plot in ("confusion.png", "curves.png"):
            run.log_artifact(here / plot, "plots")


def _curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in read_curve(folder):
        for key in ("train/loss", "val/top1_accuracy"):
            if key in metrics:
                curves.setdefault(key, []).append((step, metrics[key]))
    return curves


def _card(preparation: Preparation, result: TrainResult) -> dict[str, CardValue]:
    """Where a projector comes from, kept in its config.json."""
    recipe = preparation.recipe
    return {
        "run": result.name,
        "mlflow_run_id": result.run_id,
        "recipe_digest": recipe.digest(),
        "llm": recipe.labels.llm,
        "llm_weights": recipe.labels.llm_weights,
        "llm_seed": recipe.labels.seed,
        "template": recipe.labels.template,
        "taxonomy": preparation.taxonomy.name,
        "labels": ",".join(preparation.taxonomy.words),
        "leave_out": ",".join(preparation.selection.left_out_words),
        "loss": recipe.loss.name,
        "data": result.data,
        "data_uri": preparation.manifest.uri,
        "data_digest": preparation.manifest.digest,
        "num_train": result.num_train,
        "test_top1_accuracy": result.test_top1_accuracy,
        "num_test": result.num_test,
        **card_entries(preparation.manifest.encoder),
    }
