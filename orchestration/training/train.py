"""The main job: what is asked for is checked first, then run, or its result shown where it is finished."""

from __future__ import annotations

import logging

from orchestration.jobs.lease import read_claim
from orchestration.recipe import Recipe
from orchestration.services import storage, tracking
from orchestration.training.prepare import prepare
from orchestration.training.result import OnReport, TrainResult

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, parent_run_id: str | None = None, on_report: OnReport | None = None) -> TrainResult:
    """Train a recipe to its end, from where an earlier call of the same name and recipe left it.

    Raises:
        TrainingError: a run of this name exists with another recipe or other data, or training failed.
        TinyEmoError: see `prepare`, and what the servers say.
    """
    preparation = prepare(recipe)
    recipe = preparation.recipe
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    claim = read_claim(folder, recipe, preparation.data_digests())
    if claim is not None and storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return TrainResult(**storage.read_json(f"{folder}/result.json"))
    tracking.require_server()
    # Torch, Ray and DeepSpeed take seconds to import: what is wrong with a recipe or its data has been said by now.
    from orchestration.training.run import run_training

    return run_training(preparation, claim, folder, parent_run_id=parent_run_id, on_report=on_report)
