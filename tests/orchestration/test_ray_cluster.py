"""A driver whose Ray cluster is gone: one line that says what to do, in the main thread, wherever that is."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from orchestration.services import ray_cluster
from tinyemo.errors import PlatformError

PATIENCE_S = 0.5


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener
    ray_cluster._is_lost.clear()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def test_a_cluster_that_goes_is_an_error_of_the_main_thread(head: socket.socket) -> None:
    address = address_of(head)
    ray_cluster.watch(address, is_over=lambda: False, patience_s=PATIENCE_S)
    time.sleep(2 * PATIENCE_S)
    assert not ray_cluster.is_lost()
    head.close()
    began_at = time.monotonic()
    with pytest.raises(PlatformError, match=f"{address} has not answered .* give the same command to go on"):
        time.sleep(60)
    assert PATIENCE_S / 2 < time.monotonic() - began_at < 30
    assert ray_cluster.is_lost()


def test_nothing_is_raised_once_the_cluster_was_left(head: socket.socket) -> None:
    ray_cluster.watch(address_of(head), is_over=lambda: True, patience_s=PATIENCE_S)
    head.close()
    time.sleep(3 * PATIENCE_S)
    assert not ray_cluster.is_lost()


def test_a_signal_that_somebody_else_handles_stays_theirs(head: socket.socket) -> None:
    def theirs(signum: int, frame: object) -> None:
        raise AssertionError

    signal.signal(signal.SIGUSR1, theirs)
    ray_cluster.watch(address_of(head), is_over=lambda: False, patience_s=PATIENCE_S)
    assert signal.getsignal(signal.SIGUSR1) is theirs
    head.close()
    time.sleep(3 * PATIENCE_S)


def test_an_error_of_ray_is_the_clusters_only_where_that_is_gone(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address_of(head))
    ray_cluster.require_cluster(RuntimeError("an actor died"))
    head.close()
    with pytest.raises(PlatformError, match=r"is gone \(.*refused.*\): once it is up again"):
        ray_cluster.require_cluster(RuntimeError("an actor died"))


def test_joining_a_cluster_waits_for_no_deep_learning_library() -> None:
    code = (
        "import sys, orchestration.services.ray_cluster; sys.exit('torch' in sys.modules or 'ray.train' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_main_thread_that_takes_no_signal_is_ended_in_one_line(head: socket.socket) -> None:
    """It waits inside the kernel with signals blocked, as in a call of Ray's that looks for none."""
    code = (
        "import signal, time; from orchestration.services import ray_cluster; ray_cluster.HANGS_AFTER_S = 0.2;"
        f"ray_cluster.watch('{address_of(head)}', is_over=lambda: False, patience_s={PATIENCE_S});"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); print('ready', flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "ready\n"
    head.close()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 2
    (line,) = said.splitlines()
    assert line.startswith("error: the Ray cluster at")
