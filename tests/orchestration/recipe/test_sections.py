"""Stages in a recipe: published values, the learning-rate schedule, and all errors at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.recipe import load_recipe, parse_recipe
from orchestration.recipe.sections import PUBLISHED, StageConfig
from tinyemo.errors import ConfigError


@pytest.mark.parametrize(
    ("trains", "batch", "rate", "checkpointing"),
    [("connector", 256, 1e-3, False), ("llm", 128, 2e-5, True), ("lora", 128, 2e-4, True)],
)
def test_a_stage_that_says_nothing_has_the_published_values(
    trains: str, batch: int, rate: float, checkpointing: bool
) -> None:
    stage = StageConfig.model_validate({"trains": trains})
    assert (stage.global_batch_size, stage.learning_rate, stage.gradient_checkpointing) == (batch, rate, checkpointing)
    assert (stage.warm_up, stage.weight_decay, stage.num_epochs) == (0.03, 0.0, 1)
    assert (stage.lora.rank, stage.lora.alpha) == (128, 256)


def test_a_stage_keeps_what_it_says() -> None:
    stage = StageConfig.model_validate({"trains": "lora", "learning_rate": 1.0})
    assert (stage.learning_rate, stage.global_batch_size) == (1.0, PUBLISHED["lora"]["global_batch_size"])


@settings(deadline=None)
@given(num_steps=st.integers(1, 500), warm_up=st.floats(0, 0.9))
def test_the_rate_rises_to_its_highest_once_and_falls_to_nearly_nothing(num_steps: int, warm_up: float) -> None:
    stage = StageConfig.model_validate({"warm_up": warm_up})
    factors = [stage.rate_factor(step, num_steps) for step in range(num_steps)]
    top = factors.index(max(factors))
    assert factors[top] == pytest.approx(1)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    if math.ceil(warm_up * num_steps) < num_steps:
        assert stage.rate_factor(num_steps, num_steps) == pytest.approx(0, abs=1e-9)


def test_every_error_of_the_stages_comes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        """
[reasoner]
connector = "identity"
llm_revision = "main"
[stages.pretrain]
global_batch_size = 30
[stages.words]
trains = "lora"
objective = "align"
[stages.finetune]
trains = "lora"
lora = { rank = 0 }
learning_rate = -1
"""
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), ["workers.num_workers=3"])
    said = str(caught.value)
    for part in (
        "stages.finetune.lora.rank: input should be greater than 0, got 0",
        "stages.finetune.learning_rate: input should be greater than 0, got -1",
        "stages.pretrain.global_batch_size: 30 does not divide by micro_batch_size x workers.num_workers = 8 x 3 = 24",
        "stages.pretrain.trains: connector, but reasoner.connector identity has no parameters",
        "reasoner.llm_revision: 'main' is not a commit",
        'stages.words.objective: align needs trains = "connector" and images = true',
        "stages.words.micro_batch_size: align compares all records of a step, so global_batch_size 128 must be",
    ):
        assert part in said


def test_the_digest_follows_the_order_of_stages() -> None:
    pretrain, finetune = {"num_steps": 1}, {"num_steps": 2}
    one = parse_recipe({"name": "x", "stages": {"a": pretrain, "b": finetune}}, source="x")
    other = parse_recipe({"name": "x", "stages": {"b": finetune, "a": pretrain}}, source="x")
    assert one.digest() != other.digest()


def test_set_reaches_into_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[stages.pretrain]\n")
    recipe = load_recipe(str(path), ["stages.pretrain.num_steps=5", 'stages.pretrain.trains="llm"'])
    assert (recipe.stages["pretrain"].num_steps, recipe.stages["pretrain"].learning_rate) == (5, 2e-5)


def test_the_baseline_differs_from_the_model_in_its_images_alone() -> None:
    model, baseline = load_recipe("reasoning-offline"), load_recipe("reasoning-text-only")
    (stage,) = baseline.stages.values()
    seeing = {"images": True, "connector_learning_rate": model.stages["finetune"].connector_learning_rate}
    assert stage.model_copy(update=seeing) == model.stages["finetune"]
    for section in ("records", "reasoner", "train", "evaluation"):
        assert getattr(baseline, section) == getattr(model, section)
