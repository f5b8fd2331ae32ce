"""Each released layout, on a small made folder of it: labels, splits, and what is dropped."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.data.ingest import ingest_images
from orchestration.data.ingest_rules import IngestRules
from orchestration.data.layouts import LAYOUTS, find_layout, write_labels
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import find_taxonomy


def picture(path: Path) -> None:
    """A made picture that no other one is like."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(path.as_posix().encode()[-8:], "big")
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(path)


def make(name: str, root: Path) -> dict[str, tuple[str, str]]:
    """Make a folder of a layout; return the label and split of each image that it names."""
    files: dict[str, dict[str, tuple[str, str]]] = {
        "emotion6": {"images/anger/1.jpg": ("anger", "test"), "images/joy/12.jpg": ("joy", "test")},
        "emotionroi": {"images/anger/1.jpg": ("anger", "train"), "images/joy/2.jpg": ("joy", "test")},
        "emoset": {
            f"image/awe/awe_{number:05d}.jpg": ("awe", split) for number, split in enumerate(("train", "val", "test"))
        },
        "webemo": {
            "train/cheerfullness/a.jpg": ("cheerfullness", "train"),
            "test/irritabilty/b.jpg": ("irritabilty", "test"),
        },
        "fi": {"amusement/amusement_0001.jpg": ("amusement", "test"), "fear/x.jpg": ("fear", "test")},
        "artphoto": {"sad_0012.jpg": ("sadness", "test"), "contentment_1.jpg": ("contentment", "test")},
        "abstract": {"abstract_0001.jpg": ("contentment", "test"), "abstract_0003.jpg": ("sadness", "test")},
        "unbiasedemo": {"images/love/dog/1.jpg": ("love", "test"), "images/fear/bench/1.jpg": ("fear", "test")},
    }
    for file in files[name]:
        picture(root / file)
    if name == "emotion6":
        (root / "ground_truth.txt").write_text("[image_filename]\t[valence]\n")
    if name == "emotionroi":
        (root / "training_testing_split").mkdir()
        (root / "training_testing_split" / "training.txt").write_text("anger/1.jpg\n")
        (root / "training_testing_split" / "testing.txt").write_text("joy/2.jpg\n")
        picture(root / "ground_truth" / "anger" / "1.jpg")  # a map of regions, no image of the set
    if name == "emoset":
        for image, (label, split) in files[name].items():
            (root / f"{split}.json").write_text(json.dumps([[label, image, image.replace("jpg", "json")]]))
    if name == "abstract":
        picture(root / "abstract_0002.jpg")
        labels = ("Amusement", "Anger", "Awe", "Content", "Disgust", "Excitement", "Fear", "Sad")
        rows = (("1", 0, 0, 2, 10, 0, 1, 0, 0), ("2", 5, 0, 0, 5, 0, 0, 0, 0), ("3", 0, 2, 0, 0, 0, 0, 0, 9))
        header = ",".join(f"'{label}'" for label in ("Image", *labels))
        lines = [f"'abstract_000{number}.jpg',{','.join(map(str, votes))}" for number, *votes in rows]
        (root / "ABSTRACT_groundTruth.csv").write_text("\n".join([header, *lines]) + "\n")
    return files[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_each_layout_becomes_a_table(name: str, tmp_path: Path) -> None:
    """A tie of votes (abstract_0002) and files that are no image of the set are left out; 10 votes beat 2."""
    wanted = make(name, tmp_path / "release")
    write_labels(LAYOUTS[name], tmp_path / "release", tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image"]: (row["label"], row["split"]) for row in rows} == wanted
    taxonomy = find_taxonomy(LAYOUTS[name].taxonomy)
    assert [row["label"] for row in rows if taxonomy.label(row["label"]) is None] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_folder_is_refused_with_advice(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="give the folder"):
        write_labels(LAYOUTS[name], tmp_path / "empty", tmp_path / "labels.csv")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="'emo' is not one of emotion6"):
        find_layout("emo")


@pytest.mark.parametrize("name", ["webemo", "unbiasedemo"])
def test_a_layout_goes_through_the_one_ingest(name: str, tmp_path: Path, s3_root: str, tasks_in_process: None) -> None:
    """WEBEmo's spellings become ours, and UnbiasedEmo's love is kept."""
    make(name, tmp_path / "release")
    write_labels(LAYOUTS[name], tmp_path / "release", tmp_path / "labels.csv")
    rules = IngestRules(taxonomy=find_taxonomy(LAYOUTS[name].taxonomy))
    manifest = ingest_images(
        tmp_path / "labels.csv", tmp_path / "release", name=name, root=s3_root, rules=rules
    ).manifest
    labels = {split: counts.labels for split, counts in manifest.splits.items()}
    assert (
        labels
        == {
            "webemo": {"train": {"cheerfulness": 1}, "test": {"irritability": 1}},
            "unbiasedemo": {"test": {"fear": 1, "love": 1}},
        }[name]
    )
