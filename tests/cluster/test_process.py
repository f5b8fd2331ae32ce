"""Processes are ended by identity: with all that they started, and never somebody else's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.process import ProcessRecord, is_alive, read_start, start_detached, stop
from tinyemo.errors import PlatformError

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    yield process
    process.kill()
    process.wait()


def _start(folder: Path, code: str) -> ProcessRecord:
    command = [sys.executable, "-c", code]
    marker = f"test:{folder}"
    return start_detached(command, environment={}, folder=folder, log=folder / "log", marker=marker)


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def test_a_process_outlives_a_polite_stop_only_until_its_grace_ends(tmp_path: Path):
    """SIGTERM ignored: SIGKILL follows."""
    record = _start(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(1, file=open('ready', 'w')); time.sleep(600)",
    )
    _wait_for(tmp_path / "ready")
    assert stop({"server": (record, 0.3)}) == ["server"]
    assert not is_alive(record)
    assert stop({"server": (record, 0.3)}) == []


def test_children_in_sessions_of_their_own_end_too(tmp_path: Path):
    """Ray's drivers are such children: the marker in their environment gives them away even after their parent."""
    code = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True); "
        "print(child.pid, file=open('child', 'w'))"
    )
    record = _start(tmp_path, code)
    child = psutil.Process(int(_wait_for(tmp_path / "child")))
    deadline = time.monotonic() + 30
    while is_alive(record):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stop({"server": (record, 5)}) == ["server"]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_recycled_pid_is_never_signalled(bystander: subprocess.Popen[bytes]):
    """The record's start time is another one, so the process behind the pid belongs to somebody else."""
    record = ProcessRecord(pid=bystander.pid, started="0:0", marker="test:recycled")
    assert not is_alive(record)
    assert stop({"server": (record, 0.1)}) == []
    assert bystander.poll() is None


def test_an_ended_process_has_no_start(bystander: subprocess.Popen[bytes]):
    """A zombie counts as ended, before and after somebody waits for it."""
    assert read_start(bystander.pid) is not None
    bystander.kill()
    deadline = time.monotonic() + 30
    while read_start(bystander.pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    bystander.wait()
    assert read_start(bystander.pid) is None


def test_a_missing_program_is_one_clear_error(tmp_path: Path):
    """It says what to do."""
    with pytest.raises(PlatformError, match="make setup"):
        start_detached(["/absent/weed"], environment={}, folder=tmp_path, log=tmp_path / "log", marker="x")
