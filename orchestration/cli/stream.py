"""`tinyemo stream`: how fast a recipe's instruct records come, and whether each is where the plan says."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.progress import progress

if TYPE_CHECKING:
    from orchestration.jobs.results import StreamResult


def stream(
    recipe_name: RecipeArgument,
    overrides: SetOption = None,
    has_ledger: Annotated[
        bool, typer.Option("--ledger", help="Write down which record was in which step, and hold it against the plan.")
    ] = False,
    is_dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a recipe's instruct records from S3 as training would, without a model: rate, time to first batch, order.

    Killed, it goes on where it was, with any number of workers.

    Example: tinyemo stream oasis-stream --ledger
    """
    load_platform_environment()
    from orchestration.recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides)
    if is_dry_run:
        from orchestration.jobs.prepare import prepare_records

        plan = prepare_records(recipe)
        for part, count in zip(plan.sets, plan.plan.counts, strict=True):
            typer.echo(
                f"{part.manifest.uri} {part.split}: {part.manifest.splits[part.split].rows} records, {count} an epoch"
            )
        typer.echo(
            f"{plan.num_steps} steps of {plan.plan.global_batch_size}, {plan.steps_per_epoch} an epoch, "
            f"read in {plan.plan.num_windows} windows by {plan.num_readers} readers for {plan.world_size} workers"
        )
        return

    from orchestration.jobs.job import read_stream

    with progress() as advance:
        result = read_stream(recipe, has_ledger=has_ledger, progress=advance)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        _show(result)


def _show(result: StreamResult) -> None:
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
            f"{found['num_doubled']} doubled, {found['num_wrong_steps']} steps that are not the plan's"
        )
