"""A bulk run stores one row per image, goes on where it was stopped, and its counts add up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestration.assets.model_files import fetch_from_s3
from orchestration.services import storage
from orchestration.use.bulk import Job, Row, check_output, run
from orchestration.use.locations import fetch_export, find_images
from tinyemo.errors import ConfigError, DataError

IMAGES = [f"{number}.jpg" for number in range(7)]


class StoppedError(Exception):
    """Stands for the end of a process."""


def worker(seen: list[str], *, broken: frozenset[str] = frozenset(), stops_at: str = "") -> Callable[[], object]:
    def compute(images: Sequence[str]) -> list[Row]:
        if stops_at in images:
            raise StoppedError
        seen.extend(images)
        return [
            {"image": image, "problem": "torn"}
            if image in broken
            else {"image": image, "label": "joy", "scores": {"joy": 0.5, "awe": len(image) / 10}, "problem": None}
            for image in images
        ]

    return lambda: compute


def job(build: object, output: Path | None, settings: str = "a") -> Job:
    return Job(build, settings, chunk_size=2, output=output)  # type: ignore[arg-type]


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_stopped_run_goes_on_and_an_equal_one_computes_nothing(name: str, tmp_path: Path) -> None:
    output = tmp_path / "new folder" / name
    seen: list[str] = []
    with pytest.raises(StoppedError):
        run(job(worker(seen, stops_at="4.jpg"), output), IMAGES, on_cluster=False, progress=quiet)
    assert not output.exists()
    partial = output.with_name(f"{name}.partial")
    partial.write_text(partial.read_text() + '{"image": "6.jpg", "scores": {"joy": 0.1}')  # a line torn by the kill
    steps: list[tuple[str, int, int]] = []
    result = run(
        job(worker(seen, broken=frozenset({"5.jpg"})), output), IMAGES, on_cluster=False,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert seen == IMAGES
    assert steps == [("images", done, 7) for done in (4, 6, 7)]
    assert result.summary("predicted") == "7 images = 6 predicted + 1 unreadable; 4 of them by an earlier run"
    assert result.problems == {"5.jpg": "torn"}
    stored = pq.read_table(output).to_pylist() if name.endswith("parquet") else _lines(output)
    assert [row["image"] for row in stored] == IMAGES
    assert stored[0]["words"] == ["joy", "awe"]
    assert not partial.exists()

    again = run(job(worker(seen), output), IMAGES, on_cluster=False, progress=quiet)
    assert seen == [*IMAGES, "5.jpg"]  # only the image that had failed
    assert again.rows[0] == result.rows[0]
    run(job(worker(seen), output, "b"), IMAGES, on_cluster=False, progress=quiet)
    assert seen[8:] == IMAGES  # other settings, other rows


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_where_no_image_can_be_used_the_reasons_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 7 images can be used: 0.jpg: torn; 1.jpg: torn; 2.jpg: torn$"):
        run(job(worker([], broken=frozenset(IMAGES)), tmp_path / "a.jsonl"), IMAGES, on_cluster=False, progress=quiet)


def test_a_file_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--output must end in \.parquet or \.jsonl, got 'a\.csv'"):
        check_output(Path("a.csv"))


def test_images_are_found_in_folders_and_prefixes(tmp_path: Path, s3_root: str) -> None:
    for name in ("b.jpg", "a.PNG", "deeper/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inside = [str(tmp_path / name) for name in ("a.PNG", "b.jpg", "deeper/c.webp")]
    assert find_images([str(tmp_path)]) == (inside, True)
    assert find_images([inside[1], inside[1]]) == (inside[1:2], False)
    storage.upload_folder(tmp_path, f"{s3_root}/photos")
    uris = [f"{s3_root}/photos/{name}" for name in ("a.PNG", "b.jpg", "deeper/c.webp")]
    assert find_images([f"{s3_root}/photos"]) == (uris, True)
    assert find_images([uris[1]]) == ([uris[1]], False)
    with pytest.raises(DataError, match="holds no image"):
        find_images([f"{s3_root}/nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        find_images([str(tmp_path / "empty")])


def test_a_model_in_s3_is_fetched_once_and_again_where_its_content_changes(
    tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path))
    uri = f"{s3_root}/model"
    storage.write_bytes(f"{uri}/weights", b"one")
    first = fetch_from_s3(uri)
    assert (first / "weights").read_bytes() == b"one"
    (first / "mark").write_bytes(b"")
    assert (fetch_from_s3(uri) / "mark").exists()
    storage.write_bytes(f"{uri}/weights", b"two")  # of the same size
    assert (fetch_from_s3(uri) / "weights").read_bytes() == b"two"


def test_a_run_is_found_by_its_name(tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    storage.ensure_bucket("tinyemo")
    name = s3_root.rsplit("/", 1)[-1]
    storage.write_bytes(f"s3://tinyemo/runs/{name}/model/config.json", b"{}")
    assert (fetch_export(name, "projector") / "config.json").read_bytes() == b"{}"
    storage.write_bytes(f"s3://tinyemo/runs/{name}/projector/config.json", b"[]")
    assert (fetch_export(name, "projector") / "config.json").read_bytes() == b"[]"
    assert (fetch_export(name, "model") / "config.json").read_bytes() == b"{}"
    with pytest.raises(DataError, match="no folder and no finished run is named 'never-trained'"):
        fetch_export("never-trained", "model")
    (tmp_path / "here").mkdir()
    assert fetch_export("here", "model") == tmp_path / "here"
