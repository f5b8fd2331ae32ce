"""Where a vision encoder's files are: an asset, a folder of the user's, or a pinned commit on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.assets.catalogue import get_asset
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
    """What a user asked for; checked, but nothing fetched."""

    name: str
    """efficientnet-lite0, an absolute folder, or owner/name on the hub."""
    revision: str | None = None
    """Commit of a hub repository; None for the others, whose revision is the sha256 of their files."""


def choose_encoder(name: str, revision: str | None = None) -> EncoderChoice:
    """The encoder of that name.

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
    """What the encoder is and yields; of a hub repository only the configuration is fetched.

    Raises:
        AssetError: no source of its files answers.
        DataError: they hold no encoder that we know.
    """
    folder = fetch(choice, CONFIG_FILES)
    return describe_encoder(folder, name=_public_name(choice), revision=choice.revision)


def open_choice(choice: EncoderChoice, spec: EncoderSpec, device: str, batch_size: int | None = None) -> VisionEncoder:
    """The encoder with its weights, on any node.

    Raises:
        AssetError: no source of its files answers.
        DataError: they are not those that `spec` describes.
    """
    from tinyemo.vision import load_encoder

    return load_encoder(fetch(choice, CONFIG_FILES + WEIGHT_FILES), spec, device, batch_size)


def _public_name(choice: EncoderChoice) -> str:
    """What manifests call it; a path of this machine says nothing elsewhere."""
    return Path(choice.name).name if Path(choice.name).is_absolute() else choice.name


def fetch(choice: EncoderChoice, patterns: tuple[str, ...]) -> Path:
    """A folder with the encoder's files of these patterns."""
    if choice.name == EFFICIENTNET_LITE0:
        return get_asset(EFFICIENTNET_LITE0)
    if choice.revision is None:
        folder = Path(choice.name)
        if not folder.is_dir():
            raise AssetError(f"{folder} is not on this node: put the encoder's folder on every node")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(choice.name, revision=choice.revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"the hub does not yield {choice.name} at {choice.revision[:12]} ({reason}): reach it, or name a folder"
        ) from error
