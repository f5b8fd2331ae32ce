"""`tinyemo train` with a recipe of stages: what it would read, how it goes, what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from orchestration.cli.train import show_facts, stoppable

if TYPE_CHECKING:
    from orchestration.jobs.stage_state import PhaseState
    from orchestration.reasoning.result import ReasonerResult
    from orchestration.recipe import Recipe


def train_stages(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    """Train the reasoning model of a recipe, or show what would be read."""
    if dry_run:
        show_facts(recipe, _plan_facts(recipe), as_json)
        return
    from orchestration.reasoning.train import train_reasoner

    with stoppable():
        result = train_reasoner(recipe, on_report=None if as_json else _show_report)
    _show_result(result, as_json)


def train_family_stages(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    """Train the reasoning model of a recipe at every size of the family, or show what would be read at each."""
    from orchestration.reasoning.family import recipe_for_size, train_reasoner_family
    from orchestration.recipe import recipes_of_sizes

    if dry_run:
        planned = [(child, _plan_facts(child)) for child in recipes_of_sizes(recipe, recipe_for_size)]
        if as_json:
            found = [facts | {"recipe": child.model_dump(mode="json")} for child, facts in planned]
            typer.echo(json.dumps(found, indent=1))
            return
        for child, facts in planned:
            show_facts(child, facts, as_json)
        return
    with stoppable():
        results = train_reasoner_family(recipe, on_report=None if as_json else _show_report)
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        return
    for result in results:
        _show_result(result, as_json)


def _plan_facts(recipe: Recipe) -> dict[str, Any]:
    """What is known of a run before anything starts."""
    from orchestration.reasoning.prepare import prepare_reasoning
    from orchestration.reasoning.sources import describe_sources

    sources = describe_sources(recipe)
    plan = prepare_reasoning(recipe, sources)
    return {
        "name": recipe.name,
        "recipe_digest": recipe.digest(),
        "llm": f"{sources.llm_name} ({sources.llm_weights} weights)",
        "vision_tower": str(sources.encoder.info),
        "image_tokens": sources.image_tokens,
        "optimizer_steps": {name: stage.num_steps for name, stage in plan.stages.items()},
        "records_per_epoch": {name: stage.steps.samples_per_epoch for name, stage in plan.stages.items()},
        "validation_records": plan.validation.steps.samples_per_epoch if plan.validation else 0,
        "test_records": plan.test.steps.samples_per_epoch if plan.test else 0,
    }


def _show_report(stage: str, state: PhaseState) -> None:
    metrics = state.metrics
    shown = ", ".join(
        f"{name} {metrics[name]:,.4g}" for name in ("loss", "val_loss", "tokens_per_s") if name in metrics
    )
    typer.echo(f"  {stage}: step {state.step}, {shown}", err=True)


def _show_result(result: ReasonerResult, as_json: bool) -> None:
    from orchestration.reasoning.model_card import evaluation_lines, warnings_of

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
