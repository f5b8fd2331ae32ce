"""How fast a stage trains: tokens, model FLOPs and memory."""

from __future__ import annotations

import resource
import time

import torch

from tinyemo.reasoner.flops import FlopModel, Work

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendor's data sheets."""


class Meter:
    """Rates of a run's steps between two calls of `take`.

    Attributes:
        flops: of the model, before DeepSpeed shards it.
    """

    def __init__(self, flops: FlopModel, device: torch.device, world_size: int) -> None:
        self.flops = flops
        self._device, self._world_size = device, world_size
        self.skip()

    def skip(self) -> None:
        """Start anew: what came since the last call is not training."""
        self._work, self._began_at = Work(), time.perf_counter()
        self._step_began_at = self._began_at

    def add(self, work: Work) -> float:
        """Count a step of all ranks: its seconds, waiting for data included."""
        self._work = self._work + work
        began_at, self._step_began_at = self._step_began_at, time.perf_counter()
        return self._step_began_at - began_at

    def take(self) -> dict[str, float]:
        """Figures since the last call; none without a step."""
        elapsed_s = time.perf_counter() - self._began_at
        if not self._work.tokens or elapsed_s <= 0:
            return {}
        rate = self.flops.of_training(self._work) / elapsed_s
        found = {
            "train/tokens_per_s": self._work.tokens / elapsed_s,
            "train/model_flops_per_s": rate,
            "train/peak_memory_bytes": float(peak_memory_bytes(self._device)),
        }
        peak = peak_flops(self._device)
        if peak is not None:
            found["train/mfu"] = rate / (peak * self._world_size)
        self.skip()
        return found


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device by its vendor; None of a CPU and of a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
