"""Locations of trained models and images: local files and folders, S3, MLflow, and names of runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from orchestration.assets.model_files import digest_of_etags, fetch_from_s3
from tinyemo.errors import DataError
from tinyemo.local_files import sha256_of_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
Part = Literal["projector", "model"]


def find_export(location: str, part: Part) -> str:
    """Return where an exported model is: a folder, an S3 folder or an MLflow address.

    Args:
        location: one of these (`s3://bucket/folder`, `models:/NAME@ALIAS`, `runs:/RUN/PATH`), or the name of a run.
        part: which export of a run its name stands for.

    Raises:
        DataError: nothing is there.
        StorageError: S3 does not answer.
    """
    if Path(location).is_dir():
        return str(Path(location).absolute())
    from cluster.environment import load_platform_environment

    load_platform_environment()
    if ":/" in location:
        return location.rstrip("/")
    kinds = "give a folder, s3://..., models:/NAME@ALIAS, runs:/RUN/PATH or the name of a run"
    if "/" in location or not os.environ.keys() & {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"}:
        raise DataError(f"{location} holds no {part}, it is no folder: {kinds}")
    from orchestration.recipe import CheckpointConfig
    from orchestration.services.storage import list_prefix

    root = f"{CheckpointConfig().root}/{location}"
    for name in dict.fromkeys((part, "model")):
        if list_prefix(f"{root}/{name}"):
            return f"{root}/{name}"
    raise DataError(f"no folder and no finished run is named {location!r} (looked in {root}): {kinds}")


def fetch_export(location: str, part: Part) -> Path:
    """Return a local folder with an exported model; see `find_export`.

    Raises:
        DataError: nothing is there.
        TinyEmoError: S3 or MLflow does not answer.
    """
    found = find_export(location, part)
    if found.startswith("s3://"):
        return fetch_from_s3(found)
    if ":/" in found:
        from orchestration.services.tracking import download_artifacts

        return download_artifacts(found)
    return Path(found)


def digest_of_export(location: str) -> str:
    """Return a digest that changes with the files of what `find_export` found, evaluations and bias reports aside."""
    if location.startswith("s3://"):
        return digest_of_etags(location)
    if ":/" in location:
        return location
    about = {"evaluations", "bias"}
    files = sorted(path for path in Path(location).rglob("*") if path.is_file())
    files = [path for path in files if not about & set(path.relative_to(location).parts)]
    return hashlib.sha256("".join(f"{path.name} {sha256_of_file(path)}\n" for path in files).encode()).hexdigest()


def weight_cautions(location: str) -> list[str]:
    """Return the lines that must stand beside every text of an exported reasoning model; none if all weights are real.

    Args:
        location: what `find_export` found. Only the configuration is read where the model is in S3 or a folder.
    """
    if location.startswith("s3://"):
        from orchestration.services.storage import read_json

        config = read_json(f"{location}/config.json")
    else:
        config = json.loads((fetch_export(location, "model") / "config.json").read_text(encoding="utf-8"))
    return [
        f"RANDOM WEIGHTS: {part} was never trained, its texts mean nothing."
        for part, key in (("the language model", "llm_weights"), ("the vision tower", "vision_weights"))
        if config.get(key) == "random"
    ]


def find_images(locations: Sequence[str]) -> tuple[list[str], bool]:
    """Return every image that files, folders, S3 objects and S3 prefixes name, and whether there may be many of them.

    Raises:
        DataError: a folder or a prefix holds no image.
        StorageError: S3 cannot be read.
    """
    found: list[str] = []
    is_many = False
    for location in locations:
        if location.startswith("s3://"):
            from orchestration.services.storage import list_prefix

            inside = [] if _is_image(location) else [uri for uri in list_prefix(location) if _is_image(uri)]
            is_folder = not _is_image(location)
        else:
            is_folder = Path(location).is_dir()
            inside = sorted(str(path) for path in Path(location).rglob("*") if _is_image(path)) if is_folder else []
        if is_folder and not inside:
            raise DataError(f"{location} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        is_many |= is_folder
        found += inside or [location]
    return list(dict.fromkeys(found)), is_many


def _is_image(location: str | Path) -> bool:
    return Path(location).suffix.lower() in IMAGE_SUFFIXES


def read_image(location: str) -> bytes:
    """Read an image's file from this machine or S3.

    Raises:
        DataError: there is no such file.
        StorageError: S3 does not answer.
    """
    if location.startswith("s3://"):
        from orchestration.services import storage

        try:
            return storage.read_bytes(location)
        except storage.MissingObjectError as error:
            raise DataError("there is no such object") from error
    try:
        return Path(location).read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}") from error
