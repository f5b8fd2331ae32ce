"""Modules that see the global batch: statistics, dropout masks and contrastive rows span all ranks.

Plain torch.distributed, so it does not matter who started the processes. Without a process group, or in a group of one,
each does what its parent class does. A global batch is the ranks' rows one after another, in rank order.

Gradients follow one rule: every rank computes the same loss on gathered rows, and the gradients of the parameters are
then AVERAGED over ranks (as DDP and DeepSpeed do). `gather_rows` therefore returns gradients times the world size, and
the average equals the gradient of one rank that holds the whole batch.

Shape letters: B rows, H features, W world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Return the number of ranks in the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank in the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is float16 or bfloat16; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_gather(x: Tensor) -> Tensor:
    """Gather (B, ...) of each rank to (W * B, ...) in rank order; not differentiable."""
    gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(gathered, x.contiguous())
    return gathered


class _NormalizeByGlobalBatch(torch.autograd.Function):
    """Subtract the mean and divide by the deviation of all ranks' rows; one collective each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, H) -> normalised (B, H), mean (H,), biased variance (H,), global row count ()."""
        num_rows = x.shape[0]
        local_mean = x.sum(0) / max(num_rows, 1)
        local_m2 = (x - local_mean).square().sum(0)
        # Means and squared deviations are merged by Chan's rule: sums of squares would lose digits far from zero.
        packed = torch.cat([local_mean, local_m2, x.new_tensor([float(num_rows)])])
        by_rank = _all_gather(packed[None])
        width = x.shape[1]
        means, m2s, counts = by_rank[:, :width], by_rank[:, width:-1], by_rank[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = (m2s.sum(0) + ((means - mean).square() * counts).sum(0)) / count
        inverse_deviation = torch.rsqrt(variance + eps)
        normalized = (x - mean) * inverse_deviation
        ctx.save_for_backward(normalized, inverse_deviation, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, whose two batch means are over all ranks."""
        grad = grads[0]
        normalized, inverse_deviation, count = ctx.saved_tensors
        sums = torch.cat([grad.sum(0), (grad * normalized).sum(0)])
        # Gathered and added here: on gloo this takes half the time of an all-reduce (0.6 for 1.2 ms), and all ranks
        # add in the same order.
        grad_mean, grad_dot_mean = (_all_gather(sums[None]).sum(0) / count).chunk(2)
        return (grad - grad_mean - normalized * grad_dot_mean) * inverse_deviation, None


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation over the rows of all ranks; statistics and running statistics stay in float32 under bf16.

    Rank row counts may differ. One collective forward and one backward in training, none in evaluation. Weight and bias
    are read in `forward` alone, so that ZeRO-3 may gather them before and free them after.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, input: Tensor) -> Tensor:
        """(B, H) float -> (B, H) of the same dtype."""
        self._check_input_dim(input)
        x = at_least_float32(input)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        momentum, running_mean, running_var = self.momentum, self.running_mean, self.running_var
        assert momentum is not None
        assert running_mean is not None
        assert running_var is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if not self.training or world_size() == 1:
            y = F.batch_norm(x, running_mean, running_var, weight, bias, self.training, momentum, self.eps)
            return y.to(input.dtype)
        normalized, mean, variance, count = _NormalizeByGlobalBatch.apply(x, self.eps)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return torch.addcmul(bias, normalized, weight).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2:
            raise ValueError(f"GlobalBatchNorm1d needs a 2-D input (rows, features), got {input.dim()}-D")

    def _apply(self, fn: Any, recurse: bool = True) -> GlobalBatchNorm1d:
        # module.bfloat16() and module.half() would round the running statistics, and a moving average with momentum 0.1
        # stalls at eight bits.
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, statistic in before.items():
            now = getattr(self, name)
            if statistic is not None and now.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, at_least_float32(statistic).to(now.device))
        return self


class GlobalDropout(nn.Dropout):
    """Dropout whose mask does not depend on the number of ranks.

    Every rank draws the mask of the whole global batch from torch's default generator and keeps its own rows. That asks
    for the same generator state and the same number of rows on every rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) float -> (B, ...): zero with probability p, else divided by 1 - p."""
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        num_rows = input.shape[0]
        mask = input.new_empty((world_size() * num_rows, *input.shape[1:])).bernoulli_(1 - self.p)
        return input * mask[rank() * num_rows : (rank() + 1) * num_rows].div_(1 - self.p)


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward needs no collective, because every rank holds the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = rank() * ctx.num_rows
        return grads[0][start : start + ctx.num_rows] * world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order; differentiable.

    Args:
        x: (B, ...) with the same shape on every rank.

    Returns:
        (W * B, ...). The gradient that reaches `x` is W times the gradient of its own rows, which is right where every
        rank computes the same loss on the result and parameter gradients are averaged over ranks afterwards.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call]
    return gathered
