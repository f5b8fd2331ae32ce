"""Connector from patches of the vision tower to embeddings of the language model.

Shape letters: N images, P patches, D patch width, H width of the language model.
"""

from __future__ import annotations

from torch import Tensor, nn

CONNECTORS = ("identity", "linear", "mlp2x_gelu")
"""TinyLLaVA Factory's names."""


class Connector(nn.Module):
    """Layers that map (N, P, D) float to (N, P, H) float, each patch by itself."""

    def __init__(self, kind: str, patch_width: int, hidden_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if kind != "identity":
            layers.append(nn.Linear(patch_width, hidden_size))
        if kind == "mlp2x_gelu":
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        embeds: Tensor = self.layers(patches)
        return embeds
