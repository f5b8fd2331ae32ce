"""The objective's augmentations: functions of (seed, step), off by default, and what they say they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyemo.config import LossConfig, ProjectorConfig
from tinyemo.label_embeddings import LabelEmbeddings, known_words
from tinyemo.objective import Objective, build_objective, other_labels
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES

EKMAN = TAXONOMIES["ekman"].words


def objective(loss: dict[str, Any] | None = None, **settings: Any) -> Objective:
    words = known_words()
    vectors = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(1))
    labels = LabelEmbeddings(words, vectors, "none", "none", "random", "word")
    return build_objective(
        LossConfig(**(loss or {})), labels, EKMAN, **{"synonyms_probability": 0.0, "seed": 0, **settings}
    )


def identity(x: Tensor) -> Tensor:
    return x


def batch() -> tuple[Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    features = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.normalize(features, dim=-1), np.array([0, 1, 2, 3, 4, 5, 0, 1])


@pytest.mark.parametrize("name", ["cosine", "nt_xent", "info_nce", "prototype"])
def test_mixup_is_the_weighted_loss_of_both_labels_on_mixed_features(name: str) -> None:
    goal, plain = objective({"name": name, "mixup_alpha": 0.4}), objective({"name": name})
    features, labels = batch()
    weight, partners = goal.mixing(8, 3)
    assert 0.5 <= weight <= 1
    mixed = weight * features + (1 - weight) * features[partners]
    expected = weight * plain.step_loss(identity, mixed, labels, 3)
    expected += (1 - weight) * plain.step_loss(identity, mixed, labels[partners], 3)
    assert goal.step_loss(identity, features, labels, 3) == pytest.approx(float(expected))


def test_mixing_changes_with_the_step_and_comes_back() -> None:
    goal = objective({"mixup_alpha": 1.0})
    assert goal.mixing(8, 1)[0] == goal.mixing(8, 1)[0] != goal.mixing(8, 2)[0]


def test_other_taxonomies_give_the_words_that_stand_for_a_label() -> None:
    assert other_labels("surprise", TAXONOMIES["ekman"]) == ("awe",)
    assert other_labels("joy", TAXONOMIES["ekman"]) == ()
    assert "joy" in other_labels("affection", TAXONOMIES["parrott"])


def test_taxonomy_augmentation_swaps_texts_and_never_labels() -> None:
    goal = objective(taxonomy_augmentation=1.0)
    surprise = EKMAN.index("surprise")
    rows = goal.text_rows(np.array([surprise, EKMAN.index("joy")]), 0)
    assert rows[0] >= len(EKMAN)
    assert rows[1] == EKMAN.index("joy")
    half = objective(taxonomy_augmentation=0.5).text_rows(np.full(1000, surprise), 0)
    assert 400 < int((half >= len(EKMAN)).sum()) < 600


def test_a_hidden_layer_has_its_own_width_and_old_configs_have_none() -> None:
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=16, hidden_width=40))
    assert [tuple(model.layers[i].weight.shape) for i in (0, 4)] == [(40, 512), (16, 40)]  # type: ignore[union-attr]
    assert model(torch.randn(3, 512)).shape == (3, 16)
    assert ProjectorConfig.model_validate({"encoder_width": 512, "hidden_size": 16}).hidden_width is None
