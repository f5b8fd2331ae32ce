"""A vision encoder's files: an asset, a folder of the user's, or a pinned commit on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.assets.catalogue import get_asset
from orchestration.assets.model_files import fetch_from_hub
from tinyemo.encoder_folders import describe_encoder
from tinyemo.encoders import EFFICIENTNET_LITE0, EncoderSpec
from tinyemo.errors import AssetError, ConfigError

if TYPE_CHECKING:
    from tinyemo.vision import VisionEncoder

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder that a user named; the name is checked, nothing is fetched yet."""

    name: str
    """efficientnet-lite0, an absolute folder, or owner/name on the hub."""
    revision: str | None = None
    """Commit of a hub repository; None for the others, whose revision is the sha256 of their files."""


def choose_encoder(name: str, revision: str | None = None) -> EncoderChoice:
    """Return the encoder that a name stands for.

    Raises:
        ConfigError: there is no such folder, or a hub name comes without the commit that pins it.
    """
    if name == EFFICIENTNET_LITE0 or Path(name).is_dir():
        if revision is not None:
            raise ConfigError(
                f"--revision goes with a name on the hub: the revision of {name} is the sha256 of its files"
            )
        return EncoderChoice(name if name == EFFICIENTNET_LITE0 else str(Path(name).absolute()))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"encoder {name!r} is neither {EFFICIENTNET_LITE0}, a folder nor owner/name on the hub")
    if revision is None or not COMMIT.fullmatch(revision):
        raise ConfigError(f"revision is {revision!r}: pin {name} with --revision and its commit, 40 hexadecimal digits")
    return EncoderChoice(name, revision)


def describe_choice(choice: EncoderChoice) -> EncoderSpec:
    """Describe an encoder and its features; fetches only the configuration of a hub repository.

    Raises:
        AssetError: no source of its files answers.
        DataError: the files hold no encoder of a known kind.
    """
    folder = fetch(choice, CONFIG_FILES)
    return describe_encoder(folder, name=_public_name(choice), revision=choice.revision)


def open_choice(choice: EncoderChoice, spec: EncoderSpec, device: str, batch_size: int | None = None) -> VisionEncoder:
    """Load an encoder with its weights on this node.

    Raises:
        AssetError: no source of its files answers.
        DataError: they are not those that `spec` describes.
    """
    from tinyemo.vision import load_encoder

    return load_encoder(fetch(choice, CONFIG_FILES + WEIGHT_FILES), spec, device, batch_size)


def _public_name(choice: EncoderChoice) -> str:
    """Return the name that manifests show: of a local folder only its last part."""
    return Path(choice.name).name if Path(choice.name).is_absolute() else choice.name


def fetch(choice: EncoderChoice, patterns: tuple[str, ...]) -> Path:
    """Return a folder on this node with the encoder's files of these patterns."""
    if choice.name == EFFICIENTNET_LITE0:
        return get_asset(EFFICIENTNET_LITE0)
    if choice.revision is None:
        folder = Path(choice.name)
        if not folder.is_dir():
            raise AssetError(f"{folder} is not on this node: put the encoder's folder on every node")
        return folder
    return fetch_from_hub(choice.name, choice.revision, patterns)
