"""The photographs of a synthesis: a data set in S3, an S3 prefix or a folder, and what tables say about them."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from orchestration.data.manifest import Manifest, held_out_rank, load_manifest
from orchestration.data.sets import RecordSet, read_records, turns_of
from orchestration.services import storage
from orchestration.synthesize.synthesis_recipe import ImagesConfig
from orchestration.use.locations import find_images, read_image
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import TAXONOMIES, Taxonomy

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "emotion")
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Photograph:
    """One photograph.

    Attributes:
        digest: sha256 of its file.
        name: id in the data set, or the file's place.
        split: None where nothing says it.
        label: canonical word, or None.
        context: what else is known, by name; empty texts are left out.
    """

    digest: str
    name: str
    split: str | None
    label: str | None
    context: dict[str, str]


@dataclass(frozen=True)
class PhotographSet:
    """The photographs of a recipe, in the order of their digests.

    Attributes:
        manifest: None for files.
        places: digest -> (split, row) in the data set, or location of the file.
        digest: of the source: the manifest's, or one over the files'.
    """

    photographs: tuple[Photograph, ...]
    taxonomy: Taxonomy
    manifest: Manifest | None
    places: dict[str, Any]
    digest: str

    def read(self, digests: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the digest and file of photographs; each is checked against its digest.

        Raises:
            DataError: a photograph is missing or has changed.
        """
        for start in range(0, len(digests), ROWS_AT_ONCE):
            part = digests[start : start + ROWS_AT_ONCE]
            for digest, data in self._read(part):
                if hashlib.sha256(data).hexdigest() != digest:
                    raise DataError(f"photograph {digest[:12]} has changed since it was listed: give a new name")
                yield digest, data

    def _read(self, digests: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        if self.manifest is None:
            with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
                yield from zip(digests, pool.map(read_image, [self.places[digest] for digest in digests]), strict=True)
            return
        for split in sorted({self.places[digest][0] for digest in digests}):
            inside = [digest for digest in digests if self.places[digest][0] == split]
            rows = np.array([self.places[digest][1] for digest in inside])
            images = read_records(RecordSet(self.manifest, split), rows, ("image",))["image"]
            yield from zip(inside, (image.as_py() for image in images), strict=True)


def list_photographs(images: ImagesConfig, contexts: Iterable[str]) -> PhotographSet:
    """Return the photographs of a recipe with their contexts.

    Args:
        images: of the recipe.
        contexts: names that prompts are told; each must be a column of a table or known of the source.

    Raises:
        ConfigError: a context is nowhere to be found.
        DataError: the source or a table cannot be read, or holds no photograph.
        StorageError: S3 fails.
    """
    found, manifest, places = _from_source(images)
    taxonomy = images.taxonomy or (manifest.taxonomy if manifest else TAXONOMIES["mikels"])
    tables = [read_table(location) for location in images.tables]
    known = {"label", "caption", *(name for table in tables for row in table.values() for name in row)}
    missing = sorted({name for name in contexts if not name.startswith("answer.")} - known)
    if missing:
        raise ConfigError(f"no source of the contexts {', '.join(missing)}; known: {', '.join(sorted(known))}")
    told = [_with_tables(photograph, tables, taxonomy) for photograph in found]
    kept = [photograph for photograph in told if not images.splits or photograph.split in images.splits]
    kept = sorted(kept, key=lambda photograph: photograph.digest)[: images.limit]
    if not kept:
        raise DataError(f"{images.source} holds no photograph of the splits {', '.join(images.splits) or '(any)'}")
    digest = manifest.digest if manifest else hashlib.sha256("".join(p.digest for p in kept).encode()).hexdigest()
    return PhotographSet(tuple(kept), taxonomy, manifest, places, digest)


def _from_source(images: ImagesConfig) -> tuple[list[Photograph], Manifest | None, dict[str, Any]]:
    source = images.source
    if source.startswith("s3://") and _is_dataset(source):
        manifest = load_manifest(source, "images", "instruct")
        photographs, rows = _from_dataset(manifest)
        return photographs, manifest, rows
    locations, _ = find_images([source])
    places: dict[str, Any] = {}
    found = []
    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        for location, digest in zip(locations, pool.map(_sha256, locations), strict=True):
            if digest not in places:
                places[digest] = location
                found.append(Photograph(digest, location, None, None, {}))
    return found, None, places


def _is_dataset(uri: str) -> bool:
    return any(storage.exists(f"{uri.rstrip('/')}/{name}") for name in ("latest.json", "manifest.json"))


def _sha256(location: str) -> str:
    return hashlib.sha256(read_image(location)).hexdigest()


def _from_dataset(manifest: Manifest) -> tuple[list[Photograph], dict[str, Any]]:
    """Return one photograph for each distinct image; of two splits that hold it, the one that is held out more."""
    places: dict[str, Any] = {}
    found: dict[str, Photograph] = {}
    columns = ["id", "image_sha256", "label"] + (["task", "turns"] if manifest.kind == "instruct" else [])
    for split in sorted(manifest.splits, key=held_out_rank):
        record_set = RecordSet(manifest, split)
        for start in range(0, record_set.num_rows, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, record_set.num_rows))
            table = read_records(record_set, rows, columns)
            captions = _captions(table) if manifest.kind == "instruct" else [""] * table.num_rows
            records = table.select(columns[:3]).to_pylist()
            for row, record, caption in zip(rows.tolist(), records, captions, strict=True):
                digest, told = record["image_sha256"], {"caption": caption} if caption else {}
                before = found.get(digest)
                if before is None:
                    places[digest] = (split, row)
                    found[digest] = Photograph(digest, record["id"], split, record["label"], told)
                elif before.split == split:
                    label = before.label or record["label"]
                    found[digest] = replace(before, label=label, context=told | before.context)
    return list(found.values()), places


def _captions(table: pa.Table) -> list[str]:
    """Return the answer of each record of the task caption, and an empty text for others."""
    return [
        turns[-1][1] if task == "caption" else ""
        for task, turns in zip(table["task"].to_pylist(), turns_of(table), strict=True)
    ]


def read_table(location: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table by the id, name or stem that a photograph is joined on."""
    suffix = Path(location).suffix.lower()
    try:
        data = storage.read_bytes(location) if location.startswith("s3://") else Path(location).read_bytes()
        if suffix == ".parquet":
            table = pq.read_table(io.BytesIO(data))
        else:
            parse = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            table = pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parse)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"the table {location} cannot be read: {str(error).splitlines()[0]}") from error
    key = next((name for name in ("image", "id") if name in table.column_names), None)
    if key is None:
        raise DataError(f"the table {location} has no column image or id: {', '.join(table.column_names)}")
    found: dict[str, dict[str, str]] = {}
    for row in table.to_pylist():
        name = stem_of(str(row.pop(key)))
        texts = {column: _text(value) for column, value in row.items() if value is not None}
        before = found.setdefault(name, {})
        for column, text in texts.items():
            known = before.get(column)
            before[column] = text if known is None or text in known.split("; ") else f"{known}; {text}"
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stem_of(name: str) -> str:
    return Path(name).stem


def _with_tables(photograph: Photograph, tables: Sequence[dict[str, dict[str, str]]], taxonomy: Taxonomy) -> Photograph:
    context = dict(photograph.context)
    for table in tables:
        context |= table.get(stem_of(photograph.name), {})
    words = [photograph.label, *(context.get(column) for column in LABEL_COLUMNS)]
    label = next((taxonomy.label(word) for word in words if word), None)
    split = photograph.split or context.get("split")
    return replace(photograph, split=split, label=label, context=context)
