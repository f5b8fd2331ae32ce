"""`tinyemo ingest instruct`: LLaVA records and their images into S3."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest_output import ingest_facts, show_json, show_rejected, show_stored
from orchestration.cli.options import DatasetNameOption, ForceOption, JsonOption, RootOption, default_root
from orchestration.cli.progress import progress

if TYPE_CHECKING:
    from orchestration.instruct.ingest import InstructReport


def instruct_command(
    records: Annotated[
        str, typer.Option(help="JSON array or JSON Lines of LLaVA records: a file, or s3://...", show_default=False)
    ],
    images: Annotated[
        str, typer.Option(help="Folder that image paths are relative to, or s3://...", show_default=False)
    ],
    name: DatasetNameOption = "instruct",
    root: RootOption = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Which records are kept; see docs/instruct_data.md.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a rule over the file or the defaults.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of records that name none.")] = None,
    rows_per_group: Annotated[int, typer.Option(help="Records of a Parquet row group.", min=1)] = 256,
    shard_bytes: Annotated[int, typer.Option(help="A shard ends where it reaches this.", min=1)] = 64 * 2**20,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
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
    manifest = report.manifest
    if as_json:
        document = {
            "rows_duplicate": report.rows_duplicate,
            "tasks": manifest.tasks,
            "shards": len(manifest.shards),
            "card": manifest.file_uri("card.md"),
            "mlflow_run": report.run_url,
        }
        show_json(manifest, ingest_facts(report) | document)
        return
    if manifest.data == "generated":
        typer.echo("GENERATED records: figures from them mean nothing")
    for split, counts in manifest.splits.items():
        tasks = ", ".join(f"{task} {rows}" for task, rows in manifest.tasks[split].items())
        typer.echo(f"{split}: {counts.rows} records ({tasks})")
    typer.echo(
        f"rows in {manifest.rows_in} = kept {manifest.rows_kept} + rejected {report.rows_rejected} "
        f"+ duplicates {report.rows_duplicate}"
    )
    show_rejected(manifest)
    typer.echo(f"card: {report.run_url or manifest.file_uri('card.md')}")
    show_stored(report)
