"""Commands `tinyemo platform up | status | down`: S3, MLflow and Ray on this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.options import JsonOption

if TYPE_CHECKING:
    from cluster.platform import ServiceStatus

platform_app = typer.Typer(help="Servers on this machine: S3, MLflow and a Ray head.", no_args_is_help=True)

StateOption = Annotated[
    Path | None, typer.Option(help="Folder for data, logs and credentials.  [default: TINYEMO_STATE, else .tinyemo]")
]


@platform_app.command()
def up(
    state: StateOption = None,
    s3_port: Annotated[
        int | None,
        typer.Option(help="S3; takes eight ports in a row.  [default: 8333]", min=1024, max=65_528),
    ] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="MLflow.  [default: 5000]", min=1024, max=65_535)] = None,
    ray_port: Annotated[
        int | None, typer.Option(help="Ray head; takes two ports in a row.  [default: 6379]", min=1024, max=65_534)
    ] = None,
    dashboard_port: Annotated[
        int | None, typer.Option(help="Ray dashboard and job server.  [default: 8265]", min=1024, max=65_535)
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs that Ray hands out.  [default: all of this machine]", min=1)
    ] = None,
    object_store_gb: Annotated[float, typer.Option(help="Ray's shared memory, GB.", min=0.1)] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Start the servers that do not run and wait until they answer; do nothing where all are up.

    Example: tinyemo platform up --mlflow-port 5001
    """
    from cluster import platform
    from cluster.state import resolve_folder
    from orchestration.services.storage import ensure_bucket, write_bytes

    logging.getLogger("cluster").setLevel(logging.INFO)
    wanted = {"s3": s3_port, "mlflow": mlflow_port, "ray": ray_port, "dashboard": dashboard_port}
    folder = resolve_folder(state)
    started = platform.up(
        folder,
        ensure_bucket,
        write_bytes,
        ports={name: port for name, port in wanted.items() if port is not None},
        num_cpus=num_cpus,
        object_store_gb=object_store_gb,
    )
    services = platform.read_status(folder)
    if as_json:
        typer.echo(json.dumps({"started": started, "services": [asdict(service) for service in services]}, indent=2))
    else:
        typer.echo(f"started {', '.join(started)}" if started else "all was up")
        _print_services(services)


@platform_app.command()
def status(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show addresses, processes and health; exit code 0 where all three answer, 1 otherwise.

    Example: tinyemo platform status --json
    """
    from cluster.platform import read_status
    from cluster.state import resolve_folder

    services = read_status(resolve_folder(state))
    is_up = bool(services) and all(service.is_healthy for service in services)
    if as_json:
        typer.echo(json.dumps({"is_up": is_up, "services": [asdict(service) for service in services]}, indent=2))
    elif services:
        _print_services(services)
    else:
        typer.echo("not up: run `tinyemo platform up`")
    if not is_up:
        raise typer.Exit(1)


@platform_app.command()
def down(state: StateOption = None, as_json: JsonOption = False) -> None:
    """End the servers that `up` started; data, logs and credentials stay for the next `up`.

    Example: tinyemo platform down
    """
    from cluster import platform
    from cluster.state import resolve_folder

    stopped = platform.down(resolve_folder(state))
    if as_json:
        typer.echo(json.dumps({"stopped": stopped}))
    else:
        typer.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was up")


def _print_services(services: Sequence[ServiceStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("service", "address", "process", "health", "log", "login or token", box=None, pad_edge=False)
    for service in services:
        health = "healthy" if service.is_healthy else "not answering" if service.is_running else "not running"
        table.add_row(service.title, service.address, str(service.pid or "-"), health, service.log, service.login)
    # Addresses and paths are for copying: no wrapping in a narrow terminal or a pipe.
    Console(soft_wrap=True, width=max(200, Console().width)).print(table)
