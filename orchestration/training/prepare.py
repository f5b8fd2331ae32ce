"""What is known of a run before a worker starts: its recipe held against the data set's manifest and index."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from orchestration.datasets.manifest import FeatureManifest, load_manifest
from orchestration.datasets.split import SplitRows, carve_validation, load_splits
from orchestration.recipe import Recipe
from orchestration.streaming.feature_stream import Split, StreamPlan
from orchestration.streaming.sampling import SampleOrder, TrainPlan
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import canonical_word, taxonomy_labels


@dataclass(frozen=True)
class Preparation:
    """A recipe with what it will read: all that is known before a worker starts."""

    recipe: Recipe
    manifest: FeatureManifest
    words: tuple[str, ...]
    splits: dict[str, SplitRows]
    left_out_words: tuple[str, ...] = ()
    left_out: SplitRows | None = None
    """Train rows of the labels of data.leave_out, labels as indices into `left_out_words`; None without such labels."""

    def data_digests(self) -> dict[str, str]:
        """Of what it reads, by the data set's name."""
        return {self.manifest.name: self.manifest.digest}

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
            num_readers=recipe.data.num_readers,
            is_tested=is_refit or not recipe.train.refit,
        )


def prepare(recipe: Recipe) -> Preparation:
    """Read manifest and index and hold the recipe against them; no shard is read and no worker started.

    Raises:
        ConfigError: all that does not fit together, one line a field.
        StorageError, DataError: the data set cannot be read.
    """
    manifest = load_manifest(recipe.data.dataset, FeatureManifest)
    taxonomy = taxonomy_labels(recipe.labels.taxonomy)
    left_out_words = tuple(dict.fromkeys(canonical_word(word) for word in recipe.data.leave_out))
    words = tuple(word for word in taxonomy if word not in left_out_words)
    problems = _leave_out_problems(recipe, left_out_words, words)
    all_splits = load_splits(manifest, taxonomy)
    splits = {name: _of_words(rows, taxonomy, words) for name, rows in all_splits.items()}
    for split in ("train", "test"):
        if split not in splits:
            problems.append(f"data.dataset: {manifest.uri} has no {split} split, it has {', '.join(splits)}")
    if manifest.feature_width != recipe.projector.encoder_width:
        problems.append(
            f"projector.encoder_width: {recipe.projector.encoder_width} and the features of {manifest.uri} "
            f"are {manifest.feature_width} wide"
        )
    problems += _encoder_problems(recipe, manifest)
    num_train = len(splits.get("train", ()))
    if recipe.train.global_batch_size > num_train * (1 - recipe.data.validation_fraction):
        problems.append(
            f"train.global_batch_size: {recipe.train.global_batch_size} is more than the {num_train} train rows "
            "less validation"
        )
    if problems:
        raise ConfigError(f"{recipe.name}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))
    left_out = _of_words(all_splits["train"], taxonomy, left_out_words) if left_out_words else None
    return Preparation(recipe, manifest, words, splits, left_out_words, left_out)


def _leave_out_problems(recipe: Recipe, left_out: tuple[str, ...], words: tuple[str, ...]) -> list[str]:
    foreign = [word for word in left_out if word not in taxonomy_labels(recipe.labels.taxonomy)]
    if foreign:
        return [f"data.leave_out: {', '.join(foreign)} not among the labels of {recipe.labels.taxonomy}"]
    if len(words) < 2:
        return [f"data.leave_out: leaves {len(words)} labels to train on; at least 2"]
    return []


def _encoder_problems(recipe: Recipe, manifest: FeatureManifest) -> list[str]:
    wanted, found = recipe.projector.encoder, manifest.encoder
    if not wanted or (found is not None and found.matches(wanted)):
        return []
    made_by = "do not say which encoder made them" if found is None else f"are of {found}"
    return [f"projector.encoder: {wanted} and the features of {manifest.uri} {made_by}"]


def _of_words(rows: SplitRows, taxonomy: tuple[str, ...], words: tuple[str, ...]) -> SplitRows:
    """The rows whose label is among `words`, labels as indices into those."""
    if words == taxonomy:
        return rows
    place = np.array([words.index(word) if word in words else -1 for word in taxonomy], dtype=np.int64)
    kept = rows.take(np.flatnonzero(place[rows.label] >= 0))
    return replace(kept, label=place[kept.label])
