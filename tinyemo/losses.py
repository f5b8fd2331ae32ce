"""Losses that pull an image to its label: three published ones (arXiv 2410.07062), and `prototype` of this project.

All are vectorised, take L2-normalised embeddings, and compute in float32 or wider (float64 stays float64).

Shape letters: B batch, T texts, C classes, D width. s(i, t) is the cosine of image i and text t, tau the temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyemo.config import PUBLISHED_TEMPERATURES, LossConfig
from tinyemo.distributed import at_least_float32


def cosine_embedding(image_embeds: Tensor, text_embeds: Tensor, *, margin: float = 0.5) -> Tensor:
    """Pull each image to its own label text, without negatives.

    Args:
        image_embeds: (B, D) float, L2-normalised.
        text_embeds: (B, D) float, L2-normalised; row i is the label text of image i.
        margin: as published; every target is +1, so it never acts.

    Returns:
        () float32, mean of 1 - s(i, t) over B, in [0, 2].
    """
    images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds)
    return F.cosine_embedding_loss(images, texts, images.new_ones(len(images)), margin=margin)


def nt_xent(image_embeds: Tensor, text_embeds: Tensor, labels: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Pull each image to every text of its label, each against all texts of other labels.

    One term for each pair (image, text) of the same label: -log(e^(s/tau) / (e^(s/tau) + sum over other labels'
    texts)). Equal to pytorch-metric-learning's NTXentLoss with image anchors and text references.

    Args:
        image_embeds: (B, D) float, L2-normalised.
        text_embeds: (B, D) float, L2-normalised; row i is the label text of image i.
        labels: (B,) int64; texts of the same label are positives.
        temperature: > 0.

    Returns:
        () float32, nats, mean over positive pairs. 0 where every row has the same label (nothing to push from).
    """
    logits = at_least_float32(image_embeds) @ at_least_float32(text_embeds).T / temperature
    is_positive = labels[:, None] == labels[None, :]
    # The lowest finite number and not -inf: where no negative exists, -inf would turn the gradient into NaN.
    negatives = logits.masked_fill(is_positive, torch.finfo(logits.dtype).min).logsumexp(dim=1, keepdim=True)
    losses = -F.logsigmoid(logits - negatives)
    return losses.masked_fill(~is_positive, 0).sum() / is_positive.sum()


def info_nce(image_embeds: Tensor, text_embeds: Tensor, labels: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Pull each image to its own label text and push it from the texts of other labels.

    The reference code adds n_pos - 1 negatives to the numerator; this follows the definition.

    Args:
        image_embeds: (B, D) float, L2-normalised.
        text_embeds: (B, D) float, L2-normalised; row i is the label text of image i.
        labels: (B,) int64; texts of the same label are never negatives.
        temperature: > 0.

    Returns:
        () float32, nats, mean over B. 0 where every row has the same label (there is nothing to push from).
    """
    logits = at_least_float32(image_embeds) @ at_least_float32(text_embeds).T / temperature
    is_own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_left_out = (labels[:, None] == labels[None, :]) & ~is_own
    logits = logits.masked_fill(is_left_out, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(labels), device=labels.device))


def prototype(
    image_embeds: Tensor,
    label_embeds: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.07,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax over all labels of the taxonomy, whatever the batch holds; not from the paper.

    Args:
        image_embeds: (B, D) float, L2-normalised.
        label_embeds: (C, D) float, L2-normalised.
        targets: (B,) int64 in [0, C).
        temperature: > 0.
        label_smoothing: in [0, 1).

    Returns:
        () float32, nats, mean over B.
    """
    logits = at_least_float32(image_embeds) @ at_least_float32(label_embeds).T / temperature
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def alignment(image_embeds: Tensor, text_embeds: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Pull each image's mean token to the mean token of its own text, by contrast and by distance; not from the paper.

    Both sides are centred by the mean text of the batch, which holds what all texts share. The contrast is InfoNCE from
    images to texts and back; the distance is the mean squared error in units of the variance of the texts, and gives
    image tokens the scale of word embeddings.

    Args:
        image_embeds: (B, D) float, not normalised.
        text_embeds: (B, D) float, not normalised; row i is the text of image i.
        temperature: > 0.

    Returns:
        () float32, nats plus a ratio, mean over B.
    """
    texts = at_least_float32(text_embeds)
    images, texts = at_least_float32(image_embeds) - texts.mean(0), texts - texts.mean(0)
    own = torch.arange(len(texts), device=texts.device)
    near_images, near_texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    contrast = info_nce(near_images, near_texts, own, temperature=temperature)
    contrast = (contrast + info_nce(near_texts, near_images, own, temperature=temperature)) / 2
    return contrast + F.mse_loss(images, texts) / texts.var().clamp(min=torch.finfo(torch.float32).tiny)


def compute_loss(
    config: LossConfig,
    image_embeds: Tensor,
    labels: Tensor,
    text_rows: Tensor,
    text_table: Tensor,
    label_embeds: Tensor,
) -> Tensor:
    """Compute the configured loss of one batch; the caller L2-normalises image_embeds, text_table and label_embeds.

    Args:
        config: name and constants of the loss.
        image_embeds: (B, D) float.
        labels: (B,) int64, rows of `label_embeds`.
        text_rows: (B,) int64, rows of `text_table`: the label's own text, or a synonym's.
        text_table: (T, D) float.
        label_embeds: (C, D) float.

    Returns:
        () float32.
    """
    if config.name == "cosine":
        return cosine_embedding(image_embeds, text_table[text_rows], margin=config.margin)
    temperature = config.temperature or PUBLISHED_TEMPERATURES[config.name]
    if config.name == "prototype":
        return prototype(
            image_embeds, label_embeds, labels, temperature=temperature, label_smoothing=config.label_smoothing
        )
    contrast = {"nt_xent": nt_xent, "info_nce": info_nce}[config.name]
    return contrast(image_embeds, text_table[text_rows], labels, temperature=temperature)
