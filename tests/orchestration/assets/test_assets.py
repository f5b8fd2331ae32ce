"""Assets come from the first source that answers, are what the catalogue pins, and are whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_files import EKMAN, MIRROR
from typer.testing import CliRunner

from orchestration.assets.catalogue import (
    Asset,
    Source,
    asset_names,
    find_asset,
    get_asset,
    get_from_sources,
    list_assets,
    read_provenance,
)
from orchestration.assets.sources import (
    EMOTION6_FOLDER,
    EMOTION6_MIRROR_TEST_ROWS_SHA256,
    EMOTION6_TRAIN_ROWS_SHA256,
    emotion6_from_git,
    rows_sha256,
    rows_sha256_of_file,
    run_bounded,
)
from orchestration.cli.assets import assets_app
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY

needs_mirror = pytest.mark.skipif(not (MIRROR / "emotion6").is_dir(), reason=f"no real features at {MIRROR}")
COUNTS = {"train": 12, "test": 6}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(repository: Path) -> str:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "features")
    return git(repository, "rev-parse", "HEAD")


def build_repository(repository: Path, rows: dict[str, dict[str, torch.Tensor]]) -> tuple[str, str]:
    """A git repository of the public one's shape; its address and commit. `rows`: split -> "label/n" -> feature."""
    repository.mkdir()
    git(repository, "init", "--quiet")
    git(repository, "config", "uploadpack.allowFilter", "true")
    (repository / "README.md").write_text("other files")
    for split, features in rows.items():
        for name, feature in features.items():
            path = repository / EMOTION6_FOLDER / split / f"{name}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(feature, path)
    return f"file://{repository}", commit_all(repository)


def small_rows() -> dict[str, dict[str, torch.Tensor]]:
    """(1, 768) float16 features; validation is test over again, as in the public repository."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        split: {f"{EKMAN[i % 6]}/{i}": torch.randn(1, 768, generator=generator).half() for i in range(count)}
        for split, count in COUNTS.items()
    }
    return {**rows, "validation": rows["test"]}


def digest_of(features: dict[str, torch.Tensor]) -> str:
    values = np.stack([feature.reshape(-1).numpy() for feature in features.values()])
    return rows_sha256(list(features), [name.split("/")[0] for name in features], values)


# The public source of Emotion6, on a local repository of its shape


def test_feature_files_become_the_mirrors_parquet(tmp_path: Path) -> None:
    rows = small_rows()
    url, commit = build_repository(tmp_path / "public", rows)
    (tmp_path / "out").mkdir()
    found = emotion6_from_git(
        tmp_path / "out", url=url, commit=commit, expected_rows=COUNTS, train_rows_sha256=digest_of(rows["train"])
    )
    assert found["rows"] == COUNTS
    assert found["rows_sha256"] == {split: digest_of(rows[split]) for split in COUNTS}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    table = pq.read_table(tmp_path / "out" / "test.parquet")
    assert str(table.schema.field("features").type) == "fixed_size_list<element: halffloat>[768]"
    assert table.column_names == ["id", "emotion", "features"]
    assert table["id"].to_pylist() == sorted(rows["test"])
    for row in table.to_pylist():
        assert row["emotion"] == row["id"].split("/")[0]
        assert row["features"] == rows["test"][row["id"]].reshape(-1).tolist()


@needs_mirror
def test_public_files_and_mirror_have_the_same_train_digest(tmp_path: Path) -> None:
    """The mirror's rows written as .pt files come back with the digests that the catalogue pins."""
    rows = {}
    for split in ("train", "test"):
        table = pq.read_table(MIRROR / "emotion6" / f"{split}.parquet").to_pylist()
        rows[split] = {row["id"]: torch.tensor(row["features"], dtype=torch.float16) for row in table}
    url, commit = build_repository(tmp_path / "public", rows)
    (tmp_path / "out").mkdir()
    found = emotion6_from_git(tmp_path / "out", url=url, commit=commit, expected_rows={"train": 1386, "test": 306})
    assert found["rows_sha256"]["train"] == EMOTION6_TRAIN_ROWS_SHA256
    assert found["rows_sha256"]["test"] == EMOTION6_MIRROR_TEST_ROWS_SHA256
    assert rows_sha256_of_file(tmp_path / "out" / "train.parquet") == (1386, EMOTION6_TRAIN_ROWS_SHA256)


def test_another_repository_is_refused(tmp_path: Path) -> None:
    rows = small_rows()
    url, commit = build_repository(tmp_path / "public", rows)
    digest = digest_of(rows["train"])
    cases = [
        ({"expected_rows": {"train": 13, "test": 6}}, "train holds 12 feature files, it must hold 13"),
        ({"train_rows_sha256": "0" * 64}, "the train rows have digest"),
        ({"commit": "1" * 40}, "git from file://"),
        ({"url": f"file://{tmp_path}/nowhere"}, "git from file://"),
    ]
    for number, (change, message) in enumerate(cases):
        options = {"url": url, "commit": commit, "expected_rows": COUNTS, "train_rows_sha256": digest, **change}
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssetError) as caught:
            emotion6_from_git(tmp_path / str(number), **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


class RunsWhenUnpickled:
    """A pickle that would write a file on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_feature_file_never_runs_code(tmp_path: Path) -> None:
    rows = small_rows()
    build_repository(tmp_path / "public", rows)
    bad = tmp_path / "public" / EMOTION6_FOLDER / "train" / "anger" / "0.pt"
    payloads: list[bytes] = [pickle.dumps(RunsWhenUnpickled(tmp_path / "ran")), b"", b"PK no archive"]
    torch.save(RunsWhenUnpickled(tmp_path / "ran"), tmp_path / "payload.pt")
    payloads.append((tmp_path / "payload.pt").read_bytes())
    torch.save(torch.zeros(767), tmp_path / "payload.pt")
    payloads.append((tmp_path / "payload.pt").read_bytes())
    for number, payload in enumerate(payloads):
        bad.write_bytes(payload)
        commit = commit_all(tmp_path / "public")
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssetError, match=r"anger/0\.pt"):
            emotion6_from_git(
                tmp_path / str(number), url=f"file://{tmp_path / 'public'}", commit=commit, expected_rows=COUNTS
            )
    assert not (tmp_path / "ran").exists()


# The mirror and the cache


@needs_mirror
def test_the_mirror_comes_first_and_the_note_counts_its_test_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(MIRROR))
    folder = get_asset("emotion6")
    note = read_provenance(folder)
    assert folder == cache / "assets" / "emotion6"
    assert note["source"] == "local mirror"
    assert (note["rows"], note["public_rows"]) == ({"train": 1386, "test": 306}, {"train": 1386, "test": 594})
    assert note["rows_sha256"] == {"train": EMOTION6_TRAIN_ROWS_SHA256, "test": EMOTION6_MIRROR_TEST_ROWS_SHA256}
    monkeypatch.delenv("TINYEMO_MIRROR")
    assert get_asset("emotion6") == folder  # from the cache, nothing else would answer
    assert [path.name for path in (cache / "assets").iterdir()] == ["emotion6"]


def text_asset(*sources: Source) -> Asset:
    return replace(find_asset("emotion6"), name="text", files=("a.txt",), sources=sources)


def fetch_text(folder: Path, *, text: str) -> dict[str, str]:
    (folder / "a.txt").write_text(text)
    return {"revision": text}


def fetch_half(folder: Path) -> dict[str, str]:
    (folder / "a.txt").write_text("ha")
    raise AssetError("broke off")


def test_sources_are_tried_in_order_and_leave_nothing_of_a_failure(cache: Path) -> None:
    asset = text_asset(
        Source("local mirror", "first", fetch_half),
        Source("public source", "second", partial(fetch_text, text="whole")),
    )
    folder = get_from_sources(asset)
    assert (folder / "a.txt").read_text() == "whole"
    assert read_provenance(folder)["source"] == "public source"
    assert [path.name for path in (cache / "assets").iterdir()] == ["text"]


def test_a_damaged_cache_is_fetched_again(cache: Path) -> None:
    asset = text_asset(Source("local mirror", "first", partial(fetch_text, text="whole")))
    folder = get_from_sources(asset)
    for damage in (
        lambda: (folder / "a.txt").write_text("whale"),
        (folder / "a.txt").unlink,
        lambda: (folder / "provenance.json").write_text("{"),
        lambda: (folder / "provenance.json").write_text("{}"),
    ):
        damage()
        assert (get_from_sources(asset) / "a.txt").read_text() == "whole"
        assert read_provenance(folder)["asset"] == "text"
    assert [path.name for path in (cache / "assets").iterdir()] == ["text"]


def test_a_refresh_that_fails_keeps_what_was_there(cache: Path) -> None:
    get_from_sources(text_asset(Source("local mirror", "first", partial(fetch_text, text="old"))))
    with pytest.raises(AssetError, match="broke off"):
        get_from_sources(text_asset(Source("local mirror", "first", fetch_half)), is_refreshed=True)
    renewed = text_asset(Source("local mirror", "first", partial(fetch_text, text="new")))
    assert (get_from_sources(renewed) / "a.txt").read_text() == "old"
    assert (get_from_sources(renewed, is_refreshed=True) / "a.txt").read_text() == "new"


def test_where_no_source_answers_one_line_lists_what_was_tried(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = find_asset("emotion6")
    nowhere = partial(emotion6_from_git, url=f"file://{tmp_path}/nowhere")
    asset = replace(asset, sources=(asset.sources[0], replace(asset.sources[1], fetch=nowhere)))
    with pytest.raises(AssetError) as caught:
        get_from_sources(asset)
    text = str(caught.value)
    assert "\n" not in text
    assert "(1) local mirror" in text
    assert "TINYEMO_MIRROR is not set" in text
    assert "(2) public source" in text
    assert "nowhere" in text
    assert list((cache / "assets").iterdir()) == []

    (tmp_path / "mirror" / "emotion6").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "mirror" / "emotion6" / f"{split}.parquet").write_bytes(b"something else")
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(AssetError, match=r"train\.parquet has sha256 .* pinned is 66c4bb2af159"):
        get_from_sources(asset)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set TINYEMO_CACHE"):
        get_from_sources(text_asset(Source("local mirror", "first", partial(fetch_text, text="whole"))))


def test_an_unknown_asset_lists_the_catalogue() -> None:
    with pytest.raises(ConfigError, match="unknown asset 'emotion7': it must be one of emotion6, oasis, smollm2-135m"):
        get_asset("emotion7")
    assert asset_names() == ("emotion6", "oasis", "smollm2-135m", "efficientnet-lite0")
    assert {size.asset for size in FAMILY.values() if size.asset} <= set(asset_names())


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid_file}; wait"
    with pytest.raises(AssetError, match="slow thing: no end after 1 s"):
        run_bounded(["sh", "-c", script], what="slow thing", timeout_s=1.0)
    status = Path(f"/proc/{pid_file.read_text().strip()}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_a_program_that_is_not_there_is_one_line() -> None:
    with pytest.raises(AssetError, match="thing: cannot run no-such-program"):
        run_bounded(["no-such-program"], what="thing", timeout_s=1.0)


# The command line


def test_the_list_names_every_source_in_order() -> None:
    shown = CliRunner().invoke(assets_app, ["list", "--json"])
    assert shown.exit_code == 0
    entries = {entry["name"]: entry for entry in json.loads(shown.stdout)}
    assert list(entries) == [status.asset.name for status in list_assets()]
    assert [source["name"] for source in entries["emotion6"]["sources"]] == ["local mirror", "public source"]
    assert entries["emotion6"]["cached"] is None
    assert "not cached" in CliRunner().invoke(assets_app, ["list"]).stdout


@needs_mirror
def test_get_prints_the_folder_and_how_many_test_rows_it_has(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(MIRROR))
    shown = CliRunner().invoke(assets_app, ["get", "emotion6"])
    assert shown.stdout.splitlines()[0] == str(cache / "assets" / "emotion6")
    assert "test: 306 of 594 public rows" in shown.stderr
    document = json.loads(CliRunner().invoke(assets_app, ["get", "emotion6", "--json"]).stdout)
    assert document["source"] == "local mirror"


def test_no_source_is_exit_status_2(cache: Path) -> None:
    code = "from orchestration.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TINYEMO_CACHE": str(cache)}
    command = [sys.executable, "-c", code, "assets", "get", "no-such-asset"]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
