"""Memory that a rank gives back while it takes in a model; what the ranks build is in test_reasoning_engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import psutil, torch
from orchestration.jobs.stage_weights import give_freed_memory_back

def resident() -> int:
    return psutil.Process().memory_info().rss

torch.ones(8 * 2**20)  # freed at once: from here on glibc keeps blocks of this size
give_freed_memory_back(at_once=sys.argv[1] == "at once")
before, shards = resident(), []
for _ in range(50):  # as a rank takes in a model: each parameter whole, then half of it
    whole = torch.ones(2 * 2**20)
    shards.append(whole[: len(whole) // 2].clone())
    keep = [whole] if len(shards) % 2 else []  # freed out of order
del whole, keep
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_rank_holds_its_shards_and_nothing_else() -> None:
    command = [sys.executable, "-c", SCRIPT, "at once"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shards = 50 * 4 * 2**20
    assert shards <= grown < 1.1 * shards
