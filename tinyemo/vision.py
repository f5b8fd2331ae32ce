"""Vision encoders: encoded images in, pooled and patch features out.

CLIP, SigLIP and DINOv2 are transformers' own classes, loaded from a folder; EfficientNet-Lite0 is our own class. The
features are those that TinyEmo reads (arXiv 2410.07062) and that TinyLLaVA Factory's vision towers yield:

| kind | pooled (d) | patches (P, D) |
|---|---|---|
| clip | the projected image embedding, not normalised (L/14: 768, of 1024 hidden) | layer -2, no class token |
| siglip | the attention-pooled output (so400m: 1152) | layer -2 |
| dinov2 | the class token after the last norm (L: 1024) | layer -2, no class token |
| efficientnet-lite0 | mean over the last grid (1280) | the last grid, 7 x 7 x 1280 |

Shape letters: B batch, S side of an image in pixels, P patches, D patch width, d pooled width.
"""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.encoder_folders import describe_encoder
from tinyemo.encoders import EFFICIENTNET_FILE, EFFICIENTNET_LITE0, EncoderSpec, Preprocessing
from tinyemo.errors import DataError, first_line

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Images per forward pass that `VisionEncoder.measure_batch_size` tries."""
MIN_MEASURED = 16
"""Fewer images than these are not worth a measurement: they are encoded in batches of FEW_IMAGES_BATCH."""
FEW_IMAGES_BATCH = 2
MAX_BATCH_SECONDS = 0.5
"""No larger batch is tried after one that took as long."""


@dataclass(frozen=True)
class Features:
    """Features of a batch of images, float32 unless stated otherwise.

    Attributes:
        pooled: (B, d) float.
        patches: (B, P, D) float, row after row of the grid.
    """

    pooled: Tensor
    patches: Tensor


class VisionEncoder:
    """A loaded encoder in evaluation mode; on one device the same pixels always give the same features.

    Args:
        spec: description of the encoder.
        network: network of the kind that `spec` names; changed in place where that makes inference faster.
        device: device that encodes.
        batch_size: images per forward pass; None measures which number is fastest on the device, once there are many.
    """

    def __init__(
        self, spec: EncoderSpec, network: nn.Module, device: torch.device, batch_size: int | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        self.batch_size = batch_size
        self._network = network.eval()
        if isinstance(network, EfficientNetLite0):
            network.fuse()
        self._network.to(device)

    def encode(self, pixels: Tensor) -> Features:
        """Return the features, on the CPU, of (N, S, S, 3) uint8 pixels from `read_pixels`, for any N > 0."""
        if self.batch_size is None and len(pixels) >= MIN_MEASURED:
            self.batch_size = self.measure_batch_size()
        size = self.batch_size or FEW_IMAGES_BATCH
        batches = [self._encode_batch(batch) for batch in pixels.split(size)]  # type: ignore[no-untyped-call]
        return Features(
            torch.cat([batch.pooled.float().cpu() for batch in batches]),
            torch.cat([batch.patches.float().cpu() for batch in batches]),
        )

    def measure_batch_size(self) -> int:
        """Return the batch size that encodes the most images per second on this device.

        On a CPU that is a small one, whose activations stay in the cache; on a GPU a large one, which fills it. Sizes
        1, 2, 4 ... are tried until one is clearly slower per image than the best, takes long or does not fit.
        """
        side = self.spec.preprocessing.crop
        best_size, best_rate = 1, 0.0
        for size in BATCH_SIZES:
            pixels = torch.randint(256, (size, side, side, 3), dtype=torch.uint8)
            try:
                self._encode_batch(pixels)  # selects and compiles kernels
                seconds = min(self._time_batch(pixels) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            rate = size / seconds
            if rate > best_rate:
                best_size, best_rate = size, rate
            elif rate < 0.8 * best_rate:
                break
            if seconds > MAX_BATCH_SECONDS:
                break
        logger.info("encoding in batches of %d: %.0f images/s on %s", best_size, best_rate, self.device)
        return best_size

    def _time_batch(self, pixels: Tensor) -> float:
        started = time.perf_counter()
        self._encode_batch(pixels).pooled.cpu()
        return time.perf_counter() - started

    @torch.inference_mode()
    def _encode_batch(self, pixels: Tensor) -> Features:
        values = normalise(pixels.to(self.device), self.spec.preprocessing)
        # They are channels last, as a fused EfficientNet takes them.
        is_fused = self.spec.kind == EFFICIENTNET_LITE0
        return run_network(self.spec.kind, self._network, values if is_fused else values.contiguous())


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return (B, 3, S, S) float32 normalised pixels, a view that is channels last, of (B, S, S, 3) uint8 ones."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)
    std = torch.tensor(preprocessing.std, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def run_network(kind: str, network: nn.Module, values: Tensor) -> Features:
    """Return the features of (B, 3, S, S) normalised pixels, in the network's dtype and on its device."""
    if kind == EFFICIENTNET_LITE0:
        grid = network(values)
        return Features(grid.mean(dim=(2, 3)), grid.flatten(2).transpose(1, 2))
    outputs = network(pixel_values=values, output_hidden_states=True)
    pooled = outputs.image_embeds if kind == "clip" else outputs.pooler_output
    patches = outputs.hidden_states[-2]
    return Features(pooled, patches if kind == "siglip" else patches[:, 1:])


def load_encoder(
    folder: Path, spec: EncoderSpec, device: torch.device | str = "cpu", batch_size: int | None = None
) -> VisionEncoder:
    """Load the encoder in a folder; see `VisionEncoder` for the arguments.

    Raises:
        DataError: the folder does not hold the encoder that `spec` describes, or lacks some of its weights.
    """
    return VisionEncoder(spec, load_network(folder, spec), torch.device(device), batch_size)


def load_network(folder: Path, spec: EncoderSpec) -> nn.Module:
    """Load the network of the encoder in a folder, float32 on the CPU.

    Raises:
        DataError: see `load_encoder`.
    """
    known = spec.info.revision if not spec.info.revision.startswith("sha256-") else None
    found = describe_encoder(folder, name=spec.info.name, revision=known)
    if found != spec:
        raise DataError(f"{folder} holds {found.info}, expected is {spec.info}: put the same files on every node")
    return _load_efficientnet(folder) if spec.kind == EFFICIENTNET_LITE0 else _load_tower(folder, spec.kind)


def build_network(kind: str, config: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        kind: kind of an EncoderSpec.
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
    """Return transformers' class of a vision tower that yields the features in the table above."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Model, SiglipVisionModel

    return {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[kind]


def _load_tower(folder: Path, kind: str) -> nn.Module:
    """Load a vision tower from safetensors; no pickle is opened and no code of the folder runs."""
    try:
        network, report = _tower_class(kind).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder} holds no {kind} tower that can be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills these with noise and only warns
        raise DataError(f"{folder} lacks {len(missing)} weights of its {kind} tower, the first is {missing[0]}")
    assert isinstance(network, nn.Module)
    return network
