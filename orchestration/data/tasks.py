"""Unordered work on Ray Data: one task per item, or a pool of actors that hold a model and take one item at a time.

A task or actor whose worker died is tried again; errors of this project reach the caller unchanged.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt

from orchestration.data.stream import Row, quiet_ray_data
from tinyemo import errors
from tinyemo.config import Section
from tinyemo.errors import ConfigError, PlatformError, TinyEmoError

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


logger = logging.getLogger(__name__)

START_TIMEOUT_S = 900.0
"""Longest wait for the resources of the first actor, for instance until an autoscaler has started a node."""


class PoolConfig(Section):
    """Number of actors and the resources of each."""

    num_actors: PositiveInt | None = None
    """None: as many as the cluster can have room for, and no more than there are items."""
    cpus_per_actor: PositiveFloat = 1.0
    """CPUs that Ray sets aside for one actor; also its threads, at least one."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs, or a fraction of one; None: one where the cluster can have GPUs, else none."""
    batch_size: PositiveInt | None = None
    """Images per forward pass; None: each actor measures which number is fastest on its device."""

    def num_gpus(self) -> float:
        """Return the GPUs of one actor on the cluster that this process has joined.

        Raises:
            ConfigError: the cluster can never have so many.
        """
        from orchestration.services.ray_cluster import room_for

        if self.gpus_per_actor is None:
            return 1.0 if room_for({"GPU": 1.0}) else 0.0
        if self.gpus_per_actor and not room_for({"GPU": self.gpus_per_actor}):
            raise ConfigError(f"gpus_per_actor is {self.gpus_per_actor:g} and the cluster cannot have that many GPUs")
        return self.gpus_per_actor

    def count_actors(self, num_items: int) -> int:
        """Return the number of actors that the cluster can have room for, at most one per item.

        Raises:
            ConfigError: not even one has room, or fewer than `num_actors`.
        """
        from orchestration.services.ray_cluster import room_for

        num_gpus = self.num_gpus()
        room = room_for({"CPU": self.cpus_per_actor, "GPU": num_gpus})
        wanted = self.num_actors or max(room, 1)
        if wanted > room:
            raise ConfigError(
                f"{wanted} actors of {self.cpus_per_actor:g} CPUs and {num_gpus:g} GPUs are asked for, "
                f"the cluster has room for {room}"
            )
        return min(wanted, num_items)


def run_on_actors(
    items: list[dict[str, Any]], actor: type, arguments: tuple[Any, ...], pool: PoolConfig, *, advice: str
) -> Iterator[pa.Table]:
    """Yield what an actor returns for each item, as items get done, in no order; call `connect` first.

    Actors start as nodes come up, so a cluster that scales from zero is used as far as it grows.

    Args:
        items: rows of plain values.
        actor: class whose instances take a table of one item and return a table through `guarded`.
        arguments: of the class.
        pool: number and resources of the actors.
        advice: what a user should do where Ray loses an actor for good.

    Raises:
        ConfigError: the cluster can never have room for the actors.
        TinyEmoError: the error that the work ended with.
        PlatformError: the resources of the first actor were not free in time, or Ray lost actors too often.
    """
    import ray.data

    from orchestration.services.ray_cluster import wait_for_resources

    num_actors, num_gpus = pool.count_actors(len(items)), pool.num_gpus()
    bundle = {"CPU": pool.cpus_per_actor, "GPU": num_gpus}
    wait_for_resources([bundle], START_TIMEOUT_S, "the first actor", logger.info)
    yield from run_unordered(
        items,
        actor,
        worker="an actor",
        advice=advice,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=pool.cpus_per_actor,
        num_gpus=num_gpus,
        max_restarts=MAX_RETRIES,
        max_task_retries=MAX_RETRIES,
    )
