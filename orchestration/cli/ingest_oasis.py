"""`tinyemo ingest oasis`: photographs with human ratings as instruct data."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Literal

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest_instruct import show_report
from orchestration.cli.options import DatasetNameOption, ForceOption, JsonOption, RootOption, default_root
from orchestration.cli.progress import progress


def oasis_command(
    name: DatasetNameOption = "oasis",
    root: RootOption = None,
    negative_below: Annotated[float, typer.Option(help="Mean valence (1 to 7) of a negative photograph.")] = 3.5,
    positive_above: Annotated[float, typer.Option(help="Mean valence of a positive one; none between.")] = 4.5,
    calm_below: Annotated[float, typer.Option(help="Mean arousal (1 to 7) of a calm photograph.")] = 3.6,
    aroused_above: Annotated[float, typer.Option(help="Mean arousal of a stirring one; none between.")] = 3.8,
    state_label: Annotated[
        Literal["always", "train", "never"], typer.Option(help="Where a reasoning question states the right label.")
    ] = "always",
    validation_fraction: Annotated[float, typer.Option(help="Chance of a theme to be in validation.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Chance of a theme to be in test.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of splits, wordings and offered labels.", min=0)] = 0,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write captions, questions and reasoning for OASIS by templates from its norms, and store them with its images.

    Example: tinyemo ingest oasis --name oasis
    """
    from orchestration.instruct.oasis import OasisRules, ingest_oasis
    from orchestration.recipe.toml_sections import parse_section

    load_platform_environment()
    chosen = {
        "negative_below": negative_below,
        "positive_above": positive_above,
        "calm_below": calm_below,
        "aroused_above": aroused_above,
        "state_label": state_label,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    rules = parse_section(OasisRules, chosen, source="the rules of OASIS cannot be used")
    # Ray reports lost workers on stdout, which is for results.
    with progress() as advance, redirect_stdout(sys.stderr):
        report = ingest_oasis(name=name, root=root or default_root(), rules=rules, is_forced=is_forced, advance=advance)
    if not as_json:
        typer.echo("answers are TEMPLATES filled from the norms; emotions are a rule over mean valence and arousal")
    show_report(report, as_json=as_json)
