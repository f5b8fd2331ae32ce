"""One model out of three: what it computes, what it keeps frozen, and that it survives a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_reasoners import IMAGE, LANGUAGE_MODELS, TOWERS, VOCABULARY, pixels, prompt, tiny_config, tiny_reasoner
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig

from tinyemo.conversation import IGNORED
from tinyemo.errors import ConfigError, DataError
from tinyemo.reasoner.config import ReasonerConfig
from tinyemo.reasoner.model import Connector, Reasoner, find_answer_positions, measure_answers

PAIRS = [(llm, "clip") for llm in LANGUAGE_MODELS] + [("llama", tower) for tower in TOWERS[1:]]


# What it computes


@pytest.mark.parametrize(("llm", "tower"), PAIRS)
def test_images_stand_where_their_placeholders_do(llm: str, tower: str) -> None:
    """Against a merge by hand: two rows, one with two images, one with one."""
    model = tiny_reasoner(llm, tower)
    per_image = model.config.num_image_tokens
    rows = [
        [5, *[IMAGE] * per_image, 6, *[IMAGE] * per_image, 7],
        [8, 9, 10, *[IMAGE] * per_image, *range(11, 11 + per_image)],
    ]
    assert len(rows[0]) == len(rows[1])
    images = pixels(model, 3)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(rows), pixel_values=images).logits
        table = model.get_input_embeddings().weight
        parts = [model.image_embeds(image[None])[0] for image in images]
        assert parts[0].shape == (per_image, 32)
        first = torch.cat([table[[5]], parts[0], table[[6]], parts[1], table[[7]]])
        second = torch.cat([table[[8, 9, 10]], parts[2], table[11 : 11 + per_image]])
        expected = model.language_model(inputs_embeds=torch.stack([first, second])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize(("placeholders", "images"), [(3, 1), (5, 1), (4, 2), (4, 0), (0, 1)])
def test_placeholders_and_images_must_fit(placeholders: int, images: int) -> None:
    model = tiny_reasoner()
    ids = torch.tensor([[1, *[IMAGE] * placeholders, 2]])
    message = f"{placeholders} image placeholders in input_ids, but {images} images of 4 patches need {4 * images}"
    with pytest.raises(DataError, match=message):
        model(input_ids=ids, pixel_values=pixels(model, images) if images else None)


@pytest.mark.parametrize(("kind", "count"), [("identity", 0), ("linear", 33 * 40), ("mlp2x_gelu", 33 * 40 + 41 * 40)])
def test_a_connector_is_what_its_name_says(kind: str, count: int) -> None:
    connector = Connector(kind, 32, 40)
    patches = torch.randn(2, 4, 32)
    assert sum(parameter.numel() for parameter in connector.parameters()) == count
    weights = list(connector.parameters())
    expected = patches
    if kind != "identity":
        expected = patches @ weights[0].T + weights[1]
    if kind == "mlp2x_gelu":
        expected = F.gelu(expected) @ weights[2].T + weights[3]
    torch.testing.assert_close(connector(patches), expected)


def test_a_coarser_grid_averages_patches_before_the_connector() -> None:
    patches = torch.arange(2 * 49 * 3, dtype=torch.float32).view(2, 49, 3)
    connector = Connector("identity", 3, 3, patch_grid=(7, 7), image_grid=1)
    torch.testing.assert_close(connector(patches), patches.mean(1, keepdim=True))
    rows = Connector("identity", 3, 3, patch_grid=(7, 7), image_grid=7)(patches)
    torch.testing.assert_close(rows, patches)
    model = Reasoner(ReasonerConfig(**{**tiny_config().to_dict(), "image_grid": 1}))
    assert model.config.num_image_tokens == 1
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    assert model(input_ids=ids, pixel_values=pixels(model, 1)).logits.shape[:2] == (1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connector": "resampler"}, "connector is 'resampler'"),
        ({"connector": "identity", "vision": {"patch_width": 48}}, "patches are 48 wide and the language model 32"),
        ({"vision_config": None}, "a clip tower with vision_config None"),
        ({"image_token_id": 3}, "image_token_id is 3"),
        ({"image_grid": 3}, "image_grid is 3: the encoder has 2 x 2 patches"),
        ({"llm_weights": "good"}, "llm_weights is 'good'"),
        ({"text_config": {"model_type": "gpt2"}}, "language model of type 'gpt2'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    fields = tiny_config().to_dict()
    if isinstance(change.get("vision"), dict):
        change = {**change, "vision": {**fields["vision"], **change["vision"]}}
    with pytest.raises(ConfigError, match=message):
        ReasonerConfig(**{**fields, **change})


# The loss


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 3), tokens=st.integers(2, 9))
def test_the_loss_is_cross_entropy_of_the_next_token(seed: int, rows: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens, 11, generator=generator)
    labels = torch.randint(0, 11, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.4] = IGNORED
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    positions = find_answer_positions(labels)
    assert int(positions.sum()) == int((labels[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(measure_answers(logits[positions], labels, positions).sum(), expected)


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_the_models_loss_is_that_of_its_logits(llm: str) -> None:
    model = tiny_reasoner(llm)
    ids = torch.tensor([prompt(model, [1, 5], [6, 7, 8, 2]), prompt(model, [1], [9, 10, 11, 12, 2])])
    labels = ids.clone()
    labels[:, :-3] = IGNORED
    labels[1, -2] = IGNORED
    images = pixels(model, 2)
    logits = model(input_ids=ids, pixel_values=images).logits
    found = model(input_ids=ids, pixel_values=images, labels=labels)
    shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(*shifted, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert int(found.num_answer_tokens) == len(found.token_nats) == 5
    torch.testing.assert_close(found.loss, expected / 5, rtol=1e-5, atol=1e-5)
    divided = model(input_ids=ids, pixel_values=images, labels=labels, num_items_in_batch=40)
    torch.testing.assert_close(divided.loss, expected / 40, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_packed_rows_are_as_if_alone(llm: str) -> None:
    model = tiny_reasoner(llm)
    records = [prompt(model, [1, 5], [6, 7, 2]), [1, 20, 21, 2], prompt(model, [1], [30, 31, 32, 2])]
    images = pixels(model, 2)
    per_record = [images[:1], None, images[1:]]
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([ids]), pixel_values=image).logits[0]
            for ids, image in zip(records, per_record, strict=True)
        ]
        ids = torch.tensor([[token for record in records for token in record]])
        positions = torch.cat([torch.arange(len(record)) for record in records])[None]
        packed = model(input_ids=ids, pixel_values=images, position_ids=positions).logits[0]
        running_on = model(input_ids=ids, pixel_values=images).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(running_on, packed, atol=1e-2)
    # No record learns the first token of the next, whatever its label says.
    learned = find_answer_positions(ids.clamp_min(0), positions)
    assert int(learned.sum()) == sum(len(record) - 1 for record in records)


def test_padding_changes_nothing() -> None:
    model = tiny_reasoner()
    short, long = prompt(model, [1], [6, 2]), prompt(model, [1, 4, 5], [6, 7, 2])
    images = pixels(model, 2)
    ids = torch.tensor([short + [0] * (len(long) - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (len(long) - len(short)), [1] * len(long)])
    with torch.no_grad():
        padded = model(input_ids=ids, pixel_values=images, attention_mask=mask).logits[0, : len(short)]
        alone = model(input_ids=torch.tensor([short]), pixel_values=images[:1]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


# Generation


@pytest.mark.parametrize(("llm", "tower"), PAIRS)
def test_generation_with_a_cache_is_step_by_step_greedy(llm: str, tower: str) -> None:
    model = tiny_reasoner(llm, tower)
    ids = torch.tensor([prompt(model, [1, 5], [6, 7])])
    images = pixels(model, 1)
    model.generation_config.eos_token_id = None
    found = model.generate(
        input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            best = model(input_ids=expected, pixel_values=images).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, best[:, None]], dim=1)
    assert found.tolist() == expected.tolist()
    assert len(set(found[0, -6:].tolist())) > 1


def test_generation_in_a_batch_is_that_of_each_row() -> None:
    """Padding on the left, as generation wants it."""
    model = tiny_reasoner()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    rows = [prompt(model, [1, 5, 9], [6, 7]), prompt(model, [1], [8])]
    images = pixels(model, 2)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(input_ids=ids, pixel_values=images, attention_mask=mask, **options)[:, -5:]
    for row, image, found in zip(rows, images, together, strict=True):
        alone = torch.tensor([row])
        expected = model.generate(
            input_ids=alone, pixel_values=image[None], attention_mask=torch.ones_like(alone), **options
        )
        assert found.tolist() == expected[0, -5:].tolist()


# Files


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_model_comes_back_bit_by_bit(llm: str, tower: str, tmp_path: Path) -> None:
    model = tiny_reasoner(llm, tower, connector="linear" if llm == "phi" else "mlp2x_gelu")
    ids = torch.tensor([prompt(model, [1, 5], [6, 7])])
    images = pixels(model, 1)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images).logits
        model.save_pretrained(tmp_path)
        again = Reasoner.from_pretrained(tmp_path)
        assert torch.equal(again(input_ids=ids, pixel_values=images).logits, expected)
    assert not again.training
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ReasonerConfig)
    assert config.encoder_spec == model.config.encoder_spec
    assert type(config.text_config) is type(model.config.text_config)
    assert config.connector == model.config.connector
    assert again.generation_config.eos_token_id == 2
    names = {name for name, _ in again.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )  # batch norm's statistics too


def test_a_model_is_saved_in_shards_and_in_its_type(tmp_path: Path) -> None:
    """A cast leaves the rotary frequencies in float32: or far tokens would turn by other angles than the export's."""
    model = tiny_reasoner("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = Reasoner.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    ids = torch.tensor([prompt(model, [1, 5], [6, 7])])
    images = pixels(model, 1)
    with torch.no_grad():
        found, expected = (m(input_ids=ids, pixel_values=images).logits for m in (again, model))
    assert torch.equal(found, expected)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


# Training


@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_never_moves(tower: str) -> None:
    model = tiny_reasoner("llama", tower).train()
    assert model.language_model.training
    assert not any(module.training for module in model.vision_tower.modules())
    before = {name: value.clone() for name, value in model.vision_tower.state_dict().items()}
    ids = torch.tensor([prompt(model, [1], [6, 7, 2])])
    model(input_ids=ids, pixel_values=pixels(model, 1), labels=ids.clamp_min(IGNORED)).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in model.connector.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.vision_tower.state_dict().items())


def test_a_batch_without_images_still_reaches_every_trained_parameter() -> None:
    model = tiny_reasoner().train()
    ids = torch.tensor([[1, 5, 6, 2]])
    with_zero = model(input_ids=ids, labels=ids)
    with_zero.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.connector.parameters())
    torch.testing.assert_close(with_zero.loss, model.eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(llm: str) -> None:
    model = tiny_reasoner(llm).train()
    ids = torch.tensor([prompt(model, [1, 5], [6, 7, 2])])
    images = pixels(model, 1)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        calls.clear()
        model(input_ids=ids, pixel_values=images, labels=ids.clamp_min(IGNORED)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    calls: list[int] = []
    linear = next(module for module in model.decoder_layers()[0].modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients()
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) == 2  # computed again in the backward pass
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=0)


def test_ids_outside_of_the_vocabulary_are_never_embedded() -> None:
    model = tiny_reasoner()
    assert not 0 <= model.config.image_token_id < VOCABULARY
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
