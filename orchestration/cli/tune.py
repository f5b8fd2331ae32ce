"""`tinyemo tune`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.progress import line_printer

if TYPE_CHECKING:
    from rich.table import Table

    from orchestration.recipe import Recipe
    from orchestration.search.search import OnTrial, TuneResult
    from orchestration.search.trials import TrialRecord

NUM_TRIALS_SHOWN = 12


def tune(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search a recipe's hyper-parameters: many short trials on shared features, then train the winner.

    The space stands in [search.space]. The same command again goes on where an interrupted search stopped.

    Example: tinyemo tune search-emotion6 --set search.num_trials=30 --set name=search-small
    """
    from orchestration.recipe import load_recipe

    load_platform_environment()
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        _show_plan(loaded, as_json)
        return
    from orchestration.search import search as job

    with _progress(loaded, is_quiet=as_json) as on_trial:
        result = job.tune(loaded, on_trial=on_trial, progress=None if as_json else line_printer())
    _show_result(result, as_json)


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    from orchestration.search.search import describe_search

    facts = describe_search(recipe)
    if as_json:
        typer.echo(json.dumps(facts | {"recipe": recipe.model_dump(mode="json")}, indent=1))
        return
    space = facts.pop("space")
    for key, value in facts.items():
        typer.echo(f"{key:26}{value}")
    for knob, item in space.items():
        typer.echo(f"{knob:32}{', '.join(f'{key} {value}' for key, value in item.items())}")
    typer.echo("nothing was started (--dry-run)")


@contextmanager
def _progress(recipe: Recipe, *, is_quiet: bool) -> Iterator[OnTrial | None]:
    """A live table on a terminal, a line for each trial elsewhere, nothing where the result is JSON."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if is_quiet:
        yield None
    elif not console.is_terminal:
        yield lambda records: typer.echo(_line(records, recipe), err=True)
    else:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda records: live.update(_table(records, recipe))


def _best(records: list[TrialRecord]) -> float:
    from orchestration.search.trials import SEEN

    return max((record.value(SEEN) for record in records if record.ended == "finished"), default=0.0)


def _line(records: list[TrialRecord], recipe: Recipe) -> str:
    from orchestration.search.trials import SEEN

    record = records[-1]
    ended = f"{record.ended} after {len(record.curve)} epochs" + (f": {record.error}" if record.error else "")
    return (
        f"  trial {record.number + 1}/{recipe.search.num_trials}: val top-1 {record.value(SEEN):.4f}, {ended}; "
        f"best {_best(records):.4f}"
    )


def _table(records: list[TrialRecord], recipe: Recipe) -> Table:
    from rich.table import Table

    from orchestration.search.trials import SEEN

    title = f"{recipe.name}: {len(records)} of {recipe.search.num_trials} trials, best val top-1 {_best(records):.4f}"
    table = Table(title=title)
    for column in ("trial", "val top-1", "epochs", "ended", "loss", "max lr"):
        table.add_column(column, justify="left" if column in ("ended", "loss") else "right")
    for record in records[-NUM_TRIALS_SHOWN:]:
        rate = record.params.get("optimizer.max_lr", recipe.optimizer.max_lr)
        table.add_row(
            str(record.number), f"{record.value(SEEN):.4f}", str(len(record.curve)),
            record.error[:60] or record.ended, str(record.params.get("loss.name", recipe.loss.name)), f"{rate:.2g}",
        )  # fmt: skip
    return table


def _show_result(result: TuneResult, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1))
        return
    count = result.num_finished + result.num_stopped + result.num_failed
    table = Table(title=f"{result.name}: winner of {count} trials is trial {result.winner_trial}, chosen by validation")
    table.add_column("knob")
    table.add_column("value", justify="right")
    for knob, value in result.params.items():
        table.add_row(knob, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(width=None if typer.get_text_stream("stdout").isatty() else 120).print(table)
    rate = 60 * count / result.search_s if result.search_s else 0.0
    typer.echo(
        f"trials: {result.num_finished} finished, {result.num_stopped} stopped by ASHA, {result.num_failed} failed, "
        f"{result.search_s:.0f} s, {rate:.0f} a minute"
    )
    if result.front:
        typer.echo(f"Pareto front of seen and zero-shot accuracy: trials {', '.join(map(str, result.front))}")
    notes = {f"random LLM weights ({w['llm']})" for w in result.winners if w["llm_weights"] == "random"}
    notes |= {"generated data" for w in result.winners if w["data"] == "generated"}
    typer.echo(
        f"test top-1 {100 * result.test_top1_mean:.2f} +- {100 * result.test_top1_se:.2f} %: mean and standard error, "
        f"{len(result.winners)} seeds, {result.num_test} images; {', '.join(sorted(notes)) or 'real weights and data'}"
    )
    typer.echo(f"recipe: {result.winner_recipe}, registered as version {result.registered_version}")
    typer.echo(f"{result.name}: {result.run_url}")
