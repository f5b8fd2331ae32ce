"""Tables read by rows: against what transformers and gguf read whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict
from transformers.integrations.gguf.dequant import dequantize as dequantize_blocks

from orchestration.assets.catalogue import get_asset
from tinyemo.embedding_tables import open_gguf_table, open_safetensors_table, random_table
from tinyemo.errors import DataError
from tinyemo.label_embeddings import known_words

WIDTH = 64
VOCABULARY = [*pre_tokenizers.ByteLevel.alphabet(), "jo", "joy", "Ġjoy"]
MERGES = ["j o", "jo y", "Ġ joy"]
TEXTS = ["joy", " joy", "sadness", "an image expressing awe emotion", "self-esteem", "Ärger 12!", ""]


def write_gguf(path: Path, kind: GGMLQuantizationType) -> np.ndarray:
    """A GGUF file with a byte-level tokenizer; the table as it was before quantisation."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * len(VOCABULARY))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    table = np.random.default_rng(0).standard_normal((len(VOCABULARY), WIDTH)).astype(np.float32)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("token_embd.weight", quantize(table, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return table


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's GGUF file, from the mirror, the cache or its wheel."""
    [path] = get_asset("smollm2-135m").glob("*.gguf")
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_rows_are_those_of_the_whole_table(tmp_path: Path, kind: str):
    quantization = GGMLQuantizationType[kind]
    original = write_gguf(tmp_path / "t.gguf", quantization)
    table = open_gguf_table(tmp_path / "t.gguf")
    whole = dequantize(quantize(original, quantization), quantization).astype(np.float32)
    ids = [5, 0, 5, len(VOCABULARY) - 1]
    rows = table.rows(ids)
    assert (table.name, table.width, table.is_random) == ("tiny", WIDTH, False)
    assert rows.dtype == torch.float32
    assert np.array_equal(rows.numpy(), whole[ids])
    assert np.abs(rows.numpy() - original[ids]).max() < 0.5


def test_gguf_tokens_are_those_of_transformers(tmp_path: Path):
    write_gguf(tmp_path / "t.gguf", GGMLQuantizationType.F32)
    table = open_gguf_table(tmp_path / "t.gguf")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in TEXTS:
        assert table.tokenize(text) == reference.encode(text, add_special_tokens=False), text
    assert [VOCABULARY[token] for token in table.tokenize("joy joy")] == ["joy", "Ġjoy"]


def test_the_revision_tells_tables_apart(tmp_path: Path):
    for kind in ("F32", "F16"):
        write_gguf(tmp_path / f"{kind}.gguf", GGMLQuantizationType[kind])
    first, second = (open_gguf_table(tmp_path / f"{kind}.gguf") for kind in ("F32", "F16"))
    assert first.revision != second.revision
    assert first.revision == open_gguf_table(tmp_path / "F32.gguf").revision
    assert open_gguf_table(tmp_path / "F32.gguf", name="n", revision="r").revision == "r"


@pytest.mark.slow
def test_smollm2_equals_the_whole_table(smollm2: Path):
    """Rows against gguf's own reader; the model is never built."""
    table = open_gguf_table(smollm2)
    ids = sorted({token for word in known_words() for token in table.tokenize(word)})
    rows = table.rows(ids)
    assert (table.width, rows.shape) == (576, (len(ids), 576))
    [tensor] = [tensor for tensor in GGUFReader(smollm2).tensors if tensor.name == "token_embd.weight"]
    whole = dequantize(tensor.data, tensor.tensor_type)
    assert whole.shape == (49_152, 576)
    assert np.array_equal(rows.numpy(), whole[ids])


@pytest.mark.slow
def test_smollm2_agrees_with_the_tokenizer_and_table_of_transformers(smollm2: Path):
    """transformers builds the tokenizer and unpacks Q4_1 blocks by code of its own."""
    table = open_gguf_table(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name, local_files_only=True)
    for text in (*known_words(), *TEXTS, "a scene evoking joy to viewers"):
        assert table.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
    header = GgufHeader.from_file(str(smollm2))
    blocks = load_gguf_state_dict(header)["token_embd.weight"][...]
    whole = dequantize_blocks(blocks.reshape(-1), header.ggml_types["token_embd.weight"]).reshape(49_152, 576)
    ids = sorted({token for word in known_words() for token in table.tokenize(word)})
    assert torch.allclose(table.rows(ids), whole[ids], rtol=1e-6, atol=1e-7)


def write_folder(folder: Path, *, tensor_name: str, is_sharded: bool) -> torch.Tensor:
    """A model folder with a word-level tokenizer; its (5, WIDTH) table in bfloat16."""
    folder.mkdir(exist_ok=True)
    weights = {tensor_name: torch.randn(5, WIDTH).bfloat16(), "lm_head.bias": torch.zeros(5)}
    if is_sharded:
        for number, name in enumerate(weights):
            save_file({name: weights[name]}, folder / f"part-{number}.safetensors")
        weight_map = {name: f"part-{number}.safetensors" for number, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(weights, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "joy": 1, "awe": 2, "an": 3, "image": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return weights[tensor_name].float()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("tensor_name", ["model.embed_tokens.weight", "transformer.token_embeddings.weight"])
def test_a_safetensors_folder_is_read_by_rows(tmp_path: Path, tensor_name: str, is_sharded: bool):
    whole = write_folder(tmp_path / "llm", tensor_name=tensor_name, is_sharded=is_sharded)
    table = open_safetensors_table(tmp_path / "llm")
    assert (table.name, table.width, table.is_random) == ("llm", WIDTH, False)
    assert table.tokenize("an image joy never") == [3, 4, 1, 0]
    for ids in ([3, 1, 3], [1, 2, 3], [4], []):
        assert torch.equal(table.rows(ids), whole[ids])
    with pytest.raises(DataError, match="token 5 lies outside the table of llm, which has 5 rows"):
        table.rows([0, 5])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    write_folder(tmp_path / "llm", tensor_name="model.embed_tokens.weight", is_sharded=False)
    (tmp_path / "llm" / "tokenizer.json").unlink()
    (tmp_path / "llm" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no tokenizer that transformers can read"):
        open_safetensors_table(tmp_path / "llm")


def test_random_rows_depend_on_seed_and_token_alone():
    table, again, other = random_table(WIDTH, 3), random_table(WIDTH, 3), random_table(WIDTH, 4)
    ids = [7, 2**31, 7, 0]
    assert table.is_random
    assert table.revision == "seed-3" != other.revision
    assert torch.equal(table.rows(ids), again.rows(ids))
    assert torch.equal(table.rows(ids)[0], table.rows([7])[0])
    assert not torch.equal(table.rows([7]), other.rows([7]))
    assert not torch.equal(table.rows([7]), table.rows([8]))
    many = table.rows(list(range(2000)))
    assert float(many.mean()) == pytest.approx(0, abs=5e-4)
    assert float(many.std()) == pytest.approx(0.02, rel=0.01)
    cosines = torch.nn.functional.normalize(many, dim=-1) @ torch.nn.functional.normalize(many, dim=-1).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.7


def test_a_random_table_splits_at_spaces():
    plain = random_table(8, 0)
    first, second = plain.tokenize("awe joy")
    assert [second, first] == plain.tokenize("joy awe")
    assert first != second


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + b"\xff" * 40, b"not a model" * 100])
def test_a_file_that_is_no_gguf_is_one_clear_line(tmp_path: Path, content: bytes | None):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.gguf cannot be read as GGUF") as caught:
        open_gguf_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [30, 300, 4000])
def test_a_cut_gguf_is_one_clear_line(tmp_path: Path, size: int):
    write_gguf(tmp_path / "t.gguf", GGMLQuantizationType.F32)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "t.gguf").read_bytes()[:size])
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        open_gguf_table(tmp_path / "cut.gguf")


def test_a_gguf_cut_in_its_data_is_one_clear_line(tmp_path: Path):
    write_gguf(tmp_path / "t.gguf", GGMLQuantizationType.F32)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "t.gguf").read_bytes()[:-1000])
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        open_gguf_table(tmp_path / "cut.gguf")


def test_a_folder_without_weights_or_table_is_one_clear_line(tmp_path: Path):
    with pytest.raises(DataError, match="no readable safetensors weights"):
        open_safetensors_table(tmp_path)
    write_folder(tmp_path / "llm", tensor_name="embed.w", is_sharded=False)
    with pytest.raises(DataError, match=r"holds no input embeddings: it needs one of model\.embed_tokens\.weight"):
        open_safetensors_table(tmp_path / "llm")
