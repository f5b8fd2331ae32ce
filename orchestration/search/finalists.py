"""The best trials once more with other seeds and on every fold, so that luck with a seed or a fold does not choose.

The best of a hundred trials owes part of its rank to the folds it was judged on: on Emotion6 four points of accuracy
over three folds were half a point over all five (docs/lab_log.md).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import ray

from orchestration.recipe import Recipe
from orchestration.search.records import SEEN, TrialRecord
from orchestration.search.trial import PackedTrial, SearchData
from orchestration.search.trial_recipes import trial_recipe
from orchestration.services import storage


@dataclass(frozen=True)
class Finalist:
    """A trial that was tried again.

    Attributes:
        trial: its number.
        values: validation accuracy by seed, mean over all folds; its value in the search is not among them.
    """

    trial: int
    values: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)


def judge_finalists(recipe: Recipe, data: SearchData, folder: str, trials: list[TrialRecord]) -> list[Finalist]:
    """Each trial's accuracy with seeds of its own, best first; kept in S3, so that a second call reads it.

    Args:
        recipe: with its search.
        data: that the search read.
        folder: of the search in S3.
        trials: best first; equal means keep this order.
    """
    uri = f"{folder}/finalists.json"
    if storage.exists(uri):
        return [Finalist(**item) for item in storage.read_json(uri)]
    config = recipe.search
    if len(trials) < 2:
        return []
    shared = ray.put(data)
    train_again = ray.remote(
        num_cpus=config.cpus_per_trial, num_gpus=config.gpus_per_trial, max_retries=2
    )(final_accuracy)  # fmt: skip
    seeds = [recipe.train.seed + 1 + offset for offset in range(config.finalist_seeds)]
    jobs = [[train_again.remote(recipe, trial.params, seed, shared) for seed in seeds] for trial in trials]
    values: list[list[Any]] = [ray.get(refs) for refs in jobs]
    found = [Finalist(trial.number, list(map(float, row))) for trial, row in zip(trials, values, strict=True)]
    found.sort(key=lambda finalist: -finalist.mean)
    storage.write_json(uri, [asdict(finalist) for finalist in found])
    return found


def final_accuracy(recipe: Recipe, params: dict[str, Any], seed: int, data: SearchData) -> float:
    """Validation accuracy after the last epoch, mean over all folds, also those that the search did not look at."""
    import torch

    torch.set_num_threads(max(1, int(recipe.search.cpus_per_trial)))
    trial = PackedTrial(
        trial_recipe(recipe, {**params, "data.validation_fold": 0}, seed=seed),
        data,
        num_folds=int(1 / recipe.data.validation_fraction + 1e-9),
        device="cuda" if recipe.search.gpus_per_trial else "cpu",
    )
    metrics: dict[str, float] = {}
    while not trial.is_finished:
        metrics = trial.train_epoch()
    return metrics[SEEN]
