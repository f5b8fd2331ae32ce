"""How records come out of S3, ours beside its peers: `python benchmarks/streaming.py [PART...]`, every part by default.

Needs the platform (`tinyemo platform up`). Peers live apart, never in the project's environment: `python -m pip install
--no-deps --target PEERS mosaicml-streaming webdataset braceexpand brotli python-snappy cramjam zstd xxhash catalogue`,
then TINYEMO_PEERS=PEERS. One that is not there is named as missing.

speed: OASIS photographs, each under several ids, in the same local S3 server as Parquet (ours and torch's DataLoader),
MDS and tar; two decoding processes each, same decoder, same batch, rounds interleaved, medians. Ours in exact order,
over 4 epochs, since Ray Data reads far ahead; every rate is of a run's second half. Ours may find some row groups of an
earlier epoch in its readers' caches (128 MiB each).
resume: workers killed at 20 random steps, gone on with 1, 2 or 3 of them in turn; what the ledger shows.
mix: one job over an abundant and a small data set by weight; the shares that its ledger shows.
wait: the share of training that waits for its batch, for the projector and for the reasoning model of 135M (OASIS and
Emotion6 in S3: `tinyemo ingest oasis`, `tinyemo ingest features emotion6 --name emotion6`).
scale: 1,000,000 generated feature rows, 50,000 small images, ingest and one epoch: memory of driver and object store.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from benchmarks.streaming_data import ingest_oasis_copies, peer_environment
from benchmarks.streaming_hardship import measure_mix, measure_resume, measure_scale, measure_wait
from cluster.environment import load_platform_environment

ROUNDS = 2
OUR_EPOCHS = 4
PEERS = ("mosaicml-streaming", "webdataset", "torch DataLoader")


def run_peer(system: str, settings: dict[str, Any], path: Path) -> dict[str, float] | str:
    """Its figures, or why there are none."""
    path.write_text(json.dumps(settings))
    command = [sys.executable, str(Path(__file__).parent / "streaming_peers.py"), system, str(path)]
    done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def run_ours(settings: dict[str, Any], decode: str, number: int) -> dict[str, float]:
    """The exact stream under Ray Train, two workers."""
    from orchestration.jobs.reading import read_stream
    from orchestration.recipe import load_recipe

    overrides = [
        f"name=bench-stream-{decode}-{number}-{int(time.time())}",
        f'records.datasets=["{settings["dataset"]}"]',
        f"records.decode={decode}",
        'records.tokenizer=""',
        f"train.global_batch_size={2 * settings['batch']}",
        f"train.num_epochs={OUR_EPOCHS}",
    ]
    started_at = time.perf_counter()
    result = read_stream(load_recipe("emotion6", overrides))
    return {
        "samples_per_s": result.samples_per_s,
        "first_batch_s": result.first_batch_s,
        "job_s": time.perf_counter() - started_at,
    }


def measure_speed() -> dict[str, Any]:
    """Every system in turn, ROUNDS times."""
    settings = ingest_oasis_copies()
    found: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "settings.json"
        for number in range(ROUNDS):
            for system in ("decode alone", *PEERS):
                figures = run_peer(system, settings, path)
                if isinstance(figures, str):
                    missing[system] = figures
                else:
                    found.setdefault(system, []).append(figures)
            found.setdefault("ours, decode in worker", []).append(run_ours(settings, "worker", number))
            print({system: round(rounds[-1]["samples_per_s"]) for system, rounds in found.items()}, flush=True)
    speed = {system: statistics.median(r["samples_per_s"] for r in rounds) for system, rounds in found.items()}
    first = {system: statistics.median(r["first_batch_s"] for r in rounds) for system, rounds in found.items()}
    ours = max(value for system, value in speed.items() if system.startswith("ours"))
    peers = {system: speed[system] for system in PEERS if system in speed}
    return {
        "samples_per_s": speed,
        "first_batch_s": first,
        "ours_vs_best_peer": ours / max(peers.values()),
        "ours_vs_limit": ours / speed["decode alone"],
        "best_peer": max(peers, key=lambda system: peers[system]),
        "missing": missing,
        "num_records": settings["num_records"],
        "num_image_bytes": settings["num_bytes"],
        "rounds": found,
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
