"""`tinyemo train` with a recipe of stages: what it would read, how it goes, what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import typer

from orchestration.cli.progress import progress
from orchestration.cli.train import show_facts, stoppable

if TYPE_CHECKING:
    from orchestration.jobs.results import ReasonerResult
    from orchestration.recipe import Recipe


def train_stages(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    """Train the reasoning model of a recipe, or show what would be read."""
    if dry_run:
        from orchestration.jobs.job import describe

        show_facts(recipe, describe(recipe), as_json)
        return
    from orchestration.jobs.job import train

    with stoppable(), progress() as advance:
        result = train(recipe, progress=None if as_json else advance)
    _show_result(cast("ReasonerResult", result), as_json)


def train_family_stages(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    """Train the reasoning model of a recipe at every size of the family, or show what would be read at each."""
    from orchestration.jobs.family import recipe_for_size, train_family
    from orchestration.jobs.job import describe
    from orchestration.recipe import recipes_of_sizes

    if dry_run:
        planned = [(child, describe(child)) for child in recipes_of_sizes(recipe, recipe_for_size)]
        if as_json:
            found = [facts | {"recipe": child.model_dump(mode="json")} for child, facts in planned]
            typer.echo(json.dumps(found, indent=1))
            return
        for child, facts in planned:
            show_facts(child, facts, as_json)
        return
    with stoppable(), progress() as advance:
        results = train_family(recipe, progress=None if as_json else advance)
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        return
    for result in results:
        _show_result(cast("ReasonerResult", result), as_json)


def _show_result(result: ReasonerResult, as_json: bool) -> None:
    from orchestration.jobs.model_card import evaluation_lines, warnings_of

    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1))
        return
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
    typer.echo(f"model: {result.model} (tinyemo explain IMAGE --model {result.model})")
    typer.echo(f"{result.name}: {result.run_url}")
