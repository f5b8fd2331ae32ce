"""What a projector is trained on: the loss of one optimizer step, the same under any trainer and any number of ranks.

Shape letters: B global batch, b this rank's part of it, T texts, C classes, D width, d encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tinyemo.distributed import gather_rows
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.losses import LossConfig, compute_loss
from tinyemo.taxonomies import synonyms

# Streams of random numbers that must not share a seed.
_DROPOUT, _SYNONYMS = 1, 2


def seed_step(seed: int, step: int) -> None:
    """Set torch's generator to what `step` of a run draws from, on every rank alike.

    Random state is so a function of (seed, step): a resumed run needs none restored, and no rank draws its own.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, _DROPOUT, step]).generate_state(1)[0]))


@dataclass(frozen=True)
class Objective:
    """The loss with the texts it compares to.

    Attributes:
        label_embeds: (C, D) float32, L2-normalised.
        text_table: (T, D) float32, L2-normalised; the first C rows are the labels' own texts.
        synonym_rows: for each label the rows of its synonyms in `text_table`.
        synonyms_probability: chance that a sample's text is swapped for one of its label's synonyms.
        seed: of these swaps.
    """

    loss: LossConfig
    label_embeds: Tensor
    text_table: Tensor
    synonym_rows: tuple[tuple[int, ...], ...]
    synonyms_probability: float
    seed: int

    def text_rows(self, labels: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Row of `text_table` for each sample of the global batch, (B,) int64; a function of (seed, step)."""
        if self.synonyms_probability == 0:
            return labels
        rng = np.random.default_rng([self.seed, _SYNONYMS, step])
        is_swapped = rng.random(len(labels)) < self.synonyms_probability
        pick = rng.random(len(labels))
        rows = labels.copy()
        for i in np.flatnonzero(is_swapped):
            choices = self.synonym_rows[labels[i]]
            if choices:
                rows[i] = choices[int(pick[i] * len(choices))]
        return rows

    def step_loss(
        self, project: Callable[[Tensor], Tensor], features: Tensor, labels: NDArray[np.int64], step: int
    ) -> Tensor:
        """The loss of one step, () float32, equal on every rank.

        Args:
            project: the projector or an engine around it: (b, d) to (b, D), L2-normalised.
            features: (b, d), this rank's rows.
            labels: (B,) int64 of the whole global batch, rank after rank.
            step: number of the optimizer step.
        """
        seed_step(self.seed, step)
        image_embeds = gather_rows(project(features))
        device = image_embeds.device
        text_rows = torch.from_numpy(self.text_rows(labels, step)).to(device)
        return compute_loss(
            self.loss, image_embeds, torch.tensor(labels, device=device), text_rows, self.text_table, self.label_embeds
        )

    def to(self, device: torch.device) -> Objective:
        """The same with its tensors on `device`."""
        return Objective(
            self.loss,
            self.label_embeds.to(device),
            self.text_table.to(device),
            self.synonym_rows,
            self.synonyms_probability,
            self.seed,
        )


def build_objective(
    loss: LossConfig, labels: LabelEmbeddings, words: tuple[str, ...], *, synonyms_probability: float, seed: int
) -> Objective:
    """The objective of telling `words` apart; their synonyms join the text table where they are used."""
    by_word = [synonyms(word) if synonyms_probability else () for word in words]
    extra = [text for texts in by_word for text in texts]
    places = iter(range(len(words), len(words) + len(extra)))
    return Objective(
        loss=loss,
        label_embeds=F.normalize(labels.select(words), dim=-1),
        text_table=F.normalize(labels.select([*words, *extra]), dim=-1),
        synonym_rows=tuple(tuple(next(places) for _ in texts) for texts in by_word),
        synonyms_probability=synonyms_probability,
        seed=seed,
    )
