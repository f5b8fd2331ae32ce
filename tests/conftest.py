"""The local platform for the whole session: real servers on free ports, started when the first test asks for them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import platform as local_platform
from cluster.environment import GROUPS
from cluster.state import load_state
from orchestration.services import storage

FIRST_TEST_PORT, LAST_TEST_PORT = 21_000, 31_000
"""Below what Linux hands out for outgoing connections (32,768 on), above what servers usually take."""

SERVER_FIXTURES = {"mlflow_server", "platform", "s3_server"}
"""Fixtures that start a server; those that build on them bring them along."""


def pytest_configure() -> None:
    """The suite meets no platform that happens to be up here: a command run in this process would load its secrets."""
    os.environ["TINYEMO_STATE"] = str(Path(tempfile.gettempdir()) / "no-platform")
    for group in GROUPS:
        for name in group.deciding:
            os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use a server, and run files with slow tests first, so that workers side by side end together."""
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU, as on a machine without a GPU, and under the marker `gpu` a GPU."""
    import torch

    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("this machine has no GPU that torch can use")
    return str(request.param)


@dataclass(frozen=True)
class RunningPlatform:
    """A platform that is up."""

    folder: Path
    """Its state folder."""
    environment: dict[str, str] = field(repr=False)
    """What a driver needs; set before `import ray`, so give it to a subprocess. Holds secrets."""
    ports: dict[str, int]


def find_free_ports(count: int, first: int = FIRST_TEST_PORT) -> int:
    """The first of `count` free ports in a row."""
    for start in range(first, LAST_TEST_PORT, 16):
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise RuntimeError(f"no {count} free ports in a row")


def choose_platform_ports() -> dict[str, int]:
    """Free ports for one platform."""
    # Two sessions on one machine start their search far apart.
    first = find_free_ports(12, FIRST_TEST_PORT + os.getpid() % 500 * 16)
    return {"s3": first, "mlflow": first + 8, "ray": first + 9, "dashboard": first + 11}


@pytest.fixture(scope="session")
def platform() -> Iterator[RunningPlatform]:
    """A platform of our own in a short temporary folder; nothing is exported, and it ends with the session."""
    folder = Path(tempfile.mkdtemp(prefix="te-"))
    ports = choose_platform_ports()
    try:
        local_platform.up(
            folder, storage.ensure_bucket, storage.write_bytes, ports=ports, num_cpus=2, object_store_gb=0.5
        )
        state = load_state(folder)
        assert state is not None
        yield RunningPlatform(folder, dict(state.environment), ports)
    finally:
        local_platform.down(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def platform_environment(platform: RunningPlatform, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The platform in this test's environment, S3 and MLflow in reach of this process.

    Ray reads its token settings once, when it is imported: a driver belongs into a subprocess, which inherits them.
    """
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in platform.environment.items():
        monkeypatch.setenv(name, value)
    return platform.environment
