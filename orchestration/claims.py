"""A run's name in S3: whoever takes it keeps it, and goes on with it under the same recipe and the same data alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orchestration import storage, tracking
from orchestration.recipe import Recipe
from tinyemo.errors import TrainingError

Digests = Mapping[str, str]
"""What a run reads: digests of its data by a name for each."""


def read_claim(folder: str, recipe: Recipe, data: Digests) -> str | None:
    """The MLflow run that holds this name, None where the name is free.

    Args:
        folder: of the run in S3.
        recipe: that asks for the name.
        data: that it would read.

    Raises:
        TrainingError: the name belongs to another recipe or other data; the message names the fields.
    """
    uri = f"{folder}/run.json"
    if not storage.exists(uri):
        return None
    claim = storage.read_json(uri)
    before_recipe = _as_of_today(claim.get("recipe", {}))
    if _is_same(recipe, before_recipe) and claim.get("data") == dict(data):
        return str(claim["mlflow_run_id"])
    ours, theirs = (tracking.flatten(found) for found in (recipe.model_dump(mode="json"), before_recipe))
    changed = [f"{key} {theirs.get(key)} -> {ours.get(key)}" for key in ours if ours.get(key) != theirs.get(key)]
    before = claim.get("data", {})
    changed += [
        f"data version of {name} {str(before.get(name))[:12]} -> {str(data.get(name))[:12]}"
        for name in sorted({*before, *data})
        if before.get(name) != data.get(name)
    ]
    raise TrainingError(
        f"a run named {recipe.name} exists with another recipe ({'; '.join(changed)}): "
        "choose another name with --set name=..., or undo the change to go on with it"
    )


def write_claim(folder: str, recipe: Recipe, data: Digests, run_id: str) -> None:
    """Take the run's name for this recipe, these data and this MLflow run.

    Raises:
        TrainingError: another driver took it in the same moment.
    """
    claim = {
        "data": dict(data),
        "mlflow_run_id": run_id,
        "recipe": recipe.model_dump(mode="json"),
    }
    if not storage.write_bytes_if_absent(f"{folder}/run.json", json.dumps(claim, indent=1).encode()):
        raise TrainingError(f"another job started {recipe.name} just now: wait for it, or choose another name")


def _as_of_today(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an earlier version of this package stored it, fields that it did not know at their defaults; as it
    is where today's package knows less."""
    try:
        return Recipe.model_validate(content).model_dump(mode="json")
    except ValidationError:
        return content


def _is_same(recipe: Recipe, content: dict[str, Any]) -> bool:
    try:
        return Recipe.model_validate(content).digest() == recipe.digest()
    except ValidationError:
        return False


def is_finished_family(uri: str, recipe: Recipe) -> bool:
    """Whether a family of this recipe has written its last file.

    Raises:
        TrainingError: one of another recipe has.
    """
    if not storage.exists(uri):
        return False
    if not _is_same(recipe, storage.read_json(uri).get("recipe", {})):
        raise TrainingError(
            f"a family named {recipe.name} exists with another recipe: choose another name with --set name=..."
        )
    return True


def finish_family(uri: str, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write a family's last file: its recipe, whose stages keep their order, and what came out."""
    content = {"recipe": recipe.model_dump(mode="json"), **facts}
    storage.write_bytes(uri, json.dumps(content, indent=1).encode())
