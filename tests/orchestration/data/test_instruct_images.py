"""Paths stay under the root, broken images are named, and pictures are alike where people would say so."""

from __future__ import annotations

import hashlib
import io
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_records import encode, frames, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from orchestration.data.image_files import (
    ImageFacts,
    inspect_image,
    path_under_root,
    perceptual_hash,
    read_ahead,
    read_image,
    stored_image,
)
from orchestration.data.ingest_rules import IngestRules, Reason, RejectedRecordError

RULES = IngestRules()
parts = st.sampled_from(["..", ".", "a", "b.jpg", "", "..a", "...", "/", " ", "\0", "é", "s3:", "~"])


def outcome_of(data: bytes, **rules: Any) -> ImageFacts | RejectedRecordError:
    """What is known of an image, or why it is rejected; nothing else may come out."""
    try:
        return inspect_image(data, IngestRules(**rules))
    except RejectedRecordError as error:
        return error


def reason_of(data: bytes, **rules: Any) -> Reason:
    outcome = outcome_of(data, **rules)
    assert isinstance(outcome, RejectedRecordError)
    return outcome.reason


@settings(deadline=None)
@given(
    path=st.lists(parts, max_size=8).map("/".join),
    root=st.sampled_from(["/data/images", "s3://bucket/images", "/"]),
    foreign_root=st.sampled_from(["", "/a", "/a/"]),
)
def test_a_path_never_leaves_the_root(path: str, root: str, foreign_root: str) -> None:
    try:
        below = path_under_root(path, root, foreign_root)
    except RejectedRecordError:
        return  # right as well
    whole = posixpath.normpath(posixpath.join("/data/images", below))
    assert whole == "/data/images" or whole.startswith("/data/images/")
    assert path_under_root(below, root, "") == below


@pytest.mark.parametrize(
    ("path", "root", "foreign_root", "below"),
    [
        ("a/b.jpg", "/data", "", "a/b.jpg"),
        ("./a//b.jpg", "/data", "", "a/b.jpg"),
        ("/data/a.jpg", "/data", "", "a.jpg"),
        ("/data/a.jpg", "/data/", "", "a.jpg"),
        ("/home/x/a.jpg", "/data", "/home/x", "a.jpg"),
        ("/home/x/a.jpg", "s3://b/data", "/home/x/", "a.jpg"),
        ("s3://b/data/a.jpg", "s3://b/data", "", "a.jpg"),
        ("..a/b.jpg", "/data", "", "..a/b.jpg"),
    ],
)
def test_a_path_below_the_root_or_the_foreign_root_is_found(
    path: str, root: str, foreign_root: str, below: str
) -> None:
    assert path_under_root(path, root, foreign_root) == below


def test_a_link_inside_the_root_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert read_image("b.jpg", str(tmp_path), 100) == b"picture"


def test_reading_ahead_keeps_the_order_and_each_error_with_its_path(tmp_path: Path) -> None:
    for number in range(0, 40, 2):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
    found: dict[str, bytes | Reason] = {}
    for path, coming in read_ahead(map(str, range(40)), str(tmp_path), 100):
        try:
            found[path] = coming.result()
        except RejectedRecordError as error:
            found[path] = error.reason
    assert list(found) == [str(number) for number in range(40)]
    assert all(found[str(n)] == (b"%d" % n if n % 2 == 0 else Reason.IMAGE_MISSING) for n in range(40))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_a_reader_can_use_stays_as_it_came(kind: str, options: dict[str, Any], mode: str) -> None:
    if (kind, mode) == ("WEBP", "L"):
        mode = "RGB"  # WebP has no grey
    data = encode(picture(1).convert(mode), kind, **options)
    facts = inspect_image(data, RULES)
    assert (facts.sha256, facts.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert stored_image(data, RULES) == (data, 96, 64)


def test_a_phones_jpeg_with_a_second_picture_behind_it_is_a_jpeg() -> None:
    data = encode(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert stored_image(data, RULES)[0] == data
    assert inspect_image(data, RULES).num_bytes == len(data)


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encode(picture(1).convert("CMYK")), "RGB"),
        (encode(picture(1).convert("P"), "PNG"), "RGB"),
        (encode(picture(1).convert("LA"), "PNG"), "RGB"),
        (encode(picture(1).convert("RGBA"), "PNG"), "RGB"),
        (encode(picture(1).convert("1"), "PNG"), "L"),
        (encode(picture(1), "BMP"), "RGB"),
        (encode(picture(1).convert("L"), "TIFF"), "L"),
    ],
)
def test_what_is_converted_is_a_png_of_the_same_picture(data: bytes, mode: str) -> None:
    stored, width, height = stored_image(data, RULES)
    image = Image.open(io.BytesIO(stored))
    assert (image.format, image.mode, image.size) == ("PNG", mode, (width, height))
    facts = inspect_image(data, RULES)
    assert (facts.sha256, facts.num_bytes) == (hashlib.sha256(stored).hexdigest(), len(stored))
    original = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA").convert(mode), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - original).mean() < 1
    assert image.info == {}


def test_transparent_parts_become_white() -> None:
    half = picture(1).convert("RGBA")
    half.putalpha(128)
    stored, *_ = stored_image(encode(half, "PNG"), RULES)
    pixels = np.asarray(Image.open(io.BytesIO(stored)), dtype=float)
    assert np.abs(pixels - (np.asarray(picture(1), dtype=float) + 255) / 2).max() <= 2


def test_the_rules_decide_what_is_converted() -> None:
    clear, bmp, moving = encode(picture(1).convert("RGBA"), "PNG"), encode(picture(1), "BMP"), frames("GIF")
    assert reason_of(clear, convert_modes=()) == Reason.IMAGE_MODE
    assert reason_of(bmp, convert_formats=()) == Reason.IMAGE_FORMAT
    assert reason_of(moving) == Reason.IMAGE_ANIMATED
    sixteen = encode(Image.fromarray(np.zeros((32, 32), dtype=np.uint16)), "PNG")
    assert reason_of(sixteen) == Reason.IMAGE_MODE
    first, *_ = stored_image(moving, IngestRules(animated="first_frame"))
    expected = Image.open(io.BytesIO(moving)).convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), np.asarray(expected))


@settings(deadline=None)
@given(cut=st.floats(0, 0.999), seed=st.integers(0, 3), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]))
def test_a_cut_file_is_rejected_or_whole_and_never_crashes(cut: float, seed: int, kind: str) -> None:
    whole = encode(picture(seed), kind)
    data = whole[: int(len(whole) * cut)]
    outcome = outcome_of(data)
    if isinstance(outcome, RejectedRecordError):
        assert outcome.reason in (Reason.IMAGE_TRUNCATED, Reason.IMAGE_UNREADABLE)
        assert "\n" not in outcome.detail
    else:  # only an end that holds no pixels may be missing
        assert len(whole) - len(data) < 200
        assert (outcome.width, outcome.height) == (96, 64)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_flipped_bytes_never_crash(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encode(picture(1), kind), dtype=np.uint8).copy()
    data[rng.integers(0, len(data), 1 + int(rng.integers(20)))] ^= rng.integers(1, 256, dtype=np.uint8)
    outcome = outcome_of(data.tobytes())
    if isinstance(outcome, RejectedRecordError):
        assert outcome.reason.startswith("image_")
    else:
        assert outcome.width * outcome.height <= RULES.max_pixels


def test_a_picture_scaled_and_resaved_is_near_and_another_is_far() -> None:
    def bits(first: Image.Image, second: Image.Image) -> int:
        hashes = [perceptual_hash(image) for image in (first, second)]
        assert None not in hashes
        return int.bit_count((hashes[0] or 0) ^ (hashes[1] or 0))

    far = []
    for seed in range(20):
        original = picture(seed, (320, 240))
        small = original.resize((160, 120))
        resaved = Image.open(io.BytesIO(encode(small, quality=60)))
        assert bits(original, small) <= RULES.near_duplicate_bits
        assert bits(original, resaved) <= RULES.near_duplicate_bits
        assert bits(original, ImageEnhance.Brightness(original).enhance(0.9)) <= RULES.near_duplicate_bits
        far.append(bits(original, picture(seed + 100, (320, 240))))
    assert min(far) > 11  # the most that near_duplicate_bits allows


def test_a_flat_image_has_no_perceptual_hash() -> None:
    assert perceptual_hash(Image.new("RGB", (64, 64), "red")) is None
    assert inspect_image(encode(Image.new("RGB", (64, 64), "red"), "PNG"), RULES).phash is None
