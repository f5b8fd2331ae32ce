"""The plan that benchmarks/plan.py measures; imports numpy alone."""

from __future__ import annotations

import numpy as np

from orchestration.data.plan import Plan, PlannedSet, RowGroups


def billion_plan() -> Plan:
    """Return two epochs over 1.3e9 records in 1.3e6 row groups of 20,000 shards, the last row group of each short."""
    sets = (
        PlannedSet("ab" * 32, RowGroups.of_shards(np.full(10_000, 99_963), 1000), 16e6, 3.0),
        PlannedSet("cd" * 32, RowGroups.of_shards(np.full(10_000, 30_003), 1000), 16e6, 1.0),
    )
    return Plan(sets, 7, 1024, 2.0, 64 * 2**20)
