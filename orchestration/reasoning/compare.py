"""Two finished runs of the reasoning model held against each other, held-out record by record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestration.jobs.stage_state import read_state
from orchestration.reasoning.paired import PairedTest, mean_by_group, paired_test
from orchestration.services import storage
from tinyemo.errors import DataError, TrainingError


@dataclass(frozen=True)
class Comparison:
    """Mean nats a token of held-out answers.

    Attributes:
        conditions: how each run was measured: with a record's own image ("right"), or "text_only" where it was
            trained without images.
        over_records: a pair for each record.
        over_images: a pair for each image, the mean of its records, which are no independent draws.
    """

    first: str
    second: str
    conditions: tuple[str, str]
    over_records: PairedTest
    over_images: PairedTest


def compare_runs(first: str, second: str, root: str) -> Comparison:
    """How much lower the first run's losses are.

    Args:
        first: name of a finished run.
        second: of another one over the same held-out records.
        root: S3 folder of the runs.

    Raises:
        TrainingError: a run was not evaluated.
        DataError: they were evaluated on different records.
        StorageError: S3 cannot be read.
    """
    ours, theirs = (_rows_by_id(name, root) for name in (first, second))
    if set(ours) != set(theirs):
        num_shared = len(set(ours) & set(theirs))
        raise DataError(
            f"{first} was evaluated on {len(ours)} records and {second} on {len(theirs)}, {num_shared} of them the "
            "same: compare runs over the same held-out records"
        )
    ids = sorted(ours)
    conditions = tuple("right" if "right" in rows[ids[0]] else "text_only" for rows in (ours, theirs))
    losses = [
        np.array([rows[name][condition] for name in ids], dtype=np.float64)
        for rows, condition in zip((ours, theirs), conditions, strict=True)
    ]
    images = [ours[name]["image"] for name in ids]
    return Comparison(
        first=first,
        second=second,
        conditions=(conditions[0], conditions[1]),
        over_records=paired_test(losses[0], losses[1]),
        over_images=paired_test(mean_by_group(losses[0], images), mean_by_group(losses[1], images)),
    )


def _rows_by_id(name: str, root: str) -> dict[str, dict[str, Any]]:
    state = read_state(f"{root}/{name}/evaluation")
    if state is None or not state.is_final:
        raise TrainingError(f"{root}/{name} has no evaluation: train a recipe with stages of that name to its end")
    return {row["id"]: row for row in storage.read_json(f"{state.checkpoint}/rows.json")}
