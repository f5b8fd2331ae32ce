"""`tinyemo train`, `tinyemo family` and `tinyemo stream`: plan, run and show the result of a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.progress import Progress, progress

if TYPE_CHECKING:
    from orchestration.jobs.results import ReasonerResult, Result, StreamResult, TrainResult
    from orchestration.recipe import Recipe


def train(
    recipe: RecipeArgument, overrides: SetOption = None, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Train one projector, or all stages of a reasoning model, from S3 through Ray Data, DeepSpeed and Ray Train.

    The same command again continues an interrupted run, and shows the result of a finished one.

    Example: tinyemo train emotion6 --set loss.name=info_nce --set name=emotion6-info-nce
    """
    loaded = load(recipe, overrides)
    from orchestration.jobs import job

    if dry_run:
        show_plan([(loaded, job.describe(loaded))], "train", as_json)
        return
    with stoppable() as advance:
        result = job.train(loaded, progress=advance)
    _show_results([result], as_json, is_list=not loaded.stages)


def family(
    recipe: RecipeArgument, overrides: SetOption = None, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Train one projector, or reasoning model, for each size of the family, as children of one MLflow run.

    The best projector by validation is registered.

    Example: tinyemo family family --set name=family-nt-xent
    """
    loaded = load(recipe, overrides)
    from orchestration.jobs.family import recipe_for_size, train_family
    from orchestration.jobs.job import describe, prepare_run
    from orchestration.recipe import recipes_of_sizes

    if dry_run:
        prepare_run(loaded)  # reports problems of the data before torch reads label embeddings of every size
        children = recipes_of_sizes(loaded, recipe_for_size)
        show_plan([(child, describe(child)) for child in children], "family", as_json, is_list=True)
        return
    with stoppable() as advance:
        results = train_family(loaded, progress=advance)
    _show_results(results, as_json, is_list=True)


def stream(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    has_ledger: Annotated[
        bool, typer.Option("--ledger", help="Record which record was in which step, and compare it with the plan.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a recipe's instruct records from S3 as training would, without a model, and print rate and order.

    The same command again continues an interrupted reading, also with another number of workers.

    Example: tinyemo stream oasis-stream --ledger
    """
    loaded = load(recipe, overrides)
    from orchestration.jobs.reading import describe_reading, read_stream

    if dry_run:
        show_plan([(loaded, describe_reading(loaded))], "stream", as_json)
        return
    with stoppable() as advance:
        result = read_stream(loaded, has_ledger=has_ledger, progress=advance)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1))
    else:
        _show_reading(result)


def load(recipe: str, overrides: list[str] | None) -> Recipe:
    """Return a validated recipe, with the services of the local platform in this process's environment."""
    from orchestration.recipe import load_recipe

    load_platform_environment()
    return load_recipe(recipe, overrides)


@contextmanager
def stoppable() -> Iterator[Progress]:
    """Yield a callback for progress; Ctrl-C and SIGTERM end the command with exit code 130 and say how to go on."""
    try:
        with progress() as advance:
            yield advance
    except (KeyboardInterrupt, SystemExit) as error:  # Ray raises SystemExit at SIGTERM
        typer.echo("stopped: the same command continues from the last checkpoint", err=True)
        raise typer.Exit(130) from error


def show_plan(
    planned: Sequence[tuple[Recipe, dict[str, Any]]], command: str, as_json: bool, *, is_list: bool = False
) -> None:
    """Print what a dry run found: each resolved recipe with the facts that are known before anything starts."""
    from orchestration.recipe import to_toml

    if as_json:
        found = [facts | {"recipe": recipe.model_dump(mode="json")} for recipe, facts in planned]
        typer.echo(json.dumps(found if is_list else found[0], indent=1))
        return
    for recipe, facts in planned:
        typer.echo(to_toml(recipe, command))
        for key, value in facts.items():
            text = ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else value
            typer.echo(f"{key:26}{text}")
    typer.echo("nothing was started (--dry-run)")


def _show_results(results: Sequence[Result], as_json: bool, *, is_list: bool) -> None:
    from orchestration.jobs.results import ReasonerResult, TrainResult

    if as_json:
        found = [asdict(result) for result in results]
        typer.echo(json.dumps(found if is_list else found[0], indent=1))
        return
    projectors = [result for result in results if isinstance(result, TrainResult)]
    if projectors:
        _show_projectors(projectors)
    for result in results:
        if isinstance(result, ReasonerResult):
            _show_reasoner(result)
        typer.echo(f"{result.name}: {result.run_url}")


def _show_projectors(results: Sequence[TrainResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    from orchestration.jobs.results import notes

    table = Table(title="Metric projector, test read once")
    for column in ("run", "LLM", "H", "val top-1", "test top-1", "test images", "best epoch", "samples/s", "note"):
        table.add_column(column, justify="left" if column in ("run", "LLM", "note") else "right")
    for r in results:
        validation = "-" if r.val_top1_accuracy is None else f"{r.val_top1_accuracy:.4f}"
        table.add_row(
            r.name, r.llm, str(r.hidden_size), validation, f"{r.test_top1_accuracy:.4f}", str(r.num_test),
            str(r.best_epoch), f"{r.samples_per_s:,.0f}", notes(r) or "real weights, real data",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _show_reasoner(result: ReasonerResult) -> None:
    from orchestration.jobs.results import evaluation_lines, warnings_of

    for text in warnings_of(result):
        typer.echo(text)
    for name, stage in result.stages.items():
        validation = "-" if stage["val_loss"] is None else f"{stage['val_loss']:.4f}"
        typer.echo(
            f"{name}: {stage['num_steps']} steps, loss {stage['first_loss']:.4f} -> {stage['last_loss']:.4f}, "
            f"validation {validation}, {stage['tokens_per_s']:,.0f} tokens/s, {stage['duration_s']:.0f} s"
        )
    for line in evaluation_lines(result.evaluation):
        typer.echo(line)
    typer.echo(f"model: {result.model} (tinyemo explain IMAGE --model {result.name})")


def _show_reading(result: StreamResult) -> None:
    typer.echo(f"{result.name}: {result.num_steps} steps, {result.samples_per_s:,.0f} samples/s")
    typer.echo(f"first batch after {result.first_batch_s:.1f} s")
    shuffle = result.shuffle
    typer.echo(
        f"shuffled: a record moves {shuffle['mean_distance']:.0%} of an epoch (33 % is uniform), a step draws from "
        f"{shuffle['row_groups_per_step']:.1f} row groups"
    )
    if result.ledger is not None:
        found = result.ledger
        typer.echo(
            f"ledger: {found['num_records']} records in {found['num_steps']} steps, {found['num_lost']} lost, "
            f"{found['num_doubled']} doubled, {found['num_wrong_steps']} steps that differ from the plan"
        )
