"""The Ray cluster that a driver joins: connect to it, choose a device and wait for resources."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import ray

from tinyemo.errors import ConfigError, PlatformError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
ADVICE = "start one with `tinyemo platform up` or set RAY_ADDRESS"
AGAIN = "once it is up again, give the same command to go on"
POLL_S = 1.0
FIRST_LINE_AFTER_S = 3.0
SECONDS_PER_LINE = 15.0
"""Shortest time between two progress lines of one wait."""
UNLIMITED_NODES = 1_000_000
"""Stands for a node type without an upper limit."""

Resources = dict[str, float]
_is_lost = False


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names as a driver; return at once where this process has joined one.

    Ray's own handler ends the driver with SystemExit on SIGTERM from then on.

    Raises:
        ConfigError: RAY_ADDRESS is not set.
        PlatformError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(f"RAY_ADDRESS is not set: {ADVICE}")
    problem = _problem_with(address)
    if problem is not None:
        raise PlatformError(f"no Ray cluster answers at {address} ({problem}): {ADVICE}")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlatformError(
            f"the Ray cluster at {address} does not answer or refuses the token of RAY_AUTH_TOKEN_PATH "
            f"({last_line(error)})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's C++ code prints a stack trace before it calls this handler; setting the handler again removes that.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def require_cluster(error: Exception) -> None:
    """Raise PlatformError if `error`, which Ray raised, means that the cluster is gone; return otherwise."""
    global _is_lost  # noqa: PLW0603  # a process joins one cluster
    address = os.environ.get("RAY_ADDRESS", "")
    problem = _problem_with(address)
    if problem is not None:
        _is_lost = True
        raise PlatformError(f"the Ray cluster at {address} is gone ({problem}): {AGAIN}") from error


def is_lost() -> bool:
    """Return True once `require_cluster` has found the cluster gone; `ray.shutdown` would then wait for a minute."""
    return _is_lost


def _problem_with(address: str) -> str | None:
    """Return why nothing listens at host:port within seconds (Ray itself tries for minutes), or None."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


def last_line(error: BaseException) -> str:
    """Return the last line of an error that has text, up to 300 characters; in Ray's errors that is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def cluster_could_bring() -> list[Resources]:
    """Return the resources of each kind of node that is up or that the autoscaler is configured to bring.

    Ray's autoscaler does not report its node types by itself. The cluster files of this project report them on the
    head node (`python -m cluster.node_types`).
    """
    kinds: list[Resources] = []
    for resources, _ in [*_running_nodes(), *_configured_nodes()]:
        if resources and resources not in kinds:
            kinds.append(resources)
    return kinds


def room_for(bundle: Resources) -> int:
    """Return how many such bundles the cluster holds, busy or not, once the autoscaler has brought all its nodes."""
    amounts = {name: amount for name, amount in bundle.items() if amount > 0}

    def num_fitting(resources: Resources) -> int:
        # A rest of 1e-9 makes 0.3 / 0.1 three.
        return int(min(resources.get(name, 0.0) / amount for name, amount in amounts.items()) + 1e-9)

    if not amounts:
        return UNLIMITED_NODES
    return max(
        sum(num_fitting(resources) * count for resources, count in nodes)
        for nodes in (_running_nodes(), _configured_nodes())
    )


def choose_device(wanted: Literal["auto", "gpu", "cpu"], num_workers: int) -> Literal["gpu", "cpu"]:
    """Choose the device of a run's workers, one GPU per worker; "auto" takes GPUs if the cluster could bring enough.

    Args:
        wanted: `workers.device` of the recipe.
        num_workers: > 0.

    Raises:
        ConfigError: GPUs are wanted and the cluster can never have so many.
    """
    if wanted == "cpu":
        return "cpu"
    num_gpus = room_for({"GPU": 1.0})
    if num_gpus >= num_workers:
        return "gpu"
    if wanted == "gpu":
        raise ConfigError(
            f'workers.device = "gpu" with {num_workers} workers needs {num_workers} GPUs, and this cluster can have '
            f'{num_gpus}: its node types offer {_offers()}; set workers.device = "cpu" or use another cluster'
        )
    if num_gpus:
        logger.warning("%d workers train on CPUs: the cluster can have %d GPUs", num_workers, num_gpus)
    return "cpu"


def wait_for_resources(
    bundles: list[Resources],
    timeout_s: float,
    what: str,
    progress: Callable[[str], None],
    *,
    may_rejoin: bool = False,
) -> None:
    """Ask the cluster for resources and return once they are free all at once.

    The request is a placement group, so that an autoscaler sees it; it is given back before this function returns.

    Args:
        bundles: resources of each worker; a bundle fits on one node.
        timeout_s: longest wait.
        what: what the resources are for; begins each line.
        progress: gets a line every SECONDS_PER_LINE that says what is missing and who holds it.
        may_rejoin: after a node was lost: wait for a node like it also where no node type is configured.

    Raises:
        ConfigError: the cluster can never hold these bundles; the message names what its node types offer.
        PlatformError: they were not free in time.
    """
    wanted = [{name: float(amount) for name, amount in bundle.items() if amount > 0} for bundle in bundles]
    wanted = [bundle for bundle in wanted if bundle]
    if not wanted:
        return
    if not may_rejoin:
        _require_room(wanted, what)
    began_at = time.monotonic()
    next_line_s = FIRST_LINE_AFTER_S
    group = ray.util.placement_group(wanted, strategy="PACK", name=f"wait: {what}")
    try:
        while not group.wait(POLL_S):
            waited_s = time.monotonic() - began_at
            if waited_s >= timeout_s:
                raise PlatformError(
                    f"{what}: waited {timeout_s:.0f} s; {_shortage(wanted)}; raise workers.start_timeout_s to wait "
                    "longer, and give the same command to go on"
                )
            if waited_s >= next_line_s:
                progress(f"{what}: waiting for {waited_s:.0f} s; {_shortage(wanted)}")
                next_line_s = waited_s + SECONDS_PER_LINE
    finally:
        ray.util.remove_placement_group(group)


def _require_room(bundles: list[Resources], what: str) -> None:
    for text, count in Counter(_describe(bundle) for bundle in bundles).items():
        bundle = next(bundle for bundle in bundles if _describe(bundle) == text)
        room = room_for(bundle)
        if room < count:
            raise ConfigError(
                f"{what} needs {count} x ({text}), and this cluster has room for {room}: its node types offer "
                f"{_offers()}; ask for fewer or smaller workers"
            )


def _shortage(bundles: list[Resources]) -> str:
    """Say in one line what is wanted, what is free, what the autoscaler can bring, and which drivers hold the rest."""
    wanted = Counter(_describe(bundle) for bundle in bundles)
    names = {name for bundle in bundles for name in bundle}
    free = {name: amount for name, amount in ray.available_resources().items() if name in names}
    parts = [
        "it needs " + " and ".join(f"{count} x ({text})" for text, count in wanted.items()),
        f"free now: {_describe(free) or 'none'}",
    ]
    coming = [resources for resources, _ in _configured_nodes() if names <= resources.keys()]
    if coming:
        parts.append("the autoscaler can start nodes with " + " or ".join(f"({_describe(r)})" for r in coming))
    return "; ".join([*parts, *_holders()])


def _holders() -> list[str]:
    """Say what each driver's placement groups hold; the last eight digits of a group's id are the driver's job id."""
    held: dict[str, Counter[str]] = {}
    for group in ray.util.placement_group_table().values():
        if group["state"] == "CREATED":
            holder = held.setdefault(group["placement_group_id"][-8:], Counter())
            for bundle in group["bundles"].values():
                holder.update(bundle)
    own = ray.get_runtime_context().get_job_id()
    drivers = {job["JobID"]: job for job in _state().job_table() if not job["IsDead"] and job["JobID"] != own}
    lines = []
    for job_id in sorted(held.keys() | drivers.keys()):
        job = drivers.get(job_id)
        name = f"`{job['Entrypoint']}` (pid {job['DriverPid']} on {job['DriverIPAddress']})" if job else "this command"
        holding = f"holds {_describe(held[job_id])}" if job_id in held else "is running"
        lines.append(f"{name} {holding}")
    return lines


def _running_nodes() -> list[tuple[Resources, int]]:
    return [(_countable(node["Resources"]), 1) for node in ray.nodes() if node["Alive"]]


def _configured_nodes() -> list[tuple[Resources, int]]:
    config = _state().get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [
        (_countable(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED_NODES)
        for group in groups
        if group.max_count
    ]


def _state() -> Any:
    """Return Ray's view of the cluster's state. Private: Ray Train and Ray Data read the node types from it too."""
    from ray._private.state import state

    return state


def _countable(resources: Any) -> Resources:
    """Leave out what no bundle asks for: memory and the names of nodes."""
    return {
        name: float(amount)
        for name, amount in sorted(resources.items())
        if "memory" not in name and not name.startswith("node:")
    }


def _offers() -> str:
    return " or ".join(f"({_describe(resources)})" for resources in cluster_could_bring()) or "no resources"


def _describe(resources: Any) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items()) if amount)
