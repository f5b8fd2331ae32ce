"""Two gloo processes on loopback see what one process sees of the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyemo.config import ProjectorConfig
from tinyemo.distributed import GlobalBatchNorm1d, GlobalDropout, gather_rows
from tinyemo.losses import info_nce, nt_xent
from tinyemo.projector import MetricProjector

WORLD_SIZE = 2
NUM_ROWS = 12
UNEVEN = (4, 8)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Features far from zero (12, 512), texts (12, 16), labels (12,)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, 512, generator=generator, dtype=torch.float64) + 3
    texts = nn.functional.normalize(torch.randn(NUM_ROWS, 16, generator=generator, dtype=torch.float64), dim=-1)
    return features, texts, torch.arange(NUM_ROWS) % 4


def rows_of(rank: int, world_size: int) -> slice:
    return slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)


def train_projector(rank: int, world_size: int, dtype: torch.dtype, num_steps: int = 3) -> dict[str, Any]:
    """A few SGD steps on the global batch; every rank holds its part of it."""
    torch.manual_seed(1)
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=16, dropout=0.2)).to(dtype)
    features, texts, labels = data()
    losses, grads = [], {}
    for step in range(num_steps):
        torch.manual_seed(100 + step)
        embeds = gather_rows(model(features[rows_of(rank, world_size)].to(dtype)))
        loss = nt_xent(embeds, texts.to(dtype), labels) + info_nce(embeds, texts.to(dtype), labels)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
            grads[f"{step}/{name}"] = parameter.grad.clone()
            parameter.data -= 0.1 * parameter.grad
    return {"losses": losses, "grads": grads, "state": model.state_dict()}


def normalize_uneven(rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """Batch norm of some rows of the batch, with a gradient that differs from row to row."""
    features, _, _ = data()
    x = features[:, :16].to(dtype)[rows].clone().requires_grad_()
    norm = GlobalBatchNorm1d(16).to(dtype)
    weight = torch.linspace(0.5, 2, 16)
    norm.weight.data.copy_(weight)
    y = norm(x)
    direction = torch.randn(NUM_ROWS, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[rows]
    (y.double() * direction).sum().backward()
    assert x.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.weight.grad is not None
    return {
        "y": y.detach(), "x_grad": x.grad, "mean": norm.running_mean, "var": norm.running_var,
        "weight_grad": norm.weight.grad,
    }  # fmt: skip


def count_collectives() -> dict[str, int]:
    """Collectives that a training step's forward and backward issue, by the profiler."""
    norm, x = GlobalBatchNorm1d(16), torch.randn(4, 16, requires_grad=True)
    counts = {}
    with torch.profiler.profile() as profile:
        y = gather_rows(norm(x))
    counts["forward"] = sum("c10d::" in event.name for event in profile.events())
    with torch.profiler.profile() as profile:
        y.square().sum().backward()
    counts["backward"] = sum("c10d::" in event.name for event in profile.events())
    return counts


def drop(rank: int, world_size: int) -> Tensor:
    torch.manual_seed(5)
    return GlobalDropout(0.3)(torch.ones(NUM_ROWS, 33)[rows_of(rank, world_size)])


def run_rank(rank: int, port: int, folder: str) -> None:
    """What one of the two processes does; results go to a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    uneven = slice(0, UNEVEN[0]) if rank == 0 else slice(UNEVEN[0], NUM_ROWS)
    results = {
        "float64": train_projector(rank, WORLD_SIZE, torch.float64),
        "float32": train_projector(rank, WORLD_SIZE, torch.float32),
        "uneven": normalize_uneven(uneven, torch.float64),
        "bfloat16": normalize_uneven(uneven, torch.bfloat16),
        "dropped": drop(rank, WORLD_SIZE),
        "collectives": count_collectives(),
        "integers": gather_rows(torch.tensor([rank, rank + 10])),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, by rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(folder)), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 2e-4)])
def test_training_does_not_depend_on_the_number_of_ranks(ranks: list[dict[str, Any]], dtype: str, tolerance: float):
    """Loss, averaged gradients, parameters and running statistics, with dropout on."""
    whole = train_projector(0, 1, getattr(torch, dtype))
    for result in (rank[dtype] for rank in ranks):
        assert result["losses"] == pytest.approx(whole["losses"], rel=tolerance)
        for name, grad in whole["grads"].items():
            assert torch.allclose(result["grads"][name], grad, rtol=tolerance, atol=tolerance), name
        for name, tensor in whole["state"].items():
            assert torch.allclose(result["state"][name], tensor, rtol=tolerance, atol=tolerance), name


def test_ranks_hold_the_same_bits(ranks: list[dict[str, Any]]):
    for name, tensor in ranks[0]["float32"]["state"].items():
        assert torch.equal(tensor, ranks[1]["float32"]["state"][name]), name


def test_row_counts_may_differ(ranks: list[dict[str, Any]]):
    whole = normalize_uneven(slice(0, NUM_ROWS), torch.float64)
    for key in ("y", "x_grad"):
        assert torch.allclose(torch.cat([rank["uneven"][key] for rank in ranks]), whole[key], rtol=1e-10, atol=1e-10)
    for rank in ranks:
        assert torch.allclose(rank["uneven"]["mean"], whole["mean"], rtol=1e-12)
        assert torch.allclose(rank["uneven"]["var"], whole["var"], rtol=1e-12)
    assert torch.allclose(sum(rank["uneven"]["weight_grad"] for rank in ranks), whole["weight_grad"], rtol=1e-10)


def test_bfloat16_input_has_float32_statistics(ranks: list[dict[str, Any]]):
    features, _, _ = data()
    rounded = features[:, :16].bfloat16().float()
    whole = normalize_uneven(slice(0, NUM_ROWS), torch.bfloat16)
    assert torch.allclose(torch.cat([rank["bfloat16"]["y"] for rank in ranks]).float(), whole["y"].float(), atol=0.02)
    for result in (whole, *(rank["bfloat16"] for rank in ranks)):
        assert result["y"].dtype == torch.bfloat16
        assert result["mean"].dtype == result["var"].dtype == torch.float32
        assert torch.allclose(result["mean"], 0.1 * rounded.mean(0), rtol=1e-6)
        assert torch.allclose(result["var"], 0.9 + 0.1 * rounded.var(0), rtol=1e-6)


def test_dropout_masks_are_those_of_one_rank(ranks: list[dict[str, Any]]):
    assert torch.equal(torch.cat([rank["dropped"] for rank in ranks]), drop(0, 1))


def test_one_collective_forward_and_one_backward_in_the_norm(ranks: list[dict[str, Any]]):
    """The forward's other one is `gather_rows`, which has none backward."""
    assert [rank["collectives"] for rank in ranks] == [{"forward": 2, "backward": 1}] * 2


def test_gathered_rows_are_in_rank_order(ranks: list[dict[str, Any]]):
    assert [rank["integers"].tolist() for rank in ranks] == [[0, 10, 1, 11]] * 2


def test_without_a_group_each_is_its_parent_class():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    ours, plain = GlobalBatchNorm1d(16), nn.BatchNorm1d(16)
    for is_training in (True, True, False):
        assert torch.equal(ours.train(is_training)(x), plain.train(is_training)(x))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    torch.manual_seed(3)
    dropped = GlobalDropout(0.2)(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, nn.Dropout(0.2)(x))
    assert GlobalDropout(0.2).eval()(x) is x
    assert torch.equal(GlobalDropout(1.0)(x), torch.zeros_like(x))
    assert gather_rows(x) is x


def test_running_statistics_stay_in_float32_when_the_module_goes_to_bfloat16():
    """1 + 0.1 * 0.001 is not a bfloat16."""
    norm = GlobalBatchNorm1d(4)
    assert norm.running_mean is not None
    norm.running_mean.fill_(1.0001)
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert torch.equal(norm.running_mean, torch.full((4,), 1.0001))
    assert norm.double().running_mean.dtype == torch.float64  # type: ignore[union-attr]


def test_the_norm_needs_rows_and_features():
    with pytest.raises(ValueError, match="2-D"):
        GlobalBatchNorm1d(4)(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="more than 1 value"):
        GlobalBatchNorm1d(4)(torch.zeros(1, 4))
