"""Files of models from elsewhere: a pinned commit on the Hugging Face hub, or a folder in S3, copied to this node."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestration.assets.catalogue import cache_folder
from tinyemo.errors import AssetError


def fetch_from_hub(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return a folder with a repository's files of these patterns, from the hub or from its cache.

    Args:
        name: owner/name of the repository.
        revision: its commit, 40 hexadecimal digits.
        patterns: which files are fetched, for instance `*.json`.

    Raises:
        AssetError: neither the hub nor its cache holds them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"the hub does not yield {name} at {revision[:12]} ({reason}): reach it, or name a folder"
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
