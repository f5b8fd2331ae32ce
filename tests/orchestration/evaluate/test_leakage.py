"""Planted copies of train rows are found by kind, and nothing else is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from feature_files import rows as feature_table
from feature_files import write_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from ingested_features import ingest
from PIL import Image

from orchestration.data.ingest import ingest_images
from orchestration.evaluate.evaluation_recipe import LeakageConfig
from orchestration.evaluate.group_file import source_images
from orchestration.evaluate.leakage import find_leakage
from orchestration.evaluate.scoring import FeatureRows, open_rows

WIDTH = 64


def data_file(path: Path, ids: list[str], features: np.ndarray) -> FeatureRows:
    """A local file of features as a data set of its own."""
    write_splits(path.parent, **{path.stem: feature_table(ids, features.astype(np.float16))})
    return open_rows(str(path))


def made(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH))


def test_unrelated_rows_are_clean(tmp_path: Path) -> None:
    test = data_file(tmp_path / "a.parquet", [f"{n}" for n in range(200)], made(0, 200))
    train = data_file(tmp_path / "b.parquet", [f"{n}" for n in range(300)], made(1, 300))
    found = find_leakage(test, [train], LeakageConfig())
    assert (found.is_checked, found.has_leakage, found.findings) == (True, False, [])


@given(seed=st.integers(0, 1000), num_same=st.integers(0, 5), num_near=st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_planted_features_are_found_by_kind(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_same: int, num_near: int
) -> None:
    """Equal rows are the same, rows turned by 5 degrees (cosine 0.996) are near, by 20 degrees (0.94) neither."""
    folder, rng = tmp_path_factory.mktemp("leakage"), np.random.default_rng(seed)
    base, test = made(seed, 60), made(seed + 5000, 40)
    chosen = rng.permutation(40)
    for place, source in zip(chosen[:num_same], rng.permutation(60), strict=False):
        test[place] = base[source]
    for degrees, places in ((5, chosen[num_same : num_same + num_near]), (20, chosen[-5:])):
        for place in places:
            row = base[rng.integers(60)]
            aside = test[place] - row * (test[place] @ row) / (row @ row)
            aside *= np.linalg.norm(row) / np.linalg.norm(aside)
            test[place] = row * np.cos(np.radians(degrees)) + aside * np.sin(np.radians(degrees))
    found = find_leakage(
        data_file(folder / "test.parquet", [f"t{n}" for n in range(40)], test),
        [data_file(folder / "base.parquet", [f"b{n}" for n in range(60)], base)],
        LeakageConfig(),
    )
    assert (found.counts["same_features"], found.counts["near_features"]) == (num_same, num_near)
    assert {one.test_id for one in found.findings} == {f"t{n}" for n in chosen[: num_same + num_near]}


def test_ids_count_in_one_data_set_and_digests_of_images_everywhere(tmp_path: Path) -> None:
    digest = "ab" * 32
    test = data_file(tmp_path / "x" / "set.parquet", ["1", "2", digest], made(0, 3))
    own = data_file(tmp_path / "y" / "set.parquet", ["2", "9", digest], made(1, 3))
    other = data_file(tmp_path / "z" / "other.parquet", ["1", digest], made(2, 2))
    found = find_leakage(test, [own, other], LeakageConfig())
    kinds = sorted((one.kind, one.test_id) for one in found.findings)
    assert kinds == [("same_id", "2"), ("same_image", digest), ("same_image", digest)]


def test_without_train_data_nothing_is_said(tmp_path: Path) -> None:
    found = find_leakage(data_file(tmp_path / "a.parquet", ["1"], made(0, 1)), [], LeakageConfig())
    assert (found.is_checked, found.has_leakage) == (False, False)


def test_of_too_many_pairs_an_even_share_is_compared_and_said(tmp_path: Path) -> None:
    features = made(0, 100)
    test = data_file(tmp_path / "a.parquet", [f"a{n}" for n in range(100)], features)
    train = data_file(tmp_path / "b.parquet", [f"b{n}" for n in range(100)], features)
    found = find_leakage(test, [train], LeakageConfig(max_pairs=2500, num_findings=3))
    assert (found.share_checked, found.counts["same_features"], len(found.findings)) == (0.25, 25, 3)


def picture(seed: int, quality: int = 95) -> bytes:
    """A coarse random pattern, which survives another compression."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_a_picture_that_was_saved_again_is_near(
    tmp_path: Path, s3_root: str, tasks_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes, and here its features, are others; its perceptual hash is not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    contents = {
        "first": {"joy": [picture(1), picture(2)], "fear": [picture(3)]},
        "second": {"joy": [picture(1, quality=60), picture(7)], "fear": [picture(8)]},
    }
    sets = {}
    for number, (name, folders) in enumerate(contents.items()):
        for label, images in folders.items():
            (tmp_path / name / "test" / label).mkdir(parents=True)
            for place, data in enumerate(images):
                (tmp_path / name / "test" / label / f"{place}.jpg").write_bytes(data)
        images = ingest_images(None, tmp_path / name, name=name, root=s3_root).manifest
        source = {"kind": "images", "name": name, "digest": images.digest}
        ids = _digests_of(contents[name])
        write_splits(tmp_path / f"{name}-features", test=feature_table(ids, made(number, 3).astype(np.float16)))
        manifest = ingest(tmp_path / f"{name}-features", s3_root, name=f"{name}-features").manifest
        sets[name] = FeatureRows(
            f"{name}-features", manifest.uri, manifest.digest, open_rows(manifest.uri).parts,
            manifest.model_copy(update={"source": source}),
        )  # fmt: skip
        assert source_images(sets[name].manifest) is not None
    found = find_leakage(sets["second"], [sets["first"]], LeakageConfig())
    ids = {name: _digests_of(content) for name, content in contents.items()}
    assert [(one.kind, one.test_id, one.train_id) for one in found.findings] == [
        ("near_image", ids["second"][0], ids["first"][0])
    ]
    assert found.has_compared_images


def _digests_of(folders: dict[str, list[bytes]]) -> list[str]:
    import hashlib

    return [hashlib.sha256(data).hexdigest() for images in folders.values() for data in images]
