"""What a stage trains, and that adapters leave an ordinary model behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_reasoners import LANGUAGE_MODELS, pixels, prompt, tiny_reasoner

from tinyemo.errors import ConfigError
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.trained import (
    adapted_layers,
    has_adapters,
    merge_adapters,
    parameter_groups,
    select_trained,
)

ADAPTED = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "openelm": {"qkv_proj", "out_proj", "proj_1", "proj_2"},
}


def trained(model: Reasoner) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_steps(model: Reasoner, num_steps: int = 3) -> list[float]:
    groups = parameter_groups(model, learning_rate=1e-2, connector_learning_rate=2e-2)
    optimizer = torch.optim.AdamW(groups)
    ids = torch.tensor([prompt(model, [1, 5], [6, 7, 2])])
    labels = ids.masked_fill(ids < 0, -100)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixels(model, 1), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
@pytest.mark.parametrize("trains", ["connector", "llm", "last_layers", "lora"])
def test_a_stage_moves_what_it_trains_and_nothing_else(llm: str, trains: str) -> None:
    model = tiny_reasoner(llm).train()
    select_trained(model, trains, num_layers=2, rank=4, alpha=8)
    moving = trained(model)
    connector = {name for name, _ in model.named_parameters() if name.startswith("connector.")}
    language = {name for name, _ in model.named_parameters() if name.startswith("language_model.")}
    last = {name for name in language if ".layers.1." in name or ".layers.2." in name}
    adapters = {name for name in language if ".lora_" in name}
    expected = {"connector": set(), "llm": language, "last_layers": last, "lora": adapters}[trains]
    assert moving == connector | expected
    if trains == "lora":
        assert {name.split(".")[-4] for name in adapters} == ADAPTED[llm]
        assert len(adapters) == 2 * len(ADAPTED[llm]) * 3
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = take_steps(model)
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # Neither the bias of a key projection nor a token that was not read need move: whole parameters are compared.
    assert moved <= moving
    assert moving - moved <= {name for name in moving if name.endswith("k_proj.bias")}


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_merged_adapters_give_the_same_logits_in_an_ordinary_model(llm: str, tmp_path: Path) -> None:
    model = tiny_reasoner(llm)
    names = trained(model) | {name for name, _ in model.named_parameters()}
    ids, images = torch.tensor([prompt(model, [1, 5], [6, 7])]), pixels(model, 1)
    with torch.no_grad():
        first = model(input_ids=ids, pixel_values=images).logits
    select_trained(model, "lora", rank=4, alpha=8)
    assert has_adapters(model)
    with torch.no_grad():  # B is zero at first
        torch.testing.assert_close(model(input_ids=ids, pixel_values=images).logits, first, rtol=0, atol=0)
    take_steps(model.train())
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images).logits
    assert not torch.allclose(expected, first, atol=1e-2)
    merge_adapters(model)
    assert not has_adapters(model)
    assert {name for name, _ in model.named_parameters()} == names
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = Reasoner.from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids=ids, pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
    merge_adapters(model)  # nothing to do
    select_trained(model, "lora", rank=2, alpha=2)  # a second stage


def test_adapters_start_where_their_seed_says_and_come_back_from_a_state_dict() -> None:
    models = [tiny_reasoner(), tiny_reasoner(), tiny_reasoner()]
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.manual_seed(number)  # the process's own generator has no say
        select_trained(model, "lora", rank=4, alpha=8, seed=seed)
    first, second, third = (
        {name: value.clone() for name, value in model.state_dict().items() if "lora_A" in name} for model in models
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(torch.equal(value, third[name]) for name, value in first.items())
    take_steps(models[0].train())
    models[1].train().load_state_dict(models[0].state_dict())
    assert take_steps(models[1], 1) == take_steps(models[0], 1)


def test_dropout_of_adapters_acts_in_training_alone() -> None:
    model = tiny_reasoner()
    select_trained(model, "lora", rank=4, alpha=8, dropout=0.5)
    take_steps(model.eval())
    ids, images = torch.tensor([prompt(model, [1, 5], [6, 7])]), pixels(model, 1)
    with torch.no_grad():
        evaluated = [model(input_ids=ids, pixel_values=images).logits for _ in range(2)]
        model.train()
        trained_twice = [model(input_ids=ids, pixel_values=images).logits for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained_twice)


def test_the_connector_has_its_own_rate() -> None:
    model = tiny_reasoner()
    select_trained(model, "llm")
    groups = parameter_groups(model, learning_rate=1e-4, connector_learning_rate=1e-3)
    assert [(group["name"], group["lr"]) for group in groups] == [("connector", 1e-3), ("language_model", 1e-4)]
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert {group["lr"] for group in parameter_groups(model, learning_rate=1e-4)} == {1e-4}


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny_reasoner()
    with pytest.raises(ConfigError, match="last_layers of 4 layers: the language model has 3"):
        select_trained(model, "last_layers", num_layers=4)
    with pytest.raises(ConfigError, match="unknown stage 'tower'"):
        select_trained(model, "tower")
    select_trained(model, "lora", rank=2)
    with pytest.raises(ConfigError, match="has adapters already"):
        select_trained(model, "lora", rank=2)
    bare = tiny_reasoner(connector="identity")
    select_trained(bare, "connector")
    with pytest.raises(ConfigError, match="nothing is trained"):
        parameter_groups(bare, learning_rate=1e-3)


def test_the_output_layer_gets_no_adapter() -> None:
    for llm in LANGUAGE_MODELS:
        assert not any("lm_head" in name for name in adapted_layers(tiny_reasoner(llm)))
