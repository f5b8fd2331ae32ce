"""Servers of the local platform: command, environment, ports and health check of each.

All servers listen on loopback. Secrets stand in files of mode 0600 or in the environment, never on a command line.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.credentials import read_s3_keys
from cluster.state import PlatformState
from tinyemo.errors import PlatformError

HOST = "127.0.0.1"
GRPC_OFFSET = 4
"""Distance of a gRPC port from its HTTP port; SeaweedFS's default, 10,000, leads to ports that other programs use."""
HEALTH_TIMEOUT_S = 3.0
READERS_PER_CPU = 2
SERVICE_NAMES = ("s3", "mlflow", "ray")


@dataclass(frozen=True)
class Port:
    """Describe a port that a service listens on and the option that moves it."""

    number: int
    purpose: str
    option: str


@dataclass(frozen=True)
class HealthCheck:
    """Request (GET) that a healthy service answers with status 200 and a body that contains `expects`."""

    port: int
    path: str
    expects: str = ""
    token_file: Path | None = None
    """File with the bearer token that the service requires."""


@dataclass(frozen=True)
class Service:
    """Server process: how to start it, check it and end it."""

    name: str
    title: str
    address: str
    command: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    """Working folder of the process."""
    log: Path
    login: Path
    """File with the login or token that the service asks for."""
    ports: tuple[Port, ...]
    health: tuple[HealthCheck, ...]
    """Checks that all pass when the service is healthy."""
    start_timeout_s: float
    stop_grace_s: float
    """Seconds from SIGTERM to SIGKILL."""
    leftovers: tuple[Path, ...] = ()
    """Files that the process leaves outside the state folder."""


def build_services(folder: Path, state: PlatformState) -> dict[str, Service]:
    """Return the three services by name, in the order in which they start."""
    return {
        "s3": build_s3(folder, state),
        "mlflow": build_mlflow(folder, state),
        "ray": build_ray(folder, state),
    }


def build_s3(folder: Path, state: PlatformState) -> Service:
    """Describe SeaweedFS: one process with master, volume server, filer and S3 gateway."""
    roles = ("s3", "master", "volume", "filer")
    numbers = {role: state.ports.s3 + offset for offset, role in enumerate(roles)}
    # Without -logtostderr each log goes to the common temporary folder, too.
    command = [find_program("weed"), "-logtostderr=true", "server", "-dir", str(folder / "s3")]
    # -disableHttp: the master would delete a bucket for everybody who asks, and the filer would list all of them.
    command += ["-ip", HOST, "-ip.bind", HOST, "-disableHttp"]
    command += ["-filer", "-s3", "-s3.config", str(folder / "credentials" / "s3.json")]
    for role, number in numbers.items():
        command += [f"-{role}.port", str(number), f"-{role}.port.grpc", str(number + GRPC_OFFSET)]
    # Off: catalogues, the interface that makes keys, telemetry, and buckets that appear by a typing mistake.
    command += ["-s3.port.iceberg", "0", "-s3.port.lance", "0", "-s3.iam=false", "-s3.autoCreateBucket=false"]
    command += ["-master.telemetry=false"]
    # Many small volumes, because each bucket takes several. One master elects itself: a restart need not wait 10 s.
    command += ["-master.volumeSizeLimitMB", "64", "-volume.max", "300", "-master.electionTimeout", "1s"]
    command += ["-volume.preStopSeconds", "0"]
    environment = base_environment()
    # Without these keys the volume server would hand objects to every process of this machine, past the S3 gateway.
    for role in ("", "FILER_"):
        environment[f"WEED_JWT_{role}SIGNING_KEY"] = secrets.token_hex(32)
        environment[f"WEED_JWT_{role}SIGNING_READ_KEY"] = secrets.token_hex(32)
    # Mutual TLS on every gRPC port: without the key of this folder `weed shell` can neither list nor delete.
    certificate = str(folder / "credentials" / "tls.crt")
    environment["WEED_GRPC_CA"] = certificate
    for role in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        environment[f"WEED_GRPC_{role}_CERT"] = certificate
        environment[f"WEED_GRPC_{role}_KEY"] = str(folder / "credentials" / "tls.key")
    ports = [Port(number, f"SeaweedFS {role}", "--s3-port") for role, number in numbers.items()]
    ports += [Port(number + GRPC_OFFSET, f"SeaweedFS {role} gRPC", "--s3-port") for role, number in numbers.items()]
    return Service(
        name="s3",
        title="SeaweedFS S3",
        address=f"http://{HOST}:{state.ports.s3}",
        command=tuple(command),
        environment=environment,
        folder=folder,
        log=folder / "logs" / "s3.log",
        login=folder / "platform.env",
        ports=tuple(ports),
        health=(
            HealthCheck(port=state.ports.s3, path="/healthz"),
            HealthCheck(port=numbers["master"], path="/cluster/status", expects='"IsLeader":true'),
            HealthCheck(port=numbers["volume"], path="/healthz"),
        ),
        start_timeout_s=60,
        # After a second all data is on disk, and it waits 15 s longer for a gRPC stream between its own parts.
        stop_grace_s=2,
        leftovers=tuple(
            Path("/tmp") / f"seaweedfs-{name}.sock"
            for role, number in numbers.items()
            for name in (f"{role}-{number}", f"{role}-grpc-{number + GRPC_OFFSET}")
        ),
    )


def build_mlflow(folder: Path, state: PlatformState) -> Service:
    """Describe an MLflow server on SQLite with a login; it passes artifacts through to S3."""
    port = state.ports.mlflow
    command = [find_program("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"]
    command += ["--serve-artifacts", "--artifacts-destination", f"s3://{state.bucket}/mlflow"]
    command += ["--allowed-hosts", f"{HOST}:{port},localhost:{port}", "--app-name", "basic-auth"]
    # Its S3 identity reaches the folder of artifacts alone: whoever has the login cannot read the rest of the bucket.
    environment = base_environment() | _select(state.environment, "AWS_") | read_s3_keys(folder, "mlflow")
    environment["MLFLOW_S3_ENDPOINT_URL"] = environment["AWS_ENDPOINT_URL"]
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "credentials" / "mlflow.ini")
    environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    # The job queue evaluates prompts; without it the server starts in half the time.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    return Service(
        name="mlflow",
        title="MLflow",
        address=f"http://{HOST}:{port}",
        command=tuple(command),
        environment=environment,
        folder=folder,
        log=folder / "logs" / "mlflow.log",
        login=folder / "credentials" / "mlflow.ini",
        ports=(Port(port, "MLflow", "--mlflow-port"),),
        health=(HealthCheck(port=port, path="/health"),),
        start_timeout_s=180,
        stop_grace_s=8,
    )


def build_ray(folder: Path, state: PlatformState) -> Service:
    """Describe a Ray head with a dashboard; every port asks for the token. Its workers inherit this environment."""
    command = [find_program("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", HOST, "--port", str(state.ports.ray)]
    command += ["--ray-client-server-port", str(state.ports.ray + 1)]
    command += ["--dashboard-host", HOST, "--dashboard-port", str(state.ports.dashboard)]
    # 0: Ray picks free ports. Its defaults (52365, 10002-19999) collide with a second cluster and with SeaweedFS.
    command += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
    command += ["--num-cpus", str(state.num_cpus), "--object-store-memory", str(state.object_store_bytes)]
    # Tasks that read data take one "reader" each and no CPU: reading must not wait for the CPUs that training holds.
    command += ["--resources", json.dumps({"reader": READERS_PER_CPU * state.num_cpus})]
    # The log monitor reads every log of the session again and again, for drivers that print what workers print. The
    # drivers here do not, and the dashboard reads the files itself.
    command += ["--include-log-monitor", "false", "--temp-dir", str(state.ray_folder)]
    services = _select(state.environment, "AWS_", "MLFLOW_", "TINYEMO_", "RAY_AUTH_", "RAY_USAGE_")
    environment = base_environment() | services
    # Ray turns 127.0.0.1 into the machine's own address unless it believes in a single-node system; only then do all
    # its servers keep to loopback.
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Without these, two metric exporters take fixed ports (44217, 44227).
    environment |= {"AUTOSCALER_METRIC_PORT": "0", "DASHBOARD_METRIC_PORT": "0"}
    # Ray's workers run at nice 15 by default, so that ranks wait for every other process of a small machine.
    environment.setdefault("RAY_worker_niceness", "0")
    return Service(
        name="ray",
        title="Ray dashboard",
        address=f"http://{HOST}:{state.ports.dashboard}",
        command=tuple(command),
        environment=environment,
        # Jobs submitted without a working folder of their own run where `up` was called.
        folder=Path.cwd(),
        log=folder / "logs" / "ray.log",
        login=folder / "credentials" / "ray_token",
        ports=(
            Port(state.ports.ray, "Ray", "--ray-port"),
            Port(state.ports.ray + 1, "Ray client server", "--ray-port"),
            Port(state.ports.dashboard, "Ray dashboard", "--dashboard-port"),
        ),
        # The dashboard answers before the node is there; a job needs the node.
        health=(
            HealthCheck(
                port=state.ports.dashboard,
                path="/nodes?view=summary",
                expects='"state": "ALIVE"',
                token_file=folder / "credentials" / "ray_token",
            ),
        ),
        start_timeout_s=180,
        # After some runs it waits for its workers longer than needed; it has no data on disk to lose.
        stop_grace_s=5,
    )


def find_program(name: str) -> str:
    """Return the path of a program in this Python environment, else in PATH.

    Raises:
        PlatformError: where it is not installed.
    """
    path = shutil.which(name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if path is None:
        raise PlatformError(f"the program {name!r} is not installed: run `make setup`")
    return path


def base_environment() -> dict[str, str]:
    """Return this environment without endpoints and credentials; this Python's programs come first in PATH."""
    dropped = ("AWS_", "MLFLOW_", "WEED_", "RAY_AUTH_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    environment = {
        name: value for name, value in os.environ.items() if name == "AWS_CA_BUNDLE" or not name.startswith(dropped)
    }
    environment["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)))
    # A proxy of the user's network must not see requests to loopback.
    environment.setdefault("NO_PROXY", f"{HOST},localhost")
    return environment


def is_healthy(service: Service) -> bool:
    """Return True where the service answers all its health checks."""
    return all(map(_answers, service.health))


def _answers(check: HealthCheck) -> bool:
    headers = {}
    if check.token_file is not None:
        headers["Authorization"] = f"Bearer {check.token_file.read_text()}"
    connection = http.client.HTTPConnection(HOST, check.port, timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", check.path, headers=headers)
        answer = connection.getresponse()
        return answer.status == http.client.OK and check.expects in answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _select(environment: Mapping[str, str], *prefixes: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(prefixes)}
