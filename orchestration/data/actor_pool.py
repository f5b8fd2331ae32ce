"""Pools of Ray actors that hold a model while they work through many items."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt

from tinyemo.config import Section
from tinyemo.errors import ConfigError

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

    from orchestration.data.tasks import MAX_RETRIES, run_unordered
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
