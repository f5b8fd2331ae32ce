"""Features of a vision encoder for the images of a data set in S3, stored as a feature data set.

    text columns -> image plan -> parts -> actor pool: read, decode, encode, store shards, note -> index -> manifest

A part is some hundred images: one actor encodes it and stores its shard of pooled features and its shard of patches,
then a note that names both. A run that was killed leaves its notes, and the next one computes only what has none. The
version is named by what goes in (source, encoder, layout), not by the numbers that come out, which differ in their last
bits from machine to machine; so it can be resumed anywhere.

N images of a part, M of them encoded, d width of the pooled feature, P patches of D numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.assets.model_files import EncoderChoice, describe_choice, open_choice
from orchestration.data.manifest import (
    VERSION_LENGTH,
    Advance,
    Manifest,
    Rejection,
    Shard,
    check_destination,
    count_splits,
    existing_version,
    held_out_rank,
    load_manifest,
    parquet_bytes,
    point_latest_at,
    publish,
    put_file,
    put_index,
    put_rejected,
    read_file,
    rejected_table,
)
from orchestration.data.sets import RecordSet, read_image_columns, read_records
from orchestration.data.tasks import PoolConfig, guarded, run_on_actors
from orchestration.services import storage
from tinyemo.encoders import EncoderSpec, parquet_metadata
from tinyemo.errors import ConfigError, DataError
from tinyemo.local_files import sha256_of_file

if TYPE_CHECKING:
    from tinyemo.features import FeatureTable
    from tinyemo.vision import VisionEncoder

logger = logging.getLogger(__name__)

NOTES = ".parts"
"""Folder, inside a version that is not whole yet, with one JSON note per part that is done."""
CHUNK_IMAGES = 32
"""Images whose pixels are collected before they are encoded."""


class ImageReason(StrEnum):
    """Reasons why an image has no pooled row. Checks run in this order, and the first that applies is kept."""

    IMAGE_IN_TWO_SPLITS = "image_in_two_splits"
    """A split that is held out more (test, then validation, then any other, then train) has it too."""
    CONFLICTING_LABELS = "conflicting_labels"
    """Its records name different labels."""
    NO_LABEL = "no_label"
    """None of its records names a label, which a feature data set needs; it has a row of patches all the same."""
    UNREADABLE_IMAGE = "unreadable_image"
    """Pillow on the encoder's node cannot decode it."""
    NOT_FINITE = "not_finite"
    """A feature is NaN or Inf as float16."""


@dataclass(frozen=True)
class Part:
    """N images that one actor encodes and stores together.

    Attributes:
        rows: (N,) int64, the first record of each image, counted over its split's shards, ascending.
        ids: sha256 of each image.
        labels: label of each image; None for an image that gets no pooled row.
    """

    split: str
    number: int
    rows: NDArray[np.int64]
    ids: list[str]
    labels: list[str | None]

    @property
    def name(self) -> str:
        """Name of the part's files, without the ending."""
        return f"{self.split}-{self.number:05d}"

    def pack(self) -> dict[str, Any]:
        """Return the part as a row of Ray Data."""
        return {**self.__dict__, "rows": self.rows.tobytes()}

    @staticmethod
    def unpack(row: dict[str, Any]) -> Part:
        """Return the part that `pack` made a row of."""
        return Part(**{**row, "rows": np.frombuffer(row["rows"], dtype=np.int64)})


@dataclass(frozen=True)
class ImagePlan:
    """Every distinct image of every split once.

    Attributes:
        parts: by split, then in the order of the records.
        rejections: images without a pooled row, as far as records can tell.
        num_records: records of the data set.
        num_images: pairs of split and image.
    """

    parts: list[Part]
    rejections: list[Rejection]
    num_records: int
    num_images: int


def plan_images(records: pa.Table, images_per_part: int) -> ImagePlan:
    """Divide the images of records, with the columns of `read_image_columns`, into parts."""
    aggregates = [("row", "min"), ("label", "min"), ("label", "max")]
    grouped = records.group_by(["split", "image_sha256"]).aggregate(aggregates)
    images = grouped.sort_by([("split", "ascending"), ("row_min", "ascending")]).to_pylist()
    holders: dict[str, str] = {}
    for image in images:
        sha256, split = image["image_sha256"], image["split"]
        holders[sha256] = min(holders.get(sha256, split), split, key=held_out_rank)
    by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in records["split"].unique().to_pylist()}
    rejections: list[Rejection] = []
    for image in images:
        sha256, split = image["image_sha256"], image["split"]
        found = _reason(image, holders[sha256])
        if found is not None:
            rejections.append(Rejection(split, sha256, None, image["row_min"], *found))
        if found is None or found[0] is not ImageReason.IMAGE_IN_TWO_SPLITS:
            by_split[split].append({**image, "label": None if found else image["label_min"]})
    parts = [
        Part(
            split=split,
            number=start // images_per_part,
            rows=np.array([image["row_min"] for image in images[start : start + images_per_part]], np.int64),
            ids=[image["image_sha256"] for image in images[start : start + images_per_part]],
            labels=[image["label"] for image in images[start : start + images_per_part]],
        )
        for split, images in by_split.items()
        for start in range(0, len(images), images_per_part)
    ]
    return ImagePlan(parts, rejections, records.num_rows, grouped.num_rows)


def _reason(image: dict[str, Any], holder: str) -> tuple[ImageReason, str] | None:
    first, last = image["label_min"], image["label_max"]
    if holder != image["split"]:
        return ImageReason.IMAGE_IN_TWO_SPLITS, f"{holder} holds it too"
    if first is None:
        return ImageReason.NO_LABEL, "no record of this image names a label"
    return None if first == last else (ImageReason.CONFLICTING_LABELS, f"its records name {first} and {last}")


# An actor: encode a part, store its shards, leave a note


@dataclass(frozen=True)
class FeatureJob:
    """Everything an actor needs to encode parts; pickled to the actors.

    Attributes:
        uri: S3 folder of the version.
        run: random name of the run, kept in a part's note.
    """

    source: Manifest
    choice: EncoderChoice
    spec: EncoderSpec
    uri: str
    has_patches: bool
    pool: PoolConfig
    run: str

    @property
    def num_threads(self) -> int:
        """Threads of one actor."""
        return max(1, int(self.pool.cpus_per_actor))


class PartEncoder:
    """Ray Data actor that holds the encoder for as long as it lives."""

    def __init__(self, job: FeatureJob, device: str) -> None:
        self.job = job
        self.device = device
        self.encoder: VisionEncoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode and store the parts of the batch; return the number of images of each."""
        # The encoder too is opened under `guarded`: an error in __init__ would reach the driver as Ray Data's own.
        return guarded(self._encode, batch)

    def _encode(self, batch: pa.Table) -> pa.Table:
        parts = [Part.unpack(row) for row in batch.to_pylist()]
        if self.encoder is None:
            import torch

            torch.set_num_threads(self.job.num_threads)
            self.encoder = open_choice(self.job.choice, self.job.spec, self.device, self.job.pool.batch_size)
        for part in parts:
            encode_part(self.job, self.encoder, part)
        return pa.table({"images": [len(part.ids) for part in parts]})


@dataclass(frozen=True)
class _Encoded:
    """Results for a part's images.

    Attributes:
        pooled: (M, d) float16.
        places: places of the M images in the part.
        rejections: the other N - M images.
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
    images = read_records(RecordSet(job.source, part.split), part.rows, ("image",))["image"].to_pylist()
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
        stored = put_file(job.uri, f"{part.name}.parquet", parquet_bytes(table))
        note["pooled"] = {**stored.model_dump(), "split": part.split, "rows": table.num_rows}
    note["rejections"] = [asdict(rejection) for rejection in encoded.rejections]
    storage.write_json(f"{job.uri}/{NOTES}/{part.name}.json", note)


def _encode(job: FeatureJob, encoder: VisionEncoder, part: Part, images: list[bytes], path: Path) -> _Encoded:
    import torch

    from tinyemo.images import read_pixels

    pooled = [np.empty((0, job.spec.feature_width), np.float16)]
    places: list[int] = []
    rejections: list[Rejection] = []
    size = job.spec.patch_grid[0] * job.spec.patch_grid[1] * job.spec.patch_width
    fields = [("id", pa.string()), ("patches", pa.list_(pa.float16(), size))]
    schema = pa.schema(fields, metadata=parquet_metadata(job.spec.info))
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with ThreadPoolExecutor(job.num_threads) as threads, pq.ParquetWriter(path, schema, **options) as writer:
        # Images are decoded ahead of the network: Pillow releases the interpreter lock while it works.
        coming = [threads.submit(read_pixels, image, job.spec.preprocessing) for image in images]
        for chunk, pixels in _chunks(part, coming, rejections):
            features = encoder.encode(torch.from_numpy(pixels))
            vectors, patches = features.pooled.half().numpy(), features.patches.half().numpy()
            is_good = np.isfinite(vectors).all(axis=1)
            if job.has_patches:
                is_good &= np.isfinite(patches).all(axis=(1, 2))
            detail = "a feature is NaN or Inf as float16"
            rejections += [_reject(part, place, ImageReason.NOT_FINITE, detail) for place in chunk[~is_good].tolist()]
            good = chunk[is_good].tolist()
            places += good
            pooled.append(vectors[is_good])
            if job.has_patches and good:
                column = pa.FixedSizeListArray.from_arrays(pa.array(patches[is_good].ravel()), size)
                writer.write_table(pa.table([[part.ids[place] for place in good], column], schema=schema))
    return _Encoded(np.concatenate(pooled), places, rejections)


def _chunks(
    part: Part, coming: list[Future[NDArray[np.uint8]]], rejections: list[Rejection]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Yield (places in the part, pixels) of the images that are readable; the others join `rejections`."""
    from tinyemo.images import UnreadableImageError

    for start in range(0, len(coming), CHUNK_IMAGES):
        places, pixels = [], []
        for place in range(start, min(start + CHUNK_IMAGES, len(coming))):
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


def _pooled_table(spec: EncoderSpec, part: Part, encoded: _Encoded) -> pa.Table:
    kept = [(row, place) for row, place in enumerate(encoded.places) if part.labels[place] is not None]
    values = pa.array(encoded.pooled[[row for row, _ in kept]].ravel(), pa.float16())
    table = pa.table(
        {
            "id": pa.array([part.ids[place] for _, place in kept], pa.string()),
            "label": pa.array([part.labels[place] for _, place in kept], pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(values, spec.feature_width),
        }
    )
    return table.replace_schema_metadata(parquet_metadata(spec.info))


def read_notes(uri: str) -> dict[str, dict[str, Any]]:
    """Return the note of each part whose files are all in S3, by the part's name."""
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


# The driver


@dataclass(frozen=True)
class FeaturesReport:
    """Result of `make_features`.

    Attributes:
        is_unchanged: the version was there already, and nothing was computed.
        num_resumed: parts that an earlier run had done.
    """

    manifest: Manifest
    is_unchanged: bool
    num_parts: int
    num_resumed: int
    num_actors: int
    seconds: float


def make_features(
    dataset: str,
    choice: EncoderChoice,
    *,
    name: str,
    root: str,
    pool: PoolConfig = PoolConfig(),
    images_per_part: int = 256,
    has_patches: bool = True,
    is_forced: bool = False,
    advance: Advance | None = None,
) -> FeaturesReport:
    """Store pooled and patch features of a data set's images under `<root>/<name>/<version>`.

    Each distinct image of a split is encoded once; its label is that of its records.

    Args:
        dataset: S3 address of a data set of kind images or instruct, the newest version or one.
        choice: the encoder.
        name: name of the feature data set in S3.
        root: `s3://bucket/folder`.
        pool: actors on the cluster that RAY_ADDRESS names.
        images_per_part: images of one shard, the unit of resuming.
        has_patches: store patch features beside the pooled ones; they are P times as large.
        is_forced: compute again even where parts or all of it are there.
        advance: progress callback.

    Raises:
        ConfigError: arguments do not go together, or ask for GPUs that the cluster can never have.
        DataError: the data set cannot be read, or none of its images has a label.
        AssetError: no source has the encoder's files.
        StorageError, PlatformError: S3 or Ray fails; what is done stays, and the same call goes on from there.
    """
    started = time.monotonic()
    check_destination(name, root)
    source = load_manifest(dataset, "instruct", "images")
    folder = f"{root.rstrip('/')}/{name}"
    if source.uri.startswith(f"{folder}/"):
        raise ConfigError(f"--name {name} is the data set itself: choose another name for its features")
    spec = describe_choice(choice)
    content = [1, "vision features", source.digest, spec.model_dump(mode="json"), images_per_part, has_patches]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    uri = f"{folder}/{digest[:VERSION_LENGTH]}"
    existing = None if is_forced else existing_version(uri, digest)
    if existing is not None:
        point_latest_at(existing)
        num_parts = len(existing.patches) or len(existing.shards)
        return FeaturesReport(existing, True, num_parts, num_parts, 0, time.monotonic() - started)
    storage.delete(f"{uri}/manifest.json")  # while its files are written again, the version is not whole
    if is_forced:
        storage.delete_prefix(f"{uri}/{NOTES}")
    plan = plan_images(read_image_columns(source), images_per_part)
    if not any(label for part in plan.parts for label in part.labels):
        raise DataError(f"none of {plan.num_images} images of {source.uri} has a label: there is nothing to train on")
    job = FeatureJob(source, choice, spec, uri, has_patches, pool, secrets.token_hex(6))
    num_resumed, num_actors = _compute_missing(job, plan, advance or (lambda stage, done, total: None))
    manifest = _finish(job, plan, name, digest, images_per_part)
    publish(manifest)
    storage.delete_prefix(f"{uri}/{NOTES}")
    return FeaturesReport(manifest, False, len(plan.parts), num_resumed, num_actors, time.monotonic() - started)


def _compute_missing(job: FeatureJob, plan: ImagePlan, advance: Advance) -> tuple[int, int]:
    done = read_notes(job.uri)
    missing = [part for part in plan.parts if part.name not in done]
    num_images = sum(len(part.ids) for part in plan.parts)
    num_done = num_images - sum(len(part.ids) for part in missing)
    if done:
        logger.info("%d of %d parts are done already", len(done), len(plan.parts))
    if not missing:
        return len(done), 0
    from orchestration.services.ray_cluster import connect

    connect()
    num_actors = job.pool.count_actors(len(missing))
    device = "cuda" if job.pool.num_gpus() else "cpu"
    advice = "run the same command again, which goes on from the parts that are done"
    for table in run_on_actors([part.pack() for part in missing], PartEncoder, (job, device), job.pool, advice=advice):
        num_done += sum(table["images"].to_pylist())
        advance("encode", num_done, num_images)
    return len(done), num_actors


def _finish(job: FeatureJob, plan: ImagePlan, name: str, digest: str, images_per_part: int) -> Manifest:
    notes = read_notes(job.uri)
    lost = [part.name for part in plan.parts if part.name not in notes]
    if lost:
        raise AssertionError(f"{len(lost)} parts have no note or lack a file, the first is {lost[0]}")
    shards = [Shard(**notes[part.name]["pooled"]) for part in plan.parts if notes[part.name]["pooled"]]
    patches = [Shard(**notes[part.name]["patches"]) for part in plan.parts if notes[part.name]["patches"]]
    found = [item for part in plan.parts for item in notes[part.name]["rejections"]]
    # An image without a label is rejected already, whatever else is wrong with it.
    later = [Rejection(**{**i, "reason": ImageReason(i["reason"])}) for i in found if i["label"] is not None]
    rejections = sorted([*plan.rejections, *later], key=lambda rejection: (rejection.split or "", rejection.row))
    kept = _kept_rows(plan, {(item["split"], item["id"]) for item in found})
    if not kept.num_rows or kept.num_rows != sum(shard.rows for shard in shards):
        raise DataError(f"{kept.num_rows} images have a label and a feature: make the features again with --force")
    if plan.num_images != kept.num_rows + len(rejections):
        raise AssertionError(f"{plan.num_images} images, {kept.num_rows} kept, {len(rejections)} rejected")
    source = {"kind": job.source.kind, "name": job.source.name, "digest": job.source.digest}
    return Manifest(
        kind="features",
        name=name,
        version=digest[:VERSION_LENGTH],
        digest=digest,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        data=job.source.data,
        source={**source, "records": plan.num_records, "images": plan.num_images},
        feature_width=job.spec.feature_width,
        feature_dtype="float16",
        encoder=job.spec.info,
        patch_grid=job.spec.patch_grid if job.has_patches else None,
        patch_width=job.spec.patch_width if job.has_patches else None,
        patches=patches,
        taxonomy=job.source.taxonomy,
        rows_per_group=images_per_part,
        rows_in=plan.num_images,
        splits=count_splits(kept),
        shards=shards,
        index=put_index(job.uri, kept, [shard.rows for shard in shards]),
        rejected=put_rejected(job.uri, rejected_table(rejections)),
        uri=job.uri,
    )


def _kept_rows(plan: ImagePlan, unencoded: set[tuple[str, str]]) -> pa.Table:
    rows = [
        {"split": part.split, "id": sha256, "label": label}
        for part in plan.parts
        for sha256, label in zip(part.ids, part.labels, strict=True)
        if label is not None and (part.split, sha256) not in unencoded
    ]
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("split", "id", "label")]))


def read_stored_features(uri: str, split: str) -> FeatureTable:
    """Read a split of a feature data set in its stored order, each shard checked against its sha256.

    Args:
        uri: S3 address of a feature data set, its newest version or one.
        split: for instance test.

    Raises:
        DataError: there is no such data set or split, or a shard is corrupt.
        StorageError: S3 cannot be read.
    """
    import torch

    from orchestration.data.sets import features_array
    from tinyemo.features import FeatureTable

    manifest = load_manifest(uri, "features")
    columns = ["id", "label", "features"]
    shards = manifest.shards_of(split)
    tables = [pq.read_table(pa.BufferReader(read_file(manifest, shard)), columns=columns) for shard in shards]
    table = pa.concat_tables(tables).combine_chunks()
    return FeatureTable(
        ids=table["id"].to_pylist(),
        labels=table["label"].to_pylist(),
        features=torch.from_numpy(features_array(table).astype(np.float32)),
        encoder=manifest.encoder,
    )
