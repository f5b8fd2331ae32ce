"""Every command explains itself: help, an example, --json, a line for each option, and a place in the documents."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from orchestration.cli import app

ROOT = Path(__file__).parents[3]
DOCUMENTS = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_there_are_commands() -> None:
    assert ("recipes", "list") in COMMANDS
    assert ("train",) in COMMANDS


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_has_help_with_an_example_that_parses(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    summary, _, example = command.help.partition("Example: ")
    assert summary.strip().splitlines()[0].endswith("."), "the first line is a sentence"
    words = shlex.split(example)
    while "=" in words[0]:  # variables of the environment
        words.pop(0)
    assert words[: 1 + len(path)] == ["tinyemo", *path]
    command.make_context(path[-1], words[1 + len(path) :])
    assert "Example: " in CliRunner().invoke(app, [*path, "--help"]).stdout


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_prints_json_and_explains_its_options(path: tuple[str, ...]) -> None:
    parameters = COMMANDS[path].params
    assert any("--json" in parameter.opts for parameter in parameters)
    assert [parameter.name for parameter in parameters if not getattr(parameter, "help", None)] == []


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_stands_in_the_documents(path: tuple[str, ...]) -> None:
    assert f"tinyemo {' '.join(path)}" in DOCUMENTS
