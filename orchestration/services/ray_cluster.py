"""The Ray cluster that a driver joins, and what becomes of a driver whose cluster is gone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import ray

from tinyemo.errors import ConfigError, PlatformError

CONNECT_TIMEOUT_S = 5.0
RAYS_PATIENCE_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112  # Ray's name
"""After so long without its head node Ray ends a driver's process where it stands."""
ADVICE = "start one with `tinyemo platform up` or set RAY_ADDRESS"
AGAIN = "once it is up again, give the same command to go on"

HANGS_AFTER_S = 3.0
"""A main thread that has not taken a signal for so long hangs in a call that looks for none."""

_is_lost = threading.Event()


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names as a driver; nothing where this process has joined one.

    From then on see `watch`.

    Raises:
        ConfigError: no cluster is named.
        PlatformError: it does not answer.
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
    watch(address, is_over=lambda: not ray.is_initialized())


def require_cluster(error: Exception) -> None:
    """Called where Ray has raised `error`: PlatformError where that is because the cluster is gone."""
    address = os.environ.get("RAY_ADDRESS", "")
    problem = _problem_with(address)
    if problem is not None:
        _is_lost.set()
        raise PlatformError(f"the Ray cluster at {address} is gone ({problem}): {AGAIN}") from error


def is_lost() -> bool:
    """Whether the cluster was found gone; to leave it would take until Ray ends the process."""
    return _is_lost.is_set()


def watch(address: str, *, is_over: Callable[[], bool], patience_s: float = 0.75 * RAYS_PATIENCE_S) -> None:
    """Raise PlatformError in the main thread once nothing has answered at host:port for `patience_s`.

    Ray waits for its head node, which may come back, and then ends the process without a word to MLflow. Where the main
    thread hangs in a call to it, the open runs are ended and then the process, with the error's line and exit code 2.
    Nothing where the caller is another thread or SIGUSR1, which carries the news, has a handler of somebody else.

    Args:
        address: of the cluster's head; one without a port is not watched.
        is_over: whether there is nothing to watch any more.
        patience_s: less than Ray's own.
    """
    taken = signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL and not _is_ours(signal.getsignal(signal.SIGUSR1))
    if threading.current_thread() is not threading.main_thread() or taken:
        return

    lost = PlatformError(f"the Ray cluster at {address} has not answered for {patience_s:.0f} s: {AGAIN}")
    was_raised = threading.Event()

    def raise_lost(signum: int, frame: FrameType | None) -> None:
        was_raised.set()
        raise lost

    def look() -> None:
        answered_at = time.monotonic()
        while not is_over() and not is_lost():
            if _problem_with(address) is None:
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > patience_s:
                _is_lost.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                if not was_raised.wait(HANGS_AFTER_S):
                    _end_process(lost)
                return
            time.sleep(patience_s / 20)

    signal.signal(signal.SIGUSR1, raise_lost)
    threading.Thread(target=look, name="ray-cluster-watch", daemon=True).start()


def _end_process(error: PlatformError) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    if "orchestration.services.tracking" in sys.modules:
        from orchestration.services.tracking import fail_open_runs

        fail_open_runs(error)
    os._exit(2)


def _is_ours(handler: object) -> bool:
    return getattr(handler, "__module__", None) == __name__


def _problem_with(address: str) -> str | None:
    """Why nothing listens at host:port, found in seconds where Ray tries for ten minutes; None of other addresses."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


def last_line(error: BaseException) -> str:
    """The last line of an error that says something, which in Ray's is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
