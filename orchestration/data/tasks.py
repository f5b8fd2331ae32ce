"""Unordered work on Ray Data: run one task per item, retry tasks whose worker died, re-raise our errors unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from orchestration.data.stream import Row, quiet_ray_data
from tinyemo import errors
from tinyemo.errors import PlatformError, TinyEmoError

MAX_RETRIES = 3
"""Number of times that a task runs again, or that an actor starts again, after its worker died."""


def guarded(work: Callable[[pa.Table], pa.Table], batch: pa.Table) -> pa.Table:
    """Return the result of `work`, or a row (failure, message) for an error of ours, which `run_unordered` raises.

    Raised in the task, the error would reach the driver as Ray Data's own, without ours inside.
    """
    try:
        return work(batch)
    except TinyEmoError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return pa.Table.from_pylist([{"failure": kind.__name__, "message": str(error)}])


def run_unordered(items: list[Row], work: Any, *, worker: str, advice: str, **options: Any) -> Iterator[pa.Table]:
    """Yield the result of the work for each item as it gets done; call `connect` first.

    Args:
        items: plain values.
        work: takes a table of one item and returns through `guarded`; a function, or a class for actors.
        worker: name of what Ray lost where it gives up, for the error: "a task".
        advice: the user's next step, for the error.
        options: of `ray.data.Dataset.map_batches`, `MAX_RETRIES` among them.

    Raises:
        TinyEmoError: the error that ended the work.
        PlatformError: Ray lost workers more often than it may.
    """
    import ray.data
    import ray.exceptions

    quiet_ray_data()
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():
        # Ray Data's own limits are none: an image that kills its worker would be tried for ever. 2.60 calls this way of
        # setting them deprecated and has no other yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        results = dataset.map_batches(work, batch_size=1, batch_format="pyarrow", **options)
    try:
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            if "failure" in table.column_names:
                failure = table.to_pylist()[0]
                raise getattr(errors, failure["failure"])(failure["message"])
            yield table
    except ray.exceptions.RayTaskError:
        raise  # a defect of ours, with its traceback
    except ray.exceptions.RayError as error:
        raise PlatformError(
            f"Ray lost {worker} for good ({type(error).__name__}; tried {MAX_RETRIES} times more): "
            f"see the logs in the Ray dashboard, then {advice}"
        ) from error
