"""Processes that outlive their starter and are ended by identity, never by name.

A record holds a pid and the moment its process started, so a pid that the system has given to another process is never
signalled. What a server starts is found by its process tree, its session and a marker in the environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from tinyemo.config import Section
from tinyemo.errors import PlatformError

MARKER = "TINYEMO_PLATFORM_ID"
"""Environment variable that a server hands down to every process it starts, also into other sessions."""
KILL_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.05


class ProcessRecord(Section):
    """Identity of one process. The pid alone is not enough: the system may give it to another process later."""

    pid: int
    started: str
    """Boot and clock tick of the start on Linux, seconds since the epoch elsewhere."""
    marker: str
    """Value of the environment variable `TINYEMO_PLATFORM_ID` in it and in what it starts."""


def read_start(pid: int) -> str | None:
    """Return a text that identifies the start of the process, or None where it has ended; a zombie has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


def is_alive(record: ProcessRecord) -> bool:
    """Return True while the recorded process itself runs."""
    return read_start(record.pid) == record.started


def start_detached(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path, marker: str
) -> ProcessRecord:
    """Start a process in its own session that appends both outputs to `log`; its files are readable by its owner alone.

    Raises:
        PlatformError: where the program cannot be started or ends at once.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            command,
            env={**environment, MARKER: marker},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as error:
        raise PlatformError(f"cannot start {command[0]}: {error.strerror}; run `make setup`") from error
    finally:
        os.close(descriptor)
    started = read_start(process.pid)
    if started is None:
        raise PlatformError(f"{command[0]} ended at once with status {process.wait()}; see {log}")
    return ProcessRecord(pid=process.pid, started=started, marker=marker)


def stop(targets: Mapping[str, tuple[ProcessRecord, float]]) -> list[str]:
    """End processes and all that they started: SIGTERM to each, SIGKILL to what outlives its own grace time.

    Args:
        targets: name -> (record, grace time in seconds).

    Returns:
        The names of those of which a process was still running.

    Raises:
        PlatformError: where a process outlives SIGKILL.
    """
    deadlines: dict[psutil.Process, float] = {}
    names = []
    for name, (record, grace_s) in targets.items():
        members = find_members(record)
        deadlines |= dict.fromkeys(members, time.monotonic() + grace_s)
        # A server that still lives ends its own children, in its own order; without it each of them is asked.
        for member in [member for member in members if member.pid == record.pid] or members:
            _signal(member, is_kill=False)
        names += [name] if members else []
    while any(time.monotonic() < deadline and _is_live(member) for member, deadline in deadlines.items()):
        time.sleep(POLL_INTERVAL_S)
    # What came to life after the first look carries the marker.
    late = {member for record, _ in targets.values() for member in find_members(record)}
    remaining = [member for member in deadlines.keys() | late if _is_live(member)]
    for member in remaining:
        _signal(member, is_kill=True)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while any(_is_live(member) for member in remaining):
        if time.monotonic() > deadline:
            pids = ", ".join(str(member.pid) for member in remaining if _is_live(member))
            raise PlatformError(f"process {pids} does not end; end it yourself, then run `tinyemo platform down` again")
        time.sleep(POLL_INTERVAL_S)
    return names


def find_members(record: ProcessRecord) -> list[psutil.Process]:
    """Return the recorded process, its descendants, its session, and every process that carries its marker."""
    members: set[psutil.Process] = set()
    is_root_alive = is_alive(record)
    if is_root_alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(record.pid)
            members |= {root, *root.children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # A session belongs to a living leader beyond doubt; a dead leader's number proves nothing.
            is_in_session = is_root_alive and os.getsid(process.pid) == record.pid
            if is_in_session or process.environ().get(MARKER) == record.marker:
                members.add(process)
    return [member for member in members if _is_live(member)]


def _is_live(process: psutil.Process) -> bool:
    """Return True while the process runs; reap it where it is an ended child of this process."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return True
        process.wait(0)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        # Our own zombie that cannot be reaped yet has threads left, which still hold its ports. Others are reaped by
        # their parents, or never.
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(process.ppid() == os.getpid())
    return False


def _signal(process: psutil.Process, *, is_kill: bool) -> None:
    """Send SIGKILL or SIGTERM; psutil compares the start time first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill() if is_kill else process.terminate()
