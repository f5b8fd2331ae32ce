"""Where a reasoning model's language model comes from: a folder, S3 or the hub's cache; always the same weights."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
from tiny_reasoners import text_config
from transformers import AutoModelForCausalLM

from orchestration.assets.models import describe_sources, fetch_llm
from orchestration.recipe import Recipe, parse_recipe
from orchestration.services import storage
from tinyemo.errors import AssetError, ConfigError, StorageError
from tinyemo.reasoner.loading import load_language_model

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model of a few thousand numbers, as its owner would store it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text_config("llama")).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own, and a hub that cannot be reached but may have been."""
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def recipe(llm: str, **fields: object) -> Recipe:
    source = {"llm": llm, "vision_tower": "random:clip-vit-large-patch14", **fields}
    return parse_recipe({"name": "x", "reasoner": source}, source="test")


def assert_same_weights(found: Path, folder: Path) -> None:
    ours, theirs = (load_language_model(path, torch.float32)[0].state_dict() for path in (found, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_in_s3_is_fetched_once_and_is_the_one_that_was_stored(
    s3_root: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(f"{s3_root}/llm")
    with pytest.raises(StorageError, match="llm"):
        fetch_llm(chosen)
    assert not list(cache.rglob("*.safetensors")), "nothing half fetched stays"
    storage.upload_folder(folder, f"{s3_root}/llm")
    found = fetch_llm(chosen)
    assert_same_weights(found, folder)
    assert describe_sources(chosen).llm_revision == describe_sources(recipe(str(folder))).llm_revision
    with monkeypatch.context() as patch:
        patch.setattr(storage, "download_folder", lambda *_: pytest.fail("it was fetched already"))
        assert fetch_llm(chosen) == found
    # Other weights under the same address are another model.
    (folder / "more.json").write_text("{}")
    storage.upload_folder(folder, f"{s3_root}/llm")
    assert fetch_llm(chosen) != found


def test_a_model_of_the_hub_is_pinned_and_comes_from_its_cache(folder: Path) -> None:
    stored = Path(hub.HF_HUB_CACHE) / "models--owner--name" / "snapshots" / COMMIT
    stored.parent.mkdir(parents=True)
    folder.rename(stored)
    chosen = recipe("owner/name", llm_revision=COMMIT)
    assert_same_weights(fetch_llm(chosen), stored)
    sources = describe_sources(chosen)
    assert (sources.llm_name, sources.llm_revision, sources.llm_weights) == ("owner/name", COMMIT, "real")
    with pytest.raises(AssetError, match=f"the hub does not yield owner/name at {'f' * 12}") as caught:
        fetch_llm(recipe("owner/name", llm_revision="f" * 40))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_pinned_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a name on the hub needs reasoner\.llm_revision"):
        fetch_llm(recipe("owner/name"))
    with pytest.raises(AssetError, match="is not on this node"):
        fetch_llm(recipe(str(tmp_path / "none")))
