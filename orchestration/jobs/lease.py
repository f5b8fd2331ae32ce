"""A run's name in S3: whoever takes it keeps it, and goes on with it under the same recipe and the same data alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orchestration.recipe import Recipe
from orchestration.services import storage, tracking
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
    stored = claim.get("recipe", {})
    earlier = _as_of_today(stored)
    before = claim.get("data", {})
    if earlier is not None and earlier.digest() == recipe.digest() and before == dict(data):
        return str(claim["mlflow_run_id"])
    ours = tracking.flatten(recipe.model_dump(mode="json"))
    theirs = tracking.flatten(earlier.model_dump(mode="json") if earlier is not None else stored)
    changed = [
        f"{key} {theirs.get(key)} -> {ours.get(key)}"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]
    if list(recipe.stages) != list(stored.get("stages", {})):
        changed.append(f"stages {', '.join(stored.get('stages', {}))} -> {', '.join(recipe.stages)}")
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


def _as_of_today(content: dict[str, Any]) -> Recipe | None:
    """A recipe that an earlier version of this package stored, with defaults for fields that it did not know; None
    where it has what today's package does not take."""
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None


def is_finished_family(uri: str, recipe: Recipe) -> bool:
    """Whether a family of this recipe has written its last file.

    Raises:
        TrainingError: one of another recipe has.
    """
    if not storage.exists(uri):
        return False
    earlier = _as_of_today(storage.read_json(uri).get("recipe", {}))
    if earlier is None or earlier.digest() != recipe.digest():
        raise TrainingError(
            f"a family named {recipe.name} exists with another recipe: choose another name with --set name=..."
        )
    return True


def finish_family(uri: str, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write a family's last file: its recipe, whose stages keep their order, and what came out."""
    content = {"recipe": recipe.model_dump(mode="json"), **facts}
    storage.write_bytes(uri, json.dumps(content, indent=1).encode())
