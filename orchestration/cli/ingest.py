"""`tinyemo ingest`: data sets into S3."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.datasets.ingest import IngestReport
    from orchestration.datasets.versions import Advance

ingest_app = typer.Typer(help="Put data sets into S3.", no_args_is_help=True)

LINE_EVERY_S = 5.0
"""Between two progress lines where there is no terminal."""


@ingest_app.callback()
def _group() -> None:
    """Put data sets into S3, validated, sharded and versioned."""


@ingest_app.command("features")
def features_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="Folder of <split>.parquet files, a Parquet file, or an asset's name."),
    ] = None,
    name: Annotated[str, typer.Option(help="The data set's name in S3.")] = "emotion6",
    taxonomy: Annotated[str, typer.Option(help="ekman, mikels or parrott; rows with other labels go.")] = "ekman",
    root: Annotated[
        str | None, typer.Option(metavar="S3_URI", help="Default: s3://$TINYEMO_BUCKET/datasets.", show_default=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a single file that has no column `split`.")] = None,
    is_generated: Annotated[
        bool, typer.Option("--generated", help="Seeded noise instead of SOURCE; its runs are tagged data=generated.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the generated rows.", min=0)] = 0,
    feature_width: Annotated[
        int | None, typer.Option("--width", help="Numbers in a feature. Default: those of train.", min=1)
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(help="Rows of one Parquet file in S3.", min=1)] = 512,
    is_forced: Annotated[bool, typer.Option("--force", help="Upload again even where nothing changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
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
    if as_json:
        typer.echo(json.dumps(_as_document(report), indent=2, sort_keys=True))
    else:
        _show(report)


def default_root() -> str:
    """Where data sets lie on the platform; ConfigError where no bucket is named."""
    bucket = os.environ.get("TINYEMO_BUCKET")
    if not bucket:
        raise ConfigError(
            "TINYEMO_BUCKET is not set: run `tinyemo platform up`, set it, or say --root s3://bucket/path"
        )
    return f"s3://{bucket}/datasets"


@contextmanager
def progress() -> Iterator[Advance]:
    """What draws a bar on a terminal, or prints a line every few seconds and at the end of a stage; on stderr."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done)

        yield advance


def _line_printer() -> Advance:
    last = time.monotonic()

    def advance(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > LINE_EVERY_S:
            typer.echo(f"{stage}: {done} of {total}", err=True)
            last = time.monotonic()

    return advance


def _as_document(report: IngestReport) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "data": manifest.data,
        "unchanged": report.is_unchanged,
        "rows_in": manifest.rows_in,
        "rows_kept": manifest.rows_kept,
        "rows_rejected": manifest.rejected.rows,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
        "uploaded_files": report.num_uploaded,
        "uploaded_bytes": report.uploaded_bytes,
        "seconds": round(report.seconds, 3),
    }


def _show(report: IngestReport) -> None:
    manifest = report.manifest
    if manifest.data == "generated":
        typer.echo("GENERATED features: noise, not images; figures from them mean nothing")
    for split, counts in manifest.splits.items():
        labels = ", ".join(f"{label} {rows}" for label, rows in counts.labels.items())
        typer.echo(f"{split}: {counts.rows} rows ({labels})")
    rejected = manifest.rejected
    typer.echo(f"rows in {manifest.rows_in} = kept {manifest.rows_kept} + rejected {rejected.rows}")
    for reason, rows in rejected.reasons.items():
        typer.echo(f"  {reason}: {rows}")
    if rejected.rows:
        typer.echo(f"  see {manifest.file_uri(rejected.path)}")
    stored = "unchanged" if report.is_unchanged else f"stored {report.num_uploaded} files, {report.uploaded_bytes:,} B"
    typer.echo(f"{manifest.uri}: {stored} in {report.seconds:.1f} s")
