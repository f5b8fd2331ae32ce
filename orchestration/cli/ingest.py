"""`tinyemo ingest`: data sets into S3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest_output import (
    ingest_facts,
    show_json,
    show_label_counts,
    show_rejected,
    show_stored,
)
from orchestration.cli.options import DatasetNameOption, ForceOption, JsonOption, RootOption, default_root
from orchestration.cli.progress import progress

if TYPE_CHECKING:
    from orchestration.datasets.ingest import IngestReport

ingest_app = typer.Typer(help="Put data sets into S3.", no_args_is_help=True)


@ingest_app.callback()
def _group() -> None:
    """Put data sets into S3, validated, sharded and versioned."""


@ingest_app.command("features")
def features_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="Folder of <split>.parquet files, a Parquet file, or an asset's name."),
    ] = None,
    name: DatasetNameOption = "emotion6",
    taxonomy: Annotated[str, typer.Option(help="ekman, mikels or parrott; rows with other labels go.")] = "ekman",
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split of a single file that has no column `split`.")] = None,
    is_generated: Annotated[
        bool, typer.Option("--generated", help="Seeded noise instead of SOURCE; its runs are tagged data=generated.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the generated rows.", min=0)] = 0,
    feature_width: Annotated[
        int | None, typer.Option("--width", help="Numbers in a feature. Default: those of train.", min=1)
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(help="Rows of one Parquet file in S3.", min=1)] = 512,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Validate feature rows, store them as sharded Parquet with a manifest, and keep what is rejected with a reason.

    Example: tinyemo ingest features emotion6 --name emotion6 --taxonomy ekman
    """
    from orchestration.datasets.ingest import ingest_features

    load_platform_environment()
    with progress() as advance:
        report = ingest_features(
            source,
            name=name,
            root=root or default_root(),
            taxonomy=taxonomy,
            split=split,
            is_generated=is_generated,
            seed=seed,
            feature_width=feature_width,
            rows_per_shard=rows_per_shard,
            is_forced=is_forced,
            advance=advance,
        )
    _show(report, as_json=as_json)


def _show(report: IngestReport, *, as_json: bool) -> None:
    manifest = report.manifest
    if as_json:
        show_json(manifest, ingest_facts(report))
        return
    if manifest.data == "generated":
        typer.echo("GENERATED features: noise, not images; figures from them mean nothing")
    show_label_counts(manifest, "rows")
    typer.echo(f"rows in {manifest.rows_in} = kept {manifest.rows_kept} + rejected {manifest.rejected.rows}")
    show_rejected(manifest)
    show_stored(report)
