"""`tinyemo tune`: search hyper-parameters, then train the winner."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.train import load, show_plan, stoppable

if TYPE_CHECKING:
    from orchestration.search.search import TuneResult
    from orchestration.search.trials import TrialRecord


def tune(
    recipe: RecipeArgument, overrides: SetOption = None, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Search a recipe's hyper-parameters: many short trials on shared features, then train the winner.

    The section [search.space] names what is searched. The same command again continues an interrupted search.

    Example: tinyemo tune search-emotion6 --set search.num_trials=30 --set name=search-small
    """
    loaded = load(recipe, overrides)
    from orchestration.search import search as job
    from orchestration.search.trials import SEEN

    if dry_run:
        facts = job.describe_search(loaded)
        if not as_json:
            facts.pop("space")  # the recipe is printed with it
        show_plan([(loaded, facts)], "tune", as_json)
        return
    with stoppable() as advance:

        def on_trial(records: list[TrialRecord]) -> None:
            best = max((record.value(SEEN) for record in records if record.ended == "finished"), default=0.0)
            advance(f"{loaded.name} trials", len(records), loaded.search.num_trials, {f"best {SEEN}": best})

        result = job.tune(loaded, on_trial=on_trial, progress=advance)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1))
    else:
        _show(result)


def _show(result: TuneResult) -> None:
    from rich.console import Console
    from rich.table import Table

    count = result.num_finished + result.num_stopped + result.num_failed
    table = Table(title=f"{result.name}: winner of {count} trials is trial {result.winner_trial}, chosen by validation")
    table.add_column("knob")
    table.add_column("value", justify="right")
    for knob, value in result.params.items():
        table.add_row(knob, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
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
