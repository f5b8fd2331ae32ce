"""Local platform: start, show and stop SeaweedFS, MLflow and a Ray head on one machine.

One state folder (default .tinyemo) holds all its files: platform.json, credentials, data, logs.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.credentials import read_s3_keys
from cluster.environment import only_platform_s3
from cluster.plan import keep_plan, make_plan
from cluster.process import is_alive, start_detached, stop
from cluster.services import HOST, SERVICE_NAMES, Service, build_services, is_healthy
from cluster.state import PlatformState, exclusive, forget_state, load_state, make_private_folder, save_state
from tinyemo.errors import PlatformError, StorageError

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
POLL_INTERVAL_S = 0.1


@dataclass(frozen=True)
class ServiceStatus:
    """Row of `tinyemo platform status`."""

    name: str
    title: str
    address: str
    pid: int | None
    is_running: bool
    is_healthy: bool
    log: str
    login: str
    """File that holds the login or the token of the service."""


def up(
    folder: Path,
    create_bucket: Callable[[str], None],
    write_bytes: Callable[[str, bytes], None],
    *,
    ports: Mapping[str, int] | None = None,
    num_cpus: int | None = None,
    object_store_gb: float = 1.0,
) -> list[str]:
    """Start the services that do not run; where one fails, stop those that this call has started.

    Args:
        folder: state folder, absolute.
        create_bucket: creates a bucket where it is missing, with the S3 settings of `os.environ`.
        write_bytes: stores an object, with the S3 settings of `os.environ`.
        ports: first port by server (s3, mlflow, ray, dashboard) where it differs from what runs or from the default.
        num_cpus: logical CPUs for Ray; None for those this process may use.
        object_store_gb: Ray's shared memory, GB.

    Returns:
        Names of the services that this call started; empty where all were up.

    Raises:
        PlatformError: a port is taken, or a service does not start or answer in time.
    """
    make_private_folder(folder)
    with exclusive(folder):
        recorded = load_state(folder)
        running = _running_services(recorded)
        if recorded is not None:
            # A service that crashed may have left processes that hold its ports.
            _stop_services(folder, recorded, set(recorded.processes) - running)
        if recorded is not None and running:
            state = keep_plan(recorded, ports or {})
        else:
            state = make_plan(folder, ports or {}, num_cpus=num_cpus, object_store_gb=object_store_gb)
        services = build_services(folder, state)
        missing = [service for name, service in services.items() if name not in running]
        is_complete = False
        try:
            check_ports(missing)
            for stage in (["s3"], ["mlflow", "ray"]):
                for name in stage:
                    if name not in running:
                        state = _start(folder, state, services[name])
                _wait_until_healthy([services[name] for name in stage], state)
                if "s3" in stage:
                    with only_platform_s3(state.environment | read_s3_keys(folder, "administrator")):
                        create_bucket(state.bucket)
            _wait_until_writable(state, write_bytes, services["s3"].start_timeout_s)
            is_complete = True
        finally:
            if not is_complete:
                _stop_services(folder, state, [service.name for service in missing])
    return [service.name for service in missing]


def down(folder: Path) -> list[str]:
    """Stop the processes that `up` started, found by pid and start time; data, logs and credentials stay.

    Returns:
        Names of the services whose processes were ended; empty where none was up.

    Raises:
        PlatformError: where a process cannot be ended.
    """
    if not (folder / "platform.json").exists():
        return []
    with exclusive(folder):
        state = load_state(folder)
        return [] if state is None else _stop_services(folder, state, SERVICE_NAMES)


def read_status(folder: Path) -> list[ServiceStatus]:
    """Return address, process and health of each service; an empty list where no platform is recorded."""
    state = load_state(folder)
    if state is None:
        return []
    running = _running_services(state)
    return [
        ServiceStatus(
            name=name,
            title=service.title,
            address=service.address,
            pid=state.processes[name].pid if name in running else None,
            is_running=name in running,
            is_healthy=name in running and is_healthy(service),
            log=str(service.log),
            login=str(service.login),
        )
        for name, service in build_services(folder, state).items()
    ]


def check_ports(services: Sequence[Service]) -> None:
    """Check that all ports of these services are free and that no two services want the same one.

    Raises:
        PlatformError: naming the port and the option that moves it.
    """
    owners: dict[int, str] = {}
    for port in (port for service in services for port in service.ports):
        who = f"port {port.number} ({port.purpose})"
        if port.number > 65_535:
            raise PlatformError(f"{who} does not exist: choose a lower one with {port.option}")
        if port.number in owners:
            raise PlatformError(f"{who} is wanted by {owners[port.number]} too: choose another with {port.option}")
        owners[port.number] = port.purpose
        with socket.socket() as probe:
            # Without this a connection that a former server has just closed would count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port.number))
            except OSError as error:
                raise PlatformError(
                    f"{who} cannot be used ({error.strerror}): choose another with {port.option}"
                ) from error


def _running_services(state: PlatformState | None) -> set[str]:
    return set() if state is None else {name for name, process in state.processes.items() if is_alive(process)}


def _start(folder: Path, state: PlatformState, service: Service) -> PlatformState:
    """Start a service and return the state that records its process."""
    record = start_detached(
        service.command,
        environment=service.environment,
        folder=service.folder,
        log=service.log,
        marker=f"{state.platform_id}:{service.name}",
    )
    logger.info("started %s, process %d", service.title, record.pid)
    state = state.model_copy(update={"processes": {**state.processes, service.name: record}})
    save_state(folder, state)
    return state


def _wait_until_healthy(services: Sequence[Service], state: PlatformState) -> None:
    """Wait until all services answer.

    Raises:
        PlatformError: where one has ended or does not answer in its time, with the last lines of its log.
    """
    start = time.monotonic()
    waiting = list(services)
    while waiting:
        for service in list(waiting):
            waited_s = time.monotonic() - start
            if not is_alive(state.processes[service.name]):
                raise PlatformError(f"{service.title} ended while starting{_read_tail(service.log)}")
            if is_healthy(service):
                logger.info("%s answers at %s", service.title, service.address)
                waiting.remove(service)
            elif waited_s > service.start_timeout_s:
                raise PlatformError(
                    f"{service.title} does not answer after {waited_s:.0f} s: run `tinyemo platform down`, then `up`"
                    f"{_read_tail(service.log)}"
                )
        if waiting:
            time.sleep(POLL_INTERVAL_S)


def _wait_until_writable(state: PlatformState, write_bytes: Callable[[str, bytes], None], timeout_s: float) -> None:
    """Wait until a job can write to the bucket: S3 answers seconds before its volume server has found the master."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with only_platform_s3(state.environment):
                return write_bytes(f"s3://{state.bucket}/.ready", b"written by tinyemo platform up")
        except StorageError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_INTERVAL_S)


def _read_tail(log: Path) -> str:
    """Return the last lines of a log, each indented, after its name."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
    return "".join([f"; the end of {log}:", *(f"\n  {line}" for line in lines)])


def _stop_services(folder: Path, state: PlatformState, names: Collection[str]) -> list[str]:
    """Stop these services, Ray first because its jobs need the others; forget a platform without services."""
    services = build_services(folder, state)
    stopped = []
    for stage in (["ray"], ["mlflow", "s3"]):
        present = [name for name in stage if name in names and name in state.processes]
        ended = stop({name: (state.processes[name], services[name].stop_grace_s) for name in present})
        stopped += ended
        # The sockets are named by port: where the service had ended before, another server may own them now.
        for name in ended:
            for leftover in services[name].leftovers:
                leftover.unlink(missing_ok=True)
    remaining = {name: process for name, process in state.processes.items() if name not in names}
    if "ray" in names:
        _keep_ray_logs(folder, state.ray_folder)
    if remaining:
        save_state(folder, state.model_copy(update={"processes": remaining}))
    else:
        ray_folder = state.ray_folder
        shutil.rmtree(ray_folder if ray_folder.parent == folder else ray_folder.parent, ignore_errors=True)
        forget_state(folder)
    return stopped


def _keep_ray_logs(folder: Path, ray_folder: Path) -> None:
    """Move the last session's logs to the platform's logs and delete the session."""
    logs = (ray_folder / "session_latest" / "logs").resolve()
    if logs.is_dir():
        kept = folder / "logs" / "ray"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, symlinks=True)
        shutil.rmtree(logs.parent, ignore_errors=True)
