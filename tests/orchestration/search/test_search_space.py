"""A search space is checked whole before anything starts, and comes back from TOML as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from orchestration.recipe import Recipe, load_recipe, parse_recipe, to_toml
from orchestration.search.space import KNOBS, Distribution
from orchestration.search.trials import first_point, trial_recipe
from tinyemo.errors import ConfigError


def recipe(**space: dict[str, object]) -> Recipe:
    return parse_recipe({"name": "x", "search": {"space": space}}, source="test")


def test_the_shipped_space_holds_every_knob_that_was_asked_for() -> None:
    knobs = load_recipe("search-emotion6").search.knobs()
    assert set(KNOBS) - {"optimizer.pct_start"} == set(knobs)


def test_every_knob_is_a_field_of_a_recipe() -> None:
    content = Recipe(name="x").model_dump()
    for knob in KNOBS:
        section, field = knob.split(".")
        assert field in content[section], knob


@pytest.mark.parametrize(
    ("distribution", "problem"),
    [
        ({}, "needs choices"),
        ({"low": 1}, "needs choices"),
        ({"low": 2, "high": 1}, "low below high"),
        ({"low": 0, "high": 1, "log": True}, "above 0 on a log scale"),
        ({"low": 0.1, "high": 1, "log": True, "step": 0.1}, "not both"),
        ({"choices": [0.1], "low": 0}, "must be left out"),
        ({"choices": [0.1, 0.1]}, "twice"),
        ({"choices": []}, "at least 1 item"),
    ],
)
def test_a_distribution_that_is_none_is_an_error(distribution: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        recipe(loss={"temperature": distribution})
    assert "search.space.loss.temperature" in str(caught.value)


def test_all_knobs_that_cannot_be_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(
            loss={"nme": {"choices": ["a"]}, "name": {"low": 0, "high": 1}},
            workers={"num_workers": {"choices": [1, 2]}},
            train={"global_batch_size": {"low": 16.5, "high": 32}},
        )
    said = str(caught.value)
    assert "search.space.loss.nme: is no knob" in said
    assert "search.space.workers.num_workers: is no knob" in said
    assert "search.space.loss.name: needs choices" in said
    assert "search.space.train.global_batch_size: needs whole numbers" in said


def test_distributions_become_optunas() -> None:
    space = recipe(
        loss={"name": {"choices": ["cosine"]}, "temperature": {"low": 0.02, "high": 1, "log": True}},
        train={"global_batch_size": {"low": 16, "high": 64, "step": 16}},
    )
    assert space.search.to_optuna() == {
        "loss.name": CategoricalDistribution(("cosine",)),
        "loss.temperature": FloatDistribution(0.02, 1.0, log=True),
        "train.global_batch_size": IntDistribution(16, 64, step=16),
    }


def test_a_space_comes_back_from_toml(tmp_path: Path) -> None:
    chosen = load_recipe("search-emotion6", ["search.space.loss.margin={choices=[0.1, 0.2]}"])
    path = tmp_path / "again.toml"
    path.write_text(to_toml(chosen))
    assert load_recipe(str(path)) == chosen
    assert chosen.search.knobs()["loss.margin"] == Distribution(choices=(0.1, 0.2))


def test_a_trials_recipe_is_one_that_searches_nothing(tmp_path: Path) -> None:
    chosen = load_recipe("search-emotion6")
    trial = trial_recipe(chosen, {"loss.name": "prototype", "optimizer.max_lr": 0.01}, name="winner", seed=3)
    path = tmp_path / "winner.toml"
    path.write_text(to_toml(trial))
    again = load_recipe(str(path))
    assert again == trial
    assert (again.loss.name, again.optimizer.max_lr, again.train.seed) == ("prototype", 0.01, 3)
    assert again.search.knobs() == {}


def test_values_that_do_not_go_together_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"does not divide by workers\.num_workers"):
        trial_recipe(Recipe(name="x"), {"train.global_batch_size": 33})


def test_the_first_trial_is_the_recipe_itself_where_the_space_holds_it() -> None:
    published = first_point(load_recipe("search-emotion6"))
    assert published is not None
    assert (published["loss.name"], published["loss.temperature"], published["projector.hidden_width"]) == (
        "nt_xent",
        0.07,
        576,
    )
    assert first_point(recipe(loss={"temperature": {"low": 0.1, "high": 1.0}})) is None
    assert first_point(recipe(projector={"dropout": {"low": 0.1, "high": 0.5, "step": 0.1}})) == {
        "projector.dropout": 0.2
    }
