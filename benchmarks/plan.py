"""The cost of one window of a plan over a billion records: `python benchmarks/plan.py`.

Two data sets of 1e9 and 3e8 records in 1e6 and 3e5 row groups of 10,000 shards each, mixed 3 to 1, nothing stored. Each
window is computed in a fresh process that imports numpy alone, from the number of rows of each shard: its time, from
those numbers to the records with their steps, and the peak memory of that process. A full pass over a sample of pools
then looks for a record that comes twice.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from benchmarks.plan_sizes import billion_plan

ROOT = Path(__file__).parents[1]
NUM_PROCESSES = 20
NUM_POOLS = 2_000
ONE_WINDOW = r"""
import json, re, sys, time
from benchmarks.plan_sizes import billion_plan
started, cpu = time.perf_counter(), time.process_time()
plan = billion_plan()
start_step = int(float(sys.argv[1]) * plan.num_steps)
window = next(plan.windows(start_step))
records = plan.records(window, start_step)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
rss = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
assert not {"pyarrow", "ray", "torch"} & set(sys.modules)
print(json.dumps([1000 * seconds, 1000 * cpu, rss, len(records.row)]))
"""


def measure() -> dict[str, Any]:
    """Compute windows all over the run in fresh processes, then pass over a sample of pools in this one."""
    rounds = []
    for place in np.linspace(0, 0.999, NUM_PROCESSES):
        command = [sys.executable, "-c", ONE_WINDOW, str(place)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        rounds.append(json.loads(done.stdout))
    plan = billion_plan()
    seen: dict[int, list[Any]] = {0: [], 1: []}
    windows = plan.windows(plan.num_steps // 3)
    for _ in range(NUM_POOLS):
        window = next(windows)
        seen[window.source].append(plan.records(window).row)
    rows = {source: np.concatenate(parts) for source, parts in seen.items()}
    return {
        "window_ms": statistics.median(wall for wall, *_ in rounds),
        "window_ms_worst": max(wall for wall, *_ in rounds),
        "window_cpu_ms": statistics.median(cpu for _, cpu, *_ in rounds),
        "window_cpu_ms_worst": max(cpu for _, cpu, *_ in rounds),
        "load_average": os.getloadavg()[0],
        "rss_mib": max(rss for _, _, rss, _ in rounds),
        "num_processes": NUM_PROCESSES,
        "num_records_per_epoch": plan.samples_per_epoch,
        "num_row_groups": sum(part.groups.num_groups for part in plan.sets),
        "records_per_window": statistics.mean(count for *_, count in rounds),
        "pools_passed": NUM_POOLS,
        "records_passed": sum(map(len, rows.values())),
        "records_twice": sum(len(part) - len(np.unique(part)) for part in rows.values()),
    }


if __name__ == "__main__":
    figures = measure()
    print(json.dumps(figures, indent=1))
    print("written", write_results("plan", figures))
