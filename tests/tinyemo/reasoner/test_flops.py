"""Model FLOPs against what torch counts in a real step, and against 6 N."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_reasoners import LANGUAGE_MODELS, count_parameters, pixels, prompt, tiny_reasoner
from torch.utils.flop_counter import FlopCounterMode

from tinyemo.reasoner.flops import FlopModel, Work, flop_model
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.presets import preset_config
from tinyemo.reasoner.trained import select_trained

WORKS = st.builds(Work, *[st.integers(0, 10**6)] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
@pytest.mark.parametrize(("trains", "connector"), [
    ("connector", "linear"), ("connector", "mlp2x_gelu"), ("llm", "identity"), ("llm", "mlp2x_gelu"),
    ("last_layers", "identity"), ("last_layers", "linear"), ("lora", "mlp2x_gelu"),
])  # fmt: skip
def test_a_step_costs_what_torch_counts(llm: str, trains: str, connector: str) -> None:
    """Eager attention, whose products torch counts over all T x T pairs, as the convention does.

    With an identity connector gradients end at the lowest trained layer.
    """
    model = tiny_reasoner(llm, connector=connector).train()
    model.set_attn_implementation("eager")
    select_trained(model, trains, num_layers=2, rank=4, alpha=8)
    ids = torch.tensor([prompt(model, [1, 5], [6, 7, 8, 2]), prompt(model, [1, 9, 9], [6, 7, 2])])
    labels = ids.masked_fill(ids < 0, -100)
    labels[:, :-3] = -100
    images = pixels(model, 2)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=images, labels=labels).loss.backward()
    rows, tokens = ids.shape
    work = Work(tokens=rows * tokens, answer_tokens=6, images=2, context=rows * tokens**2)
    assert flop_model(model).of_training(work) == counter.get_total_flops()


def test_adapters_without_a_trained_connector_are_an_upper_bound() -> None:
    model = tiny_reasoner(connector="identity").train()
    model.set_attn_implementation("eager")
    select_trained(model, "lora", rank=4)
    ids = torch.tensor([prompt(model, [1, 5], [6, 2])])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels(model, 1), labels=ids.masked_fill(ids < 0, -100)).loss.backward()
    tokens = ids.shape[1]
    bound = flop_model(model).of_training(Work(tokens, tokens - 1 - 4, 1, tokens**2))
    assert counter.get_total_flops() <= bound <= 1.1 * counter.get_total_flops()


@cache
def connector_flops() -> FlopModel:
    model = tiny_reasoner()
    select_trained(model, "connector")
    return flop_model(model)


@settings(deadline=None, max_examples=20)
@given(first=WORKS, second=WORKS)
def test_work_adds_up(first: Work, second: Work) -> None:
    flops = connector_flops()
    assert flops.of_training(first + second) == flops.of_training(first) + flops.of_training(second)


def test_a_family_member_costs_six_n_in_full_training_and_four_with_a_frozen_language_model() -> None:
    with torch.device("meta"):
        model = Reasoner(preset_config("tinyemo-1.5b"))
    table, norms = 32_000 * 2048, (2 * 22 + 1) * 2048
    matrices = count_parameters(model.language_model) - 2 * table - norms
    a_token, an_answer = Work(tokens=1), Work(answer_tokens=1)
    select_trained(model, "llm")
    assert flop_model(model).of_training(a_token) == 6 * matrices
    assert flop_model(model).of_training(an_answer) == 6 * table
    # 12 L H T a token, summed over T tokens of a record.
    assert flop_model(model).of_training(Work(context=1)) == 12 * 22 * 2048
    select_trained(model, "connector")
    assert flop_model(model).of_training(a_token) == 4 * matrices
    assert flop_model(model).of_training(an_answer) == 4 * table
    # CLIP ViT-L/14 on 224 pixels: about 81 GFLOPs in the vendor's multiply-adds, twice that here.
    assert flop_model(model).tower == pytest.approx(162e9, rel=0.02)
