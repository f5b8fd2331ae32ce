"""Groups of real processes for tests of engines, each started once for all tests of a file."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from orchestration.recipe import Recipe

Job = Callable[[Recipe, int, int, Path], Any]
"""Of (recipe, rank, world size, folder that all groups share); what it returns, torch.load takes with weights_only."""
Jobs = dict[int, dict[str, tuple[Job, Recipe]]]
"""By world size and name."""
Found = dict[int, list[dict[str, Any]]]
"""What each rank's jobs returned, by world size, rank and name."""


def run_groups(jobs: Jobs, folder: Path, device: str = "cpu") -> Found:
    """One group of processes after the other, in the order of `jobs`; each does all of its jobs.

    On "cpu" they see no GPU, on "cuda" each has one of its own.
    """
    found: Found = {}
    for world_size, named in jobs.items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(_run_rank, (world_size, port, folder, named, device), nprocs=world_size)
        found[world_size] = [
            torch.load(_path(folder, world_size, rank), weights_only=True) for rank in range(world_size)
        ]
    return found


def _run_rank(
    rank: int, world_size: int, port: int, folder: Path, named: dict[str, tuple[Job, Recipe]], device: str
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", rank=rank, world_size=world_size)
    found = {name: job(chosen, rank, world_size, folder) for name, (job, chosen) in named.items()}
    torch.save(found, _path(folder, world_size, rank))
    torch.distributed.destroy_process_group()


def _path(folder: Path, world_size: int, rank: int) -> Path:
    return folder / f"{world_size}-{rank}.pt"
