"""Features of a vision encoder for the images of an instruct data set in S3, as a feature data set.

    text columns -> image plan -> parts -> actor pool: read, decode, encode, store shards, note -> index -> manifest

A part is some hundred images: one actor encodes it and stores its shard of pooled features and its shard of patches,
then a note that names both. A run that was killed leaves its notes, and the next one computes only what has none. The
version is named by what goes in (source, encoder, layout), not by the numbers that come out, which differ in their last
bits from machine to machine; so it can be resumed anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from orchestration.data.dataset import read_image_columns
from orchestration.data.manifest import (
    VERSION_LENGTH,
    Advance,
    Manifest,
    Shard,
    check_destination,
    count_splits,
    existing_version,
    load_manifest,
    point_latest_at,
    publish,
    put_index,
    put_rejected,
)
from orchestration.datasets.shards import rejected_table
from orchestration.datasets.validation import Rejection
from orchestration.services import storage
from orchestration.services.interruption import sigterm_interrupts
from orchestration.streaming.unordered_tasks import MAX_RETRIES, run_unordered
from orchestration.vision.encode_parts import FeatureJob, PartEncoder, PoolConfig, forget_notes, read_notes
from orchestration.vision.encoder_sources import EncoderChoice, describe_choice
from orchestration.vision.image_plan import ImagePlan, ImageReason, Part, plan_images
from tinyemo.encoders import EncoderSpec
from tinyemo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeaturesReport:
    """What `make_features` did."""

    manifest: Manifest
    is_unchanged: bool
    """The version was there already: nothing was computed."""
    num_parts: int
    num_resumed: int
    """Parts that an earlier run had done."""
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
    """Store pooled and patch features of an instruct data set's images under `<root>/<name>/<version>`.

    Each distinct image of a split is encoded once; its label is that of its records.

    Args:
        dataset: S3 address of an instruct data set, the newest version or one.
        choice: the encoder.
        name: the feature data set's name in S3.
        root: `s3://bucket/folder`.
        pool: the actors, on the cluster that RAY_ADDRESS names.
        images_per_part: images of one shard, the unit of resuming.
        has_patches: store patch features beside the pooled ones; they are P times as large.
        is_forced: compute again even where parts or all of it are there.
        advance: told about progress, for instance to draw a bar.

    Raises:
        ConfigError: arguments do not go together, or ask for GPUs that the cluster has not.
        DataError: the data set cannot be read, or none of its images has a label.
        AssetError: no source of the encoder's files answers.
        StorageError, PlatformError: S3 or Ray fails; what is done stays, and the same call goes on from there.
    """
    started = time.monotonic()
    check_destination(name, root)
    source = load_manifest(dataset, "instruct", "images")
    folder = f"{root.rstrip('/')}/{name}"
    if source.uri.startswith(f"{folder}/"):
        raise ConfigError(f"--name {name} is the instruct data set itself: choose another name for its features")
    spec = describe_choice(choice)
    digest = _digest(source, spec, images_per_part, has_patches)
    uri = f"{folder}/{digest[:VERSION_LENGTH]}"
    existing = None if is_forced else existing_version(uri, digest)
    if existing is not None:
        point_latest_at(existing)
        num_parts = len(existing.patches) or len(existing.shards)
        return FeaturesReport(existing, True, num_parts, num_parts, 0, time.monotonic() - started)
    storage.delete(f"{uri}/manifest.json")  # while its files are written again, the version is not whole
    if is_forced:
        forget_notes(uri)
    plan = plan_images(read_image_columns(source), images_per_part)
    if not any(label for part in plan.parts for label in part.labels):
        raise DataError(f"none of {plan.num_images} images of {source.uri} has a label: there is nothing to train on")
    job = FeatureJob(source, choice, spec, uri, has_patches, pool, secrets.token_hex(6))
    with sigterm_interrupts():
        num_resumed, num_actors = _compute_missing(job, plan, advance or (lambda stage, done, total: None))
    manifest = _finish(job, plan, name, digest, images_per_part)
    publish(manifest)
    forget_notes(uri)
    return FeaturesReport(manifest, False, len(plan.parts), num_resumed, num_actors, time.monotonic() - started)


def _digest(source: Manifest, spec: EncoderSpec, images_per_part: int, has_patches: bool) -> str:
    """sha256 over all that decides what a version holds."""
    content = [1, "vision features", source.digest, spec.model_dump(mode="json"), images_per_part, has_patches]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# The driver: what is missing, and who computes it


def _compute_missing(job: FeatureJob, plan: ImagePlan, advance: Advance) -> tuple[int, int]:
    """(parts that were done before, actors that computed the others); every part is done when this returns."""
    done = read_notes(job.uri)
    missing = [part for part in plan.parts if part.name not in done]
    num_images = sum(len(part.ids) for part in plan.parts)
    num_done = sum(len(part.ids) for part in plan.parts if part.name in done)
    if done:
        logger.info("%d of %d parts are done already", len(done), len(plan.parts))
    if not missing:
        return len(done), 0
    import ray

    from orchestration.services.ray_cluster import connect

    connect()
    resources = ray.cluster_resources()
    num_gpus = _gpus_per_actor(job.pool, resources)
    num_actors = _count_actors(job.pool, num_gpus, len(missing), resources)
    for count in _run_pool(job, missing, num_actors, num_gpus):
        num_done += count
        advance("encode", num_done, num_images)
    return len(done), num_actors


def _run_pool(job: FeatureJob, parts: list[Part], num_actors: int, num_gpus: float) -> Iterator[int]:
    """Images of a part, as parts get done, in no order; an error of ours in an actor comes out."""
    import ray.data

    done = run_unordered(
        [part.pack() for part in parts],
        PartEncoder,
        worker="an actor",
        advice="run the same command again, which goes on from the parts that are done",
        fn_constructor_args=(job, "cuda" if num_gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=job.pool.cpus_per_actor,
        num_gpus=num_gpus,
        max_restarts=MAX_RETRIES,
        max_task_retries=MAX_RETRIES,
    )
    for table in done:
        yield from table["images"].to_pylist()


def _gpus_per_actor(pool: PoolConfig, resources: dict[str, float]) -> float:
    """GPUs of one actor.

    Raises:
        ConfigError: the cluster has fewer; an actor would wait for them for ever.
    """
    available = resources.get("GPU", 0.0)
    if pool.gpus_per_actor is None:
        return 1.0 if available >= 1 else 0.0
    if pool.gpus_per_actor > available:
        raise ConfigError(f"gpus_per_actor is {pool.gpus_per_actor:g} and the cluster has {available:g} GPUs")
    return pool.gpus_per_actor


def _count_actors(pool: PoolConfig, num_gpus: float, num_parts: int, resources: dict[str, float]) -> int:
    """Actors that the cluster has resources for, and no more than there are parts.

    Raises:
        ConfigError: not even one has room, or fewer than were asked for.
    """
    room = int(resources.get("CPU", 0.0) / pool.cpus_per_actor)
    if num_gpus:
        room = min(room, int(resources.get("GPU", 0.0) / num_gpus))
    wanted = pool.num_actors or max(room, 1)
    if wanted > room:
        raise ConfigError(
            f"{wanted} actors of {pool.cpus_per_actor:g} CPUs and {num_gpus:g} GPUs are asked for, "
            f"the cluster has room for {room}"
        )
    return min(wanted, num_parts)


# The end: from notes to a manifest


def _finish(job: FeatureJob, plan: ImagePlan, name: str, digest: str, images_per_part: int) -> Manifest:
    """Store index and rejected images; the manifest that may be written when this returns."""
    notes = read_notes(job.uri)
    lost = [part.name for part in plan.parts if part.name not in notes]
    if lost:
        raise AssertionError(f"{len(lost)} parts have no note or lack a file, the first is {lost[0]}")
    shards = [Shard(**notes[part.name]["pooled"]) for part in plan.parts if notes[part.name]["pooled"]]
    patches = [Shard(**notes[part.name]["patches"]) for part in plan.parts if notes[part.name]["patches"]]
    found = [item for part in plan.parts for item in notes[part.name]["rejections"]]
    # An image without a label is rejected already, whatever else is wrong with it.
    rejections = [*plan.rejections, *(_from_note(item) for item in found if item["label"] is not None)]
    rejections.sort(key=lambda rejection: (rejection.split or "", rejection.row))
    kept = _kept_rows(plan, {(item["split"], item["id"]) for item in found})
    if not kept.num_rows or kept.num_rows != sum(shard.rows for shard in shards):
        raise DataError(f"{kept.num_rows} images have a label and a feature: make the features again with --force")
    if plan.num_images != kept.num_rows + len(rejections):
        raise AssertionError(f"{plan.num_images} images, {kept.num_rows} kept, {len(rejections)} rejected")
    index = put_index(job.uri, kept, [shard.rows for shard in shards])
    rejected = put_rejected(job.uri, rejected_table(rejections))
    return Manifest(
        kind="features",
        name=name,
        version=digest[:VERSION_LENGTH],
        digest=digest,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        data=job.source.data,
        source={
            "kind": job.source.kind,
            "name": job.source.name,
            "digest": job.source.digest,
            "records": plan.num_records,
            "images": plan.num_images,
        },
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
        index=index,
        rejected=rejected,
        uri=job.uri,
    )


def _from_note(item: dict[str, Any]) -> Rejection:
    return Rejection(**{**item, "reason": ImageReason(item["reason"])})


def _kept_rows(plan: ImagePlan, unencoded: set[tuple[str, str]]) -> pa.Table:
    """Return split, id and label of every image with a pooled row, in the order in which they are stored."""
    rows = [
        {"split": part.split, "id": sha256, "label": label}
        for part in plan.parts
        for sha256, label in zip(part.ids, part.labels, strict=True)
        if label is not None and (part.split, sha256) not in unencoded
    ]
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("split", "id", "label")]))
