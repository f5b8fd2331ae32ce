"""Released folder layouts of emotion data sets, read into a table of labels for the one ingest of images.

Layouts are those that the published projector's loaders read (repository ggcr/TinyEmo, `projector_mps/dataloaders`).
None of these data sets is ours to ship, so tests use made folders; what could not be checked against a release is said
in docs/evaluation.md. Every function takes the folder and yields (path below it, label, split or None).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestration.data.staging import IMAGE_SUFFIXES
from tinyemo.errors import ConfigError, DataError

Row = tuple[str, str, str | None]

SHORT = {"content": "contentment", "sad": "sadness"}
"""Machajdik and Hanbury's short forms of two of Mikels' labels (doi 10.1145/1873951.1873965)."""
UNBIASED_EMO_WORDS = ("anger", "fear", "joy", "love", "sadness", "surprise")
"""Parrott's six primary emotions, by which UnbiasedEmo is sorted (Panda et al., 2018); love is none of Ekman's."""


def _images(root: Path, folder: str) -> Iterator[Path]:
    """Yield every image below a folder, as a path below the root.

    Raises:
        DataError: the folder is not there, or holds no image.
    """
    found = sorted(path for path in (root / folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{root / folder} holds no image: give the folder of the release that contains it")
    yield from (path.relative_to(root) for path in found if not path.name.startswith("."))


def _by_folder(root: Path, folder: str, depth: int) -> Iterator[Row]:
    for path in _images(root, folder):
        if len(path.parts) > depth + 1:
            yield path.as_posix(), path.parts[depth], None


def emotion6(root: Path) -> Iterator[Row]:
    """`images/<label>/<number>.jpg`; the label is the folder, the keyword that the image was searched with."""
    yield from _by_folder(root, "images", 1)


def emotionroi(root: Path) -> Iterator[Row]:
    """`images/<label>/<number>.jpg`, and the published split in `training_testing_split/{training,testing}.txt`."""
    for split, name in (("train", "training.txt"), ("test", "testing.txt")):
        path = root / "training_testing_split" / name
        if not path.is_file():
            raise DataError(f"{path} is not there: give the folder EmotionROI of the release")
        for line in path.read_text(encoding="utf-8").split():
            yield f"images/{line}", line.split("/")[0], split


def emoset(root: Path) -> Iterator[Row]:
    """`train.json`, `val.json`, `test.json`, each a list of [label, path of the image, path of its annotation]."""
    for split in ("train", "val", "test"):
        path = root / f"{split}.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            found = [(str(image), str(label), split) for label, image, *_ in rows]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not EmoSet's list of images ({error}): give the folder EmoSet-118K") from error
        yield from found


def webemo(root: Path) -> Iterator[Row]:
    """`<split>/<label>/<file>`, the form that the published loader reads, with WEBEmo's own spellings of labels."""
    for split in ("train", "validation", "test"):
        if (root / split).is_dir():
            yield from ((image, label, split) for image, label, _ in _by_folder(root, split, 1))


def fi(root: Path) -> Iterator[Row]:
    """`<label>/<file>`; no split is published."""
    yield from _by_folder(root, "", 0)


def artphoto(root: Path) -> Iterator[Row]:
    """`<label>_<number>.jpg` in one folder, with short forms of two labels."""
    for path in _images(root, ""):
        label = path.name.split("_")[0].lower()
        yield path.as_posix(), SHORT.get(label, label), None


def abstract(root: Path) -> Iterator[Row]:
    """`ABSTRACT_groundTruth.csv`, votes for each label, beside the images; a tie of most votes is dropped."""
    path = root / "ABSTRACT_groundTruth.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, quotechar="'"))
        labels = [name.strip().lower() for name in header[1:]]
        for image, *cells in (row for row in rows if row):
            votes = [int(cell) for cell in cells]
            if votes.count(max(votes)) == 1:
                label = labels[votes.index(max(votes))]
                yield image, SHORT.get(label, label), None
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not the table of votes ({error}): give the folder testImages_abstract") from error


def unbiasedemo(root: Path) -> Iterator[Row]:
    """`images/<label>/<object>/<file>`."""
    yield from _by_folder(root, "images", 1)


@dataclass(frozen=True)
class ReleasedLayout:
    """How to read one data set, and the labels that it is sorted by.

    Attributes:
        taxonomy: name of a taxonomy, or words.
        split: of images for which no split is published; None: the image decides.
    """

    read: Callable[[Path], Iterator[Row]]
    taxonomy: str | tuple[str, ...]
    split: str | None = None


LAYOUTS: dict[str, ReleasedLayout] = {
    "emotion6": ReleasedLayout(emotion6, "ekman", "test"),
    "emotionroi": ReleasedLayout(emotionroi, "ekman"),
    "emoset": ReleasedLayout(emoset, "mikels"),
    "webemo": ReleasedLayout(webemo, "parrott"),
    "fi": ReleasedLayout(fi, "mikels", "test"),
    "artphoto": ReleasedLayout(artphoto, "mikels", "test"),
    "abstract": ReleasedLayout(abstract, "mikels", "test"),
    "unbiasedemo": ReleasedLayout(unbiasedemo, UNBIASED_EMO_WORDS, "test"),
}
"""Data sets of the published table. Those that it reports zero-shot have no split of their own: all of them is test."""


def find_layout(name: str) -> ReleasedLayout:
    """Return a layout by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"--layout: {name!r} is not one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def write_labels(layout: ReleasedLayout, root: Path, path: Path) -> int:
    """Write the table of labels that `ingest_images` reads, and return its number of rows.

    Args:
        layout: of the folder.
        root: folder of the release.
        path: .csv file to write, with the columns image, label and split.

    Raises:
        DataError: the folder does not have this layout.
    """
    rows = list(layout.read(root))
    if not rows:
        raise DataError(f"{root} holds no labelled image in this layout: give the folder of the release")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "split"])
        table.writerows((image, label, split or layout.split or "") for image, label, split in rows)
    return len(rows)
