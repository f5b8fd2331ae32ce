"""`tinyemo assets`: what is not in the repository, and where it is to be had."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestration.cli.options import JsonOption

assets_app = typer.Typer(help="List and fetch data and weights.", no_args_is_help=True)


@assets_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """Show the catalogue: each asset, its sources in the order in which they are tried, and what is in the cache.

    Example: tinyemo assets list --json
    """
    from orchestration.assets.catalogue import list_assets

    statuses = list_assets()
    if as_json:
        rows = [
            {
                "name": status.asset.name,
                "description": status.asset.description,
                "terms": status.asset.terms,
                "sources": [{"name": source.name, "where": source.where} for source in status.asset.sources],
                "cached": str(status.folder) if status.folder else None,
                "source": status.source,
            }
            for status in statuses
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    for status in statuses:
        typer.echo(f"{status.asset.name}: {status.asset.description} ({status.asset.terms})")
        for number, source in enumerate(status.asset.sources, start=1):
            typer.echo(f"  {number}. {source.name}: {source.where}")
        typer.echo(f"  cached: {status.folder} (from the {status.source})" if status.folder else "  not cached")


@assets_app.command("get")
def get_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `tinyemo assets list` shows.")],
    is_refreshed: Annotated[bool, typer.Option("--refresh", help="Ask the sources even where it is cached.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch an asset from the first source that answers, check it and print its folder.

    Example: TINYEMO_MIRROR=../shared/data tinyemo assets get emotion6
    """
    from orchestration.assets.catalogue import get_asset, read_provenance

    folder = get_asset(name, is_refreshed=is_refreshed)
    note = read_provenance(folder)
    if as_json:
        typer.echo(json.dumps({"path": str(folder), **note}, indent=2, sort_keys=True))
        return
    typer.echo(str(folder))
    typer.echo(f"from the {note['source']}, revision {note['revision']}", err=True)
    rows, public_rows = note.get("rows", {}), note.get("public_rows", {})
    for split, count in rows.items():
        typer.echo(f"{split}: {count} of {public_rows.get(split, count)} public rows", err=True)
