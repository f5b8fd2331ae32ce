"""`tinyemo report`: one HTML page about a model or a family."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from orchestration.cli.options import JsonOption
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)


def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FAMILY", help="A finished run, family or search, models:/NAME@ALIAS, s3://..., or a folder."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE.html", help="The page.")] = Path("report.html"),
    root: Annotated[
        str, typer.Option("--root", metavar="S3_URI", help="S3 folder of the runs, checkpoint.root of their recipes.")
    ] = "s3://tinyemo/runs",
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about a model or a family, and store it with its MLflow run.

    Example: tinyemo report models:/tinyemo-projector@champion --output report.html
    """
    from orchestration.report.page import MAX_BYTES, write_report
    from orchestration.report.subject import find_subject

    subject = find_subject(model, root)
    num_bytes = write_report(subject, output)
    if num_bytes > MAX_BYTES:
        logger.warning("%s has %.1f MiB: pictures of fewer data sets would make it smaller", output, num_bytes / 2**20)
    stored = ""
    if subject.run is not None:
        from orchestration.services import tracking

        try:
            tracking.log_artifact(subject.run.run_id, output, "report")
            stored = subject.run.url.replace("?", "/artifacts?", 1)
        except PlatformError as error:  # the page is written by now
            logger.warning("the page is not in MLflow: %s", error)
    evaluated = [entry["name"] for entry in subject.documents.measured()]
    if as_json:
        document = {"page": str(output.absolute()), "bytes": num_bytes, "artifact": stored, "data": evaluated,
                    "marks": subject.marks, "bias_reports": len(subject.documents.bias)}  # fmt: skip
        typer.echo(json.dumps(document, indent=1))
        return
    for mark in subject.marks:
        typer.echo(f"CAUTION: {mark}")
    typer.echo(f"report on {subject.name}: {output.absolute()} ({num_bytes / 1000:.0f} kB)")
    if stored:
        typer.echo(f"also in MLflow: {stored}")
    if not evaluated:
        typer.echo("it has no evaluation yet: tinyemo evaluate RECIPE")
