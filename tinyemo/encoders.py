"""Descriptions of vision encoders and of the pixels they read, as manifests, recipes and projectors store them.

Nothing here imports torch; `tinyemo.vision` runs the encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveInt, ValidationError

from tinyemo.config import Section
from tinyemo.errors import ConfigError, DataError

EFFICIENTNET_LITE0 = "efficientnet-lite0"
"""The encoder whose real weights come without a hub, from an ordinary package."""
EFFICIENTNET_FILE = "efficientnet-lite0.pth"

UNKNOWN = "unknown"
"""A revision or a preprocessing that nobody wrote down; it is never held against another one."""
PARQUET_KEY = b"tinyemo"
"""Key in a Parquet file's metadata; its value is JSON whose `encoder` is an EncoderInfo."""


class Preprocessing(Section):
    """Conversion of an image into the RGB pixels that an encoder reads; equal values mean equal pixels."""

    resize: Literal["shortest_edge", "exact"]
    """Scale the shorter side to `size` and keep the shape, or both sides."""
    size: PositiveInt
    """Pixels."""
    crop: PositiveInt
    """Side of the centre square that is kept, pixels."""
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Values subtracted from red, green and blue in [0, 1]."""
    std: tuple[float, float, float]
    """Values that the differences are divided by."""

    def digest(self) -> str:
        """Return the sha256 over every field."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class EncoderInfo(Section):
    """Identity of the network that made features, and of its preprocessing."""

    name: str
    """Public name, for instance openai/clip-vit-large-patch14."""
    revision: str
    """Commit or sha256 of its weights; `unknown` where nobody wrote it down."""
    preprocessing: str
    """sha256 over size, crop, interpolation, mean and standard deviation, or `unknown`."""
    weights: Literal["real", "random"] = "real"
    """random: a network that was never trained, for tests; figures from its features mean nothing."""

    def matches(self, wanted: str) -> bool:
        """Return True if a recipe names this encoder, as `name` or `name@revision`."""
        return wanted in (self.name, f"{self.name}@{self.revision}")

    def __str__(self) -> str:
        random = ", random weights" if self.weights == "random" else ""
        return f"{self.name}@{self.revision[:19]} (preprocessing {self.preprocessing[:12]}{random})"


class EncoderSpec(Section):
    """An encoder and the shapes of its features, known before any weights are read.

    P patches, D their width, d width of the pooled feature.
    """

    info: EncoderInfo
    kind: Literal["efficientnet-lite0", "clip", "siglip", "dinov2"]
    preprocessing: Preprocessing
    feature_width: PositiveInt
    """d."""
    patch_grid: tuple[PositiveInt, PositiveInt]
    """Rows and columns of patches; their product is P."""
    patch_width: PositiveInt
    """D."""


def encoder_in_metadata(metadata: Mapping[bytes, bytes] | None, source: str) -> EncoderInfo | None:
    """Return the encoder that a Parquet file's metadata names; None where it names none.

    Raises:
        DataError: what stands there is not ours.
    """
    if not metadata or PARQUET_KEY not in metadata:
        return None
    try:
        found = json.loads(metadata[PARQUET_KEY])
        encoder = found.get("encoder")
        return None if encoder is None else EncoderInfo.model_validate(encoder)
    except (ValueError, AttributeError, ValidationError) as error:
        raise DataError(f"{source} names its encoder in a form that cannot be read: make the features again") from error


def parquet_metadata(encoder: EncoderInfo) -> dict[bytes, bytes]:
    """Return the metadata of a Parquet file with this encoder's features."""
    return {PARQUET_KEY: json.dumps({"encoder": encoder.model_dump()}).encode()}


def card_entries(encoder: EncoderInfo | None) -> dict[str, str]:
    """Return the entries of a projector's card for the encoder whose features it was trained on; none if unknown."""
    return {} if encoder is None else {f"encoder_{name}": str(value) for name, value in encoder.model_dump().items()}


def encoder_of_card(card: Mapping[str, Any]) -> EncoderInfo | None:
    """Return the encoder in a card's entries; None in a card without them.

    Raises:
        DataError: the card names it in another form.
    """
    entries = {name: card[f"encoder_{name}"] for name in EncoderInfo.model_fields if f"encoder_{name}" in card}
    if not entries:
        return None
    try:
        return EncoderInfo.model_validate(entries)
    except ValidationError as error:
        raise DataError(f"the projector's card names its encoder as {entries}: save the projector again") from error


def find_conflict(trained_on: EncoderInfo | None, given: EncoderInfo | None) -> str | None:
    """Say how two encoders differ; None where they are the same as far as is known."""
    if trained_on is None or given is None:
        return None
    for field in ("name", "revision", "preprocessing", "weights"):
        ours, theirs = getattr(trained_on, field), getattr(given, field)
        if ours != theirs and UNKNOWN not in (ours, theirs):
            return f"{field} {theirs} is not {ours}"
    return None


def count_image_tokens(encoder: EncoderSpec, image_grid: int | None) -> int:
    """Return the number of tokens of one image: a token for each patch, or for each cell of the averaged grid.

    Raises:
        ConfigError: the grid is finer than the encoder's patches.
    """
    rows, columns = encoder.patch_grid
    if image_grid is None:
        return rows * columns
    if not 0 < image_grid <= min(rows, columns):
        raise ConfigError(
            f"image_grid is {image_grid}: the encoder has {rows} x {columns} patches, choose 1 to {min(rows, columns)}"
        )
    return image_grid**2
