"""`tinyemo compare`: test two finished reasoning runs against each other on the same held-out records."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from orchestration.cli.options import JsonOption


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Name of a finished run.")],
    second: Annotated[str, typer.Argument(metavar="BASELINE", help="Name of the run to compare it with.")],
    root: Annotated[str, typer.Option(help="S3 folder of the runs, checkpoint.root of their recipes.")] = (
        "s3://tinyemo/runs"
    ),
    as_json: JsonOption = False,
) -> None:
    """Test whether one run gives held-out answers a higher likelihood than another, record by record.

    Example: tinyemo compare reasoning-offline reasoning-text-only
    """
    from cluster.environment import load_platform_environment

    load_platform_environment()
    from orchestration.jobs.paired import compare_runs

    found = compare_runs(first, second, root)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    shown = {"right": "with each record's own image", "text_only": "without images"}
    for name, condition in zip((first, second), found.conditions, strict=True):
        typer.echo(f"{name}: measured {shown[condition]}")
    for over, test in (("records", found.over_records), ("images", found.over_images)):
        typer.echo(
            f"{test.num_pairs} {over}: {test.mean_first:.4f} against {test.mean_second:.4f} nats a token, "
            f"{test.mean_difference:+.4f}, lower in {100 * test.share_lower:.1f} %, "
            f"p {test.p_wilcoxon:.2g} (Wilcoxon), {test.p_t:.2g} (t)"
        )
    typer.echo(f'Tests are one-sided for "{first} is lower"; the records of one image are no independent draws.')
