"""MLflow's client: opened for a block, and what any process writes with it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestration.services.tracking_server import answers, one_line, public_address, set_client_defaults
from tinyemo.errors import ConfigError, PlatformError

METRICS_PER_REQUEST = 1000
"""MLflow's limit; a test compares it."""

Points = Sequence[tuple[int, dict[str, float]]]
"""(step, metrics by `split/name`), in any order."""


@dataclass(frozen=True)
class RunLogger:
    """Writes metrics into a run from any process, for instance Ray Train's controller; the server is read from the
    environment of that process. Pickles. Each method raises PlatformError where MLflow does not answer or refuses."""

    run_id: str

    def log_curve(self, points: Points) -> None:
        """Log metrics of many steps, 1,000 figures a request. A step logged twice is shown twice, at one place."""
        now_ms = int(time.time() * 1000)
        with open_client("log metrics") as client:
            from mlflow.entities import Metric

            metrics = [Metric(key, float(value), now_ms, step) for step, row in points for key, value in row.items()]
            for first in range(0, len(metrics), METRICS_PER_REQUEST):
                client.log_batch(self.run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])

    def complete_curve(self, points: Points) -> None:
        """Log what of a curve the run does not have yet: parts of it were logged while the server was away."""
        with open_client("read a curve") as client:
            keys = {key for _, row in points for key in row}
            steps = {key: {entry.step for entry in client.get_metric_history(self.run_id, key)} for key in keys}
        missing = [(step, {key: row[key] for key in row if step not in steps[key]}) for step, row in points]
        if any(row for _, row in missing):
            self.log_curve(missing)


@contextmanager
def open_client(action: str) -> Iterator[Any]:
    """MLflow's client for a block; what MLflow and the network raise in it becomes a PlatformError of one line."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError(f"cannot {action}: MLFLOW_TRACKING_URI is not set in this process")
    client = _cached_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except (MlflowException, OSError) as error:
        said = f"MLflow at {public_address(uri)} failed to {action}: {one_line(error)}"
        raise PlatformError(said + ("" if answers(uri) else "; give the same command again once it answers")) from error


@lru_cache(maxsize=4)
def _cached_client(uri: str) -> Any:
    set_client_defaults()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
