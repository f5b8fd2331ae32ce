"""The local platform: SeaweedFS, MLflow and a Ray head on one machine, brought up, shown and taken down.

Everything it knows stands in one state folder (default .tinyemo): platform.json, credentials, data, logs.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.environment import only_platform_s3
from cluster.plan import keep_plan, make_plan
from cluster.process import is_alive, start_detached, stop
from cluster.services import HOST, SERVICE_NAMES, Service, build_services, is_healthy
from cluster.state import PlatformState, exclusive, forget_state, load_state, make_private_folder, save_state
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
POLL_INTERVAL_S = 0.1


@dataclass(frozen=True)
class ServiceStatus:
    """One line of `tinyemo platform status`."""

    name: str
    title: str
    address: str
    pid: int | None
    is_running: bool
    is_healthy: bool
    log: str


def up(
    folder: Path,
    create_bucket: Callable[[str], None],
    *,
    ports: Mapping[str, int] | None = None,
    num_cpus: int | None = None,
    object_store_gb: float = 1.0,
) -> list[str]:
    """Start what is not running; where that fails, stop again what this call has started.

    Args:
        folder: state folder, absolute.
        create_bucket: makes a bucket where it is missing, with the S3 settings of `os.environ`.
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
            # After a crash: orphans that still hold ports.
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
                    with only_platform_s3(state.environment):
                        create_bucket(state.bucket)
            is_complete = True
        finally:
            if not is_complete:
                _stop_services(folder, state, [service.name for service in missing])
    return [service.name for service in missing]


def down(folder: Path) -> list[str]:
    """Stop what `up` started, by process id and start time; data, logs and credentials stay.

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
    """Address, process and health of each service; empty where no platform is recorded."""
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
        )
        for name, service in build_services(folder, state).items()
    ]


def check_ports(services: Sequence[Service]) -> None:
    """All ports of these services are free and wanted once.

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
            # Else a connection that a former server has just closed would count as taken.
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
    """The state with this service's process, recorded before anything can go wrong with it."""
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
    """Return when all answer.

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


def _read_tail(log: Path) -> str:
    """The last lines of a log, each indented, after its name."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
    return "".join([f"; the end of {log}:", *(f"\n  {line}" for line in lines)])


def _stop_services(folder: Path, state: PlatformState, names: Collection[str]) -> list[str]:
    """Stop these services, Ray first: its jobs still need the others. Forget the platform when nothing is left."""
    services = build_services(folder, state)
    stopped = []
    for stage in (["ray"], ["mlflow", "s3"]):
        present = [name for name in stage if name in names and name in state.processes]
        ended = stop({name: (state.processes[name], services[name].stop_grace_s) for name in present})
        stopped += ended
        # Only what we have ended leaves anything of ours: the sockets are named by port, which may be another's now.
        for name in ended:
            for leftover in services[name].leftovers:
                leftover.unlink(missing_ok=True)
    remaining = {name: process for name, process in state.processes.items() if name not in names}
    if "ray" in names:
        _keep_ray_logs(folder, state.ray_folder)
    if remaining:
        save_state(folder, state.model_copy(update={"processes": remaining}))
    else:
        shutil.rmtree(state.ray_folder, ignore_errors=True)
        forget_state(folder)
    return stopped


def _keep_ray_logs(folder: Path, ray_folder: Path) -> None:
    """Move the last session's logs to the platform's own; sessions would pile up otherwise."""
    logs = (ray_folder / "session_latest" / "logs").resolve()
    if logs.is_dir():
        kept = folder / "logs" / "ray"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, symlinks=True)
        shutil.rmtree(logs.parent, ignore_errors=True)
