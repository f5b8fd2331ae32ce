"""All stages of a reasoning model: what is asked for is checked first, then run, or its result shown where one is."""

from __future__ import annotations

import logging

from orchestration.jobs.lease import read_claim
from orchestration.reasoning.prepare import prepare_reasoning
from orchestration.reasoning.result import OnReport, ReasonerResult
from orchestration.reasoning.sources import describe_sources
from orchestration.recipe import Recipe
from orchestration.services import storage, tracking

logger = logging.getLogger(__name__)


def train_reasoner(
    recipe: Recipe, *, parent_run_id: str | None = None, on_report: OnReport | None = None
) -> ReasonerResult:
    """Train every stage of a recipe, from where an earlier call of the same name and recipe left it.

    Raises:
        TrainingError: a run of this name exists with another recipe or other data, or training failed.
        TinyEmoError: see `prepare_reasoning`, and what the servers say.
    """
    sources = describe_sources(recipe)
    plan = prepare_reasoning(recipe, sources)
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    claim = read_claim(folder, recipe, plan.data_digests())
    if claim is not None and storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return ReasonerResult(**storage.read_json(f"{folder}/result.json"))
    tracking.require_server()
    # Torch, Ray and DeepSpeed take seconds to import: what is wrong with a recipe or its data has been said by now.
    from orchestration.reasoning.run import run_stages

    return run_stages(plan, sources, claim, folder, parent_run_id=parent_run_id, on_report=on_report)
