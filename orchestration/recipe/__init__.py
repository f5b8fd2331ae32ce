"""The recipe: one validated configuration for a run, read from TOML and `--set section.key=value`."""

from orchestration.recipe.recipe import (
    CheckpointConfig,
    FamilyConfig,
    Recipe,
    TrainConfig,
    WorkersConfig,
    load_recipe,
    parse_recipe,
    parse_size,
    recipe_path,
    recipes_of_sizes,
    to_toml,
)

__all__ = [
    "CheckpointConfig", "FamilyConfig", "Recipe", "TrainConfig", "WorkersConfig",
    "load_recipe", "parse_recipe", "parse_size", "recipe_path", "recipes_of_sizes", "to_toml",
]  # fmt: skip
