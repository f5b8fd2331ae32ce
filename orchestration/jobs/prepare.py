"""Preparation of a run before a worker starts: its recipe, checked against the manifests of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestration.data.manifest import Manifest, load_manifest
from orchestration.data.sets import RecordSet, Selection, SplitRows, select_rows
from orchestration.data.stream import EVALUATION_ROWS, Stream, plan_features
from orchestration.recipe import Recipe
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import Taxonomy


@dataclass(frozen=True)
class Preparation:
    """A projector's recipe and the rows that it reads."""

    recipe: Recipe
    manifest: Manifest
    taxonomy: Taxonomy
    selection: Selection

    @property
    def words(self) -> tuple[str, ...]:
        """Labels that the projector tells apart."""
        return self.selection.words

    def data_digests(self) -> dict[str, str]:
        """Return the digest of the data set by its name."""
        return {self.manifest.name: self.manifest.digest}

    def facts(self) -> dict[str, Any]:
        """Return what a dry run shows."""
        rows, train = self.rows(is_refit=False), self.recipe.train
        stream = self.streams(num_epochs=train.num_epochs, is_refit=False, is_tested=False)["train"]
        return {
            "data": self.manifest.uri,
            "data_kind": self.manifest.data,
            **{f"{split}_rows": len(rows[split]) for split in rows},
            "optimizer_steps": stream.num_steps,
            "rows_per_rank_and_step": train.global_batch_size // self.recipe.workers.num_workers,
        }

    def rows(self, *, is_refit: bool) -> dict[str, SplitRows]:
        """Return the rows of each split; a refit trains on those of validation too."""
        selection = self.selection
        train, validation = selection.train, selection.validation
        if is_refit:
            train, validation = selection.whole, validation.take(np.arange(0))
        return {"train": train, "validation": validation, "test": selection.test}

    def record_set(self, rows: SplitRows) -> RecordSet:
        """Return the records of the data set that `rows` are."""
        whole = RecordSet(self.manifest, "")
        return whole.select(whole.row_numbers(rows.shard, rows.row))

    def streams(self, *, num_epochs: float, is_refit: bool, is_tested: bool) -> dict[str, Stream]:
        """Return the streams of a stage by name; "validation" and "test" only where there are such rows."""
        rows = self.rows(is_refit=is_refit)
        found = {"train": self._stream(rows["train"], num_epochs)}
        if len(rows["validation"]):
            found["validation"] = self._stream(rows["validation"])
        if is_tested:
            found["test"] = self._stream(rows["test"])
        return found

    def _stream(self, rows: SplitRows, num_epochs: float | None = None) -> Stream:
        """Return the stream of some rows: over epochs, or once and padded where no number of epochs is given."""
        recipe, world_size = self.recipe, self.recipe.workers.num_workers
        evaluation_size = -(-min(len(rows), EVALUATION_ROWS) // world_size) * world_size
        return plan_features(
            self.record_set(rows),
            self.words,
            recipe.data,
            seed=recipe.train.seed,
            global_batch_size=evaluation_size if num_epochs is None else recipe.train.global_batch_size,
            num_epochs=num_epochs or 1,
            world_size=world_size,
            tail="pad" if num_epochs is None else "carry",
        )


def prepare(recipe: Recipe) -> Preparation:
    """Read manifest and index and check the recipe against them; no shard is read and no worker started.

    The returned recipe names its labels, also where the given one leaves them to the data set.

    Raises:
        ConfigError: everything that does not fit together, one line per field.
        StorageError, DataError: the data set cannot be read.
    """
    manifest = load_manifest(recipe.data.dataset, "features")
    taxonomy = recipe.labels.resolved(manifest.taxonomy)
    labels = recipe.labels.model_copy(update={"taxonomy": taxonomy, "words": ()})
    recipe = recipe.model_copy(update={"labels": labels})
    problems: list[str] = []
    selection = None
    data = recipe.data
    try:
        selection = select_rows(
            manifest,
            taxonomy.words,
            leave_out=data.leave_out,
            validation_split=data.validation_split,
            validation_fraction=data.validation_fraction,
            validation_fold=data.validation_fold,
        )
    except ConfigError as error:
        problems += str(error).splitlines()
    if manifest.feature_width != recipe.projector.encoder_width:
        problems.append(
            f"projector.encoder_width: {recipe.projector.encoder_width} and the features of {manifest.uri} "
            f"are {manifest.feature_width} wide"
        )
    problems += _encoder_problems(recipe, manifest)
    if selection is not None and recipe.train.global_batch_size > len(selection.train):
        problems.append(
            f"train.global_batch_size: {recipe.train.global_batch_size} is more than the {len(selection.train)} train "
            "rows left after validation"
        )
    if problems:
        raise ConfigError(f"{recipe.name}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))
    assert selection is not None
    return Preparation(recipe, manifest, taxonomy, selection)


def _encoder_problems(recipe: Recipe, manifest: Manifest) -> list[str]:
    wanted, found = recipe.projector.encoder, manifest.encoder
    if not wanted or (found is not None and found.matches(wanted)):
        return []
    made_by = "do not say which encoder made them" if found is None else f"are of {found}"
    return [f"projector.encoder: {wanted} and the features of {manifest.uri} {made_by}"]
