"""What is known of a run before a worker starts: its recipe held against the data set's manifest and index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestration.manifest import Manifest, load_manifest
from orchestration.recipe import Recipe
from orchestration.sampling import SampleOrder, TrainPlan
from orchestration.split import SplitRows, carve_validation, load_splits
from orchestration.stream import Split, StreamPlan
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import taxonomy_labels


@dataclass(frozen=True)
class Preparation:
    """A recipe with what it will read: all that is known before a worker starts."""

    recipe: Recipe
    manifest: Manifest
    words: tuple[str, ...]
    splits: dict[str, SplitRows]

    def plan(self, *, num_epochs: float, is_refit: bool) -> StreamPlan:
        """The stream of one phase: train with validation beside it, or both as train."""
        recipe = self.recipe
        rows = self.splits["train"]
        train, validation = carve_validation(
            rows, fraction=recipe.data.validation_fraction, fold=recipe.data.validation_fold
        )
        if is_refit:
            train, validation = rows, validation.take(np.arange(0))
        order = SampleOrder(len(train), recipe.train.seed, recipe.data.shuffle_pool_rows)
        splits: dict[Split, SplitRows] = {"train": train, "validation": validation, "test": self.splits["test"]}
        return StreamPlan(
            manifest=self.manifest,
            train=TrainPlan(order, recipe.train.global_batch_size, num_epochs),
            splits=splits,
            world_size=recipe.workers.num_workers,
            steps_per_window=recipe.data.steps_per_window,
            is_tested=is_refit or not recipe.train.refit,
        )


def prepare(recipe: Recipe) -> Preparation:
    """Read manifest and index and hold the recipe against them; no shard is read and no worker started.

    Raises:
        ConfigError: all that does not fit together, one line a field.
        StorageError, DataError: the data set cannot be read.
    """
    manifest = load_manifest(recipe.data.dataset)
    words = taxonomy_labels(recipe.labels.taxonomy)
    splits = load_splits(manifest, words)
    problems = []
    for split in ("train", "test"):
        if split not in splits:
            problems.append(f"data.dataset: {manifest.uri} has no {split} split, it has {', '.join(splits)}")
    if manifest.feature_width != recipe.projector.encoder_width:
        problems.append(
            f"projector.encoder_width: {recipe.projector.encoder_width} and the features of {manifest.uri} "
            f"are {manifest.feature_width} wide"
        )
    num_train = len(splits.get("train", ()))
    if recipe.train.global_batch_size > num_train * (1 - recipe.data.validation_fraction):
        problems.append(
            f"train.global_batch_size: {recipe.train.global_batch_size} is more than the {num_train} train rows "
            "less validation"
        )
    if problems:
        raise ConfigError(f"{recipe.name}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))
    return Preparation(recipe, manifest, words, splits)
