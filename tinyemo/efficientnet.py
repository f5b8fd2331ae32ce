"""EfficientNet-Lite0 for inference: the one vision encoder whose real weights an ordinary package ships.

The architecture is that of EfficientNet (arXiv 1905.11946) in its Lite form: no squeeze-and-excitation, ReLU6 for
swish. Ours is written down to what inference at 224 pixels needs: no dropout, no classifier.

Shape letters: B batch, S side of the image in pixels, a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyemo.encoder_folders import EFFICIENTNET_WIDTH
from tinyemo.errors import DataError

STAGES = (
    # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _BatchNorm(nn.BatchNorm2d):
    """By the running statistics, in float32 at least, whatever type the parameters were cast to.

    DeepSpeed casts parameters to bf16 and leaves buffers alone, a mixture that torch's own batch norm refuses.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        mean, variance, weight, bias = (
            values.to(dtype) for values in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(inputs, mean, variance, weight, bias, training=False, eps=self.eps)


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm with TensorFlow's padding: an odd one has its greater part on the right and below."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return [
        nn.ZeroPad2d((before, after, before, after)),
        nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False),
        _BatchNorm(outputs, eps=1e-3),
    ]


class _Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; added to its input where both have one shape."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        widen = [*_conv(inputs, width, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = _conv(width, width, kernel, stride=stride, groups=width)
        self.layers = nn.Sequential(*widen, *depthwise, nn.ReLU6(), *_conv(width, outputs, 1))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs + inputs if self.is_residual else outputs


class EfficientNetLite0(nn.Module):
    """Grid of features of normalised pixels; their mean over the grid is what the published classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 32, 3, stride=2), nn.ReLU6()]
        width = 32
        for repeats, kernel, stride, expansion, channels in STAGES:
            for number in range(repeats):
                first_stride = stride if number == 0 else 1
                layers.append(_Block(width, channels, kernel=kernel, stride=first_stride, expansion=expansion))
                width = channels
        self.layers = nn.Sequential(*layers, *_conv(width, EFFICIENTNET_WIDTH, 1), nn.ReLU6())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) float -> (B, 1280, S / 32, S / 32), between 0 and 6."""
        grid: Tensor = self.layers(pixels)
        return grid

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the published state dict, which lists its layers in the order of ours, and a classifier.

        Raises:
            DataError: it has other layers.
        """
        published = {name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
        ours = self.state_dict()
        if [tensor.shape for tensor in published.values()] != [tensor.shape for tensor in ours.values()]:
            raise DataError(
                f"{len(published)} tensors are not the {len(ours)} of EfficientNet-Lite0: get the asset again"
            )
        self.load_state_dict(dict(zip(ours, published.values(), strict=True)))
