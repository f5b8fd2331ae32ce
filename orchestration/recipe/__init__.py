"""The recipe: the validated configuration of a run, read from TOML and `--set section.key=value`."""

from orchestration.recipe.recipe import (
    CheckpointConfig,
    FamilyConfig,
    Recipe,
    TrainConfig,
    WorkersConfig,
    command_of,
    load_recipe,
    parse_recipe,
    parse_size,
    recipe_path,
    recipes_of_sizes,
    shipped_recipes,
    to_toml,
)
from orchestration.recipe.sections import DataConfig, RecordsConfig

__all__ = [
    "CheckpointConfig", "DataConfig", "FamilyConfig", "Recipe", "RecordsConfig", "TrainConfig", "WorkersConfig",
    "command_of", "load_recipe", "parse_recipe", "parse_size", "recipe_path", "recipes_of_sizes", "shipped_recipes",
    "to_toml",
]  # fmt: skip
