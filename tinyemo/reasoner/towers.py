"""The vision tower inside a reasoning model: an encoder of `tinyemo.vision` that is never trained.

Shape letters: N images, S side of an image in pixels, P patches, D patch width, d pooled width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyemo.vision import Features, build_network, run_network


class VisionTower(nn.Module):
    """An encoder without gradients that always stays in evaluation mode."""

    def __init__(self, kind: str, network: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.network = network
        self.requires_grad_(requires_grad=False)
        self.eval()

    @classmethod
    def build(cls, kind: str, config: Any | None) -> VisionTower:
        """Build a tower with random weights; `config` is transformers' own, None for EfficientNet-Lite0."""
        return cls(kind, build_network(kind, config))

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in evaluation mode: batch norm and dropout of a frozen tower must not change."""
        super().train(mode=False)
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Features:
        """Return pooled (N, d) and patch (N, P, D) features of (N, 3, S, S) normalised pixels, in the tower's dtype."""
        dtype = next(self.network.parameters()).dtype
        return run_network(self.kind, self.network, pixel_values.to(dtype))
