"""A recipe is checked whole, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.recipe import Recipe, load_recipe, parse_recipe, to_toml
from tinyemo.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "orchestration" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_has_it(path: Path) -> None:
    assert load_recipe(path.stem).name == path.stem


def test_recipes_are_shipped() -> None:
    assert SHIPPED


def test_all_errors_come_at_once() -> None:
    content = {"name": "x", "loss": {"nam": "cosine"}, "train": {"num_epochs": "five", "global_batch_size": 33}}
    with pytest.raises(ConfigError) as caught:
        parse_recipe(content, source="bad.toml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "bad.toml: 3 errors"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "loss.nam",
        "train.num_epochs",
        "train.global_batch_size",
    ]
    assert "32 or 34 would" in lines[3]


def test_conflicts_between_sections_show_without_field_errors_too() -> None:
    with pytest.raises(
        ConfigError, match=r"projector.hidden_size: 576 is not the width of labels.llm tinyemo-700m, 1280"
    ):
        parse_recipe({"name": "x", "labels": {"llm": "tinyemo-700m"}}, source="x")


def test_set_lays_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[loss]\nname = "cosine"\n')
    recipe = load_recipe(str(path), ["loss.name=info_nce", "train.seed=7", "train.refit=true", "name=other"])
    assert (recipe.name, recipe.loss.name, recipe.train.seed, recipe.train.refit) == ("other", "info_nce", 7, True)


@pytest.mark.parametrize("text", ["loss.name", "=3", "name.first=3"])
def test_a_malformed_override_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match="--set"):
        load_recipe(str(path), [text])


def test_an_unknown_recipe_lists_the_shipped() -> None:
    with pytest.raises(ConfigError, match="emotion6"):
        load_recipe("emotion7")


def test_toml_comes_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe("emotion6", ["data.validation_fraction=0.2", "labels.template=scene"])
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(str(path)) == recipe


def test_the_digest_ignores_where_and_follows_what() -> None:
    recipe = Recipe(name="x")
    elsewhere = recipe.model_copy(update={"experiment": "other"})
    other = parse_recipe({"name": "x", "train": {"seed": 1}}, source="x")
    assert recipe.digest() == elsewhere.digest() != other.digest()
