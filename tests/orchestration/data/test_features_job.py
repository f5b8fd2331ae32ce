"""Features of a whole data set on a Ray cluster: resumed by part, and a projector trains on them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from job_runner import Jobs
from record_files import drawn_picture, write_records
from vision_files import CLIP_WIDTH, EKMAN, photograph, photographed, read_table, with_image

from orchestration.assets.model_files import EncoderChoice, choose_encoder, describe_choice
from orchestration.data.features import (
    NOTES,
    PoolConfig,
    make_features,
    read_notes,
    read_stored_features,
)
from orchestration.data.manifest import (
    id_hash,
    load_manifest,
    read_file,
    read_index,
    verify_manifest,
)
from orchestration.services import ray_cluster, storage
from tinyemo.encoders import EFFICIENTNET_LITE0
from tinyemo.errors import AssetError, ConfigError, DataError

ONE = PoolConfig(num_actors=1)

# The pool


def use_cluster(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    """Stand in for a cluster whose one node, up or not, has these resources."""
    monkeypatch.setattr(ray_cluster, "_running_nodes", list)
    monkeypatch.setattr(ray_cluster, "_configured_nodes", lambda: [(resources, 1)])


def test_an_actor_gets_a_gpu_where_the_cluster_could_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cluster(monkeypatch, CPU=4.0)
    assert PoolConfig().num_gpus() == 0
    with pytest.raises(ConfigError, match=r"gpus_per_actor is 0\.5 and the cluster cannot have that many GPUs"):
        PoolConfig(gpus_per_actor=0.5).num_gpus()
    use_cluster(monkeypatch, CPU=4.0, GPU=2.0)
    assert PoolConfig().num_gpus() == 1
    assert PoolConfig(gpus_per_actor=0.25).num_gpus() == 0.25
    assert PoolConfig(gpus_per_actor=0).num_gpus() == 0


def test_there_are_as_many_actors_as_have_room_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cluster(monkeypatch, CPU=8.0)
    assert PoolConfig().count_actors(100) == 8
    assert PoolConfig().count_actors(3) == 3
    assert PoolConfig(num_actors=2).count_actors(100) == 2
    with pytest.raises(ConfigError, match="3 actors of 4 CPUs and 0 GPUs are asked for, the cluster has room for 2"):
        PoolConfig(num_actors=3, cpus_per_actor=4).count_actors(100)
    with pytest.raises(ConfigError, match="room for 0"):
        PoolConfig(cpus_per_actor=9).count_actors(100)
    use_cluster(monkeypatch, CPU=8.0, GPU=2.0)
    assert PoolConfig().count_actors(100) == 2
    assert PoolConfig(gpus_per_actor=0.25).count_actors(100) == 8
    assert PoolConfig(cpus_per_actor=0.5, gpus_per_actor=0.1).count_actors(100) == 16


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


# The whole job, on a real Ray cluster


def test_the_result_is_a_feature_data_set_with_patches(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(23))
    seen: list[tuple[str, int, int]] = []
    report = make_features(
        source.uri, choose_encoder(str(tiny_clip)), name="tiny", root=s3_root, images_per_part=5,
        advance=lambda *step: seen.append(step),
    )  # fmt: skip
    manifest = report.manifest
    assert manifest == load_manifest(f"{s3_root}/tiny", "features")
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
        assert table["label"][line["row"]].as_py() == line["label"]
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
        source.uri, choose_encoder(str(tiny_clip)), name="tiny", root=s3_root, images_per_part=5, has_patches=False,
        pool=ONE,
    )  # fmt: skip
    assert other.manifest.version != manifest.version
    assert (other.manifest.patches, other.manifest.patch_grid) == ([], None)


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
    whole = make_features(source.uri, choice, name="whole", root=s3_root, images_per_part=4, pool=ONE).manifest
    resumed = load_manifest(f"{s3_root}/killed", "features")
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
        make_features(source.uri, choose_encoder(str(tiny_clip)), name="bad", root=s3_root, pool=ONE)
    assert "\n" not in str(caught.value)
    assert not storage.exists(f"{s3_root}/bad/latest.json")


def test_what_cannot_become_features_is_refused(cluster: str, s3_root: str, tiny_clip: Path) -> None:
    choice = choose_encoder(str(tiny_clip))
    unlabelled = write_records(s3_root, [with_image(number, photograph(number)) for number in range(3)])
    with pytest.raises(DataError, match=r"none of 3 images of .* has a label"):
        make_features(unlabelled.uri, choice, name="none", root=s3_root)
    with pytest.raises(ConfigError, match="--name drawn is the data set itself"):
        make_features(f"{s3_root}/drawn", choice, name="drawn", root=s3_root)
    with pytest.raises(DataError, match="no data set at"):
        make_features(f"{s3_root}/nothing", choice, name="none", root=s3_root)
    broken = write_records(s3_root, [with_image(n, b"no image %d" % n, label="joy") for n in range(2)], name="broken")
    with pytest.raises(DataError, match="0 images have a label and a feature"):
        make_features(broken.uri, choice, name="none", root=s3_root, pool=ONE)


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
    made = jobs.run(
        "features", "plain", "--encoder", tiny_clip, "--name", "plain-clip", "--actors", "1", "--json"
    ).document
    assert (made["images_kept"], made["feature_width"], made["encoder"]["weights"]) == (90, CLIP_WIDTH, "random")
    shown = jobs.run("features", "plain", "--encoder", tiny_clip, "--name", "plain-clip")
    assert "RANDOM WEIGHTS" in shown.stdout
    assert "unchanged" in shown.stdout

    text = f"""
[data]
dataset = "s3://tinyemo/datasets/plain-clip"
num_readers = 1
[projector]
encoder = "tiny-clip"
encoder_width = {CLIP_WIDTH}
[workers]
num_workers = 1
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
