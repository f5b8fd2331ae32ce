"""What is known of a reading before a worker starts."""

from __future__ import annotations

from orchestration.recipe import Recipe
from orchestration.streaming.record_sets import open_record_set
from orchestration.streaming.record_stream import RecordPlan, plan_records
from tinyemo.errors import ConfigError


def prepare_records(recipe: Recipe) -> RecordPlan:
    """The plan of a recipe's records; manifests are read, no shard is.

    Raises:
        ConfigError: the recipe names no data set, or one that does not fit it.
        StorageError, DataError: a data set cannot be read.
    """
    if not recipe.records.datasets:
        raise ConfigError(
            "records.datasets: names no data set; make one with `tinyemo ingest instruct` or `tinyemo ingest oasis` "
            "and say --set 'records.datasets=[\"s3://tinyemo/datasets/oasis\"]'"
        )
    sets = tuple(open_record_set(uri, recipe.records.split) for uri in recipe.records.datasets)
    return plan_records(
        sets,
        recipe.records,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        num_epochs=recipe.train.num_epochs,
        world_size=recipe.workers.num_workers,
    )
