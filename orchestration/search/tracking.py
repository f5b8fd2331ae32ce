"""The trials of a search as children of its MLflow run, written by a thread so that MLflow does not slow the search.

A child is written when its trial has ended, with the trial's own times, so no trial stays RUNNING for long; a child
that a killed driver left half written is completed by the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from orchestration.search.records import TrialRecord
from orchestration.services.tracking import RunHandle, find_runs, record_run
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)

WORDS = {"finished": "finished", "stopped": "stopped by ASHA", "failed": "failed"}


class TrialLog:
    """Writes records as children of a run; use `open_trial_log`."""

    def __init__(self, run: RunHandle, name: str) -> None:
        self._run, self._name = run, name
        children = find_runs("tags.kind = 'trial'", parent_run_id=run.run_id)
        self._half_written = {int(c.tags["trial"]): c.run_id for c in children if c.status == "RUNNING"}
        self._written = {int(c.tags["trial"]) for c in children if c.status != "RUNNING"}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-log")

    def put(self, record: TrialRecord) -> None:
        """Have a record written soon."""
        self._thread.submit(self._try_to_write, record)

    def close(self, records: Sequence[TrialRecord]) -> None:
        """Wait for the thread, then write those of `records` that are not there yet.

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
        tags = {"kind": "trial", "trial": str(record.number), "ended": WORDS[record.ended]}
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
    """A log for the length of a block; when it ends, however it ends, every one of `records` is in MLflow.

    Args:
        run: of the search.
        name: of the search, for the names of the children.
        records: may grow in the block.
    """
    log = TrialLog(run, name)
    for record in records:
        log.put(record)
    try:
        yield log
    finally:
        log.close(records)
