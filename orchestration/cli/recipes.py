"""`tinyemo recipes`: show and copy the recipes that come with this package. Needs no data and no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestration.cli.options import JsonOption
from tinyemo.errors import ConfigError

recipes_app = typer.Typer(help="Show and copy the shipped recipes.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name that `tinyemo recipes list` prints.")]


@recipes_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the shipped recipes with one line each.

    Example: tinyemo recipes list
    """
    from orchestration.recipe import shipped_recipes

    found = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped_recipes().items()}
    if as_json:
        typer.echo(json.dumps([{"name": name, "description": text} for name, text in found.items()], indent=1))
        return
    for name, text in found.items():
        typer.echo(f"{name:24}{text}")


@recipes_app.command("show")
def show_command(name: NameArgument, as_json: JsonOption = False) -> None:
    """Print a recipe file; --json prints the whole recipe, defaults included.

    Example: tinyemo recipes show emotion6
    """
    from orchestration.recipe import command_of, load_recipe, recipe_path

    if as_json and command_of(name) == "synthesize":
        from orchestration.synthesize.synthesis_recipe import load_synthesis

        typer.echo(json.dumps(load_synthesis(name).model_dump(mode="json"), indent=1))
        return
    if as_json:
        typer.echo(json.dumps(load_recipe(name).model_dump(mode="json"), indent=1))
        return
    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("init")
def init_command(
    name: NameArgument,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write.  [default: NAME.toml in this folder]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a shipped recipe to a file of yours, to edit it and to pass it to its command.

    Example: tinyemo recipes init emotion6 --output my-run.toml
    """
    from orchestration.recipe import command_of, recipe_path

    source = recipe_path(name)
    target = output or Path(source.name)
    # A run is named after its recipe unless the file says otherwise, so the copy takes the name of its file.
    text = source.read_text(encoding="utf-8").replace(f'name = "{source.stem}"', f'name = "{target.stem}"', 1)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{target} exists: choose another file with --output") from error
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    if as_json:
        typer.echo(json.dumps({"path": str(target), "recipe": source.stem}))
        return
    typer.echo(f"{target}: a copy of {source.stem}; edit it, then run `tinyemo {command_of(source.stem)} {target}`")
