"""What one actor does: encode the images of a part, store its shards of features, and leave a note that they are there.

N images of a part, M of them encoded, d width of the pooled feature, P patches of D numbers.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from orchestration.assets.inputs import sha256_of_file
from orchestration.data.manifest import Manifest, parquet_bytes
from orchestration.datasets.validation import Rejection
from orchestration.services import storage
from orchestration.streaming.record_sets import RecordSet, read_records
from orchestration.streaming.unordered_tasks import guarded
from orchestration.vision.encoder_sources import EncoderChoice, open_choice
from orchestration.vision.image_plan import ImageReason, Part
from tinyemo.config import Section
from tinyemo.encoders import EncoderSpec, parquet_metadata
from tinyemo.errors import DataError

if TYPE_CHECKING:
    from tinyemo.vision import VisionEncoder

NOTES = ".parts"
"""Folder, inside a version that is not whole yet, of one JSON note per part that is done."""


CHUNK_IMAGES = 32
"""Images whose pixels are collected before they are encoded."""


class PoolConfig(Section):
    """The actors that encode, and what each of them gets."""

    num_actors: PositiveInt | None = None
    """None: as many as the cluster has resources for, and no more than there are parts."""
    cpus_per_actor: PositiveFloat = 1.0
    """CPUs that Ray sets aside for one actor; also its threads, at least one."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs, or a fraction of one; None: one where the cluster has GPUs, else none."""
    batch_size: PositiveInt | None = None
    """Images per forward pass; None: each actor measures which number is fastest on its device."""


@dataclass(frozen=True)
class FeatureJob:
    """What every actor gets to know."""

    source: Manifest
    choice: EncoderChoice
    spec: EncoderSpec
    uri: str
    """S3 folder of the version."""
    has_patches: bool
    pool: PoolConfig
    run: str
    """Random; says in a part's note which run computed it."""

    @property
    def num_threads(self) -> int:
        """Of one actor."""
        return max(1, int(self.pool.cpus_per_actor))


class PartEncoder:
    """A Ray Data actor: holds the encoder for as long as it lives."""

    def __init__(self, job: FeatureJob, device: str) -> None:
        self.job = job
        self.device = device
        self.encoder: VisionEncoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Part and images of each part in the batch, which are stored when this returns; through `guarded`."""
        # The encoder too is opened here: an error of ours in __init__ would not come out as itself.
        return guarded(self._encode, batch)

    def _encode(self, batch: pa.Table) -> pa.Table:
        parts = [Part.unpack(row) for row in batch.to_pylist()]
        for part in parts:
            encode_part(self.job, self._open(), part)
        return pa.table({"part": [part.name for part in parts], "images": [len(part.ids) for part in parts]})

    def _open(self) -> VisionEncoder:
        if self.encoder is None:
            import torch

            torch.set_num_threads(self.job.num_threads)
            self.encoder = open_choice(self.job.choice, self.job.spec, self.device, self.job.pool.batch_size)
        return self.encoder


@dataclass(frozen=True)
class _Encoded:
    """What became of a part's images.

    Attributes:
        pooled: (M, d) float16.
        places: of those M images in the part.
        rejections: of the other N - M.
    """

    pooled: NDArray[np.float16]
    places: list[int]
    rejections: list[Rejection]


def encode_part(job: FeatureJob, encoder: VisionEncoder, part: Part) -> None:
    """Encode the images of a part and store its shards, then its note.

    Raises:
        DataError: an image is not the one that the data set names.
        StorageError: S3 fails.
    """
    images = read_records(RecordSet(job.source, part.split), part.rows)["image"].to_pylist()
    for sha256, image in zip(part.ids, images, strict=True):
        if hashlib.sha256(image).hexdigest() != sha256:
            raise DataError(f"image {sha256[:12]} of {job.source.uri} is corrupt: ingest it again with --force")
    note: dict[str, Any] = {"run": job.run, "pooled": None, "patches": None}
    with tempfile.TemporaryDirectory(prefix="tinyemo-features-") as scratch:
        path = Path(scratch) / "patches.parquet"
        encoded = _encode(job, encoder, part, images, path)
        if job.has_patches and encoded.places:
            name = f"patches-{part.name}.parquet"
            storage.upload_file(path, f"{job.uri}/{name}")
            file = {"num_bytes": path.stat().st_size, "sha256": sha256_of_file(path), "rows": len(encoded.places)}
            note["patches"] = {"path": name, "split": part.split, **file}
    table = _pooled_table(job.spec, part, encoded)
    if table.num_rows:
        name, data = f"{part.name}.parquet", parquet_bytes(table)
        storage.write_bytes(f"{job.uri}/{name}", data)
        file = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": table.num_rows}
        note["pooled"] = {"path": name, "split": part.split, **file}
    note["rejections"] = [asdict(rejection) for rejection in encoded.rejections]
    storage.write_json(f"{job.uri}/{NOTES}/{part.name}.json", note)


def _encode(job: FeatureJob, encoder: VisionEncoder, part: Part, images: list[bytes], path: Path) -> _Encoded:
    """Pooled features in memory; patches go to the Parquet file `path`, batch by batch."""
    import torch

    from tinyemo.images import read_pixels

    pooled = [np.empty((0, job.spec.feature_width), np.float16)]
    places: list[int] = []
    rejections: list[Rejection] = []
    schema = _patch_schema(job.spec)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with ThreadPoolExecutor(job.num_threads) as threads, pq.ParquetWriter(path, schema, **options) as writer:
        # Decoded ahead of the network: Pillow lets go of the interpreter while it works.
        coming = [threads.submit(read_pixels, image, job.spec.preprocessing) for image in images]
        for batch, pixels in _batches(part, coming, CHUNK_IMAGES, rejections):
            features = encoder.encode(torch.from_numpy(pixels))
            vectors, patches = features.pooled.half().numpy(), features.patches.half().numpy()
            is_good = np.isfinite(vectors).all(axis=1)
            if job.has_patches:
                is_good &= np.isfinite(patches).all(axis=(1, 2))
            detail = "a feature is NaN or Inf as float16"
            rejections += [_reject(part, place, ImageReason.NOT_FINITE, detail) for place in batch[~is_good].tolist()]
            good = batch[is_good].tolist()
            places += good
            pooled.append(vectors[is_good])
            if job.has_patches and good:
                column = pa.FixedSizeListArray.from_arrays(
                    pa.array(patches[is_good].ravel()), schema.field("patches").type.list_size
                )
                writer.write_table(pa.table([[part.ids[place] for place in good], column], schema=schema))
    return _Encoded(np.concatenate(pooled), places, rejections)


def _batches(
    part: Part, coming: list[Future[NDArray[np.uint8]]], batch_size: int, rejections: list[Rejection]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """(places in the part, pixels) of the images that are readable; the others join `rejections`."""
    from tinyemo.images import UnreadableImageError

    for start in range(0, len(coming), batch_size):
        places, pixels = [], []
        for place in range(start, min(start + batch_size, len(coming))):
            try:
                pixels.append(coming[place].result())
            except UnreadableImageError as error:
                rejections.append(_reject(part, place, ImageReason.UNREADABLE_IMAGE, str(error)))
            else:
                places.append(place)
        if places:
            yield np.array(places), np.stack(pixels)


def _reject(part: Part, place: int, reason: ImageReason, detail: str) -> Rejection:
    return Rejection(part.split, part.ids[place], part.labels[place], int(part.rows[place]), reason, detail)


def _patch_schema(spec: EncoderSpec) -> pa.Schema:
    size = spec.patch_grid[0] * spec.patch_grid[1] * spec.patch_width
    fields = [("id", pa.string()), ("patches", pa.list_(pa.float16(), size))]
    return pa.schema(fields, metadata=parquet_metadata(spec.info))


def _pooled_table(spec: EncoderSpec, part: Part, encoded: _Encoded) -> pa.Table:
    """The columns of a feature data set, for images with a label; the metadata names the encoder, for whoever takes the
    file away."""
    kept = [(row, place) for row, place in enumerate(encoded.places) if part.labels[place] is not None]
    labels = [str(part.labels[place]) for _, place in kept]
    values = pa.array(encoded.pooled[[row for row, _ in kept]].ravel(), pa.float16())
    table = pa.table(
        {
            "id": pa.array([part.ids[place] for _, place in kept], pa.string()),
            "label": pa.array(labels, pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(values, spec.feature_width),
        }
    )
    return table.replace_schema_metadata(parquet_metadata(spec.info))


def read_notes(uri: str) -> dict[str, dict[str, Any]]:
    """Part -> its note, of every part of the version at `uri` whose files are all in S3."""
    stored = storage.list_prefix(uri)
    notes = {}
    for note_uri in stored:
        if not note_uri.startswith(f"{uri}/{NOTES}/"):
            continue
        note = storage.read_json(note_uri)
        files = [note[kind] for kind in ("pooled", "patches") if note[kind] is not None]
        if all(stored.get(f"{uri}/{file['path']}") == file["num_bytes"] for file in files):
            notes[Path(note_uri).stem] = note
    return notes


def forget_notes(uri: str) -> None:
    """Remove the notes of the version at `uri`."""
    for note_uri in storage.list_prefix(f"{uri}/{NOTES}"):
        storage.delete(note_uri)
