"""Signals as exceptions, so that a job that is stopped still closes what it opened."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop with SIGTERM, as `ray job stop` and Kubernetes do."""


class _RaiseOnce:
    """A SIGTERM handler that raises at the first signal and lets finally-blocks run through the next ones."""

    def __init__(self) -> None:
        self.has_raised = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.has_raised:
            logger.warning("%s again: already stopping", signal.Signals(signum).name)
            return
        self.has_raised = True
        raise Interrupted(signal.Signals(signum).name)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM raises `Interrupted` in the main thread, once; the former handler comes back after it.

    A nested block changes nothing, and neither does one in another thread. `ray.init` in the block puts Ray's own
    handler in place, which raises SystemExit; that one then stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    if not is_main or isinstance(previous, _RaiseOnce):
        yield
        return
    handler = _RaiseOnce()
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextmanager
def held_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of the block, which must be short. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in held:
        signal.signal(number, lambda signum, frame: received.append(signum))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for signum in received[:1]:
            signal.raise_signal(signum)
