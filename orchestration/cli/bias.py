"""`tinyemo bias`: look for bias in a projector, and decide on what was found."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.options import JsonOption
from orchestration.cli.progress import progress
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_SHOWN = 20


def bias(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|FAMILY", help="Folder, s3://..., models:/NAME@ALIAS, or a run or family.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Data set in S3, or a Parquet file of features; may be repeated.")
    ] = None,
    groups: Annotated[
        list[str] | None, typer.Option(help="Table with id or image and columns of groups (.csv, .tsv, .parquet).")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Columns, by commas.  [default: all that fit]")] = None,
    covariates: Annotated[str | None, typer.Option(help="Columns of numbers that may explain a gap.")] = None,
    cluster_by: Annotated[str | None, typer.Option(help="Column whose images are alike: author or theme.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set in S3; * for all.")] = "test",
    taxonomy: Annotated[str | None, typer.Option(help="ekman, mikels or parrott.  [default: the data set's]")] = None,
    word_groups: Annotated[Path | None, typer.Option(help="TOML file of word groups.  [default: gender]")] = None,
    num_scenes: Annotated[int, typer.Option("--scenes", help="Images to change and encode again.", min=0)] = 0,
    alpha: Annotated[float, typer.Option(help="Chance of any false blame in the report.", min=1e-6, max=0.5)] = 0.05,
    name: Annotated[str, typer.Option(help="Name of the report.")] = "bias",
    seed: Annotated[int, typer.Option(help="Seed of samples and clusters.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for the files.  [default: below the run in S3]")] = None,
    decide: Annotated[
        list[str] | None, typer.Option(metavar="ID=DECISION", help="confirmed, dismissed, explained or open.")
    ] = None,
    note: Annotated[str, typer.Option(help="Reason of the decisions.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Look for bias in a projector: words, groups, slices, associations, flips and spurious features.

    Findings go to bias.json and to review.toml, which a person decides on: by hand, or with --decide. Without --data
    the last report's findings and decisions are printed.

    Example: tinyemo bias my-run --data s3://tinyemo/datasets/oasis-lite0 --groups norms.csv --cluster-by theme
    """
    from cluster.environment import load_platform_environment

    load_platform_environment()
    if not data:
        _review(model, name, output, decide or [], note, as_json)
        return
    if decide:
        raise ConfigError("--decide goes without --data: decide on a report that is there")
    from orchestration.bias.bias_inputs import DataChoice
    from orchestration.bias.bias_job import BiasOptions, family_curves, report_bias
    from orchestration.bias.bias_review import split_names

    choices = [
        DataChoice(
            location=location, split=split, taxonomy=taxonomy, groups=tuple(groups or ()), columns=split_names(columns),
            covariates=split_names(covariates), cluster_by=cluster_by,
        )
        for location in data
    ]  # fmt: skip
    options = BiasOptions(name, alpha, word_groups, num_scenes, seed)
    members = family_members(model)
    import sys

    with progress() as advance, redirect_stdout(sys.stderr):
        documents = [
            report_bias(
                member, choices, options, advance=advance,
                output=output / member if output is not None and len(members) > 1 else output,
            )
            for member in members
        ]  # fmt: skip
    curves = family_curves(documents) if len(documents) > 1 else []
    if as_json:
        typer.echo(json.dumps(documents[0] if len(documents) == 1 else {"sizes": documents, "curves": curves}))
        return
    for document in documents:
        _show(document)
    for curve in curves:
        points = "  ".join(f"{point['size']} {point['effect']:+.3f}" for point in curve["sizes"])
        typer.echo(f"{curve['id']}: {points}")


def family_members(model: str) -> list[str]:
    """Return the names of a family's finished runs, smallest first; the model itself where it is none."""
    import os

    from orchestration.recipe import CheckpointConfig
    from orchestration.services.storage import list_prefix
    from tinyemo.families import FAMILY

    if Path(model).is_dir() or "/" in model or not os.environ.get("AWS_ENDPOINT_URL"):
        return [model]
    root = CheckpointConfig().root
    if list_prefix(f"{root}/{model}/projector"):
        return [model]
    found = [name for name in (f"{model}-{size}" for size in FAMILY) if list_prefix(f"{root}/{name}/projector")]
    return found or [model]


def _review(location: str, name: str, output: Path | None, decisions: Sequence[str], note: str, as_json: bool) -> None:
    """Print the findings and decisions of the last report, after storing new decisions."""
    from orchestration.bias.bias_job import decide_on_report

    document = decide_on_report(location, name, output, decisions, note)
    if as_json:
        typer.echo(json.dumps(document))
        return
    for row in document["review"]:
        gone = " (no longer found)" if row.get("is_gone") else ""
        typer.echo(f"{row['decision']:<10} {row['effect']:+.3f}  {row['id']}{gone}")
        typer.echo(f"           {row['title']} {row['note']}")
    typer.echo(f"{sum(row['decision'] == 'open' for row in document['review'])} of {len(document['review'])} are open")


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if document["model"]["is_random_weights"]:
        console.print("RANDOM WEIGHTS: label embeddings or the encoder were never trained.", style="bold red")
    found = sorted((row for row in document["findings"] if row["is_significant"]), key=lambda row: row["q"])
    title = f"{len(found)} significant of {document['num_tests']} tests, false blame in at most {document['alpha']:.0%}"
    table = Table(title=f"{title} of such reports")
    for column in ("part", "finding", "95 %", "q", "explained by"):
        table.add_column(column, overflow="fold")
    for row in found[:NUM_SHOWN]:
        limits = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        table.add_row(row["part"], row["title"], limits, f"{row['q']:.1g}", row["explained_by"] or "")
    console.print(table)
    if len(found) > NUM_SHOWN:
        typer.echo(f"... and {len(found) - NUM_SHOWN} more: --json, or bias.json")
    for line in [*document["notes"], *document["changes"]]:
        typer.echo(line, err=True)
    if document["place"]:
        undecided = sum(row["decision"] == "open" for row in document["review"])
        typer.echo(f"{undecided} findings to decide on in {document['place']}/review.toml")
