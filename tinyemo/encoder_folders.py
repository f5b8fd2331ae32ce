"""Description of the vision encoder in a folder, read from its configuration without loading weights.

For EfficientNet-Lite0 nothing here imports torch; `tinyemo.vision` runs the encoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tinyemo.encoders import EFFICIENTNET_FILE, EFFICIENTNET_LITE0, EncoderInfo, EncoderSpec, Preprocessing
from tinyemo.errors import DataError, first_line
from tinyemo.local_files import read_config, revision_of_files

EFFICIENTNET_WIDTH = 1280
EFFICIENTNET_STRIDE = 32
"""Pixels of the image that one cell of the last grid stands for, in each direction."""
EFFICIENTNET_PREPROCESSING = Preprocessing(
    resize="shortest_edge",
    size=224,
    crop=224,
    interpolation="bicubic",
    # TensorFlow's (x - 127) / 128, with which it was trained. The package's own example says ImageNet's mean and
    # deviation: the published classifier is then less sure of itself (mean top probability of 82 OASIS photographs 0.34
    # instead of 0.41).
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
)

WEIGHTS_MARK = "tinyemo_weights"
"""Key of a model's config.json: "random" where it was never trained."""
HASHED_FILES = ("config.json", "*.safetensors", "*.pth")
"""Files of a folder that its revision depends on."""
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_KINDS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
}


def describe_encoder(folder: Path, *, name: str, revision: str | None = None) -> EncoderSpec:
    """Describe the encoder in a folder from its configuration; its weights are not loaded.

    Args:
        folder: folder of EfficientNet-Lite0's asset, or of a model that transformers wrote.
        name: public name of the encoder.
        revision: revision of its weights; None takes the sha256 of the folder's weights and configuration.

    Raises:
        DataError: the folder holds no encoder that we know, or says too little about it.
    """
    if (folder / EFFICIENTNET_FILE).is_file():
        return _describe_efficientnet(name, revision or revision_of_files(folder, HASHED_FILES), "real")
    config = read_config(folder, "vision encoder")
    kind = _KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise DataError(
            f"{folder} holds a model of type {config.get('model_type')!r}: encoders are {', '.join(sorted(_KINDS))}"
        )
    vision = read_vision_config(folder)
    preprocessing = _read_preprocessing(folder)
    if kind != "dinov2" and preprocessing.crop != vision.image_size:
        raise DataError(
            f"{folder}: its preprocessing yields {preprocessing.crop} pixels and its network takes {vision.image_size}"
        )
    side = preprocessing.crop // vision.patch_size
    return EncoderSpec(
        info=EncoderInfo(
            name=name,
            revision=revision or revision_of_files(folder, HASHED_FILES),
            preprocessing=preprocessing.digest(),
            weights="random" if config.get(WEIGHTS_MARK) == "random" else "real",
        ),
        kind=kind,
        preprocessing=preprocessing,
        feature_width=vision.projection_dim if kind == "clip" else vision.hidden_size,
        patch_grid=(side, side),
        patch_width=vision.hidden_size,
    )


def describe_random_efficientnet() -> EncoderSpec:
    """Describe an EfficientNet-Lite0 with random weights."""
    return _describe_efficientnet(EFFICIENTNET_LITE0, "random", "random")


def _describe_efficientnet(name: str, revision: str, weights: Literal["real", "random"]) -> EncoderSpec:
    preprocessing = EFFICIENTNET_PREPROCESSING
    side = preprocessing.crop // EFFICIENTNET_STRIDE
    return EncoderSpec(
        info=EncoderInfo(name=name, revision=revision, preprocessing=preprocessing.digest(), weights=weights),
        kind="efficientnet-lite0",
        preprocessing=preprocessing,
        feature_width=EFFICIENTNET_WIDTH,
        patch_grid=(side, side),
        patch_width=EFFICIENTNET_WIDTH,
    )


def read_vision_config(folder: Path) -> Any:
    """Read transformers' configuration of a vision tower, also from a model of images and texts."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: config.json cannot be used: {first_line(error)}") from error
    return getattr(config, "vision_config", config)


def _read_preprocessing(folder: Path) -> Preprocessing:
    """Read the folder's preprocessing through transformers, which knows the older forms of that file.

    Raises:
        DataError: it is missing, or does more than scaling, cropping and normalising.
    """
    from transformers import AutoImageProcessor

    try:
        found = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} does not say how images are prepared: {first_line(error)}") from error
    if not (found.do_resize and found.do_rescale and found.do_normalize) or abs(found.rescale_factor * 255 - 1) > 1e-6:
        raise DataError(f"{folder}: an encoder must scale images, bring them to [0, 1] and normalise them")
    is_exact = found.size.shortest_edge is None
    size = found.size.height if is_exact else found.size.shortest_edge
    crop = found.crop_size.height if found.do_center_crop else size
    is_square = not is_exact or found.size.height == found.size.width
    is_square &= not found.do_center_crop or found.crop_size.height == found.crop_size.width
    if not size or not crop or not is_square or crop > size or not (is_exact or found.do_center_crop):
        raise DataError(f"{folder}: its preprocessing does not end in a square of one size")
    if int(found.resample) not in _RESAMPLING:
        raise DataError(f"{folder}: resample is {found.resample}: known are {_RESAMPLING}")
    return Preprocessing.model_validate(
        {
            "resize": "exact" if is_exact else "shortest_edge",
            "size": size,
            "crop": crop,
            "interpolation": _RESAMPLING[int(found.resample)],
            "mean": tuple(found.image_mean),
            "std": tuple(found.image_std),
        }
    )
