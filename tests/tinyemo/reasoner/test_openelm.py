"""Our OpenELM against the paper's table, its published names and a forward pass written from the facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_reasoners import text_config
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tinyemo.errors import ConfigError, DataError
from tinyemo.reasoner.loading import load_language_model
from tinyemo.reasoner.openelm import OpenELMConfig, OpenELMForCausalLM, round_to_multiple

PUBLISHED = {
    # layers, H, query heads, FFN widths, parameters
    "270M": (
        16, 1280, [12] * 5 + [16] * 7 + [20] * 4,
        [768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120],
        271_527_168,
    ),
    "450M": (
        20, 1536, [12] * 3 + [16] * 7 + [20] * 6 + [24] * 4,
        [768, 1024, 1280, 1536, 1792, 2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096, 4352, 4608, 5120, 5376, 5632,
         5888, 6144],
        457_179_136,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_layers_widen_as_the_paper_says(size: str) -> None:
    layers, width, heads, ffn, count = PUBLISHED[size]
    config = OpenELMConfig(model_dim=width, num_transformer_layers=layers)
    assert config.num_query_heads == heads
    assert config.num_kv_heads == [number // 4 for number in heads]
    assert config.ffn_dims == ffn
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_rounding_never_takes_more_than_a_tenth() -> None:
    for value in range(1, 3000):
        found = round_to_multiple(value, 256)
        assert found % 256 == 0
        assert found >= 0.9 * value
        assert abs(found - value) <= 128 or found == 256 or round(value / 256) * 256 < 0.9 * value


def reference(weights: dict[str, Tensor], config: OpenELMConfig, ids: Tensor) -> Tensor:
    """Logits of one row, (T, V), written from the paper's facts; in float64."""
    weights = {name: value.double() for name, value in weights.items()}

    def norm(values: Tensor, name: str) -> Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def turn(values: Tensor) -> Tensor:  # (heads, T, d)
        half = values.shape[-1] // 2
        angles = torch.outer(torch.arange(len(ids)).double(), 10_000 ** (-torch.arange(half).double() / half))
        as_complex = torch.complex(values[..., :half], values[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((as_complex.real, as_complex.imag), dim=-1)

    hidden = weights["transformer.token_embeddings.weight"][ids]
    for layer in range(config.num_transformer_layers):
        here = f"transformer.layers.{layer}"
        num_heads, num_kv = config.num_query_heads[layer], config.num_kv_heads[layer]
        values = norm(hidden, f"{here}.attn_norm.weight") @ weights[f"{here}.attn.qkv_proj.weight"].T
        heads = values.view(len(ids), -1, config.head_dim).transpose(0, 1)
        query = turn(norm(heads[:num_heads], f"{here}.attn.q_norm.weight"))
        key = turn(norm(heads[num_heads : num_heads + num_kv], f"{here}.attn.k_norm.weight"))
        value = heads[num_heads + num_kv :]
        out = []
        for head in range(num_heads):
            group = head * num_kv // num_heads
            scores = query[head] @ key[group].T / config.head_dim**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ value[group])
        hidden = hidden + torch.cat(out, dim=-1) @ weights[f"{here}.attn.out_proj.weight"].T
        gate, up = (norm(hidden, f"{here}.ffn_norm.weight") @ weights[f"{here}.ffn.proj_1.weight"].T).chunk(2, -1)
        hidden = hidden + (F.silu(gate) * up) @ weights[f"{here}.ffn.proj_2.weight"].T
    return norm(hidden, "transformer.norm.weight") @ weights["transformer.token_embeddings.weight"].T


@pytest.fixture
def published_folder(tmp_path: Path) -> Path:
    """A tiny model in the form in which the published ones lie: names, lists in config.json, remote code's entry."""
    config = text_config("openelm")
    torch.manual_seed(3)
    model = OpenELMForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    weights = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = {
        "model_type": "openelm", "auto_map": {"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
        "activation_fn_name": "swish", "bos_token_id": 1, "eos_token_id": 2, "ffn_dim_divisor": 8,
        "ffn_multipliers": config.ffn_multipliers, "ffn_with_glu": True, "head_dim": 8, "initializer_range": 0.02,
        "max_context_length": 2048, "model_dim": 32, "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True, "num_gqa_groups": 2, "num_kv_heads": config.num_kv_heads,
        "num_query_heads": config.num_query_heads, "num_transformer_layers": 3, "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000, "rope_max_length": 4096, "share_input_output_layers": True, "use_cache": True,
        "vocab_size": 96,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "modeling_openelm.py").write_text("raise SystemExit('the folder\\'s own code ran')")
    return tmp_path


def test_published_names_load_and_compute_what_the_paper_says(published_folder: Path) -> None:
    model, weights = load_language_model(published_folder, torch.float32)
    assert isinstance(model, OpenELMForCausalLM)
    assert weights == "real"
    ids = torch.randint(0, 96, (11,), generator=torch.Generator().manual_seed(0))
    expected = reference(load_file(published_folder / "model.safetensors"), model.config, ids)
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            found = model(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.transformer.token_embeddings.weight
    names = {"transformer.token_embeddings.weight", "transformer.norm.weight"} | {
        f"transformer.layers.{layer}.{part}.weight"
        for layer in range(3)
        for part in (
            "attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj", "attn_norm", "ffn.proj_1", "ffn.proj_2",
            "ffn_norm",
        )
    }  # fmt: skip
    assert {name for name, _ in model.named_parameters()} == names


def test_a_missing_weight_is_refused(published_folder: Path) -> None:
    weights = load_file(published_folder / "model.safetensors")
    del weights["transformer.layers.1.attn.q_norm.weight"]
    save_file(weights, published_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights .* transformer\.layers\.1\.attn\.q_norm\.weight"):
        load_language_model(published_folder, torch.float32)


def test_openelm_writes_its_names_and_reads_them_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text_config("openelm")).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert AutoConfig.from_pretrained(tmp_path).num_query_heads == model.config.num_query_heads
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_heads": [2, 4]}, "num_query_heads has 2 values for 3 layers"),
        ({"normalize_qk_projections": False}, "normalize_qk_projections is False"),
        ({"activation_fn_name": "gelu"}, "activation_fn_name is 'gelu'"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenELMConfig(num_transformer_layers=3, **change)
