"""What is known of a run before a worker starts: its recipe held against the data set's manifest and index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestration.data.dataset import Selection, SplitRows, select_rows
from orchestration.data.manifest import Manifest, load_manifest
from orchestration.recipe import Recipe
from orchestration.streaming.feature_stream import Split, StreamPlan
from orchestration.streaming.sampling import SampleOrder, TrainPlan
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import Taxonomy


@dataclass(frozen=True)
class Preparation:
    """A recipe with what it will read: all that is known before a worker starts."""

    recipe: Recipe
    manifest: Manifest
    taxonomy: Taxonomy
    selection: Selection

    @property
    def words(self) -> tuple[str, ...]:
        """Labels that are told apart."""
        return self.selection.words

    def data_digests(self) -> dict[str, str]:
        """Of what it reads, by the data set's name."""
        return {self.manifest.name: self.manifest.digest}

    def plan(self, *, num_epochs: float, is_refit: bool) -> StreamPlan:
        """The stream of one phase: train with validation beside it, or both as train."""
        recipe = self.recipe
        train, validation = self.selection.train, self.selection.validation
        if is_refit:
            train, validation = self.selection.whole, validation.take(np.arange(0))
        order = SampleOrder(len(train), recipe.train.seed, recipe.data.shuffle_pool_rows)
        splits: dict[Split, SplitRows] = {"train": train, "validation": validation, "test": self.selection.test}
        return StreamPlan(
            manifest=self.manifest,
            train=TrainPlan(order, recipe.train.global_batch_size, num_epochs),
            splits=splits,
            world_size=recipe.workers.num_workers,
            steps_per_window=recipe.data.steps_per_window,
            num_readers=recipe.data.num_readers,
            is_tested=is_refit or not recipe.train.refit,
        )


def prepare(recipe: Recipe) -> Preparation:
    """Read manifest and index and hold the recipe against them; no shard is read and no worker started.

    The recipe that comes back names its labels, also where the one that went in leaves them to the data set.

    Raises:
        ConfigError: all that does not fit together, one line a field.
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
