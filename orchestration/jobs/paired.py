"""Paired tests: of losses with and without a record's own image, and of two finished runs.

Shape letters: N records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.jobs.checkpoints import read_state
from orchestration.services import storage
from tinyemo.errors import DataError, TrainingError


@dataclass(frozen=True)
class PairedTest:
    """How much lower the first loss of each pair is than the second.

    Attributes:
        num_pairs: N.
        mean_first: nats a token, mean over pairs.
        mean_second: nats a token, mean over pairs.
        mean_difference: second less first; above 0 where the first is lower.
        share_lower: of the pairs, how many have the first strictly lower, in [0, 1].
        p_wilcoxon: of Wilcoxon's signed-rank test, one-sided for "the first is lower"; 1 where all pairs are equal.
        p_t: of the paired t-test, one-sided likewise; 1 where it is not defined.
    """

    num_pairs: int
    mean_first: float
    mean_second: float
    mean_difference: float
    share_lower: float
    p_wilcoxon: float
    p_t: float


def paired_test(first: NDArray[np.float64], second: NDArray[np.float64]) -> PairedTest:
    """Test whether the first loss of each of N records is lower than the second.

    Args:
        first: (N,) nats a token.
        second: (N,) likewise, of the same records.
    """
    from scipy import stats

    difference = second - first
    is_flat = not difference.any()
    p_t = 1.0 if len(first) < 2 or is_flat else float(stats.ttest_rel(first, second, alternative="less").pvalue)
    return PairedTest(
        num_pairs=len(first),
        mean_first=float(first.mean()),
        mean_second=float(second.mean()),
        mean_difference=float(difference.mean()),
        share_lower=float((difference > 0).mean()),
        p_wilcoxon=1.0 if is_flat else float(stats.wilcoxon(first, second, alternative="less").pvalue),
        p_t=1.0 if math.isnan(p_t) else p_t,
    )


def mean_by_group(values: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean of each group's values, groups in alphabetical order.

    Records of one photograph are no independent draws, their means are.
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(place, weights=values, minlength=len(names)) / np.bincount(place, minlength=len(names))


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
    """Return how much lower the first run's losses are, over held-out records and over images.

    Args:
        first: name of a finished run.
        second: of another one over the same held-out records.
        root: S3 folder of the runs.

    Raises:
        TrainingError: a run was not evaluated.
        DataError: they were evaluated on different records.
        StorageError: S3 cannot be read.
    """
    first_rows, second_rows = (_rows_by_id(name, root) for name in (first, second))
    if set(first_rows) != set(second_rows):
        num_shared = len(set(first_rows) & set(second_rows))
        raise DataError(
            f"{first} was evaluated on {len(first_rows)} records and {second} on {len(second_rows)}, {num_shared} of "
            "them the same: compare runs over the same held-out records"
        )
    ids = sorted(first_rows)
    conditions = tuple("right" if "right" in rows[ids[0]] else "text_only" for rows in (first_rows, second_rows))
    losses = [
        np.array([rows[name][condition] for name in ids], dtype=np.float64)
        for rows, condition in zip((first_rows, second_rows), conditions, strict=True)
    ]
    images = [first_rows[name]["image"] for name in ids]
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
