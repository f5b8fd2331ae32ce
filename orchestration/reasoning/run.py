"""The reasoning model's driver: train stage after stage, evaluate once, export, record."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration.jobs.attempts import ReportCallback, run_phase
from orchestration.jobs.lease import write_claim
from orchestration.jobs.stage_state import PhaseState, read_curve, read_state
from orchestration.reasoning.evaluate import EvaluateJob, evaluate_loop_per_worker, summarise
from orchestration.reasoning.export import export_model
from orchestration.reasoning.loop import StageJob, stage_loop_per_worker
from orchestration.reasoning.prepare import ReasoningPlan
from orchestration.reasoning.result import OnReport, ReasonerResult, StageResult
from orchestration.reasoning.sources import Sources
from orchestration.recipe import Recipe, to_toml
from orchestration.services import storage, tracking
from orchestration.services.ray_cluster import connect
from tinyemo.errors import TrainingError

logger = logging.getLogger(__name__)


def run_stages(
    plan: ReasoningPlan,
    sources: Sources,
    claim: str | None,
    folder: str,
    *,
    parent_run_id: str | None = None,
    on_report: OnReport | None = None,
) -> ReasonerResult:
    """Run what `prepare_reasoning` found, from where an earlier call left it.

    Args:
        claim: the MLflow run that holds the name, None where the name is free.
        folder: of the run in S3.

    Raises:
        TinyEmoError: see `orchestration.reasoning.train.train_reasoner`.
    """
    recipe, began_at = plan.recipe, time.monotonic()
    connect()
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json"),
        tags={"kind": "reasoner", **_tags(recipe, plan, sources)},
        parent_run_id=parent_run_id,
        resume_run_id=claim,
    ) as run:
        if claim is None:
            write_claim(folder, recipe, plan.data_digests(), run.run_id)
        _log_inputs(run, plan)
        stages: dict[str, StageResult] = {}
        for name in recipe.stages:
            stages[name] = _train_stage(plan, sources, name, stages, folder, run.run_id, on_report)
        weights = {name: stage.checkpoint for name, stage in stages.items()}
        evaluation = _evaluate(plan, weights, folder, run)
        result = ReasonerResult(
            name=recipe.name,
            run_id=run.run_id,
            run_url=run.url,
            model=f"{folder}/model",
            llm=sources.llm_name,
            llm_weights=sources.llm_weights,
            vision_tower=str(sources.encoder.info),
            vision_weights=sources.encoder.info.weights,
            answers=_answers(plan),
            stages={name: asdict(stage) for name, stage in stages.items()},
            evaluation=evaluation,
            duration_s=time.monotonic() - began_at,
        )
        _export(plan, sources, weights, result, run)
        storage.write_json(f"{folder}/result.json", asdict(result))
    return result


def _tags(recipe: Recipe, plan: ReasoningPlan, sources: Sources) -> dict[str, str]:
    digests = sorted(set(plan.data_digests().values()))
    return {
        "llm": sources.llm_name,
        "llm.revision": sources.llm_revision,
        "llm_weights": sources.llm_weights,
        "encoder": str(sources.encoder.info),
        "vision_weights": sources.encoder.info.weights,
        "data": _answers(plan),
        "data.digest": ",".join(digests),
        "zero_stage": str(recipe.engine.zero_stage),
        "num_workers": str(recipe.workers.num_workers),
    }


def _answers(plan: ReasoningPlan) -> str:
    """What the answers that it learns are: "templates" where a manifest says so."""
    kinds = {
        str(part.manifest.rules.get("answers", part.manifest.data))
        for stage in plan.stages.values()
        for part in stage.sets
    }
    return ",".join(sorted(kinds))


def _log_inputs(run: tracking.RunHandle, plan: ReasoningPlan) -> None:
    for stage in (*plan.stages.values(), plan.validation, plan.test):
        for part in stage.sets if stage is not None else ():
            manifest = part.manifest
            rows = manifest.splits[part.split].rows
            run.log_dataset(f"{manifest.name}-{part.split}", manifest.digest, manifest.uri, rows, part.split)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "recipe.toml"
        path.write_text(to_toml(plan.recipe))
        run.log_artifact(path)


def _train_stage(
    plan: ReasoningPlan,
    sources: Sources,
    name: str,
    earlier: dict[str, StageResult],
    folder: str,
    parent_run_id: str,
    on_report: OnReport | None,
) -> StageResult:
    """One stage as a child run; a finished one is read from S3."""
    recipe, run_name, began_at = plan.recipe, f"{plan.recipe.name}-{name}", time.monotonic()
    found = tracking.find_run(recipe.experiment, run_name, parent_run_id=parent_run_id)
    state = read_state(f"{folder}/{name}")
    if found is not None and found.status == "FINISHED" and state is not None and state.is_final:
        return _stage_result(found.run_id, state, 0.0)
    tags = {"kind": "stage", "stage": name, **_tags(recipe, plan, sources)}
    if earlier:
        before, stage = list(earlier.items())[-1]
        tags |= {"starts_from": before, "starts_from.run_id": stage.run_id, "starts_from.checkpoint": stage.checkpoint}
    job = StageJob(
        recipe, name, plan.stages[name], plan.validation, {key: stage.checkpoint for key, stage in earlier.items()}
    )
    with tracking.open_run(
        recipe.experiment,
        run_name,
        params=recipe.stages[name].model_dump(mode="json"),
        tags=tags,
        parent_run_id=parent_run_id,
        resume_run_id=found.run_id if found else None,
    ) as run:
        watch = (lambda state: on_report(name, state)) if on_report else None
        callback = ReportCallback(f"{folder}/{name}", run.logger)
        state = run_phase(job, stage_loop_per_worker, callback, on_report=watch)
        run.set_tags({"checkpoint": state.checkpoint})
        return _stage_result(run.run_id, state, time.monotonic() - began_at)


def _stage_result(run_id: str, state: PhaseState, duration_s: float) -> StageResult:
    points = [metrics for _, metrics in read_curve(state.folder)]
    losses = [metrics["train/loss"] for metrics in points if "train/loss" in metrics]
    validations = [metrics["val/loss"] for metrics in points if "val/loss" in metrics]
    rates = [metrics["train/tokens_per_s"] for metrics in points if "train/tokens_per_s" in metrics]
    tail = losses[-max(1, len(losses) // 10) :]
    return StageResult(
        run_id=run_id,
        checkpoint=state.checkpoint,
        num_steps=state.step,
        first_loss=losses[0],
        last_loss=sum(tail) / len(tail),
        val_loss=validations[-1] if validations else None,
        tokens_per_s=rates[-1],
        duration_s=duration_s,
    )


def _evaluate(
    plan: ReasoningPlan, weights: dict[str, str], folder: str, run: tracking.RunHandle
) -> dict[str, Any] | None:
    """The only reading of the test split: rows to S3 and MLflow, figures to MLflow."""
    if plan.test is None:
        split = plan.recipe.evaluation.test
        logger.warning("%s: nothing is evaluated", f"no split {split!r}" if split else "evaluation.test is empty")
        return None
    job = EvaluateJob(plan.recipe, plan.test, weights)
    state = run_phase(job, evaluate_loop_per_worker, ReportCallback(f"{folder}/evaluation", None))
    rows = storage.read_json(f"{state.checkpoint}/rows.json")
    expected = sum(part.manifest.splits[part.split].rows for part in plan.test.sets)
    if len({row["id"] for row in rows}) != expected:
        raise TrainingError(f"the evaluation has {len(rows)} rows for {expected} records; please report it")
    document = summarise(rows).document()
    figures = {f"test/loss_{name}": value for name, value in document["loss"].items()}
    for name, test in document["tests"].items():
        figures |= {f"test/right_vs_{name}_difference": test["mean_difference"]}
        figures |= {f"test/right_vs_{name}_p_wilcoxon": test["p_wilcoxon"]}
    run.log_metrics(figures)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "rows.json").write_text(json.dumps(rows, indent=1))
        (Path(name) / "evaluation.json").write_text(json.dumps(document, indent=1))
        run.log_artifacts(Path(name), "evaluation")
    return document


def _export(
    plan: ReasoningPlan,
    sources: Sources,
    weights: dict[str, str],
    result: ReasonerResult,
    run: tracking.RunHandle,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name) / "model"
        export_model(plan, sources, weights, result, here)
        storage.upload_folder(here, result.model)
        run.log_artifacts(here, "model")
    run.set_tags({"model": result.model})
