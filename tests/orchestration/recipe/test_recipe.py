"""A recipe is checked whole, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.evaluate.evaluation_recipe import load_evaluation
from orchestration.recipe import Recipe, command_of, load_recipe, parse_recipe, to_toml
from orchestration.synthesize.synthesis_recipe import load_synthesis
from tinyemo.config import Section
from tinyemo.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "orchestration" / "recipes").glob("*.toml"))
TRAINING = [path for path in SHIPPED if command_of(path.stem) == "train"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_has_it(path: Path) -> None:
    loaders = {"synthesize": load_synthesis, "evaluate": load_evaluation}
    load = loaders.get(command_of(path.stem), load_recipe)
    assert load(path.stem).name == path.stem


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


@pytest.mark.parametrize("command", ["train", "family", "tune", "stream"])
@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_toml_comes_back_the_same(path: Path, command: str, tmp_path: Path) -> None:
    recipe = load_recipe(path.stem, ["train.seed=7", 'experiment="\u00fc \\" x"'])
    written = tmp_path / "again.toml"
    written.write_text(to_toml(recipe, command), encoding="utf-8")
    again = load_recipe(str(written))
    assert again == recipe
    assert again.digest() == recipe.digest()


def tables(text: str) -> set[str]:
    return {line.strip("[]").split(".")[0] for line in text.splitlines() if line.startswith("[")}


SHARED = {"train", "engine", "workers", "checkpoint"}
PROJECTOR = SHARED | {"data", "labels", "projector", "loss", "optimizer"}
REASONER = SHARED | {"records", "reasoner", "stages", "evaluation"}


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("emotion6", "train", PROJECTOR),
        ("emotion6", "family", PROJECTOR | {"family"}),
        ("emotion6", "tune", PROJECTOR | {"search"}),
        ("reasoning-offline", "train", REASONER),
        ("reasoning-offline", "family", REASONER | {"family"}),
        ("oasis-stream", "stream", {"records", "train", "workers", "checkpoint"}),
    ],
)
def test_toml_has_the_sections_that_a_command_uses(name: str, command: str, expected: set[str]) -> None:
    assert tables(to_toml(load_recipe(name), command)) == expected


def fields(section: type[Section], path: str = "") -> set[str]:
    """Dotted names of all fields below a section, those of its subsections included."""
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        found |= fields(kind, f"{path}{name}.") if is_section else {f"{path}{name}"}
    return found


def test_toml_has_every_field_also_those_that_are_not_set() -> None:
    text = to_toml(load_recipe("emotion6"))
    written, table = set(), ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif line:
            written.add(table + line.removeprefix("# ").split(" = ")[0])
    expected = {name for name in fields(Recipe) if name.split(".")[0] in PROJECTOR | {"name", "experiment"}}
    assert written == expected
    assert "# hidden_width = (not set)" in text
    stages = to_toml(load_recipe("reasoning-offline"))
    assert "[stages.finetune]" in stages
    assert "[stages.finetune.lora]\nrank = 16" in stages
    assert "# num_steps = (not set)" in stages


def test_a_validation_split_takes_the_place_of_a_carved_part() -> None:
    named = {"name": "x", "data": {"validation_fraction": 0, "validation_split": "val"}}
    assert parse_recipe({**named, "train": {"refit": True}}, source="x").has_validation()
    with pytest.raises(ConfigError, match=r"search.num_folds: folds are parts of train, so .* allows only 1"):
        parse_recipe({**named, "search": {"num_folds": 2}}, source="x")


def test_the_digest_ignores_where_and_follows_what() -> None:
    recipe = Recipe(name="x")
    elsewhere = recipe.model_copy(update={"experiment": "other"})
    patient = parse_recipe(
        {"name": "x", "workers": {"timeout_s": 9}, "train": {"log_every_steps": 3}, "checkpoint": {"every_minutes": 1}},
        source="x",
    )
    other = parse_recipe({"name": "x", "train": {"seed": 1}}, source="x")
    assert recipe.digest() == elsewhere.digest() == patient.digest() != other.digest()


def test_labels_of_ones_own_come_back_from_toml(tmp_path: Path) -> None:
    """Words, synonyms and maps of a taxonomy file stand in the recipe itself, so that no run needs the file again."""
    (tmp_path / "mood.toml").write_text('words = ["calm", "tense"]\nsynonyms = { calm = ["at ease"] }\n')
    recipe = parse_recipe({"name": "x", "labels": {"taxonomy": str(tmp_path / "mood.toml")}}, source="test")
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    (tmp_path / "mood.toml").unlink()
    assert load_recipe(path) == recipe
    assert recipe.labels.taxonomy is not None
    assert recipe.labels.taxonomy.synonyms == {"calm": ("at ease",)}
