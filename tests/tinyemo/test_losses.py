"""The losses against closed forms, plain loops, gradient checks, properties and pytorch-metric-learning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor

from tinyemo.config import LossConfig
from tinyemo.losses import alignment, compute_loss, cosine_embedding, info_nce, nt_xent, prototype

Batch = tuple[Tensor, Tensor, Tensor]


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def batch(seed: int, size: int = 12, num_labels: int = 4, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, num_labels, (size,), generator=generator)
    return unit(size, 8, seed=seed, dtype=dtype), unit(size, 8, seed=seed + 2, dtype=dtype), labels


batches = st.builds(batch, st.integers(0, 2**20), st.integers(2, 24), st.integers(1, 6))
contrasts = st.sampled_from([nt_xent, info_nce])


def nt_xent_by_loops(images: Tensor, texts: Tensor, labels: Tensor, temperature: float) -> float:
    """The definition, one pair at a time."""
    terms = []
    for i, image in enumerate(images):
        negatives = [math.exp(float(image @ t) / temperature) for j, t in enumerate(texts) if labels[j] != labels[i]]
        for j, text in enumerate(texts):
            if labels[j] == labels[i]:
                positive = math.exp(float(image @ text) / temperature)
                terms.append(-math.log(positive / (positive + sum(negatives))))
    return sum(terms) / len(terms)


def info_nce_by_loops(images: Tensor, texts: Tensor, labels: Tensor, temperature: float) -> float:
    """The definition, one image at a time."""
    terms = []
    for i, image in enumerate(images):
        positive = math.exp(float(image @ texts[i]) / temperature)
        negatives = [math.exp(float(image @ t) / temperature) for j, t in enumerate(texts) if labels[j] != labels[i]]
        terms.append(-math.log(positive / (positive + sum(negatives))))
    return sum(terms) / len(terms)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": nt_xent,
    "info_nce": info_nce,
    "prototype": prototype,
    "cosine": lambda images, texts, labels: cosine_embedding(images, texts),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_losses_and_gradients_on_a_device_are_those_in_float64(
    name: str, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    loss = LOSSES[name]
    images, texts, labels = batch(3)
    expected = leaf(images)
    value = loss(expected, texts, labels)
    value.backward()
    found = leaf(images.to(device, dtype))
    computed = loss(found, texts.to(device, dtype), labels.to(device))
    computed.backward()
    assert computed.device.type == device
    assert float(computed.detach()) == pytest.approx(float(value.detach()), rel=tolerance)
    assert expected.grad is not None
    assert found.grad is not None
    difference = found.grad.cpu().double() - expected.grad
    assert float(difference.norm() / expected.grad.norm()) < tolerance


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


@given(batches)
@settings(deadline=None, max_examples=30)
def test_nt_xent_is_its_definition(data: Batch):
    assert float(nt_xent(*data, temperature=0.3)) == pytest.approx(nt_xent_by_loops(*data, 0.3), rel=1e-9, abs=1e-12)


@given(batches)
@settings(deadline=None, max_examples=30)
def test_info_nce_is_its_definition(data: Batch):
    assert float(info_nce(*data, temperature=0.3)) == pytest.approx(info_nce_by_loops(*data, 0.3), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("contrast", [nt_xent, info_nce])
def test_two_orthogonal_labels_have_a_closed_form(contrast: Callable[..., Tensor]):
    """Own cosine 1, the other 0: each term is log(1 + e^(-1/tau))."""
    embeds = torch.eye(2, dtype=torch.float64)
    loss = contrast(embeds, embeds, torch.tensor([0, 1]), temperature=0.5)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)


def test_cosine_is_one_minus_the_mean_cosine_at_any_margin():
    images, texts, _ = batch(0)
    expected = float((1 - (images * texts).sum(1)).mean())
    for margin in (0.0, 0.5, 1.0):
        assert float(cosine_embedding(images, texts, margin=margin)) == pytest.approx(expected, rel=1e-9)


def test_prototype_is_a_softmax_over_all_labels():
    images, labels = unit(5, 8, seed=1), torch.tensor([0, 2, 2, 1, 3])
    table = unit(4, 8, seed=2)
    expected = -(images @ table.T / 0.07).log_softmax(1)[torch.arange(5), labels].mean()
    assert float(prototype(images, table, labels)) == pytest.approx(float(expected), rel=1e-9)
    perfect = prototype(torch.eye(3), torch.eye(3), torch.arange(3), temperature=1.0)
    assert float(perfect) == pytest.approx(math.log(1 + 2 * math.exp(-1)), rel=1e-6)
    smoothed = prototype(images, table, labels, label_smoothing=1 - 1e-9)
    assert float(smoothed) == pytest.approx(float(-(images @ table.T / 0.07).log_softmax(1).mean()), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_labels", [2, 6, 40])
def test_nt_xent_is_that_of_pytorch_metric_learning(seed: int, num_labels: int):
    images, texts, labels = batch(seed, size=32, num_labels=num_labels)
    # A clone: of the very same tensor twice, the library takes image i and text i for one sample and drops the pair.
    reference = NTXentLoss(0.07)(images, labels, ref_emb=texts, ref_labels=labels.clone())
    assert float(nt_xent(images, texts, labels)) == pytest.approx(float(reference), rel=1e-9)


def test_nt_xent_keeps_the_pair_that_the_library_drops_on_the_same_tensor():
    """The reference code passes one tensor as both labels, so own texts are no positives there; ours are."""
    images, texts, labels = batch(0, size=16, num_labels=3)
    reference = NTXentLoss(0.07)(images, labels, ref_emb=texts, ref_labels=labels)
    logits = images @ texts.T / 0.07
    is_positive = labels[:, None] == labels[None, :]
    negatives = logits.masked_fill(is_positive, -torch.inf).logsumexp(1, keepdim=True)
    terms = F.softplus(negatives - logits)
    without_own = is_positive & ~torch.eye(16, dtype=torch.bool)
    assert float(reference) == pytest.approx(float(terms[without_own].mean()), rel=1e-6)
    assert float(nt_xent(images, texts, labels)) == pytest.approx(float(terms[is_positive].mean()), rel=1e-9)


@pytest.mark.parametrize("contrast", [nt_xent, info_nce])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_one_label_alone_gives_zero_loss_and_zero_gradient(contrast: Callable[..., Tensor], size: int):
    images, texts = unit(size, 8, seed=3).requires_grad_(), unit(size, 8, seed=4)
    labels = torch.zeros(size, dtype=torch.int64)
    loss = contrast(images, texts, labels)
    loss.backward()
    assert loss.item() == 0
    assert images.grad is not None
    assert images.grad.abs().max() == 0
    if contrast is nt_xent:
        assert NTXentLoss(0.07)(images, labels, ref_emb=texts, ref_labels=labels.clone()).item() == 0


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cosine": lambda images, texts, labels: cosine_embedding(images, texts),
    "nt_xent": nt_xent,
    "info_nce": info_nce,
    "prototype": lambda images, texts, labels: prototype(images, texts, labels, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_gradients_are_those_of_finite_differences(name: str, num_labels: int):
    images, texts, labels = batch(5, size=6, num_labels=num_labels)
    images, texts = images.requires_grad_(), texts.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: LOSSES[name](i, t, labels), (images, texts))


@given(batches, contrasts, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_order_of_rows_and_the_names_of_labels_do_not_matter(data, contrast, random):
    images, texts, labels = data
    order = list(range(len(labels)))
    random.shuffle(order)
    loss = float(contrast(images, texts, labels))
    assert float(contrast(images[order], texts[order], 7 - labels[order])) == pytest.approx(loss, rel=1e-9, abs=1e-12)


@given(batches, contrasts, st.floats(0.05, 2.0))
@settings(deadline=None, max_examples=30)
def test_losses_are_finite_and_never_negative(data, contrast, temperature: float):
    loss = float(contrast(*data, temperature=temperature))
    assert math.isfinite(loss)
    assert loss >= 0


@given(st.integers(0, 2**20))
@settings(deadline=None, max_examples=20)
def test_info_nce_grows_with_each_sample_of_another_label(seed: int):
    images, texts, _ = batch(seed, size=8)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    first = [float(info_nce(images[:n], texts[:n], torch.arange(n))) for n in (1, 2)]
    assert first[0] == 0 < first[1]
    # Among rows of one label, a row of another is the one thing that pushes.
    assert float(info_nce(images[:7], texts[:7], labels[:7])) == 0 < float(info_nce(images, texts, labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_compute_in_float32_or_wider(name: str, dtype: torch.dtype):
    images, texts, labels = batch(1, dtype=torch.float32)
    loss = LOSSES[name](images.to(dtype), texts.to(dtype), labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("temperature", [0.01, 0.001])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce"])
def test_small_temperatures_do_not_overflow(name: str, temperature: float):
    images, texts, labels = batch(2, dtype=torch.float32)
    images.requires_grad_()
    loss = {"nt_xent": nt_xent, "info_nce": info_nce}[name](images, texts, labels, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cosine", "nt_xent", "info_nce", "prototype"])
def test_compute_loss_reads_texts_by_row_and_takes_the_published_temperature(name: str):
    table, label_embeds = unit(6, 8, seed=1), unit(3, 8, seed=2)
    images, labels, rows = unit(5, 8, seed=3), torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 4, 2, 1, 5])
    texts = table[rows]
    expected = {
        "cosine": cosine_embedding(images, texts),
        "nt_xent": nt_xent(images, texts, labels, temperature=0.07),
        "info_nce": info_nce(images, texts, labels, temperature=0.1),
        "prototype": prototype(images, label_embeds, labels, temperature=0.07),
    }
    assert torch.equal(compute_loss(LossConfig(name=name), images, labels, rows, table, label_embeds), expected[name])
    if name == "nt_xent":
        warm = compute_loss(LossConfig(name=name, temperature=1.0), images, labels, rows, table, label_embeds)
        assert torch.equal(warm, nt_xent(images, texts, labels, temperature=1.0))


def test_alignment_is_least_where_images_are_their_texts():
    """Images equal to their texts leave the contrast alone; a common shift of both sides changes nothing."""
    texts = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    centred = F.normalize(texts - texts.mean(0), dim=-1)
    logits = centred @ centred.T / 0.07
    expected = F.cross_entropy(logits, torch.arange(6))
    assert float(alignment(texts, texts)) == pytest.approx(float(expected), rel=1e-5)
    assert float(alignment(texts + 3, texts + 3)) == pytest.approx(float(expected), rel=1e-4)
    assert float(alignment(texts.roll(1, 0), texts)) > float(expected) + 1
