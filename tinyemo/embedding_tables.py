"""Input-embedding tables of language models, read row by row: the model itself is never built.

Shape letters: D width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class EmbeddingTable(Protocol):
    """A language model's tokenizer and input embeddings, read by rows."""

    @property
    def name(self) -> str:
        """The language model's name."""

    @property
    def revision(self) -> str:
        """Which weights: a digest, a commit or a seed."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def is_random(self) -> bool:
        """Whether the rows are drawn and not learned."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens."""

    def rows(self, ids: list[int]) -> Tensor:
        """(len(ids), D) float32."""
