"""`tinyemo recipes` shows and copies recipes with no data and no server in reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.recipe import Recipe, load_recipe, shipped_recipes
from tinyemo.errors import ConfigError


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["recipes", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_has_a_line_for_each_recipe() -> None:
    lines = invoke("list").splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    described = {row["name"]: row["description"] for row in json.loads(invoke("list", "--json"))}
    assert all(text[0].isupper() and len(text) > 40 for text in described.values()), described


def test_show_prints_the_file_or_the_whole_recipe() -> None:
    assert invoke("show", "oasis") == shipped_recipes()["oasis"].read_text()
    assert Recipe.model_validate(json.loads(invoke("show", "oasis", "--json"))) == load_recipe("oasis")


def test_init_writes_a_copy_that_trains_under_its_own_name(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    assert str(target) in invoke("init", "oasis", "--output", str(target))
    assert load_recipe(str(target)) == load_recipe("oasis", ["name=mine"])
    with pytest.raises(ConfigError, match=r"mine\.toml exists"):
        invoke("init", "oasis", "--output", str(target))
    with pytest.raises(ConfigError, match="cannot write"):
        invoke("init", "oasis", "--output", str(tmp_path / "none" / "mine.toml"))
    with pytest.raises(ConfigError, match="no recipe at emotion7"):
        invoke("init", "emotion7")
