"""A search held against its recipe and data before anything starts."""

from __future__ import annotations

from orchestration.jobs.prepare import Preparation
from orchestration.recipe import Recipe
from orchestration.search.space import Distribution
from orchestration.search.trial_recipes import trial_recipe
from tinyemo.errors import ConfigError


def check_search(preparation: Preparation) -> None:
    """Hold every choice and both ends of every range against the recipe, and the search against the data.

    Raises:
        ConfigError: all that does not fit, one line a field.
    """
    recipe = preparation.recipe
    config, knobs = recipe.search, recipe.search.knobs()
    problems = [] if knobs else ["search.space: is empty; name at least one knob, for instance loss.temperature"]
    for knob, distribution in knobs.items():
        problems += _value_problems(recipe, knob, distribution)
    batch = knobs.get("train.global_batch_size")
    largest = max(batch.examples()) if batch else recipe.train.global_batch_size
    num_train = len(preparation.selection.whole)
    if largest > num_train * (1 - recipe.data.validation_fraction):
        problems.append(
            f"search.space.train.global_batch_size: {largest} is more than the {num_train} train rows less validation"
        )
    if recipe.data.validation_split:
        problems.append("data.validation_split: a search carves its folds out of train; leave it out")
    if not recipe.data.validation_fraction:
        problems.append("data.validation_fraction: a search needs validation rows to choose by; got 0")
    last_fold = recipe.data.validation_fold + config.num_folds
    if recipe.data.validation_fraction * last_fold > 1 + 1e-9:
        problems.append(
            f"search.num_folds: {config.num_folds} folds of data.validation_fraction {recipe.data.validation_fraction} "
            "are more than the data"
        )
    if config.objective == "seen_and_zero_shot" and len(preparation.selection.left_out_words) < 2:
        problems.append(
            "search.objective: seen_and_zero_shot tells labels apart that were left out of training; "
            f"data.leave_out needs at least 2, got {list(preparation.selection.left_out_words)}"
        )
    if problems:
        raise ConfigError(f"{recipe.name}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))


def _value_problems(recipe: Recipe, knob: str, distribution: Distribution) -> list[str]:
    values = distribution.examples()
    if knob == "train.global_batch_size" and distribution.choices is None:
        # Its values must divide by the number of workers: the ends do not tell.
        values = list(range(int(values[0]), int(values[1]) + 1, int(distribution.step or 1)))
    problems = []
    for value in values:
        try:
            trial_recipe(recipe, {knob: value})
        except ConfigError as error:
            problems += [f"search.space.{line.strip()}" for line in str(error).splitlines()[1:]]
    return problems[:3]
