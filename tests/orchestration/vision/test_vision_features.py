"""Features of an instruct data set's images: every image accounted for, the encoder's own numbers, resumed by part."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from feature_files import good_rows, write_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from job_runner import Jobs
from PIL import Image
from record_files import drawn_picture, record, write_records
from typer.testing import CliRunner

from orchestration import storage
from orchestration.cli import app
from orchestration.datasets.ingest import ingest_features
from orchestration.datasets.manifest import (
    FeatureManifest,
    InstructManifest,
    id_hash,
    load_manifest,
    read_file,
    read_index,
    verify_manifest,
)
from orchestration.datasets.validation import held_out_rank
from orchestration.recipe import parse_recipe
from orchestration.training.prepare import prepare
from orchestration.vision.encode_parts import NOTES, FeatureJob, PoolConfig, encode_part, forget_notes, read_notes
from orchestration.vision.encoder_sources import EncoderChoice, choose_encoder, describe_choice, open_choice
from orchestration.vision.features import _count_actors, _gpus_per_actor, make_features
from orchestration.vision.image_plan import ImageReason, Part, plan_images, read_image_columns
from orchestration.vision.stored_features import read_stored_features
from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.embedding_tables import random_table
from tinyemo.encoders import EFFICIENTNET_FILE, EFFICIENTNET_LITE0, EncoderInfo, card_entries, parquet_metadata
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.label_embeddings import embed_labels, known_words
from tinyemo.projector import MetricProjector, ProjectorConfig
from tinyemo.taxonomies import TAXONOMIES, label_id
from tinyemo.vision import read_pixels

EKMAN = TAXONOMIES["ekman"]
CLIP_WIDTH = 512
OTHER = EncoderInfo(name="other", revision="r", preprocessing="p")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, tagged so, whose projected embedding is as wide as CLIP B/16's."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "tinyemo_weights": "random"}))
    return folder


@pytest.fixture(scope="module")
def untrained_efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 as its asset lies there, with weights that nobody trained: slow enough to be killed."""
    folder = tmp_path_factory.mktemp("encoders") / "untrained-lite0"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / EFFICIENTNET_FILE)
    return folder


@pytest.fixture(scope="module")
def cluster(s3_server: dict[str, str]) -> Iterator[str]:
    """A local Ray cluster whose actors see the S3 server; this process is its driver."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        context = ray.init(
            address="local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False
        )
        try:
            yield context.address_info["address"]
        finally:
            ray.shutdown()


# The plan: which images, in which parts


def records_table(rows: list[tuple[str, int, str | None]]) -> pa.Table:
    """(split, image, label) as the columns that a plan is made from."""
    counters: dict[str, int] = {}
    places = []
    for split, _, _ in rows:
        places.append(counters.get(split, 0))
        counters[split] = places[-1] + 1
    return pa.table(
        {
            "image_sha256": [f"image-{image}" for _, image, _ in rows],
            "label": pa.array([label for _, _, label in rows], pa.string()),
            "row": pa.array(places, pa.int64()),
            "split": [split for split, _, _ in rows],
        }
    )


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["train", "validation", "test"]), st.integers(0, 12), st.sampled_from([None, "joy", "fear"])
    ),
    min_size=1, max_size=60,
)  # fmt: skip


@given(rows=ROWS, size=st.integers(1, 7))
@settings(deadline=None)
def test_every_image_of_every_split_is_kept_or_rejected_once(
    rows: list[tuple[str, int, str | None]], size: int
) -> None:
    plan = plan_images(records_table(rows), size)
    pairs = {(split, f"image-{image}") for split, image, _ in rows}
    kept = [(p.split, i) for p in plan.parts for i, label in zip(p.ids, p.labels, strict=True) if label is not None]
    rejected = [(rejection.split, rejection.id) for rejection in plan.rejections]
    assert sorted(kept + rejected) == sorted(pairs)
    assert (plan.num_records, plan.num_images) == (len(rows), len(pairs))
    assert all(1 <= len(part.ids) <= size for part in plan.parts)
    # Read are all but those that a split which is held out more has.
    read = [(part.split, image) for part in plan.parts for image in part.ids]
    assert len(set(read)) == len(read)
    for split, image in pairs:
        holder = min((s for s, i in pairs if i == image), key=held_out_rank)
        assert ((split, image) in read) == (split == holder)


@given(rows=ROWS)
@settings(deadline=None)
def test_an_images_label_is_that_of_its_records(rows: list[tuple[str, int, str | None]]) -> None:
    plan = plan_images(records_table(rows), 5)
    reasons = {(rejection.split, rejection.id): rejection.reason for rejection in plan.rejections}
    for part in plan.parts:
        for image, label, row in zip(part.ids, part.labels, part.rows, strict=True):
            mine = [(s, i, w) for s, i, w in rows if s == part.split]
            named = {word for _, i, word in mine if f"image-{i}" == image} - {None}
            expected = named.pop() if len(named) == 1 else None
            assert label == expected
            if len(named) > 1:
                assert reasons[part.split, image] is ImageReason.CONFLICTING_LABELS
            assert f"image-{mine[row][1]}" == image
            assert row == min(place for place, (_, i, _) in enumerate(mine) if f"image-{i}" == image)


def test_reasons_say_what_is_wrong() -> None:
    rows: list[tuple[str, int, str | None]] = [
        ("train", 1, "joy"), ("train", 2, None), ("train", 3, "joy"), ("train", 3, "fear"), ("train", 4, "joy"),
        ("test", 4, "joy"),
    ]  # fmt: skip
    plan = plan_images(records_table(rows), 10)
    assert [(r.split, r.id, str(r.reason), r.detail, r.row) for r in plan.rejections] == [
        ("train", "image-2", "no_label", "no record of this image names a label", 1),
        ("train", "image-3", "conflicting_labels", "its records name fear and joy", 2),
        ("train", "image-4", "image_in_two_splits", "test holds it too", 4),
    ]
    assert [(p.name, p.ids, p.labels) for p in plan.parts] == [
        ("train-00000", ["image-1", "image-2", "image-3"], ["joy", None, None]),
        ("test-00000", ["image-4"], ["joy"]),
    ]


def test_a_part_travels_as_a_row() -> None:
    part = Part("train", 3, np.array([1, 5], dtype=np.int64), ["a", "b"], ["joy", None])
    back = Part.unpack(pa.Table.from_pylist([part.pack()]).to_pylist()[0])
    assert (back.name, back.rows.tolist(), back.ids, back.labels) == ("train-00003", [1, 5], ["a", "b"], ["joy", None])


# The pool


def test_an_actor_gets_a_gpu_where_the_cluster_has_one() -> None:
    assert _gpus_per_actor(PoolConfig(), {"CPU": 4.0}) == 0
    assert _gpus_per_actor(PoolConfig(), {"CPU": 4.0, "GPU": 2.0}) == 1
    assert _gpus_per_actor(PoolConfig(gpus_per_actor=0.25), {"GPU": 2.0}) == 0.25
    assert _gpus_per_actor(PoolConfig(gpus_per_actor=0), {"GPU": 2.0}) == 0
    with pytest.raises(ConfigError, match=r"gpus_per_actor is 0\.5 and the cluster has 0 GPUs"):
        _gpus_per_actor(PoolConfig(gpus_per_actor=0.5), {"CPU": 4.0})


def test_there_are_as_many_actors_as_have_room_and_work() -> None:
    resources = {"CPU": 8.0, "GPU": 2.0}
    assert _count_actors(PoolConfig(), 0, 100, resources) == 8
    assert _count_actors(PoolConfig(), 0, 3, resources) == 3
    assert _count_actors(PoolConfig(), 1, 100, resources) == 2
    assert _count_actors(PoolConfig(), 0.25, 100, resources) == 8
    assert _count_actors(PoolConfig(cpus_per_actor=0.5), 0.1, 100, resources) == 16
    assert _count_actors(PoolConfig(num_actors=2), 0, 100, resources) == 2
    with pytest.raises(ConfigError, match="3 actors of 4 CPUs and 0 GPUs are asked for, the cluster has room for 2"):
        _count_actors(PoolConfig(num_actors=3, cpus_per_actor=4), 0, 100, resources)
    with pytest.raises(ConfigError, match="room for 0"):
        _count_actors(PoolConfig(cpus_per_actor=9), 0, 100, resources)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("owner/model", None, "revision is None: pin owner/model"),
        ("owner/model", "main", "revision is 'main': pin owner/model"),
        ("clip", None, "encoder 'clip' is neither"),
        (EFFICIENTNET_LITE0, "0" * 40, "goes with a name on the hub"),
        (".", "0" * 40, "goes with a name on the hub"),
    ],
)
def test_an_encoder_is_pinned_or_refused(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_encoder(name, revision)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_is_pinned_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_encoder("owner/model", "a" * 40) == EncoderChoice("owner/model", "a" * 40)
    assert choose_encoder(EFFICIENTNET_LITE0) == EncoderChoice(EFFICIENTNET_LITE0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert choose_encoder("mine") == EncoderChoice(str(tmp_path / "mine"))
    with pytest.raises(DataError, match="mine holds no vision encoder"):
        describe_choice(choose_encoder("mine"))
    (tmp_path / "mine").rmdir()
    with pytest.raises(AssetError, match="mine is not on this node"):
        describe_choice(EncoderChoice(str(tmp_path / "mine")))


# One part, in this process


def photograph(number: int) -> bytes:
    """A JPEG of its own, wider than high."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def with_image(number: int, image: bytes, **changed: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(image).hexdigest()
    return record(number, image=image, image_sha256=sha256, width=60, height=40, **changed)


def photographed(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Records with labels in turn; every third photograph has a second record, every fifth no label."""
    rows = []
    for number in range(first, first + count):
        label = None if number % 5 == 4 else EKMAN[number % 6]
        rows.append(with_image(number, photograph(number), label=label))
        if number % 3 == 0:
            rows.append(with_image(number, photograph(number), label=None) | {"id": f"again{number}"})
    return rows


def job_for(source: InstructManifest, folder: Path, uri: str, **changed: Any) -> FeatureJob:
    choice = choose_encoder(str(folder))
    fields: dict[str, Any] = {"has_patches": True, "pool": PoolConfig(batch_size=4), "run": "r"} | changed
    return FeatureJob(source, choice, describe_choice(choice), uri, **fields)


def read_table(uri: str) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)


def matrix(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    return np.stack(column.to_pylist()).astype(np.float32)


def test_a_part_holds_the_encoders_own_numbers(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(11))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, encoder, part)

    pixels = np.stack([read_pixels(photograph(number), job.spec.preprocessing) for number in range(11)])
    expected = encoder.encode(torch.from_numpy(pixels))
    patches = read_table(f"{job.uri}/patches-train-00000.parquet")
    assert patches["id"].to_pylist() == [hashlib.sha256(photograph(number)).hexdigest() for number in range(11)]
    found = matrix(patches["patches"]).reshape(11, 16, 32)
    np.testing.assert_allclose(found, expected.patches.numpy(), rtol=2e-3, atol=2e-3)

    pooled = read_table(f"{job.uri}/train-00000.parquet")
    labelled = [number for number in range(11) if number % 5 != 4]
    assert pooled["label"].to_pylist() == [EKMAN[number % 6] for number in labelled]
    assert pooled["label_id"].to_pylist() == [label_id(EKMAN[number % 6]) for number in labelled]
    assert pooled["id"].to_pylist() == [patches["id"][number].as_py() for number in labelled]
    assert str(pooled.schema.field("features").type) == "fixed_size_list<element: halffloat>[512]"
    np.testing.assert_allclose(matrix(pooled["features"]), expected.pooled.numpy()[labelled], rtol=2e-3, atol=2e-3)
    for table in (pooled, patches):
        assert json.loads(table.schema.metadata[b"tinyemo"])["encoder"] == job.spec.info.model_dump()
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"]["rows"], note["patches"]["rows"], note["rejections"]) == (len(labelled), 11, [])


def test_an_image_that_cannot_be_read_is_rejected_and_the_others_stay(s3_root: str, tiny_clip: Path) -> None:
    rows = photographed(6)
    rows.insert(3, with_image(90, b"no image", label="joy"))
    rows.append(with_image(91, photograph(91)[:300], label=None))
    source = write_records(s3_root, rows)
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, open_choice(job.choice, job.spec, "cpu"), part)
    note = read_notes(job.uri)["train-00000"]
    found = {item["id"]: (item["reason"], item["label"]) for item in note["rejections"]}
    assert found == {
        hashlib.sha256(b"no image").hexdigest(): ("unreadable_image", "joy"),
        hashlib.sha256(photograph(91)[:300]).hexdigest(): ("unreadable_image", None),
    }
    ids = read_table(f"{job.uri}/patches-train-00000.parquet")["id"].to_pylist()
    assert ids == [hashlib.sha256(photograph(number)).hexdigest() for number in range(6)]
    assert read_table(f"{job.uri}/train-00000.parquet").num_rows == 5


def test_a_part_may_have_no_labels_or_no_patches(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, [with_image(number, photograph(number)) for number in range(3)])
    (part,) = plan_images(read_image_columns(source), 100).parts
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    encode_part(job, encoder, part)
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"], note["patches"]["rows"]) == (None, 3)
    job = job_for(source, tiny_clip, f"{s3_root}/pooled", has_patches=False)
    encode_part(job, encoder, Part(part.split, part.number, part.rows, part.ids, ["joy"] * 3))
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"]["rows"], note["patches"]) == (3, None)
    assert sorted(uri.rsplit("/", 1)[1] for uri in storage.list_prefix(job.uri)) == [
        "train-00000.json", "train-00000.parquet",
    ]  # fmt: skip


def test_features_beyond_float16_are_rejected(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(3))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    with torch.no_grad():
        encoder._network.visual_projection.weight *= 1e9  # type: ignore[union-attr, operator]
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, encoder, part)
    note = read_notes(job.uri)["train-00000"]
    assert {item["reason"] for item in note["rejections"]} == {"not_finite"}
    assert (len(note["rejections"]), note["pooled"], note["patches"]) == (3, None, None)


def test_an_image_that_is_not_the_one_that_was_ingested_is_an_error(s3_root: str, tiny_clip: Path) -> None:
    rows = photographed(2)
    rows[1]["image"] = photograph(50)
    source = write_records(s3_root, rows)
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    (part,) = plan_images(read_image_columns(source), 100).parts
    part = Part(part.split, 0, np.array([1, 2]), [rows[1]["image_sha256"], rows[2]["image_sha256"]], [None, None])
    with pytest.raises(DataError, match=rf"image {rows[1]['image_sha256'][:12]} of .* is corrupt"):
        encode_part(job, open_choice(job.choice, job.spec, "cpu"), part)
    assert storage.list_prefix(job.uri) == {}


def test_a_note_counts_only_with_its_files(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(4))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    parts = plan_images(read_image_columns(source), 2).parts
    assert [part.name for part in parts] == ["train-00000", "train-00001"]
    for part in parts:
        encode_part(job, encoder, part)
    assert sorted(read_notes(job.uri)) == ["train-00000", "train-00001"]
    storage.write_bytes(f"{job.uri}/patches-train-00001.parquet", b"half")
    assert sorted(read_notes(job.uri)) == ["train-00000"]
    storage.delete(f"{job.uri}/train-00000.parquet")
    assert read_notes(job.uri) == {}
    forget_notes(job.uri)
    assert not [uri for uri in storage.list_prefix(job.uri) if f"/{NOTES}/" in uri]


def test_a_corrupt_or_missing_shard_stops_the_plan(s3_root: str) -> None:
    source = write_records(s3_root, photographed(4))
    uri = source.file_uri(source.shards[0].path)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-20])
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing or corrupt"):
        read_image_columns(source)
    storage.delete(uri)
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing or corrupt"):
        read_image_columns(source)


# The whole job, on a real Ray cluster


def test_the_result_is_a_feature_data_set_with_patches(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(23))
    seen: list[tuple[str, int, int]] = []
    report = make_features(
        source.uri, choose_encoder(str(tiny_clip)), name="tiny", root=s3_root, images_per_part=5,
        advance=lambda *step: seen.append(step),
    )  # fmt: skip
    manifest = report.manifest
    assert manifest == load_manifest(f"{s3_root}/tiny", FeatureManifest)
    assert (report.num_parts, report.num_resumed, report.num_actors, report.is_unchanged) == (5, 0, 2, False)
    assert seen[-1] == ("encode", 23, 23)
    assert manifest.encoder is not None
    assert (manifest.encoder.name, manifest.encoder.weights) == ("tiny-clip", "random")
    assert (manifest.patch_grid, manifest.patch_width, manifest.feature_width) == ((4, 4), 32, CLIP_WIDTH)
    assert manifest.rows_in == manifest.rows_kept + manifest.rejected.rows == 23
    assert manifest.rejected.reasons == {"no_label": 4}
    assert manifest.source["digest"] == source.digest
    assert [shard.rows for shard in manifest.patches] == [5, 5, 5, 5, 3]
    assert verify_manifest(manifest) == sum(file.num_bytes for file in manifest.files())
    assert not [uri for uri in storage.list_prefix(manifest.uri) if f"/{NOTES}/" in uri]

    index = read_index(manifest).to_pylist()
    stored = [read_table(manifest.file_uri(shard.path)) for shard in manifest.shards]
    for line in index:
        table = stored[line["shard"]]
        assert id_hash(table["id"][line["row"]].as_py()) == line["id_hash"]
        assert table["label_id"][line["row"]].as_py() == line["label_id"]
    assert len(index) == sum(table.num_rows for table in stored) == manifest.splits["train"].rows
    rejected = pq.read_table(io.BytesIO(read_file(manifest, manifest.rejected))).to_pylist()
    assert {row["id"] for row in rejected} == {hashlib.sha256(photograph(n)).hexdigest() for n in (4, 9, 14, 19)}

    table = read_stored_features(f"{s3_root}/tiny", "train")
    assert table.encoder == manifest.encoder
    assert table.features.shape == (manifest.rows_kept, CLIP_WIDTH)
    with pytest.raises(DataError, match="has no split 'test': it has train"):
        read_stored_features(f"{s3_root}/tiny", "test")

    again = make_features(source.uri, choose_encoder(str(tiny_clip)), name="tiny", root=s3_root, images_per_part=5)
    assert (again.is_unchanged, again.manifest) == (True, manifest)
    other = make_features(
        source.uri, choose_encoder(str(tiny_clip)), name="tiny", root=s3_root, images_per_part=5, has_patches=False
    )
    assert other.manifest.version != manifest.version
    assert (other.manifest.patches, other.manifest.patch_grid) == ([], None)


def test_only_missing_parts_are_computed(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(12))
    choice = choose_encoder(str(tiny_clip))
    whole = make_features(source.uri, choice, name="whole", root=s3_root, images_per_part=4).manifest
    # As a run leaves it that was killed after its second part.
    uri = f"{s3_root}/part/{whole.version}"
    parts = plan_images(read_image_columns(source), 4).parts
    job = job_for(source, tiny_clip, uri, pool=PoolConfig(), run="killed")
    encoder = open_choice(choice, job.spec, "cpu")
    for part in parts[:2]:
        encode_part(job, encoder, part)
    before = {address: modified(address) for address in storage.list_prefix(uri) if NOTES not in address}
    report = make_features(source.uri, choice, name="part", root=s3_root, images_per_part=4)
    assert (report.num_parts, report.num_resumed) == (3, 2)
    assert {address: modified(address) for address in before} == before
    assert report.manifest.digest == whole.digest
    assert [shard.sha256 for shard in report.manifest.files()] == [shard.sha256 for shard in whole.files()]


def modified(uri: str) -> tuple[Any, str]:
    bucket, key = storage.parse_s3_uri(uri)
    answer = storage.client().head_object(Bucket=bucket, Key=key)
    return answer["LastModified"], answer["ETag"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    cluster: str, s3_server: dict[str, str], s3_root: str, untrained_efficientnet: Path
) -> None:
    source = write_records(s3_root, photographed(120), rows_per_shard=200)
    command = [
        sys.executable, "-c", "from orchestration.cli import main; main()", "features", source.uri, "--name", "killed",
        "--root", s3_root, "--encoder", str(untrained_efficientnet), "--images-per-part", "4",
        "--actors", "1", "--json",
    ]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        **s3_server, "RAY_ADDRESS": cluster, "TINYEMO_STATE": "/nonexistent",
    }  # fmt: skip
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(notes := [uri for uri in storage.list_prefix(f"{s3_root}/killed") if f"/{NOTES}/" in uri]) < 4:
        assert first.poll() is None, first.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "no part was done"
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    assert first.wait(30) == -signal.SIGKILL
    uri = notes[0].split(f"/{NOTES}/")[0]
    assert not storage.exists(f"{uri}/manifest.json")
    assert not storage.exists(f"{s3_root}/killed/latest.json")
    done = set(settled_notes(uri))
    assert 4 <= len(done) < 30
    before = {address: modified(address) for address in storage.list_prefix(uri) if f"/{NOTES}/" not in address}

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    document = json.loads(second.stdout)
    assert (document["parts"], document["parts_resumed"]) == (30, len(done))
    kept = {address: state for address, state in before.items() if Path(address).stem.removeprefix("patches-") in done}
    assert kept
    assert {address: modified(address) for address in kept} == kept

    choice = choose_encoder(str(untrained_efficientnet))
    whole = make_features(source.uri, choice, name="whole", root=s3_root, images_per_part=4).manifest
    resumed = load_manifest(f"{s3_root}/killed", FeatureManifest)
    assert [file.sha256 for file in resumed.files()] == [file.sha256 for file in whole.files()]
    assert verify_manifest(resumed) == verify_manifest(whole)


def settled_notes(uri: str) -> dict[str, Any]:
    """The notes of a version whose driver is dead, once its actors have stopped, too."""
    last, since = read_notes(uri), time.monotonic()
    while time.monotonic() - since < 5:
        time.sleep(0.5)
        now = read_notes(uri)
        if set(now) != set(last):
            last, since = now, time.monotonic()
    return last


def test_an_error_in_an_actor_is_one_line_of_ours(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    rows = photographed(8)
    rows[4]["image"] = photograph(50)
    source = write_records(s3_root, rows)
    sha256 = rows[4]["image_sha256"]
    assert rows[4]["id"] == "r00003"  # its second record has the right image, the plan takes the first
    with pytest.raises(DataError, match=f"image {sha256[:12]} of .* is corrupt") as caught:
        make_features(source.uri, choose_encoder(str(tiny_clip)), name="bad", root=s3_root)
    assert "\n" not in str(caught.value)
    assert not storage.exists(f"{s3_root}/bad/latest.json")


def test_what_cannot_become_features_is_refused(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    choice = choose_encoder(str(tiny_clip))
    unlabelled = write_records(s3_root, [with_image(number, photograph(number)) for number in range(3)])
    with pytest.raises(DataError, match=r"none of 3 images of .* has a label"):
        make_features(unlabelled.uri, choice, name="none", root=s3_root)
    with pytest.raises(ConfigError, match="--name drawn is the instruct data set itself"):
        make_features(f"{s3_root}/drawn", choice, name="drawn", root=s3_root)
    with pytest.raises(DataError, match="no data set at"):
        make_features(f"{s3_root}/nothing", choice, name="none", root=s3_root)
    broken = write_records(s3_root, [with_image(n, b"no image %d" % n, label="joy") for n in range(2)], name="broken")
    with pytest.raises(DataError, match="0 images have a label and a feature"):
        make_features(broken.uri, choice, name="none", root=s3_root)


# Whose features: ingest, training, use


def test_ingested_features_keep_the_encoder_that_their_files_name(s3_root: str, tmp_path: Path) -> None:
    plain = {split: good_rows(split, 20, seed) for seed, split in enumerate(("train", "test"))}
    folder = write_splits(tmp_path / "plain", **plain)
    assert ingest_features(folder, name="x", root=s3_root).manifest.encoder is None
    marked = {split: table.replace_schema_metadata(parquet_metadata(OTHER)) for split, table in plain.items()}
    report = ingest_features(write_splits(tmp_path / "marked", **marked), name="x", root=s3_root)
    assert report.is_unchanged  # the same rows
    assert report.manifest.encoder == load_manifest(f"{s3_root}/x", FeatureManifest).encoder == OTHER
    second = OTHER.model_copy(update={"name": "second"})
    mixed = {**marked, "test": plain["test"].replace_schema_metadata(parquet_metadata(second))}
    with pytest.raises(DataError, match="holds features of 2 encoders"):
        ingest_features(write_splits(tmp_path / "mixed", **mixed), name="y", root=s3_root)


def recipe_for(uri: str, encoder: str) -> Any:
    return parse_recipe(
        {
            "name": "x",
            "data": {"dataset": uri},
            "projector": {"encoder_width": CLIP_WIDTH, "encoder": encoder},
            "train": {"global_batch_size": 4},
        },
        source="test",
    )


def test_training_refuses_features_of_another_or_an_unknown_encoder(s3_root: str, tmp_path: Path) -> None:
    rows = {
        split: pa.table(
            {
                "id": [f"{split}{n}" for n in range(12)],
                "emotion": [EKMAN[n % 6] for n in range(12)],
                "features": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.random.default_rng(seed).standard_normal(12 * CLIP_WIDTH).astype(np.float16)),
                    CLIP_WIDTH,
                ),
            }
        )
        for seed, split in enumerate(("train", "test"))
    }
    ingest_features(write_splits(tmp_path / "plain", **rows), name="unknown", root=s3_root)
    marked = {split: table.replace_schema_metadata(parquet_metadata(OTHER)) for split, table in rows.items()}
    ingest_features(write_splits(tmp_path / "marked", **marked), name="known", root=s3_root)
    for wanted in ("", "other", "other@r"):
        assert prepare(recipe_for(f"{s3_root}/known", wanted)).manifest.encoder == OTHER
    with pytest.raises(ConfigError, match=r"projector\.encoder: clip and the features of .* are of other@r"):
        prepare(recipe_for(f"{s3_root}/known", "clip"))
    with pytest.raises(ConfigError, match=r"projector\.encoder: other@2 and the features"):
        prepare(recipe_for(f"{s3_root}/known", "other@2"))
    assert prepare(recipe_for(f"{s3_root}/unknown", "")).manifest.encoder is None
    with pytest.raises(ConfigError, match="do not say which encoder made them"):
        prepare(recipe_for(f"{s3_root}/unknown", "other"))


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    """Trained, so its card says, on features of OTHER."""
    table = random_table(576, 0, name="HuggingFaceTB/SmolLM2-135M-Instruct")
    model = MetricProjector(ProjectorConfig(encoder_width=CLIP_WIDTH, hidden_size=576)).eval()
    card = {"taxonomy": "ekman", "data": "real", "llm": "smollm2-135m", **card_entries(OTHER)}
    model.save_pretrained(tmp_path / "projector", labels=embed_labels(table, known_words(), "word"), card=card)
    return tmp_path / "projector"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("encoder", "conflict"),
    [
        (OTHER, None),
        (None, None),
        (OTHER.model_copy(update={"name": "clip"}), "name clip is not other"),
        (OTHER.model_copy(update={"preprocessing": "q"}), "preprocessing q is not p"),
    ],
)
def test_a_projector_refuses_features_of_another_encoder(
    command: str, encoder: EncoderInfo | None, conflict: str | None, projector: Path, tmp_path: Path
) -> None:
    values = pa.array(np.ones(2 * CLIP_WIDTH, np.float16))
    columns = {"id": ["a", "b"], "emotion": ["joy", "fear"]}
    table = pa.table({**columns, "features": pa.FixedSizeListArray.from_arrays(values, CLIP_WIDTH)})
    pq.write_table(
        table.replace_schema_metadata(parquet_metadata(encoder) if encoder else None), tmp_path / "f.parquet"
    )
    arguments = [command, "--projector", str(projector), "--features", str(tmp_path / "f.parquet"), "--json"]
    result = CliRunner().invoke(app, arguments)
    if conflict is None:
        assert result.exit_code == 0, result.exception
        return
    assert isinstance(result.exception, DataError)
    assert str(result.exception).endswith(f"of another encoder than the projector was trained on: {conflict}")


def test_the_command_says_what_is_wrong_in_one_line(s3_root: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["--encoder", "owner/model"], "pin owner/model with --revision"),
        (["--encoder", str(tmp_path), "--cpus-per-actor", "0"], "the pool cannot be used: cpus_per_actor"),
        (["--encoder", str(tmp_path)], f"no data set at {s3_root}/nothing"),
    ):
        result = CliRunner().invoke(app, ["features", "nothing", "--name", "x", "--root", s3_root, *arguments])
        assert isinstance(result.exception, ConfigError | DataError)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)


# From pictures to a trained projector, on the session's platform


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_features_train_a_projector_that_names_their_encoder(jobs: Jobs, tiny_clip: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for number in range(90):
        (images / f"{number}.png").write_bytes(drawn_picture(number, width=64, height=48))
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A plain colour."}]
        split = ("train", "train", "test")[number % 3]
        fields = {"id": str(number), "image": f"{number}.png", "split": split, "label": EKMAN[number // 15]}
        lines.append(json.dumps({**fields, "conversations": turns}) + "\n")
    (tmp_path / "records.jsonl").write_text("".join(lines))
    ingested = jobs.run(
        "ingest", "instruct", "--records", tmp_path / "records.jsonl", "--images", images, "--name", "plain",
        "--set", "near_duplicate_bits=-1", "--json",
    ).document  # fmt: skip
    assert ingested["rows_kept"] == 90
    made = jobs.run("features", "plain", "--encoder", tiny_clip, "--name", "plain-clip", "--json").document
    assert (made["images_kept"], made["feature_width"], made["encoder"]["weights"]) == (90, CLIP_WIDTH, "random")
    shown = jobs.run("features", "plain", "--encoder", tiny_clip, "--name", "plain-clip")
    assert "RANDOM WEIGHTS" in shown.stdout
    assert "unchanged" in shown.stdout

    text = f"""
[data]
dataset = "s3://tinyemo/datasets/plain-clip"
[projector]
encoder = "tiny-clip"
encoder_width = {CLIP_WIDTH}
[train]
num_epochs = 2
global_batch_size = 16
[engine]
precision = "fp32"
"""
    recipe = jobs.recipe("on-tiny-clip", text)
    result = jobs.run("train", recipe, "--json").document[0]
    assert (result["num_test"], result["encoder_weights"]) == (30, "random")
    refused = jobs.run("train", recipe, "--set", 'projector.encoder="clip-b16"', "--dry-run")
    assert "projector.encoder: clip-b16 and the features of" in refused.error

    projector = f"runs:/{result['run_id']}/projector"
    stored = ("evaluate", "--projector", projector, "--features", "s3://tinyemo/datasets/plain-clip")
    evaluated = jobs.run(*stored, "--split", "test", "--json").document
    assert evaluated["top1_accuracy"] == result["test_top1_accuracy"]
    assert evaluated["card"]["encoder_name"] == "tiny-clip"
    assert evaluated["card"]["encoder_revision"] == made["encoder"]["revision"]
    assert "RANDOM ENCODER" in jobs.run(*stored).stdout
    assert "has no split 'val'" in jobs.run(*stored, "--split", "val").error
