"""`tinyemo train` and `tinyemo family`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.progress import progress

if TYPE_CHECKING:
    from orchestration.jobs.results import TrainResult
    from orchestration.recipe import Recipe


def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one projector, or all stages of a reasoning model, from S3 through Ray Data, DeepSpeed and Ray Train.

    The same command again goes on where an interrupted run stopped, and shows the result of a finished one.

    Example: tinyemo train emotion6 --set loss.name=info_nce --set name=emotion6-info-nce
    """
    from orchestration.recipe import load_recipe

    load_platform_environment()
    loaded = load_recipe(recipe, overrides)
    if loaded.stages:
        from orchestration.cli.reasoner import train_stages

        train_stages(loaded, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        _show_plan(loaded, as_json)
        return
    from orchestration.jobs import job

    with stoppable(), progress() as advance:
        result = job.train(loaded, progress=None if as_json else advance)
    _show_results([cast("TrainResult", result)], as_json)


def family(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one projector, or reasoning model, for each size of the family, as children of one MLflow run.

    Of projectors, the best by validation is registered.

    Example: tinyemo family family --set name=family-nt-xent
    """
    from orchestration.recipe import load_recipe

    load_platform_environment()
    loaded = load_recipe(recipe, overrides)
    if loaded.stages:
        from orchestration.cli.reasoner import train_family_stages

        train_family_stages(loaded, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        _show_plan(loaded, as_json)
        return
    from orchestration.jobs import family as job

    with stoppable(), progress() as advance:
        results = job.train_family(loaded, progress=None if as_json else advance)
    _show_results(cast("list[TrainResult]", results), as_json)


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with a line that says how to go on, and exit code 130.

    Nothing in the block reaches stdout, which is for results: Ray reports lost workers there.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, SystemExit) as error:  # Ray raises SystemExit at SIGTERM
        typer.echo("stopped: the same command goes on from its last checkpoint", err=True)
        raise typer.Exit(130) from error


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    from orchestration.jobs.job import describe

    show_facts(recipe, describe(recipe), as_json)


def show_facts(recipe: Recipe, facts: dict[str, Any], as_json: bool) -> None:
    """What a dry run says: the resolved recipe, and what is known before anything starts."""
    from orchestration.recipe import to_toml

    if as_json:
        typer.echo(json.dumps(facts | {"recipe": recipe.model_dump(mode="json")}, indent=1))
        return
    typer.echo(to_toml(recipe))
    for key, value in facts.items():
        typer.echo(f"{key:24}{value}")
    typer.echo("nothing was started (--dry-run)")


def _show_results(results: list[TrainResult], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from orchestration.jobs.results import notes

    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        return
    table = Table(title="Metric projector, test read once")
    for column in ("run", "LLM", "H", "val top-1", "test top-1", "test images", "best epoch", "samples/s", "note"):
        table.add_column(column, justify="left" if column in ("run", "LLM", "note") else "right")
    for r in results:
        validation = "-" if r.val_top1_accuracy is None else f"{r.val_top1_accuracy:.4f}"
        table.add_row(
            r.name, r.llm, str(r.hidden_size), validation, f"{r.test_top1_accuracy:.4f}", str(r.num_test),
            str(r.best_epoch), f"{r.samples_per_s:,.0f}", notes(r) or "real weights, real data",
        )  # fmt: skip
    Console(width=None if typer.get_text_stream("stdout").isatty() else 150).print(table)
    for r in results:
        typer.echo(f"{r.name}: {r.run_url}")
