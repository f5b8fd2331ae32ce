"""Options that several commands share, each with one help text."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tinyemo.errors import ConfigError

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value in the recipe.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and plan without starting anything.")]

DatasetNameOption = Annotated[str, typer.Option("--name", help="Name of the data set in S3.")]
RootOption = Annotated[
    str | None,
    typer.Option("--root", metavar="S3_URI", help="Default: s3://$TINYEMO_BUCKET/datasets.", show_default=False),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Store it again even if it exists.")]


def default_root() -> str:
    """Return the S3 folder of the platform's data sets; ConfigError if no bucket is named."""
    bucket = os.environ.get("TINYEMO_BUCKET")
    if not bucket:
        raise ConfigError(
            "TINYEMO_BUCKET is not set: run `tinyemo platform up`, set it, or pass --root s3://bucket/path"
        )
    return f"s3://{bucket}/datasets"
