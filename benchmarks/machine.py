"""The machine and commit of a benchmark, and its JSON file."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestration.services.tracking import git_state

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, memory, versions, commit and time."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "ray", "deepspeed", "mlflow")},
        **git_state(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "note": "shared and noisy: compare figures of one file, as ratios",
    }


def write_results(name: str, figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json; figures of earlier parts of the same benchmark stay, with their commit."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    machine = describe_machine()
    now = {key: machine[key] for key in ("git_commit", "git_dirty", "finished_at")}
    measured = earlier.get("measured", {}) | dict.fromkeys(figures, now)
    path.write_text(json.dumps(earlier | figures | {"measured": measured, "machine": machine}, indent=1) + "\n")
    return path
