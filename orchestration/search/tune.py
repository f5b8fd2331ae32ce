"""A search: what is asked for is checked first, then run, or its result shown where it is finished."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from orchestration.jobs.lease import read_claim
from orchestration.jobs.prepare import prepare
from orchestration.recipe import Recipe
from orchestration.search.check import check_search
from orchestration.search.result import OnTrial, TuneResult
from orchestration.services import storage, tracking

if TYPE_CHECKING:
    from orchestration.jobs.attempts import Progress

logger = logging.getLogger(__name__)


def tune(recipe: Recipe, *, on_trial: OnTrial | None = None, progress: Progress | None = None) -> TuneResult:
    """Search a recipe's space to its end, from where an earlier call of the same name and recipe left it.

    Raises:
        ConfigError: the space has knobs or values that the recipe cannot take; nothing was started.
        TrainingError: the name belongs to another recipe, or no trial finished.
        TinyEmoError: see `prepare`, `train`, and what the servers say.
    """
    preparation = prepare(recipe)
    recipe = preparation.recipe
    check_search(preparation)
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    claim = read_claim(folder, recipe, preparation.data_digests())
    if claim is not None and storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return TuneResult(**storage.read_json(f"{folder}/result.json"))
    tracking.require_server()
    # Torch and Ray take seconds to import: what is wrong with a search or its data has been said by now.
    from orchestration.search.driver import run_search

    return run_search(preparation, claim, folder, on_trial=on_trial, progress=progress)
