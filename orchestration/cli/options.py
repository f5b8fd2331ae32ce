"""Options that several commands have, each with one help text."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tinyemo.errors import ConfigError

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay section.key=value over the recipe.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and plan, start nothing.")]

DatasetNameOption = Annotated[str, typer.Option("--name", help="The data set's name in S3.")]
RootOption = Annotated[
    str | None,
    typer.Option("--root", metavar="S3_URI", help="Default: s3://$TINYEMO_BUCKET/datasets.", show_default=False),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Store it again even where it is there.")]


def default_root() -> str:
    """Where data sets lie on the platform; ConfigError where no bucket is named."""
    bucket = os.environ.get("TINYEMO_BUCKET")
    if not bucket:
        raise ConfigError(
            "TINYEMO_BUCKET is not set: run `tinyemo platform up`, set it, or say --root s3://bucket/path"
        )
    return f"s3://{bucket}/datasets"
