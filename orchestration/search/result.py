"""What a finished search says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestration.search.records import TrialRecord

OnTrial = Callable[[list[TrialRecord]], None]
"""Called with all records, the newest last."""


@dataclass(frozen=True)
class TuneResult:
    """What a finished search says of itself.

    Attributes:
        num_finished, num_stopped, num_failed: trials by how they ended; stopped is by ASHA.
        search_s: seconds from the first trial's start to the last one's end, over all starts of the search, without
            the pauses between them.
        params: the winner's value by knob.
        winner_trial: its number.
        val_top1_accuracy: of the winner, over all folds and seeds that the search did not use; without finalists its
            value in the search, which is too high for having been the best of many.
        finalists: those that were tried again, best first.
        front: numbers of the trials on the Pareto front, of a search with two objectives.
        winner_recipe: S3 address of the TOML that `tinyemo train` takes as it is.
        winners: what `tinyemo train` says of it, a seed each.
        test_top1_mean, test_top1_se: over the seeds, standard error of the mean; 0 with one seed.
    """

    name: str
    run_id: str
    run_url: str
    num_finished: int
    num_stopped: int
    num_failed: int
    search_s: float
    params: dict[str, Any]
    winner_trial: int
    val_top1_accuracy: float
    finalists: list[dict[str, Any]]
    front: list[int]
    winner_recipe: str
    winners: list[dict[str, Any]]
    test_top1_mean: float
    test_top1_se: float
    num_test: int
    registered_version: str
