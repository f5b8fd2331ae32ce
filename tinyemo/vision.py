"""Vision encoders: encoded images in, pooled and patch features out.

CLIP, SigLIP and DINOv2 are transformers' own classes, loaded from a folder; EfficientNet-Lite0 is ours. Which feature
is taken follows what TinyEmo reads (arXiv 2410.07062) and TinyLLaVA Factory's vision towers:

| kind | pooled (d) | patches (P, D) |
|---|---|---|
| clip | the projected image embedding, not normalised (L/14: 768, of 1024 hidden) | layer -2, no class token |
| siglip | the attention-pooled output (so400m: 1152) | layer -2 |
| dinov2 | the class token after the last norm (L: 1024) | layer -2, no class token |
| efficientnet-lite0 | mean over the last grid (1280) | the last grid, 7 x 7 x 1280 |

Shape letters: B batch, S side of an image in pixels, P patches, D patch width, d pooled width.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyemo.efficientnet import STRIDE, WIDTH, EfficientNetLite0
from tinyemo.encoders import EFFICIENTNET_FILE, EFFICIENTNET_LITE0, EncoderInfo, EncoderSpec, Preprocessing
from tinyemo.errors import DataError

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
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_KINDS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
}


@dataclass(frozen=True)
class Features:
    """What an encoder yields, float32 where nothing else is said.

    Attributes:
        pooled: (B, d) float.
        patches: (B, P, D) float, row after row of the grid.
    """

    pooled: Tensor
    patches: Tensor


class VisionEncoder:
    """A loaded encoder, in evaluation mode; the same pixels yield the same features, on one device."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._network = network.eval().to(device)
        self._mean = torch.tensor(spec.preprocessing.mean, device=device)
        self._std = torch.tensor(spec.preprocessing.std, device=device)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Features:
        """Features, on CPU, of (B, S, S, 3) uint8 pixels as `read_pixels` makes them."""
        scaled = (pixels.to(self.device, torch.float32) / 255 - self._mean) / self._std
        values = scaled.permute(0, 3, 1, 2).contiguous()
        features = run_network(self.spec.kind, self._network, values)
        return Features(features.pooled.float().cpu(), features.patches.float().cpu())


def run_network(kind: str, network: nn.Module, values: Tensor) -> Features:
    """Features, in the network's type and on its device, of (B, 3, S, S) normalised pixels."""
    if kind == EFFICIENTNET_LITE0:
        grid = network(values)
        return Features(grid.mean(dim=(2, 3)), grid.flatten(2).transpose(1, 2))
    outputs = network(pixel_values=values, output_hidden_states=True)
    pooled = outputs.image_embeds if kind == "clip" else outputs.pooler_output
    patches = outputs.hidden_states[-2]
    return Features(pooled, patches if kind == "siglip" else patches[:, 1:])


def describe_encoder(folder: Path, *, name: str, revision: str | None = None) -> EncoderSpec:
    """What the encoder in a folder is and yields, read from its configuration; its weights are not loaded.

    Args:
        folder: of EfficientNet-Lite0's asset, or a model that transformers wrote.
        name: to be known by.
        revision: of its weights; None takes the sha256 of the folder's weights and configuration.

    Raises:
        DataError: the folder holds no encoder that we know, or says too little about it.
    """
    if (folder / EFFICIENTNET_FILE).is_file():
        return _describe_efficientnet(name, revision or _folder_revision(folder), "real")
    config = _read_config(folder / "config.json")
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
            revision=revision or _folder_revision(folder),
            preprocessing=preprocessing.digest(),
            weights="random" if config.get(WEIGHTS_MARK) == "random" else "real",
        ),
        kind=kind,
        preprocessing=preprocessing,
        feature_width=vision.projection_dim if kind == "clip" else vision.hidden_size,
        patch_grid=(side, side),
        patch_width=vision.hidden_size,
    )


def load_encoder(folder: Path, spec: EncoderSpec, device: torch.device | str = "cpu") -> VisionEncoder:
    """The encoder in a folder, ready to run.

    Raises:
        DataError: the folder does not hold the encoder that `spec` describes, or lacks some of its weights.
    """
    return VisionEncoder(spec, load_network(folder, spec), torch.device(device))


def load_network(folder: Path, spec: EncoderSpec) -> nn.Module:
    """The network of the encoder in a folder, float32 on CPU.

    Raises:
        DataError: as `load_encoder`.
    """
    known = spec.info.revision if not spec.info.revision.startswith("sha256-") else None
    found = describe_encoder(folder, name=spec.info.name, revision=known)
    if found != spec:
        raise DataError(f"{folder} holds {found.info}, expected is {spec.info}: put the same files on every node")
    return _load_efficientnet(folder) if spec.kind == EFFICIENTNET_LITE0 else _load_tower(folder, spec.kind)


def build_network(kind: str, config: Any) -> nn.Module:
    """A network of fresh random weights.

    Args:
        kind: of an EncoderSpec.
        config: transformers' configuration of the vision tower; EfficientNet-Lite0 takes none.
    """
    if kind == EFFICIENTNET_LITE0:
        return EfficientNetLite0()
    network: nn.Module = _tower_class(kind)._from_config(config)
    return network


def describe_random_efficientnet() -> EncoderSpec:
    """EfficientNet-Lite0 that was never trained."""
    return _describe_efficientnet(EFFICIENTNET_LITE0, "random", "random")


def _describe_efficientnet(name: str, revision: str, weights: Literal["real", "random"]) -> EncoderSpec:
    preprocessing = EFFICIENTNET_PREPROCESSING
    side = preprocessing.crop // STRIDE
    return EncoderSpec(
        info=EncoderInfo(name=name, revision=revision, preprocessing=preprocessing.digest(), weights=weights),
        kind="efficientnet-lite0",
        preprocessing=preprocessing,
        feature_width=WIDTH,
        patch_grid=(side, side),
        patch_width=WIDTH,
    )


def _load_efficientnet(folder: Path) -> nn.Module:
    network = EfficientNetLite0()
    try:
        weights = torch.load(folder / EFFICIENTNET_FILE, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{folder / EFFICIENTNET_FILE} is no file of weights ({type(error).__name__})") from error
    network.load_published(weights)
    return network


def _tower_class(kind: str) -> Any:
    """transformers' class of a vision tower that yields what the table above says."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Model, SiglipVisionModel

    return {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[kind]


def _load_tower(folder: Path, kind: str) -> nn.Module:
    """A vision tower out of safetensors; no pickle is opened and no code of the folder runs."""
    try:
        network, report = _tower_class(kind).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder} holds no {kind} tower that can be loaded: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills these with noise and only warns
        raise DataError(f"{folder} lacks {len(missing)} weights of its {kind} tower, the first is {missing[0]}")
    assert isinstance(network, nn.Module)
    return network


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.parent} holds no vision encoder: {path.name} cannot be read") from error
    if not isinstance(config, dict):
        raise DataError(f"{path.parent} holds no vision encoder: {path.name} is no JSON object")
    return config


def read_vision_config(folder: Path) -> Any:
    """transformers' configuration of the vision tower, also where it is a part of a model of images and texts."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: config.json cannot be used: {_first_line(error)}") from error
    return getattr(config, "vision_config", config)


def _read_preprocessing(folder: Path) -> Preprocessing:
    """The folder's own preprocessing, through transformers, which knows the older forms of that file.

    Raises:
        DataError: it is missing, or does more than scaling, cropping and normalising.
    """
    from transformers import AutoImageProcessor

    try:
        found = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} does not say how images are prepared: {_first_line(error)}") from error
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


def _folder_revision(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's configuration and weights."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in ("config.json", "*.safetensors", "*.pth") for path in folder.glob(pattern))
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return f"sha256-{digest.hexdigest()}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
