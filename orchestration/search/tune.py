"""Run the trials of a search with Ray Tune: Optuna's TPE proposes values and ASHA stops the trials that fall behind.

Trials run one after another in a few actors that hold the shared data. A trial reports once per epoch. A loss that is
not finite ends a trial with a result instead of an error, so the actor lives on; any other exception ends the actor
too, and Tune starts another one. A search that starts again hands the records of the trials that ended (`trials.py`)
to the sampler and to ASHA and runs only the missing ones.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from orchestration.recipe import Recipe
from orchestration.search.space import SearchConfig
from orchestration.search.trial import PackedTrial, SearchData
from orchestration.search.trials import TrialRecord, objectives, trial_recipe
from orchestration.services.ray_cluster import room_for, wait_for_resources
from tinyemo.errors import TinyEmoError

logger = logging.getLogger(__name__)

STUDY = "search"
METRIC_PREFIXES = ("train/", "val/", "zero_shot/")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records hold what Tune would write for each trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler would turn Ctrl-C into a short search that looks complete
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at verbosity 0
}


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
        """Train for one epoch and return its metrics, or the reason why that is not possible."""
        search = self.recipe.search
        try:
            if self.trial is None:
                self.trial = PackedTrial(
                    trial_recipe(self.recipe, self.params),
                    self.data,
                    num_folds=search.num_folds,
                    device="cuda" if search.gpus_per_trial else "cpu",
                )
            metrics = self.trial.train_epoch()
        except TinyEmoError as error:
            return {**dict.fromkeys(objectives(search), 0.0), "failure": str(error), "done": True}
        return {**metrics, "done": self.trial.is_finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing at a trial's end, as Tune asks for: the weights are not used."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing, see `save_checkpoint`."""


@dataclass
class _Running:
    started_at: float = field(default_factory=time.time)
    curve: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""


class RecordEnds(tune.Callback):
    """Turns the end of each of Tune's trials into one record, and keeps the S3 keys out of Tune's hands.

    Tune copies the AWS variables of the driver into the runtime environment of its actors, which Ray writes to a log
    and shows in the dashboard. It does so once, in its first step; the variables are hidden from it for that step, in
    which no trial can end. Trials read no S3, and workers have their node's environment.
    """

    def __init__(self, num_epochs: int, first_number: int, on_end: Callable[[TrialRecord], None]) -> None:
        self.num_epochs, self.next_number, self.on_end = num_epochs, first_number, on_end
        self.running: dict[str, _Running] = {}
        self.hidden: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles callbacks for a restore that is not used."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Hide the S3 keys from the step that makes the actor class."""
        if iteration == 0:
            self.hidden = {name: os.environ.pop(name) for name in CREDENTIALS if name in os.environ}

    def on_step_end(self, iteration: int = 0, trials: Sequence[Any] = (), **info: Any) -> None:
        """Put the S3 keys back into the environment of the driver."""
        os.environ.update(self.hidden)
        self.hidden = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note when a trial starts."""
        self.running.setdefault(trial.trial_id, _Running())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep the metrics of an epoch."""
        running = self.running.setdefault(trial.trial_id, _Running())
        running.failure = result.get("failure", "")
        if not running.failure:
            running.curve.append({key: value for key, value in result.items() if key.startswith(METRIC_PREFIXES)})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that finished, was stopped, or said why it failed."""
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that raised, with the last line of its error."""
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


def num_slots(recipe: Recipe) -> int:
    """Return how many trials run at a time, once there is room for the first one.

    That is as many as fit on the nodes that are up or that the autoscaler could bring, at most `search.max_concurrent`.

    Raises:
        ConfigError: the cluster can never have room for one.
        PlatformError: there was no room within `workers.start_timeout_s`.
    """
    config = recipe.search
    bundle = {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial}
    what = f"search.cpus_per_trial: a trial of {recipe.name}"
    wait_for_resources([bundle], recipe.workers.start_timeout_s, what, logger.warning)
    room = room_for(bundle)
    return min(room, config.max_concurrent or room, config.num_trials)


def run_trials(
    recipe: Recipe,
    data: SearchData,
    records: Sequence[TrialRecord],
    first_point: dict[str, Any] | None,
    on_end: Callable[[TrialRecord], None],
) -> None:
    """Run the trials that are missing after `records`, and call `on_end` with the record of each.

    Args:
        recipe: with its search.
        data: goes into the object store, once.
        records: of earlier starts of the same search, which the sampler and ASHA learn from.
        first_point: values to try first, unless a record has them: the trial may have died with its driver.
        on_end: called in the order in which trials end.
    """
    config = recipe.search
    num_missing = config.num_trials - len(records)
    if num_missing <= 0:
        return
    os.environ |= TUNE_SETTINGS
    for name in ("ray.tune", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).setLevel(logging.ERROR)
    num_epochs = PackedTrial(recipe, data, num_folds=config.num_folds, device="cpu").num_epochs
    callback = RecordEnds(num_epochs, len(records), on_end)
    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    with tempfile.TemporaryDirectory(prefix="tinyemo-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialActor, recipe=recipe, data=data), resources),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(config, records, first_point),
                scheduler=_scheduler(config, num_epochs, records),
                num_samples=num_missing,
                max_concurrent_trials=num_slots(recipe),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=recipe.name,
                storage_path=folder,
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        finally:
            callback.on_step_end()  # Tune skips it where the first step fails


def build_study(config: SearchConfig, records: Sequence[TrialRecord], storage: Any = None) -> Any:
    """Return an `optuna.Study` that holds the records as finished trials; in memory where there is no storage."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics, space = objectives(config), config.to_optuna()
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=["maximize"] * len(metrics))
    for record in records:
        values = [record.value(metric) for metric in metrics]
        study.add_trial(optuna.trial.create_trial(params=record.params, distributions=space, values=values))
    return study


def _searcher(config: SearchConfig, records: Sequence[TrialRecord], first_point: dict[str, Any] | None) -> OptunaSearch:
    import optuna

    storage, metrics = optuna.storages.InMemoryStorage(), objectives(config)
    study = build_study(config, records, storage)
    if first_point and first_point not in [record.params for record in records]:
        study.enqueue_trial(first_point)
    sampler = optuna.samplers.TPESampler(
        # A search that starts again must not draw its first points a second time.
        seed=config.seed + len(records),
        n_startup_trials=config.num_startup_trials,
        multivariate=True,
        constant_liar=True,
    )
    is_single = len(metrics) == 1
    return OptunaSearch(
        space=config.to_optuna(),
        metric=metrics[0] if is_single else metrics,
        mode="max" if is_single else ["max"] * len(metrics),
        sampler=sampler,
        storage=storage,
        study_name=STUDY,
    )


def _scheduler(config: SearchConfig, num_epochs: int, records: Sequence[TrialRecord]) -> ASHAScheduler:
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
