"""`tinyemo runs` and `tinyemo datasets`: list, show and delete what lies in S3 and MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import JsonOption, RootOption, default_root

if TYPE_CHECKING:
    from orchestration.inventory import DatasetSummary, RunSummary

runs_app = typer.Typer(help="List, show and delete runs.", no_args_is_help=True)
datasets_app = typer.Typer(help="List, show and delete data sets.", no_args_is_help=True)

RunsRootOption = Annotated[str, typer.Option("--runs-root", metavar="S3_URI", help="S3 folder that holds the runs.")]
RunArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name that `tinyemo runs list` prints.")]
DatasetArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name that `tinyemo datasets list` prints.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Delete without asking, for scripts.")]
RUNS_ROOT = "s3://tinyemo/runs"


@runs_app.command("list")
def list_runs_command(root: RunsRootOption = RUNS_ROOT, as_json: JsonOption = False) -> None:
    """List all runs with their state, step, size in S3 and last heartbeat.

    Example: tinyemo runs list
    """
    load_platform_environment()
    from orchestration.inventory import list_runs

    found = list_runs(root)
    _show_all(found, ["name", "kind", "state", "step", "heartbeat", "size"], [_run_row(run) for run in found], as_json)


@runs_app.command("show")
def show_run_command(name: RunArgument, root: RunsRootOption = RUNS_ROOT, as_json: JsonOption = False) -> None:
    """Show one run: where it is or stopped, its data, its MLflow run and what it was made from.

    Example: tinyemo runs show emotion6
    """
    load_platform_environment()
    from orchestration.inventory import find_run

    _show_one(find_run(root, name), as_json)


@runs_app.command("rm")
def remove_run_command(
    name: RunArgument, root: RunsRootOption = RUNS_ROOT, is_confirmed: YesOption = False, as_json: JsonOption = False
) -> None:
    """Delete a run from S3 and MLflow, with the parts of a family or search.

    A run that is in progress, or that another run or a registered model was made from, is refused.

    Example: tinyemo runs rm my-first --yes
    """
    load_platform_environment()
    from orchestration.inventory import deletable_runs, delete_runs

    doomed = deletable_runs(root, name)
    _confirm(f"delete {', '.join(run.name for run in doomed)}", sum(run.num_bytes for run in doomed), is_confirmed)
    delete_runs(doomed)
    _show_deleted([run.name for run in doomed], as_json)


@runs_app.command("clean")
def clean_runs_command(
    root: RootOption = None, runs_root: RunsRootOption = RUNS_ROOT, as_json: JsonOption = False
) -> None:
    """Delete checkpoints that no run goes on from, and what ingests left behind more than a day ago.

    Example: tinyemo runs clean
    """
    load_platform_environment()
    from orchestration.inventory import clean_up

    num_bytes = clean_up(runs_root, root or default_root())
    typer.echo(json.dumps({"freed_bytes": num_bytes}) if as_json else f"freed {_size(num_bytes)}")


@datasets_app.command("list")
def list_datasets_command(
    root: RootOption = None, runs_root: RunsRootOption = RUNS_ROOT, as_json: JsonOption = False
) -> None:
    """List all data sets with their kind, records, size in S3 and the runs that read them.

    Example: tinyemo datasets list
    """
    load_platform_environment()
    from orchestration.inventory import list_datasets, list_runs

    found = list_datasets(root or default_root(), list_runs(runs_root))
    columns = ["name", "kind", "version", "records", "size", "used by"]
    _show_all(found, columns, [_dataset_row(dataset) for dataset in found], as_json)


@datasets_app.command("show")
def show_dataset_command(
    name: DatasetArgument, root: RootOption = None, runs_root: RunsRootOption = RUNS_ROOT, as_json: JsonOption = False
) -> None:
    """Show one data set: versions, records of each split, size, and the runs that read it.

    Example: tinyemo datasets show emotion6
    """
    load_platform_environment()
    from orchestration.inventory import find_dataset

    _show_one(find_dataset(root or default_root(), name, runs_root), as_json)


@datasets_app.command("rm")
def remove_dataset_command(
    name: DatasetArgument,
    root: RootOption = None,
    runs_root: RunsRootOption = RUNS_ROOT,
    is_confirmed: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete all versions of a data set. One that a run reads is refused.

    Example: tinyemo datasets rm scratch --yes
    """
    load_platform_environment()
    from orchestration.inventory import delete_dataset, find_dataset

    found = find_dataset(root or default_root(), name, runs_root)
    if not found.used_by:
        _confirm(f"delete data set {name}", found.num_bytes, is_confirmed)
    delete_dataset(found)
    _show_deleted([name], as_json)


def _confirm(question: str, num_bytes: int, is_confirmed: bool) -> None:
    if not is_confirmed:
        typer.confirm(f"{question} ({_size(num_bytes)})?", abort=True, err=True)


def _show_deleted(names: Sequence[str], as_json: bool) -> None:
    typer.echo(json.dumps({"deleted": names}) if as_json else f"deleted {', '.join(names)}")


def _show_all(found: Sequence[Any], columns: Sequence[str], rows: Sequence[Sequence[str]], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps([asdict(item) for item in found], indent=1))
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, width=max(160, Console().width)).print(table)


def _show_one(found: RunSummary | DatasetSummary, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    for field, value in asdict(found).items():
        parts = [f"{key} {item}" for key, item in value.items()] if isinstance(value, dict) else value
        text = ", ".join(parts) if isinstance(parts, list | tuple) else parts
        typer.echo(f"{field:18}{'-' if text in (None, '') else text}")


def _run_row(run: RunSummary) -> list[str]:
    of = f" of {run.num_steps}" if run.num_steps is not None else ""
    step = "-" if run.step is None else f"{run.stage}: {run.step}{of}"
    heartbeat = "-" if run.heartbeat_age_s is None else f"{run.heartbeat_age_s:.0f} s ago"
    return [run.name, run.kind, run.state, step, heartbeat, _size(run.num_bytes)]


def _dataset_row(dataset: DatasetSummary) -> list[str]:
    records = ", ".join(f"{split} {rows}" for split, rows in dataset.rows.items())
    used_by = ", ".join(dataset.used_by) or "-"
    return [dataset.name, dataset.kind, dataset.version or "-", records or "-", _size(dataset.num_bytes), used_by]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
