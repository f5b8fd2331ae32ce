"""`tinyemo synthesize`: instruct records that teacher models write about photographs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from orchestration.cli.train import stoppable

if TYPE_CHECKING:
    from orchestration.synthesize.synthesis import SynthesisResult


def synthesize(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    is_retried: Annotated[
        bool, typer.Option("--retry", help="Ask again for items that failed on the way: time-outs, 429, 5xx.")
    ] = False,
    has_dataset: Annotated[
        bool, typer.Option("--ingest/--no-ingest", help="Store the records as a data set, or leave them in S3.")
    ] = True,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let teacher models write captions, questions and reasoning about photographs, and store them as a data set.

    The same command again continues an interrupted run and pays for nothing twice; see docs/synthesis.md.

    Example: tinyemo synthesize synthesize-fi --set teachers.abundant.base_url=http://127.0.0.1:8000/v1 --dry-run
    """
    from orchestration.synthesize.synthesis_recipe import load_synthesis

    load_platform_environment()
    loaded = load_synthesis(recipe, overrides)
    from orchestration.synthesize import synthesis as job

    if dry_run:
        _show_plan(loaded.name, job.describe_synthesis(loaded), as_json=as_json)
        return
    with stoppable() as advance:
        result = job.synthesize(loaded, is_retried=is_retried, has_dataset=has_dataset, progress=advance)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1))
    else:
        _show(result)


def _show_plan(name: str, facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"name": name, **facts}, indent=1))
        return
    for what, prompt in facts.pop("prompts").items():
        typer.echo(f"--- first prompt of {what}\n{prompt}\n")
    for key, value in facts.items():
        text = ", ".join(f"{item} {count}" for item, count in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{key:26}{text}")
    typer.echo("nothing was asked or written (--dry-run)")


def _show(result: SynthesisResult) -> None:
    typer.echo("SYNTHETIC answers: models wrote them, and no person checked them")
    num_rejected = sum(result.rejected.values())
    typer.echo(
        f"items {result.num_requested} = accepted {result.num_accepted} + rejected {num_rejected} + unanswered "
        f"{result.num_unanswered}; {result.num_skipped} could not be asked for"
    )
    for code, count in result.rejected.items():
        typer.echo(f"  {code:26}{count}")
    for name, found in result.teachers.items():
        typer.echo(
            f"{name}: {found['accepted']:.0f} of {found['items']:.0f} accepted, {found['tokens']:,.0f} tokens, "
            f"{found['money']:.4f} money"
        )
    for name, value in result.judge.items():
        typer.echo(f"judge {name}: {value:.3g}")
    typer.echo(
        f"all starts: {result.requests:,} requests, {result.tokens:,} tokens, {result.money:.4f} money, "
        f"{result.num_lost} requests lost with killed drivers; now {result.answers_per_s:.1f} answers/s, "
        f"{result.tokens_per_s:,.0f} tokens/s"
    )
    if result.stopped_by is not None:
        typer.echo(
            f"stopped by budget.{result.stopped_by}: {result.num_unanswered} items are left; raise it and give the "
            "same command"
        )
    typer.echo(f"records: {result.records}")
    typer.echo(f"data set: {result.dataset or '(none)'}{f'; {result.run_url}' if result.run_url else ''}")
