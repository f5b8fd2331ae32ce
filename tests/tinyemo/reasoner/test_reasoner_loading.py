"""Parts out of files: SmolLM2's real weights, folders as transformers writes them, seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from tiny_reasoners import LANGUAGE_MODELS, pixels, prompt, text_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict

from orchestration.assets.catalogue import find_asset, get_asset
from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.embedding_tables import open_gguf_table
from tinyemo.encoder_folders import WEIGHTS_MARK, describe_encoder
from tinyemo.encoders import EFFICIENTNET_FILE
from tinyemo.errors import ConfigError, DataError
from tinyemo.reasoner.loading import build_reasoner, load_gguf, load_language_model
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.presets import text_preset
from tinyemo.reasoner.sources import find_gguf
from tinyemo.tokenizer_files import open_tokenizer
from tinyemo.vision import load_encoder

# SmolLM2's real weights


@pytest.fixture(scope="module")
def gguf() -> Path:
    return get_asset("smollm2-135m") / find_asset("smollm2-135m").files[0]


@pytest.fixture(scope="module")
def dequantised(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file as a folder: reading the file takes seconds, the folder less than one."""
    folder = tmp_path_factory.mktemp("smollm2")
    load_gguf(gguf, torch.float32).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=open_tokenizer(gguf)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(dequantised: Path) -> PreTrainedModel:
    model, weights = load_language_model(dequantised, torch.float32)
    assert weights == "real"
    return model


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(gguf: Path, smollm2: PreTrainedModel) -> None:
    tokenizer = open_tokenizer(gguf)
    ids = torch.tensor([tokenizer.encode("The capital of France is", add_special_tokens=False).ids])
    mask = torch.ones_like(ids)
    written = smollm2.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids.shape[1] :].tolist())


def test_smollm2s_rows_are_those_of_the_embedding_table(gguf: Path, smollm2: PreTrainedModel) -> None:
    table = open_gguf_table(gguf)
    ids = list(range(0, smollm2.config.vocab_size, 97))
    assert torch.equal(smollm2.get_input_embeddings().weight[ids], table.rows(ids))
    assert smollm2.get_output_embeddings().weight is smollm2.get_input_embeddings().weight


def test_smollm2s_matrices_are_the_files_with_query_and_key_rows_put_back(gguf: Path, smollm2: PreTrainedModel) -> None:
    """llama.cpp stores the two halves of a head's rotary pairs side by side; transformers wants half after half."""
    header = GgufHeader.from_file(str(gguf))
    tensors, infos = load_gguf_state_dict(header), {info.name: info for info in header.tensors}

    def stored(name: str) -> torch.Tensor:
        info = infos[f"blk.7.{name}.weight"]
        blocks = tensors[info.name].data.reshape(*info.shape[:-1], -1)
        values = dequantize(np.asarray(blocks), GGMLQuantizationType(info.ggml_type))
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(info.shape)

    layer = smollm2.model.layers[7]
    for name, heads in (("q", 9), ("k", 3)):
        rows = stored(f"attn_{name}").view(heads, 32, 2, 576).transpose(1, 2).reshape(heads * 64, 576)
        assert torch.equal(getattr(layer.self_attn, f"{name}_proj").weight, rows)
    assert torch.equal(layer.self_attn.v_proj.weight, stored("attn_v"))
    assert torch.equal(layer.mlp.down_proj.weight, stored("ffn_down"))
    assert torch.equal(layer.input_layernorm.weight, stored("attn_norm"))


def test_smollm2s_configuration_is_the_presets(smollm2: PreTrainedModel) -> None:
    found, preset = smollm2.config, text_preset("smollm2-135m")
    for field in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "max_position_embeddings",
        "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        assert getattr(found, field) == getattr(preset, field), field
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134_515_008


def test_dequantised_weights_are_an_ordinary_folder(gguf: Path, dequantised: Path) -> None:
    assert "quantization_config" not in json.loads((dequantised / "config.json").read_text())
    text = "An image, <b>12</b> Ärger!"
    expected = open_tokenizer(gguf).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(dequantised).encode(text, add_special_tokens=False) == expected


def test_a_reasoner_reads_photographs_with_real_weights(smollm2: PreTrainedModel, dequantised: Path) -> None:
    folder = get_asset("efficientnet-lite0")
    model = build_reasoner(dequantised, folder, template="chatml", llm_name="SmolLM2", vision_name="efficientnet-lite0")
    config = model.config
    assert (config.llm_weights, config.vision_weights, config.llm_name) == ("real", "real", "SmolLM2")
    assert (config.num_image_tokens, config.template) == (49, "chatml")
    assert not model.training
    spec = describe_encoder(folder, name="efficientnet-lite0")
    assert config.encoder_spec == spec
    raw = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = load_encoder(folder, spec).encode(raw)
    mean, std = torch.tensor(spec.preprocessing.mean), torch.tensor(spec.preprocessing.std)
    found = model.vision_tower(((raw.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous())
    assert found.patches.shape == (2, 49, 1280)
    # The encoder alone runs with fused batch norms, which round otherwise.
    torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-4)
    weights = model.language_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in smollm2.state_dict().items())


# Folders


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_taken_from_their_folders_as_they_are(
    llm: str, dtype: torch.dtype, siglip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    language_model = AutoModelForCausalLM.from_config(text_config(llm))
    language_model.save_pretrained(tmp_path / "my-llm")
    model = build_reasoner(tmp_path / "my-llm", siglip, connector="linear", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for part, source in (
        (model.language_model, language_model),
        (model.vision_tower.network, SiglipVisionModel.from_pretrained(siglip)),
    ):
        expected = source.state_dict()
        assert all(torch.equal(value, expected[name].to(dtype)) for name, value in part.state_dict().items())
    assert (model.config.llm_name, model.config.llm_weights, model.config.vision_weights) == ("my-llm", "real", "real")
    assert model.config.encoder_spec.info.revision.startswith("sha256-")
    # The connector is drawn once, with the seed.
    again = build_reasoner(tmp_path / "my-llm", siglip, connector="linear", dtype=dtype)
    other = build_reasoner(tmp_path / "my-llm", siglip, connector="linear", dtype=dtype, seed=1)
    first, second, third = (m.connector.state_dict()["layers.0.weight"] for m in (model, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    # And the whole goes through a file.
    model.save_pretrained(tmp_path / "export")
    reloaded = Reasoner.from_pretrained(tmp_path / "export", dtype=dtype)
    ids, images = torch.tensor([prompt(model, [1, 5], [6, 7])]), pixels(model, 1)
    with torch.no_grad():
        found, expected_logits = (m(input_ids=ids, pixel_values=images).logits for m in (reloaded, model))
    assert torch.equal(found, expected_logits)


def test_random_folders_are_tagged_as_such(siglip: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(text_config("llama")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), WEIGHTS_MARK: "random"}))
    assert build_reasoner(tmp_path, siglip).config.llm_weights == "random"


def test_a_seed_draws_the_same_weights_in_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyemo.reasoner.loading.text_preset", lambda name: text_config("llama"))
    state = torch.random.get_rng_state()
    models = [
        build_reasoner("random:tinyemo-1.5b", "random:efficientnet-lite0", dtype=torch.bfloat16, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    digests = [
        hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())).hexdigest()
        for model in models
    ]
    assert digests[0] == digests[1] != digests[2]
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.bfloat16}
    config = models[0].config
    assert (config.llm_weights, config.vision_weights) == ("random", "random")
    assert config.llm_name == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert isinstance(models[0].vision_tower.network, EfficientNetLite0)


def test_what_is_no_language_model_is_one_line(siglip: Path, tmp_path: Path) -> None:
    for source, message in (
        (tmp_path, "config.json cannot be read"),
        (siglip, "holds no language model that can be loaded"),
        (tmp_path / EFFICIENTNET_FILE, "config.json cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_language_model(source, torch.float32)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    with pytest.raises(DataError, match="holds no language model that can be loaded"):
        load_language_model(tmp_path, torch.float32)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match="holds 2 GGUF files: name one"):
        load_language_model(tmp_path, torch.float32)
    with pytest.raises(ConfigError, match="unknown model size"):
        load_language_model("random:gpt5", torch.float32)
