"""Recipes of a family's sizes: weights within reach, overrides, and all errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.jobs.family import recipe_for_size
from orchestration.recipe import FamilyConfig, parse_recipe, recipes_of_sizes
from tinyemo.errors import AssetError, ConfigError


def test_a_size_out_of_reach_is_random_where_the_recipe_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    content = {"name": "sizes", "stages": {"pretrain": {}}, "records": {"tokenizer": "a"}}
    overrides = {"tinyemo-1.5b": ["records.tokenizer=b", "stages.pretrain.num_steps=3"]}
    family = {"random_weights": True, "overrides": overrides}
    allowed = parse_recipe({**content, "family": family}, source="test")
    children = {size: recipe_for_size(allowed, size) for size in ("smollm2-135m", "tinyemo-700m", "tinyemo-1.5b")}
    assert [child.reasoner.llm for child in children.values()] == [
        "smollm2-135m", "random:tinyemo-700m", "random:tinyemo-1.5b",
    ]  # fmt: skip
    assert [child.records.tokenizer for child in children.values()] == ["a", "a", "b"]
    assert [child.stages["pretrain"].num_steps for child in children.values()] == [None, None, 3]
    assert children["tinyemo-700m"].name == "sizes-tinyemo-700m"
    with pytest.raises(AssetError, match="no source of the weights of tinyemo-700m answers"):
        recipe_for_size(parse_recipe(content, source="test"), "tinyemo-700m")
    (tmp_path / "llms" / "tinyemo-700m").mkdir(parents=True)
    folder = tmp_path / "llms" / "tinyemo-700m"
    assert recipe_for_size(allowed, "tinyemo-700m").reasoner.llm == str(folder)
    assert recipe_for_size(allowed, "tinyemo-700m").records.tokenizer == "a"
    (folder / "tokenizer.json").touch()
    assert recipe_for_size(allowed, "tinyemo-700m").records.tokenizer == str(folder)


def test_what_is_wrong_with_a_sizes_overrides_comes_at_once() -> None:
    content = {"name": "sizes", "stages": {"pretrain": {}}}
    with pytest.raises(ConfigError, match=r"family\.overrides: 'huge' is not one of smollm2-135m"):
        parse_recipe({**content, "family": {"overrides": {"huge": ["train.seed=1"]}}}, source="test")
    wrong = ["records.tokeniser=a", "train.seed", "stages.pretrain.num_steps=none"]
    chosen = parse_recipe({**content, "family": {"overrides": {"smollm2-135m": wrong}}}, source="test")
    with pytest.raises(ConfigError) as caught:
        recipe_for_size(chosen, "smollm2-135m")
    said = str(caught.value)
    assert said.startswith("sizes, size smollm2-135m: 3 errors")
    assert "family.overrides.smollm2-135m: train.seed: needs the form key=value" in said
    assert "records.tokeniser" in said
    assert "stages.pretrain.num_steps" in said


def test_what_is_wrong_with_several_sizes_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYEMO_MIRROR", raising=False)
    overrides = {"smollm2-135m": ["records.tokeniser=a", "train.seed"]}
    family = {"sizes": ["smollm2-135m", "tinyemo-700m"], "overrides": overrides}
    chosen = parse_recipe({"name": "sizes", "stages": {"pretrain": {}}, "family": family}, source="test")
    with pytest.raises(ConfigError) as caught:
        recipes_of_sizes(chosen, recipe_for_size)
    first, *others = str(caught.value).splitlines()
    assert first == "sizes: 2 of 2 sizes cannot run:"
    assert all(line.startswith("  ") for line in others)
    said = "\n".join(others)
    for expected in ("records.tokeniser", "train.seed: needs the form", "no source of the weights of tinyemo-700m"):
        assert expected in said
    with pytest.raises(AssetError, match="no source of the weights of tinyemo-700m"):
        recipes_of_sizes(chosen.model_copy(update={"family": FamilyConfig(sizes=("tinyemo-700m",))}), recipe_for_size)
