"""One run from its name to its result: lease, MLflow run, stages in order, export, test, result."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Union

from orchestration.jobs.checkpoints import Done, read_state
from orchestration.jobs.lease import Lease, hold_lease, read_claim, run_folder
from orchestration.jobs.prepare import Preparation, prepare
from orchestration.jobs.results import ReasonerResult, Result, TrainResult
from orchestration.recipe import Recipe, to_toml
from orchestration.services import storage, tracking

if TYPE_CHECKING:
    from orchestration.jobs.attempts import Progress
    from orchestration.jobs.checkpoints import StageState
    from orchestration.jobs.reasoning_plan import ReasoningPlan
    from orchestration.jobs.worker import Stage

Plan = Union[Preparation, "ReasoningPlan"]

logger = logging.getLogger(__name__)


def prepare_run(recipe: Recipe) -> Plan:
    """Return what a recipe reads, checked against its data: of a reasoning model where it has stages."""
    if not recipe.stages:
        return prepare(recipe)
    # By its name, like the task: a projector's job imports nothing of language models.
    plan: ReasoningPlan = importlib.import_module("orchestration.jobs.reasoning_plan").prepare_reasoning(recipe)
    return plan


def train(recipe: Recipe, *, parent_run_id: str | None = None, progress: Progress | None = None) -> Result:
    """Train a recipe to its end, from where an earlier call of the same name and recipe left it.

    Args:
        recipe: of a projector, or of a reasoning model where it has stages.
        parent_run_id: MLflow run that the run is a child of.
        progress: called with ("RUN STAGE", step, num_steps, newest figures) at every log.

    Raises:
        TrainingError: the name belongs to another recipe, other data or a driver that is alive, or training failed.
        TinyEmoError: see `prepare_run`, and what the servers say.
    """
    plan = prepare_run(recipe)
    recipe, folder = plan.recipe, run_folder(recipe)
    claim = read_claim(folder, recipe, plan.data_digests())
    if claim is not None and storage.exists(f"{folder}/result.json"):
        return _stored_result(recipe, folder)
    tracking.require_server()
    # Torch, Ray and DeepSpeed take seconds to import: problems of a recipe or its data have been reported by now.
    from orchestration.services.ray_cluster import connect

    task = importlib.import_module(f"orchestration.jobs.{'reasoner' if recipe.stages else 'projector'}")
    connect()
    with hold_lease(folder, recipe, plan.data_digests()) as lease:
        if storage.exists(f"{folder}/result.json"):
            return _stored_result(recipe, folder)
        with open_run(recipe, lease, task.tags(plan), parent_run_id) as (run, device):
            task.log_inputs(run, plan)
            done: dict[str, Done] = {}
            for name in task.stages(plan):
                stage = replace(task.stage(plan, name, done, folder), device=device, run_id=run.run_id)
                done[name] = run_one(stage, f"{folder}/{name}", run, lease, progress)
            lease.check()
            result: Result = task.conclude(plan, run, done, folder)
            lease.write_json(f"{folder}/result.json", asdict(result))
    return result


def _stored_result(recipe: Recipe, folder: str) -> Result:
    logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
    document = storage.read_json(f"{folder}/result.json")
    return ReasonerResult(**document) if recipe.stages else TrainResult(**document)


@contextmanager
def open_run(
    recipe: Recipe, lease: Lease, tags: dict[str, str], parent_run_id: str | None
) -> Iterator[tuple[tracking.RunHandle, str]]:
    """Open the MLflow run that holds the name, or a new one; yield it with the device that was decided for the run."""
    from orchestration.services.ray_cluster import choose_device

    device = lease.device or choose_device(recipe.workers.device, recipe.workers.num_workers)
    if lease.run_id is None:
        _end_orphan(recipe, lease.folder)
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json"),
        tags={**tags, "device": device, "folder": lease.folder},
        parent_run_id=parent_run_id,
        resume_run_id=lease.run_id,
    ) as run:
        logger.info("%s: %s", recipe.name, run.url)
        if lease.run_id is None:
            lease.write_claim(run.run_id, device)
        run.log_text(to_toml(recipe), "recipe.toml")
        yield run, device


def _end_orphan(recipe: Recipe, folder: str) -> None:
    """End the MLflow run of a driver that died before it wrote its claim."""
    found = tracking.find_run(recipe.experiment, recipe.name)
    if found is not None and found.status == "RUNNING" and found.tags.get("folder") == folder:
        tracking.end_run(found.run_id, "KILLED")


def run_one(stage: Stage, folder: str, run: tracking.RunHandle, lease: Lease, progress: Progress | None) -> Done:
    """Run a stage to its end, in an MLflow run of its own where it has params; a finished stage is not run again."""
    began_at, recipe = time.monotonic(), stage.recipe
    if stage.params is None:
        logged = run.logger if stage.prefix else None
        return Done(run_workers(stage, folder, logged, lease, progress), run.run_id, time.monotonic() - began_at)
    name = f"{recipe.name}-{stage.name}"
    found = tracking.find_run(recipe.experiment, name, parent_run_id=run.run_id)
    state = read_state(folder)
    if found is not None and found.status == "FINISHED" and state is not None and state.is_final:
        return Done(state, found.run_id, 0.0)
    with tracking.open_run(
        recipe.experiment,
        name,
        params=stage.params,
        tags=stage.tags,
        parent_run_id=run.run_id,
        resume_run_id=found.run_id if found else None,
    ) as child:
        state = run_workers(stage, folder, child.logger, lease, progress)
        child.set_tags({"checkpoint": state.checkpoint})
        return Done(state, child.run_id, time.monotonic() - began_at)


def run_workers(
    stage: Stage,
    folder: str,
    run_logger: tracking.RunLogger | None,
    lease: Lease | None,
    progress: Progress | None,
) -> StageState:
    """Run a stage on its workers."""
    from orchestration.jobs.attempts import ReportCallback, run_stage

    return run_stage(stage, ReportCallback(folder, run_logger, stage.prefix, lease), progress)


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return what is known of a run before anything starts; also check that the name is free for it.

    Raises:
        TrainingError: the name belongs to another recipe or other data.
        TinyEmoError: see `prepare_run`.
    """
    plan = prepare_run(recipe)
    recipe = plan.recipe
    read_claim(run_folder(recipe), recipe, plan.data_digests())
    return {"name": recipe.name, "recipe_digest": recipe.digest(), **plan.facts()}
