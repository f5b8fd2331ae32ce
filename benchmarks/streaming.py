"""How records come out of S3, ours beside its peers: `python benchmarks/streaming.py [PART...]`, every part by default.

Needs the platform (`tinyemo platform up`). Peers live apart, never in the project's environment: `python -m pip install
--no-deps --target PEERS mosaicml-streaming webdataset braceexpand brotli python-snappy cramjam zstd xxhash catalogue`,
then TINYEMO_PEERS=PEERS. One that is not there is named as missing.

speed: photographs of three sizes (fi about 10 kB, flickr8k about 18 kB, flickr8k scaled up to 100 kB and more) in the
same local S3 server as Parquet (ours and torch's DataLoader), MDS and tar. Every system takes the same number of epochs
with two decoding processes, the same decoder and batch, in fresh processes with empty caches (ours in a fresh Ray),
rounds interleaved, medians; every rate is of a run's second half. Ours has the exact order of its plan. Bytes come from
one more run of each system through a proxy that counts what S3 answers, in epochs of the data set.
resume: workers killed at 20 random steps, gone on with 1, 2 or 3 of them in turn; what the ledger shows.
mix: one job over an abundant and a small data set by weight; the shares that its ledger shows.
wait: the share of training that waits for its batch, for the projector and for the reasoning model of 135M (OASIS and
Emotion6 in S3: `tinyemo ingest oasis`, `tinyemo ingest features emotion6 --name emotion6`).
scale: 1,000,000 generated feature rows, 50,000 small images, ingest and one epoch: memory of driver and object store.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.counting_proxy import CountingProxy
from benchmarks.machine import write_results
from benchmarks.streaming_data import ingest_photographs, peer_environment
from benchmarks.streaming_hardship import measure_mix, measure_resume, measure_scale, measure_wait
from cluster.environment import load_platform_environment

ROUNDS = 3
NUM_EPOCHS = 2
SIZES = ("fi", "flickr8k", "large")
PEERS = ("mosaicml-streaming", "webdataset", "torch DataLoader")
OURS = "tinyemo, exact order"


def run_system(
    system: str, settings: dict[str, Any], path: Path, endpoint: str | None = None
) -> dict[str, float] | str:
    """Run one system in a process of its own; return its figures, or why there are none."""
    path.write_text(json.dumps(settings))
    here = Path(__file__).parent
    command = [sys.executable, str(here / ("streaming_ours.py" if system == OURS else "streaming_peers.py"))]
    environment = peer_environment() | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})
    done = subprocess.run(
        [*command, system, str(path)], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measure_size(size: str, path: Path) -> dict[str, Any]:
    """Measure every system on photographs of one size."""
    settings = ingest_photographs(size) | {"num_epochs": NUM_EPOCHS, "size": size}
    found: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    fetched: dict[str, float] = {}
    for _round in range(ROUNDS):
        for system in ("decode alone", *PEERS, OURS):
            figures = run_system(system, settings, path)
            if isinstance(figures, str):
                missing[system] = figures
            else:
                found.setdefault(system, []).append(figures)
        rates = {system: round(rounds[-1]["samples_per_s"]) for system, rounds in found.items()}
        print(size, rates, missing or "", flush=True)
    for system in (*PEERS, OURS):
        with CountingProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            if not isinstance(run_system(system, settings, path, proxy.endpoint), str):
                fetched[system] = proxy.num_bytes
    speed = {system: statistics.median(r["samples_per_s"] for r in rounds) for system, rounds in found.items()}
    peers = {system: speed[system] for system in PEERS if system in speed}
    return {
        "samples_per_s": speed,
        "first_batch_s": {
            name: statistics.median(r["first_batch_s"] for r in rounds) for name, rounds in found.items()
        },
        "ours_vs_best_peer": speed[OURS] / max(peers.values()),
        "best_peer": max(peers, key=lambda system: peers[system]),
        "ours_vs_decode_alone": speed[OURS] / speed["decode alone"],
        "fetched_bytes": fetched,
        "fetched_ratio": fetched[OURS] / NUM_EPOCHS / settings["num_dataset_bytes"],
        "missing": missing,
        **{key: settings[key] for key in ("num_records", "num_image_bytes", "num_dataset_bytes", "num_epochs")},
        "load_average": os.getloadavg()[1],
        "rounds": found,
    }


def measure_speed() -> dict[str, Any]:
    """Measure every system on photographs of every size; the summary has the worst of the sizes."""
    with tempfile.TemporaryDirectory() as name:
        sizes = {size: measure_size(size, Path(name) / "settings.json") for size in SIZES}
    return {
        "ours_vs_best_peer": min(found["ours_vs_best_peer"] for found in sizes.values()),
        "fetched_ratio": max(found["fetched_ratio"] for found in sizes.values()),
        "first_batch_s_after_workers": max(found["first_batch_s"][OURS] for found in sizes.values()),
        "sizes": sizes,
    }


PARTS = {
    "speed": measure_speed,
    "resume": measure_resume,
    "mix": measure_mix,
    "wait": measure_wait,
    "scale": measure_scale,
}


def main() -> None:
    """Run the parts that are named, all by default, and write benchmarks/results/streaming.json."""
    load_platform_environment()
    parts = sys.argv[1:] or PARTS
    for part in parts:
        figures = PARTS[part]()
        print(json.dumps({key: value for key, value in figures.items() if key != "rounds"}, indent=1))
        print("written", write_results("streaming", figures))


if __name__ == "__main__":
    main()
