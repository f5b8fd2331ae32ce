"""Files of models on this node: from S3, from a pinned commit on the Hugging Face hub, and of encoders by name."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.assets.catalogue import cache_folder, get_asset
from tinyemo.encoder_folders import describe_encoder
from tinyemo.encoders import EFFICIENTNET_LITE0, EncoderSpec
from tinyemo.errors import AssetError, ConfigError, first_line

if TYPE_CHECKING:
    from tinyemo.vision import VisionEncoder


CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_from_hub(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return a folder with a repository's files of these patterns, from the hub or from its cache.

    Args:
        name: owner/name of the repository.
        revision: its commit, 40 hexadecimal digits.
        patterns: patterns of the files to fetch, for instance `*.json`.

    Raises:
        AssetError: neither the hub nor its cache holds them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise AssetError(
            f"the hub does not yield {name} at {revision[:12]} ({first_line(error)}): reach it, or name a folder"
        ) from error


def digest_of_etags(uri: str) -> str:
    """Return a digest of an S3 folder that changes with the name or the ETag of any object."""
    from orchestration.services.storage import list_etags

    return hashlib.sha256(json.dumps(sorted(list_etags(uri).items())).encode()).hexdigest()


def fetch_from_s3(uri: str) -> Path:
    """Return a copy of an S3 folder in the cache, which is used again as long as no object's name or ETag changes.

    Raises:
        MissingObjectError: nothing is stored there.
        StorageError: S3 does not answer.
    """
    from orchestration.services import storage

    folder = cache_folder() / "models" / f"{Path(uri).name}-{digest_of_etags(uri)[:16]}"
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
