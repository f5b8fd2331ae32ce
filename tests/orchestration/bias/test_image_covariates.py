"""Covariates of images, and changes to a scene."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestration.bias.image_covariates import CHANGES, COVARIATES, align, changed, measure_image


def picture(colour, size=(80, 60), kind="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def test_brightness_saturation_and_size_are_those_of_the_picture() -> None:
    grey = dict(zip(COVARIATES, measure_image(picture((128, 128, 128))), strict=True))
    assert grey["brightness"] == pytest.approx(128 / 255)
    assert grey["saturation"] == 0.0
    assert grey["size"] == pytest.approx((80 * 60) ** 0.5)
    red = dict(zip(COVARIATES, measure_image(picture((255, 0, 0))), strict=True))
    assert red["saturation"] == 1.0
    assert red["bytes_per_pixel"] == pytest.approx(len(picture((255, 0, 0))) / 4800)


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_change_gives_an_image_that_differs(change) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, size=(32, 48, 3), dtype=np.uint8))
    data = io.BytesIO()
    noise.save(data, "PNG")
    after = Image.open(io.BytesIO(changed(data.getvalue(), change))).convert("RGB")
    assert after.size == ((24, 16) if change == "half the size" else (48, 32))
    assert not np.array_equal(np.asarray(after.resize((48, 32))), np.asarray(noise))


def test_a_darker_scene_is_darker() -> None:
    data = picture((200, 100, 50))
    assert (
        measure_image(changed(data, "darker"))[0] < measure_image(data)[0] < measure_image(changed(data, "brighter"))[0]
    )
    assert measure_image(changed(data, "grey"))[1] == 0.0


def test_values_follow_the_ids_and_unknown_images_are_nan() -> None:
    table = pa.table({"image_sha256": ["b", "a"], **{name: [1.0, 2.0] for name in COVARIATES}})
    found = align(pa.chunked_array([["a", "x", "b", "a"]]), table)["size"]
    assert np.array_equal(found, [2.0, np.nan, 1.0, 2.0], equal_nan=True)
