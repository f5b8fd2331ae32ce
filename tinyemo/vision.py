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

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.encoder_folders import describe_encoder, first_line
from tinyemo.encoders import EFFICIENTNET_FILE, EFFICIENTNET_LITE0, EncoderSpec
from tinyemo.errors import DataError


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
        raise DataError(f"{folder} holds no {kind} tower that can be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills these with noise and only warns
        raise DataError(f"{folder} lacks {len(missing)} weights of its {kind} tower, the first is {missing[0]}")
    assert isinstance(network, nn.Module)
    return network
