"""SIGTERM becomes an exception, once."""

from __future__ import annotations

import signal

import pytest

from orchestration.services.interruption import Interrupted, sigterm_interrupts


def test_sigterm_handler_is_put_back_and_raises_once():
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_interrupts():
        with pytest.raises(Interrupted), sigterm_interrupts():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
