"""The recipes of a search: a trial's, the first one's values, the winner's."""

from __future__ import annotations

from typing import Any

from orchestration.recipe import Recipe, parse_recipe
from orchestration.search.records import TrialRecord
from tinyemo.config import PUBLISHED_TEMPERATURES


def trial_recipe(recipe: Recipe, params: dict[str, Any], *, name: str | None = None, seed: int | None = None) -> Recipe:
    """The recipe with a trial's values, that `tinyemo train` takes as it is; it searches nothing itself.

    Raises:
        ConfigError: the values do not go together.
    """
    content = recipe.model_dump(mode="json", exclude={"search"})
    for knob, value in params.items():
        section, field = knob.split(".")
        content[section][field] = value
    if seed is not None:
        content["train"]["seed"] = seed
    content["name"] = name or recipe.name
    return parse_recipe(content, source=f"trial of {recipe.name}")


def first_point(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe's own values as the first trial, so that a search never ends below where it starts; None where the
    space does not hold them."""
    content = recipe.model_dump(mode="json")
    content["loss"]["temperature"] = recipe.loss.temperature or PUBLISHED_TEMPERATURES.get(recipe.loss.name, 0.07)
    content["projector"]["hidden_width"] = recipe.projector.hidden_width or recipe.projector.hidden_size
    point = {}
    for knob, distribution in recipe.search.knobs().items():
        section, field = knob.split(".")
        value = content[section][field]
        if not distribution.holds(value):
            return None
        point[knob] = value
    return point


def winner_recipe(recipe: Recipe, winner: TrialRecord) -> Recipe:
    """What `tinyemo train` takes to train the winner.

    With train.refit it trains on train and validation for as many epochs as the search judged trials by, so nothing is
    left to choose an epoch by; without it, as any recipe that keeps validation rows.
    """
    params = dict(winner.params)
    if recipe.train.refit:
        params |= {"data.validation_fraction": 0.0, "train.refit": False}
    return trial_recipe(recipe, params, name=f"{recipe.name}-winner")
