"""Our stream over the benchmark's records, under a Ray of its own: `python streaming_ours.py SYSTEM SETTINGS.json`.

A fresh Ray has empty caches, and its workers take AWS_ENDPOINT_URL from this process. Prints JSON as streaming_peers.py
does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # in place of this folder

NUM_CPUS = 2
os.environ.setdefault("RAY_worker_niceness", "0")  # as the local platform: at Ray's 15, every other process goes first


def main() -> None:
    """Read every record of the settings' data set for their number of epochs, with two workers."""
    import ray

    from orchestration.jobs.reading import read_stream
    from orchestration.recipe import load_recipe

    settings = json.loads(Path(sys.argv[2]).read_text())
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=NUM_CPUS, resources={"reader": 2 * NUM_CPUS}, include_dashboard=False,
             object_store_memory=2**30, log_to_driver=False, logging_level=logging.WARNING)  # fmt: skip
    started_at = time.perf_counter()
    overrides = [
        f"name=bench-stream-{settings['size']}-{time.time_ns()}",
        f'records.datasets=["{settings["dataset"]}"]',
        'records.tokenizer=""',
        f"train.global_batch_size={2 * settings['batch']}",
        f"train.num_epochs={settings['num_epochs']}",
    ]
    result = read_stream(load_recipe("oasis-stream", overrides))
    figures = {"samples_per_s": result.samples_per_s, "first_batch_s": result.first_batch_s}
    print(json.dumps(figures | {"job_s": time.perf_counter() - started_at, "num_samples": result.num_samples}))
    ray.shutdown()


if __name__ == "__main__":
    main()
