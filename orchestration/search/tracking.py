"""The trials of a search as children of its MLflow run, written by a thread so that MLflow does not slow the search.

A child is created when its trial has ended, with the trial's own times, so that no trial is ever left RUNNING for long;
one that a killed driver left so is ended by the next start.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from orchestration.search.records import TrialRecord
from orchestration.services.tracking import RunHandle, flatten
from orchestration.services.tracking_client import open_client
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)

WORDS = {"finished": "finished", "stopped": "stopped by ASHA", "failed": "failed"}
PAGE_RUNS = 1000


class TrialLog:
    """Writes records as children of a run; use `open_trial_log`."""

    def __init__(self, run: RunHandle, name: str) -> None:
        self._parent_id, self._name = run.run_id, name
        with open_client("look for the search's trials") as client:
            self._experiment_id = client.get_run(run.run_id).info.experiment_id
            self._children = self._find_children(client)
        self._queue: queue.SimpleQueue[TrialRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._drain, name="trial-log", daemon=True)
        self._thread.start()

    def _find_children(self, client: Any) -> dict[int, tuple[str, bool]]:
        """(run id, whether it has ended) by number of the trial."""
        condition = f"tags.`mlflow.parentRunId` = '{self._parent_id}' and tags.kind = 'trial'"
        children: dict[int, tuple[str, bool]] = {}
        token = None
        while True:
            page = client.search_runs([self._experiment_id], condition, max_results=PAGE_RUNS, page_token=token)
            for child in page:
                children[int(child.data.tags["trial"])] = (child.info.run_id, child.info.status != "RUNNING")
            token = page.token
            if not token:
                return children

    def put(self, record: TrialRecord) -> None:
        """Have a record written soon."""
        self._queue.put(record)

    def close(self, records: Sequence[TrialRecord]) -> None:
        """Wait for the thread, then write those of `records` that are not there yet.

        Raises:
            PlatformError: MLflow does not answer or refuses.
        """
        self._queue.put(None)
        self._thread.join()
        for record in records:
            self._write(record)

    def _drain(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._write(record)
            except PlatformError as error:
                logger.warning("trial %d is not in MLflow yet: %s", record.number, error)

    def _write(self, record: TrialRecord) -> None:
        run_id, is_ended = self._children.get(record.number, (None, False))
        if is_ended:
            return
        with open_client(f"log trial {record.number}") as client:
            from mlflow.entities import Metric, Param

            if run_id is None:
                tags = {
                    "mlflow.parentRunId": self._parent_id,
                    "kind": "trial",
                    "trial": str(record.number),
                    "ended": WORDS[record.ended],
                } | ({"error": record.error} if record.error else {})
                created = client.create_run(
                    self._experiment_id,
                    start_time=int(record.started_at * 1000),
                    tags=tags,
                    run_name=f"{self._name}-trial-{record.number:03d}",
                )
                run_id = str(created.info.run_id)
                self._children[record.number] = (run_id, False)
            client.log_batch(
                run_id,
                metrics=[
                    Metric(key, float(value), int(record.ended_at * 1000), epoch)
                    for epoch, metrics in enumerate(record.curve, start=1)
                    for key, value in metrics.items()
                ][:PAGE_RUNS],
                params=[Param(key, text) for key, text in flatten(record.params).items()],
            )
            status = "FAILED" if record.ended == "failed" else "FINISHED"
            client.set_terminated(run_id, status, end_time=int(record.ended_at * 1000))
        self._children[record.number] = (run_id, True)


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
