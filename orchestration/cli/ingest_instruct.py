"""`tinyemo ingest instruct`: LLaVA records and their images into S3."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest import default_root, progress

if TYPE_CHECKING:
    from orchestration.instruct.ingest import InstructReport


def instruct_command(
    records: Annotated[
        str, typer.Option(help="JSON array or JSON Lines of LLaVA records: a file, or s3://...", show_default=False)
    ],
    images: Annotated[
        str, typer.Option(help="Folder that image paths are relative to, or s3://...", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="The data set's name in S3.")] = "instruct",
    root: Annotated[
        str | None, typer.Option(metavar="S3_URI", help="Default: s3://$TINYEMO_BUCKET/datasets.", show_default=False)
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Which records are kept; see docs/instruct_data.md.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a rule over the file or the defaults.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of records that name none.")] = None,
    rows_per_group: Annotated[int, typer.Option(help="Records of a Parquet row group.", min=1)] = 256,
    shard_bytes: Annotated[int, typer.Option(help="A shard ends where it reaches this.", min=1)] = 64 * 2**20,
    is_forced: Annotated[bool, typer.Option("--force", help="Upload again even where nothing changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check records and images one by one on the cluster, and store what is sound as Parquet shards.

    What is not kept goes to rejected.parquet, each record as it came and with its reason.

    Example: tinyemo ingest instruct --records finetune.json --images images --name emoreason --set taxonomy=parrott
    --set foreign_root=/home/author/images
    """
    from orchestration.instruct.ingest import ingest_instruct
    from orchestration.instruct.rules import Layout, load_rules

    load_platform_environment()
    # Ray reports lost workers on stdout, which is for results.
    with progress() as advance, redirect_stdout(sys.stderr):
        report = ingest_instruct(
            records,
            images,
            name=name,
            root=root or default_root(),
            rules=load_rules(rules, overrides),
            split=split,
            layout=Layout(rows_per_group=rows_per_group, shard_bytes=shard_bytes),
            is_forced=is_forced,
            advance=advance,
        )
    show_report(report, as_json=as_json)


def show_report(report: InstructReport, *, as_json: bool) -> None:
    """Print what an ingest did, for people or as JSON."""
    if as_json:
        typer.echo(json.dumps(_as_document(report), indent=2, sort_keys=True))
        return
    manifest = report.manifest
    if manifest.data == "generated":
        typer.echo("GENERATED records: figures from them mean nothing")
    for split, counts in manifest.splits.items():
        tasks = ", ".join(f"{task} {rows}" for task, rows in manifest.tasks[split].items())
        typer.echo(f"{split}: {counts.rows} records ({tasks})")
    typer.echo(
        f"rows in {manifest.rows_in} = kept {manifest.rows_kept} + rejected {report.rows_rejected} "
        f"+ duplicates {report.rows_duplicate}"
    )
    for reason, rows in manifest.rejected.reasons.items():
        typer.echo(f"  {reason}: {rows}")
    if manifest.rejected.rows:
        typer.echo(f"  see {manifest.file_uri(manifest.rejected.path)}")
    typer.echo(f"card: {report.run_url or manifest.file_uri(manifest.card.path)}")
    stored = "unchanged" if report.is_unchanged else f"stored {report.num_uploaded} files, {report.uploaded_bytes:,} B"
    typer.echo(f"{manifest.uri}: {stored} in {report.seconds:.1f} s")


def _as_document(report: InstructReport) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "data": manifest.data,
        "unchanged": report.is_unchanged,
        "rows_in": manifest.rows_in,
        "rows_kept": manifest.rows_kept,
        "rows_rejected": report.rows_rejected,
        "rows_duplicate": report.rows_duplicate,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
        "tasks": manifest.tasks,
        "shards": len(manifest.shards),
        "card": manifest.file_uri(manifest.card.path),
        "mlflow_run": report.run_url,
        "uploaded_files": report.num_uploaded,
        "uploaded_bytes": report.uploaded_bytes,
        "seconds": round(report.seconds, 3),
    }
