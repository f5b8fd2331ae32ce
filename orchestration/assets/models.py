"""What the parts of a recipe's reasoning model are and where their files lie; real ones are described without torch."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.assets.catalogue import CATALOGUE, cache_folder, find_asset, get_asset
from orchestration.assets.encoder_files import choose_encoder, describe_choice
from orchestration.recipe import Recipe
from orchestration.services import storage
from tinyemo.encoder_folders import WEIGHTS_MARK
from tinyemo.encoders import EncoderSpec
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.families import FAMILY
from tinyemo.local_files import sha256_of_file
from tinyemo.reasoner.sources import find_gguf, is_random, preset_name

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model")


@dataclass(frozen=True)
class Sources:
    """What a recipe's parts are; weights are not loaded for it.

    Attributes:
        llm_revision: commit of a hub repository, sha256 of the files, or "random".
        llm_weights: "real" or "random".
        encoder: the vision tower's.
        vocabulary: rows of the language model's embeddings; None where its file alone says it, the tokenizer's with it.
    """

    llm_name: str
    llm_revision: str
    llm_weights: str
    encoder: EncoderSpec
    vocabulary: int | None

    @property
    def image_tokens(self) -> int:
        """Placeholders for one image."""
        rows, columns = self.encoder.patch_grid
        return rows * columns


def describe_sources(recipe: Recipe) -> Sources:
    """The parts of a recipe's reasoning model; the language model's files are fetched.

    Raises:
        ConfigError: a source that is none.
        AssetError: it does not answer.
        DataError: it holds something else.
    """
    source = recipe.reasoner
    if is_random(source.vision_tower):
        from tinyemo.reasoner.presets import vision_preset

        encoder, _ = vision_preset(preset_name(source.vision_tower))
    else:
        encoder = describe_choice(choose_encoder(source.vision_tower, source.vision_revision))
    if is_random(source.llm):
        from tinyemo.reasoner.presets import text_preset

        vocabulary = text_preset(preset_name(source.llm)).vocab_size
        return Sources(public_name(source.llm), "random", "random", encoder, vocabulary)
    path = fetch_llm(recipe)
    config = _config(path) if find_gguf(path) is None else {}
    weights = "random" if config.get(WEIGHTS_MARK) == "random" else "real"
    revision = source.llm_revision or _digest(path)
    return Sources(public_name(source.llm), revision, weights, encoder, config.get("vocab_size"))


def public_name(source: str) -> str:
    """What cards call it; a path of this machine says nothing elsewhere."""
    name = source.removeprefix("random:")
    if name in FAMILY:
        return FAMILY[name].llm
    return Path(name).name if Path(name).is_absolute() else name


def fetch_llm(recipe: Recipe) -> Path:
    """The folder or file with the language model's files, on this node.

    Raises:
        ConfigError: the source is none.
        AssetError, StorageError: it does not answer.
    """
    name, revision = recipe.reasoner.llm, recipe.reasoner.llm_revision
    if name in CATALOGUE:
        return get_asset(name) / find_asset(name).files[0]
    if name.startswith("s3://"):
        return _fetch_from_s3(name)
    if Path(name).is_absolute():
        if not Path(name).exists():
            raise AssetError(f"{name} is not on this node: put the language model's folder on every node")
        return Path(name)
    if revision is None:
        raise ConfigError(
            f"reasoner.llm: {name!r} is neither an asset nor an absolute folder; a name on the hub needs "
            "reasoner.llm_revision, its commit"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"the hub does not yield {name} at {revision[:12]} ({reason}): reach it, or name a folder"
        ) from error


def _fetch_from_s3(uri: str) -> Path:
    """A copy of an S3 folder in the cache, keyed by its objects' names and sizes; whole or not there."""
    objects = storage.list_prefix(uri)
    key = hashlib.sha256(json.dumps([uri, sorted(objects.items())]).encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        storage.download_folder(uri, whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no language model: config.json cannot be read") from error
    assert isinstance(found, dict)
    return found


def _digest(path: Path) -> str:
    """sha256 of a file, or over the names and sha256 of a folder's configuration and weights."""
    if path.is_file():
        return f"sha256-{sha256_of_file(path)}"
    files = sorted(found for pattern in ("config.json", "*.safetensors", "*.gguf") for found in path.glob(pattern))
    lines = "".join(f"{found.name}\0{sha256_of_file(found)}\0" for found in files)
    return f"sha256-{hashlib.sha256(lines.encode()).hexdigest()}"


def tokenizer_source(name: str) -> Path:
    """The file or folder of `records.tokenizer`."""
    path = Path(name)
    return path if path.exists() else get_asset(name) / find_asset(name).files[0]
