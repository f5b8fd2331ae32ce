"""Ray Tune runs the trials: Optuna's TPE proposes, ASHA stops, actors that hold the shared data are used again.

A trial reports once per epoch. A loss that is not finite ends its trial as a result and not as an error, so that the
actor lives on; any other exception ends the actor too, and Tune starts another.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from orchestration.recipe import Recipe
from orchestration.search.records import SEEN, ZERO_SHOT, TrialRecord
from orchestration.search.space import SearchConfig
from orchestration.search.trial import PackedTrial, SearchData
from orchestration.search.trial_recipes import trial_recipe
from tinyemo.errors import ConfigError, TinyEmoError

logger = logging.getLogger(__name__)

STUDY = "search"
METRIC_PREFIXES = ("train/", "val/", "zero_shot/")
OnEnd = Callable[[TrialRecord], None]


def objectives(config: SearchConfig) -> list[str]:
    """The metrics that a search maximises, the first one is ASHA's."""
    return [SEEN] if config.objective == "seen" else [SEEN, ZERO_SHOT]


class TrialActor(tune.Trainable):
    """Runs one trial after another in one process."""

    def setup(self, config: dict[str, Any], recipe: Recipe, data: SearchData) -> None:
        """Take the shared data, once for the life of the actor, and the first trial."""
        import torch

        torch.set_num_threads(max(1, int(recipe.search.cpus_per_trial)))
        self.recipe, self.data = recipe, data
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial."""
        self.trial: PackedTrial | None = None
        self.params = new_config
        return True

    def step(self) -> dict[str, Any]:
        """One epoch, or why there can be none."""
        try:
            if self.trial is None:
                search = self.recipe.search
                self.trial = PackedTrial(
                    trial_recipe(self.recipe, self.params),
                    self.data,
                    num_folds=search.num_folds,
                    device="cuda" if search.gpus_per_trial else "cpu",
                )
            metrics = self.trial.train_epoch()
        except TinyEmoError as error:
            return {**dict.fromkeys(objectives(self.recipe.search), 0.0), "failure": str(error), "done": True}
        return {**metrics, "done": self.trial.is_finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial is seconds long and its weights are not used."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""


@dataclass
class _Running:
    started_at: float
    curve: list[dict[str, float]]
    failure: str = ""


class RecordEnds(tune.Callback):
    """Turns the ends of Tune's trials into records, each once."""

    def __init__(self, num_epochs: int, first_number: int, on_end: OnEnd) -> None:
        self.num_epochs, self.next_number, self.on_end = num_epochs, first_number, on_end
        self.running: dict[str, _Running] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: Tune pickles callbacks for a restore that we do not use."""
        return {"num_epochs": self.num_epochs, "next_number": self.next_number, "on_end": None, "running": {}}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts."""
        self.running.setdefault(trial.trial_id, _Running(time.time(), []))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        running = self.running.setdefault(trial.trial_id, _Running(time.time(), []))
        running.failure = result.get("failure", "")
        if not running.failure:
            running.curve.append({key: value for key, value in result.items() if key.startswith(METRIC_PREFIXES)})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial finished, was stopped, or said why it failed."""
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial raised."""
        error = trial.get_pickled_error() or trial.get_error() or "its process ended"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self._end(trial, lines[-1][:500] if lines else type(error).__name__)

    def _end(self, trial: Any, error: str) -> None:
        running = self.running.pop(trial.trial_id, None)
        if running is None:
            return
        error = error or running.failure
        is_whole = len(running.curve) >= self.num_epochs
        record = TrialRecord(
            number=self.next_number,
            params=dict(trial.config),
            curve=running.curve,
            ended="failed" if error else "finished" if is_whole else "stopped",
            error=error,
            started_at=running.started_at,
            ended_at=time.time(),
        )
        self.next_number += 1
        self.on_end(record)


def max_concurrent(config: SearchConfig) -> int:
    """Trials that the cluster has room for, at most `search.max_concurrent`.

    Raises:
        ConfigError: it has no room for one.
    """
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0) / config.cpus_per_trial + 1e-9)
    if config.gpus_per_trial:
        room = min(room, int(resources.get("GPU", 0) / config.gpus_per_trial + 1e-9))
    if room < 1:
        raise ConfigError(
            f"search.cpus_per_trial: {config.cpus_per_trial} CPUs and {config.gpus_per_trial} GPUs for one trial are "
            f"more than the cluster has ({resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs)"
        )
    return min(room, config.max_concurrent or room, config.num_trials)


def run_trials(
    recipe: Recipe, data: SearchData, records: Sequence[TrialRecord], first_point: dict[str, Any] | None, on_end: OnEnd
) -> None:
    """Run the trials that are missing after `records`; `on_end` gets each as it ends.

    Args:
        recipe: with its search.
        data: goes into the object store, once.
        records: of an earlier start of the same search, which the sampler and ASHA learn from.
        first_point: values to try first, unless a record has them: the trial may have died with its driver.
    """
    config = recipe.search
    num_missing = config.num_trials - len(records)
    if num_missing <= 0:
        return
    # What Tune would write for each trial is in our records; its signal handler would turn Ctrl-C into a short search.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    os.environ |= {
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints a banner at verbosity 0
    for name in ("ray.tune", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).setLevel(logging.ERROR)
    num_epochs = PackedTrial(recipe, data, num_folds=config.num_folds, device="cpu").num_epochs
    slots = max_concurrent(config)
    with tempfile.TemporaryDirectory(prefix="tinyemo-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialActor, recipe=recipe, data=data),
                {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial},
            ),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(config, records, first_point),
                scheduler=_scheduler(config, num_epochs, records),
                num_samples=num_missing,
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=recipe.name,
                storage_path=folder,
                callbacks=[RecordEnds(num_epochs, len(records), on_end)],
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )
        tuner.fit()


def _searcher(config: SearchConfig, records: Sequence[TrialRecord], first_point: dict[str, Any] | None) -> OptunaSearch:
    """TPE over the space; it knows the records, and proposes `first_point` first unless one of them had it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics, space = objectives(config), config.to_optuna()
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=["maximize"] * len(metrics))
    for record in records:
        study.add_trial(
            optuna.trial.create_trial(
                params=record.params, distributions=space, values=[record.value(metric) for metric in metrics]
            )
        )
    if first_point and first_point not in [record.params for record in records]:
        study.enqueue_trial(first_point)
    sampler = optuna.samplers.TPESampler(
        # A search that starts again must not draw its first points again.
        seed=config.seed + len(records),
        n_startup_trials=config.num_startup_trials,
        multivariate=True,
        constant_liar=True,
    )
    is_single = len(metrics) == 1
    return OptunaSearch(
        space=space,
        metric=metrics[0] if is_single else metrics,
        mode="max" if is_single else ["max"] * len(metrics),
        sampler=sampler,
        storage=storage,
        study_name=STUDY,
    )


def _scheduler(config: SearchConfig, num_epochs: int, records: Sequence[TrialRecord]) -> ASHAScheduler:
    """ASHA on the first objective; its rungs hold the records."""
    metric = objectives(config)[0]
    scheduler = ASHAScheduler(
        metric=metric,
        mode="max",
        max_t=num_epochs,
        grace_period=min(config.grace_epochs, num_epochs),
        reduction_factor=config.reduction_factor,
    )
    for record in records:
        stub = SimpleNamespace(trial_id=f"record-{record.number}")
        scheduler.on_trial_add(None, stub)
        for epoch, metrics in enumerate(record.curve, start=1):
            scheduler.on_trial_result(None, stub, {"training_iteration": epoch, metric: metrics[metric]})
    return scheduler
