"""The parts of a recipe's reasoning model and their files; real ones are described without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestration.assets.catalogue import CATALOGUE, find_asset, get_asset
from orchestration.assets.model_files import choose_encoder, describe_choice, fetch_from_hub, fetch_from_s3
from orchestration.recipe import Recipe
from tinyemo.encoder_folders import WEIGHTS_MARK
from tinyemo.encoders import EncoderSpec, count_image_tokens
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY
from tinyemo.local_files import read_config, revision_of_files, sha256_of_file
from tinyemo.reasoner.sources import find_gguf, is_random, preset_name

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model")
HASHED_FILES = ("config.json", "*.safetensors", "*.gguf")
"""Files of a folder that its digest depends on."""


@dataclass(frozen=True)
class Sources:
    """The parts of a recipe's reasoning model, described without loading weights.

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
    image_grid: int | None = None

    @property
    def image_tokens(self) -> int:
        """Placeholders for one image."""
        return count_image_tokens(self.encoder, self.image_grid)


def describe_sources(recipe: Recipe) -> Sources:
    """Describe the parts of a recipe's reasoning model; fetches the language model's files.

    Raises:
        ConfigError: the recipe names no known kind of source.
        AssetError: the source does not answer.
        DataError: the files are not those of a language model or encoder.
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
        return Sources(public_name(source.llm), "random", "random", encoder, vocabulary, source.image_grid)
    path = fetch_llm(recipe)
    config = read_config(path, "language model") if find_gguf(path) is None else {}
    weights = "random" if config.get(WEIGHTS_MARK) == "random" else "real"
    revision = source.llm_revision
    if revision is None:
        revision = f"sha256-{sha256_of_file(path)}" if path.is_file() else revision_of_files(path, HASHED_FILES)
    return Sources(public_name(source.llm), revision, weights, encoder, config.get("vocab_size"), source.image_grid)


def public_name(source: str) -> str:
    """Return the name that cards show: a family member's full name, or the last part of a local path."""
    name = source.removeprefix("random:")
    if name in FAMILY:
        return FAMILY[name].llm
    return Path(name).name if Path(name).is_absolute() else name


def fetch_llm(recipe: Recipe) -> Path:
    """Return the folder or file on this node that holds the language model's files; fetches them where needed.

    Raises:
        ConfigError: the recipe names no known kind of source.
        AssetError, StorageError: the source does not answer.
    """
    name, revision = recipe.reasoner.llm, recipe.reasoner.llm_revision
    if name in CATALOGUE:
        return get_asset(name) / find_asset(name).files[0]
    if name.startswith("s3://"):
        return fetch_from_s3(name)
    if Path(name).is_absolute():
        if not Path(name).exists():
            raise AssetError(f"{name} is not on this node: put the language model's folder on every node")
        return Path(name)
    if revision is None:
        raise ConfigError(
            f"reasoner.llm: {name!r} is neither an asset nor an absolute folder; a name on the hub needs "
            "reasoner.llm_revision, its commit"
        )
    return fetch_from_hub(name, revision, HUB_FILES)


def tokenizer_source(name: str) -> Path:
    """Return the file or folder of `records.tokenizer`."""
    path = Path(name)
    return path if path.exists() else get_asset(name) / find_asset(name).files[0]
