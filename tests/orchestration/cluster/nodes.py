"""Clusters of several Ray nodes on this machine, each with a loopback address and a mount namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RAY = Path(sys.executable).parent / "ray"
# 0: Ray picks free ports; two clusters on one machine would want the same ones otherwise.
NODE_OPTIONS = ("--block", "--object-store-memory=100000000", "--disable-usage-stats", "--include-log-monitor=false")
NODE_OPTIONS += ("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0")
DEADLINE_S = 120.0
HEAD = "127.0.0.9"
"""Not 127.0.0.1, which Ray replaces with the machine's own address."""


@dataclass
class Nodes:
    """The nodes of one cluster, each a process group of its own."""

    folder: Path
    """Short: Ray's sockets lie in it."""
    environment: dict[str, str] = field(repr=False)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def hidden(self) -> Path:
        """A folder that the head has and workers lack, where mount namespaces are allowed."""
        return self.folder / "head" / "photographs"

    @property
    def address(self) -> str:
        """Host and port of the head."""
        return self.environment["RAY_ADDRESS"]

    def start(self, name: str, *options: str, **resources: float) -> None:
        """Start a node and wait until it has joined."""
        log = self.folder / f"{name}.log"
        command = [str(RAY), "start", *NODE_OPTIONS, f"--num-cpus={int(resources.pop('CPU', 0))}", *options]
        command += [f"--resources={json.dumps(resources)}"] if resources else []
        if name != "head" and has_namespaces():
            hide = f'mount -t tmpfs none {self.hidden.parent} && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, "sh", *command]
        with log.open("wb") as output:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + DEADLINE_S
        while "Ray runtime started" not in log.read_text():
            assert self.processes[name].poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)

    def start_worker(self, number: int) -> None:
        """Start the worker node 127.0.0.NUMBER with one CPU and two places for reading tasks."""
        options = [f"--address={self.address}", f"--node-ip-address=127.0.0.{number}"]
        self.start(f"worker-{number}", *options, CPU=1, reader=2)

    def kill(self, name: str) -> None:
        """End a node as a machine that loses its power does."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes.pop(name).wait(30)

    def drive(self, code: str) -> subprocess.Popen[str]:
        """Start a driver that runs `code` after joining the cluster; it prints JSON documents, one per line."""
        script = f"import json, ray\nfrom orchestration.services.ray_cluster import *\nconnect()\n{code}"
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def has_namespaces() -> bool:
    """Return True if this process may start others in a mount namespace of their own."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--mount", "true"], check=False).returncode == 0


def documents(driver: subprocess.Popen[str], timeout_s: float = DEADLINE_S) -> list[Any]:
    """Return what a driver printed before it ended well."""
    try:
        stdout, stderr = driver.communicate(timeout=timeout_s)
    finally:
        driver.kill()  # one that hangs would keep what it holds from the next test
    assert driver.returncode == 0, stderr[-3000:]
    return [json.loads(line) for line in stdout.splitlines()]


@contextmanager
def running_nodes(port: int, head_options: Sequence[str], environment: Mapping[str, str]) -> Iterator[Nodes]:
    """Run a head without CPUs for tasks; every node that was started ends with the block.

    Args:
        port: of the head; the next one is taken too.
        head_options: of `ray start`.
        environment: of all nodes and drivers.
    """
    folder = Path(tempfile.mkdtemp(prefix="te-"))
    # Of the platform's settings, this one would forbid more than one node.
    inherited = {name: value for name, value in environment.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    settings = {"AUTOSCALER_METRIC_PORT": "0", "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}
    settings |= {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "RAY_ADDRESS": f"{HEAD}:{port}",
    }
    nodes = Nodes(folder, inherited | settings)
    nodes.hidden.mkdir(parents=True)
    options = ["--head", f"--port={port}", f"--ray-client-server-port={port + 1}", f"--node-ip-address={HEAD}"]
    try:
        nodes.start("head", *options, "--include-dashboard=false", f"--temp-dir={folder}/ray", *head_options)
        yield nodes
    finally:
        for process in nodes.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
