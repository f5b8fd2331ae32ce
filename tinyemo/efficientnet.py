"""EfficientNet-Lite0 for inference: the one vision encoder whose real weights an ordinary package ships.

The architecture is that of EfficientNet (arXiv 1905.11946) in its Lite form, without squeeze-and-excitation and with
ReLU6 in place of swish. Only the layers that inference at 224 pixels needs are here: no dropout and no classifier.

Shape letters: B batch, S side of the image in pixels, a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
    """Batch norm that uses the running statistics and computes in float32 or wider, whatever the parameters' dtype.

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
    """Return padding, convolution and batch norm; as in TensorFlow, odd padding is larger on the right and below."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return [
        nn.ZeroPad2d((before, after, before, after)),
        nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False),
        _BatchNorm(outputs, eps=1e-3),
    ]


class _Block(nn.Module):
    """Inverted residual block: widen, convolve each channel by itself, narrow, and add the input where shapes agree."""

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
    """Network that maps normalised pixels to a grid of features; the published classifier reads the grid's mean."""

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
        """Load the published state dict, which has the same layers in the same order and a classifier at the end.

        Raises:
            DataError: the state dict has other layers.
        """
        published = {name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
        expected = self.state_dict()
        if [tensor.shape for tensor in published.values()] != [tensor.shape for tensor in expected.values()]:
            raise DataError(
                f"{len(published)} tensors are not the {len(expected)} of EfficientNet-Lite0: get the asset again"
            )
        self.load_state_dict(dict(zip(expected, published.values(), strict=True)))

    def fuse(self) -> None:
        """Make inference faster, in place: fold batch norms into convolutions, let these pad, store channels last.

        The outputs stay the same up to rounding; the state dict does not, so an exported model is never fused.
        """
        _fuse_layers(self.layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fuse_layers(layers: nn.Sequential) -> None:
    for index, layer in enumerate(layers):
        if isinstance(layer, _Block):
            _fuse_layers(layer.layers)
        elif isinstance(layer, nn.ZeroPad2d):
            conv, norm = layers[index + 1], layers[index + 2]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, _BatchNorm)
            fused = fuse_conv_bn_eval(conv, norm)
            if len(set(layer.padding)) == 1:
                fused.padding = layer.padding[:2]
                layers[index] = nn.Identity()
            layers[index + 1], layers[index + 2] = fused, nn.Identity()
