"""Training objective of a projector: the loss of one step, the same under any trainer and any number of ranks.

Shape letters: B global batch, b this rank's part of it, T texts, C classes, D width, d encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tinyemo.config import LossConfig
from tinyemo.distributed import gather_rows, rank
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.losses import compute_loss
from tinyemo.taxonomies import TAXONOMIES, Taxonomy

# Streams of random numbers that must not share a seed.
_DROPOUT, _SYNONYMS, _TAXONOMIES, _MIXUP = 1, 2, 3, 4


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generator for `step` of a run, alike on every rank.

    Random state is so a function of (seed, step): a resumed run needs none restored, and no rank draws its own.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, _DROPOUT, step]).generate_state(1)[0]))


@dataclass(frozen=True)
class Objective:
    """A loss and the texts that it compares images to.

    Attributes:
        label_embeds: (C, D) float32, L2-normalised.
        text_table: (T, D) float32, L2-normalised; the first C rows are the labels' own texts.
        synonym_rows: rows of each label's synonyms in `text_table`.
        synonyms_probability: chance that a sample's text is swapped for one of its label's synonyms.
        seed: seed of these swaps, dropout and mixup.
        taxonomy_rows: rows of each label's words in other taxonomies in `text_table`.
        taxonomy_augmentation: chance that a sample's text is swapped for one of those; a synonym goes before.
    """

    loss: LossConfig
    label_embeds: Tensor
    text_table: Tensor
    synonym_rows: tuple[tuple[int, ...], ...]
    synonyms_probability: float
    seed: int
    taxonomy_rows: tuple[tuple[int, ...], ...] = ()
    taxonomy_augmentation: float = 0.0

    def text_rows(self, labels: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Return each sample's row of `text_table` for the global batch, (B,) int64; a function of (seed, step)."""
        rows = labels
        for stream, probability, rows_of_label in (
            (_TAXONOMIES, self.taxonomy_augmentation, self.taxonomy_rows),
            (_SYNONYMS, self.synonyms_probability, self.synonym_rows),
        ):
            if probability == 0:
                continue
            rng = np.random.default_rng([self.seed, stream, step])
            is_swapped = rng.random(len(labels)) < probability
            pick = rng.random(len(labels))
            rows = rows.copy()
            for i in np.flatnonzero(is_swapped):
                choices = rows_of_label[labels[i]]
                if choices:
                    rows[i] = choices[int(pick[i] * len(choices))]
        return rows

    def mixing(self, num_rows: int, step: int) -> tuple[float, NDArray[np.int64]]:
        """Return each sample's own weight in [0.5, 1] and its partner's place in the global batch, both (B,)."""
        rng = np.random.default_rng([self.seed, _MIXUP, step])
        weight = float(rng.beta(self.loss.mixup_alpha, self.loss.mixup_alpha))
        return max(weight, 1 - weight), rng.permutation(num_rows).astype(np.int64)

    def step_loss(
        self, project: Callable[[Tensor], Tensor], features: Tensor, labels: NDArray[np.int64], step: int
    ) -> Tensor:
        """Compute the loss of one step, () float32, equal on every rank.

        Args:
            project: the projector or an engine around it: (b, d) to (b, D), L2-normalised.
            features: (b, d), this rank's rows.
            labels: (B,) int64 of the whole global batch, rank after rank.
            step: number of the optimizer step.
        """
        seed_step(self.seed, step)
        text_rows = self.text_rows(labels, step)
        if not self.loss.mixup_alpha:
            return self._loss(gather_rows(project(features)), labels, text_rows)
        weight, partners = self.mixing(len(labels), step)
        # A partner may lie on another rank: with the features of all exchanged, mixing does not depend on their number.
        own = slice(rank() * len(features), (rank() + 1) * len(features))
        mixed = weight * features + (1 - weight) * gather_rows(features)[torch.from_numpy(partners[own])]
        image_embeds = gather_rows(project(mixed))
        return weight * self._loss(image_embeds, labels, text_rows) + (1 - weight) * self._loss(
            image_embeds, labels[partners], text_rows[partners]
        )

    def _loss(self, image_embeds: Tensor, labels: NDArray[np.int64], text_rows: NDArray[np.int64]) -> Tensor:
        device = image_embeds.device
        return compute_loss(
            self.loss,
            image_embeds,
            torch.tensor(labels, device=device),
            torch.tensor(text_rows, device=device),
            self.text_table,
            self.label_embeds,
        )

    def to(self, device: torch.device) -> Objective:
        """Return a copy with its tensors on `device`."""
        return replace(self, label_embeds=self.label_embeds.to(device), text_table=self.text_table.to(device))


def build_objective(
    loss: LossConfig,
    labels: LabelEmbeddings,
    words: tuple[str, ...],
    *,
    synonyms_probability: float,
    seed: int,
    taxonomy: Taxonomy = TAXONOMIES["ekman"],
    taxonomy_augmentation: float = 0.0,
) -> Objective:
    """Build the objective of telling `words` of `taxonomy` apart; texts that replace them join the text table."""
    by_synonym = [taxonomy.synonyms.get(word, ()) if synonyms_probability else () for word in words]
    by_taxonomy = [other_labels(word, taxonomy) if taxonomy_augmentation else () for word in words]
    extra = [text for texts in (*by_synonym, *by_taxonomy) for text in texts]
    places = iter(range(len(words), len(words) + len(extra)))
    return Objective(
        loss=loss,
        label_embeds=F.normalize(labels.select(words), dim=-1),
        text_table=F.normalize(labels.select([*words, *extra]), dim=-1),
        synonym_rows=tuple(tuple(next(places) for _ in texts) for texts in by_synonym),
        synonyms_probability=synonyms_probability,
        seed=seed,
        taxonomy_rows=tuple(tuple(next(places) for _ in texts) for texts in by_taxonomy),
        taxonomy_augmentation=taxonomy_augmentation,
    )


def other_labels(word: str, taxonomy: Taxonomy) -> tuple[str, ...]:
    """Return the labels of other taxonomies that stand for a label of this one, each once, without the word itself."""
    mapped = (mapping.get(word) for mapping in taxonomy.maps.values())
    return tuple(dict.fromkeys(label for label in mapped if label is not None and label != word))
