"""`tinyemo ingest oasis`: photographs with human ratings as instruct data."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest import default_root, progress
from orchestration.cli.ingest_instruct import show_report
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.instruct.oasis import OasisRules


def oasis_command(
    name: Annotated[str, typer.Option(help="The data set's name in S3.")] = "oasis",
    root: Annotated[
        str | None, typer.Option(metavar="S3_URI", help="Default: s3://$TINYEMO_BUCKET/datasets.", show_default=False)
    ] = None,
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
    is_forced: Annotated[bool, typer.Option("--force", help="Upload again even where nothing changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write captions, questions and reasoning for OASIS by templates from its norms, and store them with its images.

    Example: tinyemo ingest oasis --name oasis
    """
    from orchestration.instruct.oasis import ingest_oasis

    load_platform_environment()
    rules = _make_rules(
        negative_below=negative_below,
        positive_above=positive_above,
        calm_below=calm_below,
        aroused_above=aroused_above,
        state_label=state_label,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    # Ray reports lost workers on stdout, which is for results.
    with progress() as advance, redirect_stdout(sys.stderr):
        report = ingest_oasis(name=name, root=root or default_root(), rules=rules, is_forced=is_forced, advance=advance)
    if not as_json:
        typer.echo("answers are TEMPLATES filled from the norms; emotions are a rule over mean valence and arousal")
    show_report(report, as_json=as_json)


def _make_rules(**values: Any) -> OasisRules:
    from pydantic import ValidationError

    from orchestration.instruct.oasis import OasisRules

    try:
        return OasisRules(**values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])} {item['msg'].removeprefix('Value error, ')}".strip()
            for item in error.errors()
        ]
        raise ConfigError(f"the rules of OASIS cannot be used: {'; '.join(lines)}") from error
