"""Keep what a search knows about its trials: the recipe of each, its record in S3, and its run in MLflow.

A trial that has ended is one small JSON object in S3. A search that starts again reads these objects; Ray Tune's own
restore is not used. It goes back to a snapshot of the whole experiment, by default minutes old, so that trials which
ended after the snapshot would run again, and it would keep pickled recipes and data beside it. A record costs one
request for each trial and loses none. For the same reason MLflow's runs are written from records: Ray Tune's
`MLflowLoggerCallback` opens a run when a trial starts, waits for MLflow in the search's own loop, and leaves the run
RUNNING where the driver dies.

This module imports neither torch nor Ray, so a search can be checked with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestration.recipe import Recipe, parse_recipe
from orchestration.search.space import SearchConfig
from orchestration.services import storage
from orchestration.services.tracking import RunHandle, find_runs, record_run
from tinyemo.config import PUBLISHED_TEMPERATURES
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)

SEEN, ZERO_SHOT = "val/top1_accuracy", "zero_shot/top1_accuracy"
"""The metrics that trials are judged by."""
ENDS = {"finished": "finished", "stopped": "stopped by ASHA", "failed": "failed"}
"""How a trial can end, with the words for it in MLflow."""


def objectives(config: SearchConfig) -> list[str]:
    """Return the metrics that a search maximises; ASHA judges by the first one."""
    return [SEEN] if config.objective == "seen" else [SEEN, ZERO_SHOT]


def trial_recipe(recipe: Recipe, params: dict[str, Any], *, name: str | None = None, seed: int | None = None) -> Recipe:
    """Return the recipe with a trial's values and without its search, so that `tinyemo train` takes it as it is.

    Raises:
        ConfigError: the values do not go together.
    """
    content = recipe.model_dump(mode="json", exclude={"search"})
    for knob, value in params.items():
        section, field = knob.split(".")
        content[section][field] = value
    if seed is not None:
        content["train"]["seed"] = seed
    content["name"] = name or recipe.name
    return parse_recipe(content, source=f"trial of {recipe.name}")


def first_point(recipe: Recipe) -> dict[str, Any] | None:
    """Return the recipe's own values of its knobs, or None where the space does not hold them.

    They are the first trial, so that a search never ends below where it starts.
    """
    content = recipe.model_dump(mode="json")
    content["loss"]["temperature"] = recipe.loss.temperature or PUBLISHED_TEMPERATURES.get(recipe.loss.name, 0.07)
    content["projector"]["hidden_width"] = recipe.projector.hidden_width or recipe.projector.hidden_size
    point = {}
    for knob, distribution in recipe.search.knobs().items():
        section, field = knob.split(".")
        value = content[section][field]
        if not distribution.holds(value):
            return None
        point[knob] = value
    return point


@dataclass(frozen=True)
class TrialRecord:
    """A trial that ended.

    Attributes:
        number: from 0, in the order in which trials end.
        params: the value of each knob.
        curve: the metrics of each epoch.
        ended: finished after all epochs, stopped by ASHA, or failed.
        error: why it failed, in one line; empty otherwise.
        started_at, ended_at: seconds since 1970.
    """

    number: int
    params: dict[str, Any]
    curve: list[dict[str, float]]
    ended: Literal["finished", "stopped", "failed"]
    error: str
    started_at: float
    ended_at: float

    def value(self, metric: str) -> float:
        """Return a metric's last value; 0, the worst accuracy, for a trial that failed or reported nothing."""
        return 0.0 if self.ended == "failed" or not self.curve else self.curve[-1].get(metric, 0.0)


def write_record(folder: str, record: TrialRecord, write: Callable[[str, Any], None] = storage.write_json) -> None:
    """Store a record under the search's S3 folder with a function that takes an address and a document."""
    write(f"{folder}/trials/{record.number:06d}.json", asdict(record))


def read_records(folder: str) -> list[TrialRecord]:
    """Return the records under a search's S3 folder, by number."""
    return [TrialRecord(**storage.read_json(uri)) for uri in sorted(storage.list_prefix(f"{folder}/trials/"))]


def rank_trials(records: list[TrialRecord], metric: str) -> list[TrialRecord]:
    """Return the finished trials, best first: by the metric, then by cross-entropy, then by number."""
    finished = [record for record in records if record.ended == "finished"]
    return sorted(
        finished, key=lambda r: (-r.value(metric), r.curve[-1].get("val/cross_entropy", float("inf")), r.number)
    )


def best_trials(records: list[TrialRecord], metrics: list[str]) -> list[TrialRecord]:
    """Return the finished trials, best first; with two metrics only the Pareto front, by the first metric.

    A trial is on the front where no other is at least as good in every metric and better in one.
    """
    ranked = rank_trials(records, metrics[0])
    if len(metrics) == 1:
        return ranked
    scores = [[record.value(metric) for metric in metrics] for record in ranked]

    def is_beaten(score: list[float]) -> bool:
        return any(all(o >= s for o, s in zip(other, score, strict=True)) and other != score for other in scores)

    return [record for record, score in zip(ranked, scores, strict=True) if not is_beaten(score)]


class TrialLog:
    """Writes records as children of a search's run, in a thread, so that MLflow does not slow the search."""

    def __init__(self, run: RunHandle, name: str) -> None:
        self._run, self._name = run, name
        children = find_runs("tags.kind = 'trial'", parent_run_id=run.run_id)
        self._half_written = {int(c.tags["trial"]): c.run_id for c in children if c.status == "RUNNING"}
        self._written = {int(c.tags["trial"]) for c in children if c.status != "RUNNING"}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-log")

    def put(self, record: TrialRecord) -> None:
        """Write a record soon."""
        self._thread.submit(self._try_to_write, record)

    def close(self, records: list[TrialRecord]) -> None:
        """Wait for the thread, then write those of `records` that MLflow does not have yet.

        Raises:
            PlatformError: MLflow does not answer or refuses.
        """
        self._thread.shutdown()
        for record in records:
            self._write(record)

    def _try_to_write(self, record: TrialRecord) -> None:
        try:
            self._write(record)
        except PlatformError as error:
            logger.warning("trial %d is not in MLflow yet: %s", record.number, error)

    def _write(self, record: TrialRecord) -> None:
        if record.number in self._written:
            return
        tags = {"kind": "trial", "trial": str(record.number), "ended": ENDS[record.ended]}
        record_run(
            self._run,
            f"{self._name}-trial-{record.number:03d}",
            params=record.params,
            tags=tags | ({"error": record.error} if record.error else {}),
            points=list(enumerate(record.curve, start=1)),
            status="FAILED" if record.ended == "failed" else "FINISHED",
            started_at=record.started_at,
            ended_at=record.ended_at,
            run_id=self._half_written.get(record.number),
        )
        self._written.add(record.number)


@contextmanager
def open_trial_log(run: RunHandle, name: str, records: list[TrialRecord]) -> Iterator[TrialLog]:
    """Open a log for the length of a block; at its end, whatever ends it, all of `records` are in MLflow.

    Args:
        run: of the search.
        name: of the search, which the names of the children begin with.
        records: may grow in the block.
    """
    log = TrialLog(run, name)
    for record in records:
        log.put(record)
    try:
        yield log
    finally:
        log.close(records)
