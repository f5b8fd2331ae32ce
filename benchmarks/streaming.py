"""How records come out of S3, ours beside its peers: `python benchmarks/streaming.py [speed] [resume] [wait] [scale]`.

Needs the platform (`tinyemo platform up`). Peers live apart, never in the project's environment: `python -m pip install
--no-deps --target PEERS mosaicml-streaming webdataset braceexpand brotli python-snappy cramjam zstd xxhash catalogue`,
then TINYEMO_PEERS=PEERS. One that is not there is named as missing.

speed: OASIS photographs, each under several ids, in the same local S3 server as Parquet (ours and torch's DataLoader),
MDS and tar; two decoding processes each, same decoder, same batch, rounds interleaved, medians. Ours in exact order.
resume: workers killed 20 times at random moments, gone on with 1, 2 or 3 of them in turn; what the ledger shows.
wait: the share of a training step that waits for its batch, for the projector and for a 135M language model.
scale: 1,000,000 generated feature rows, 50,000 small images, ingest and one epoch: memory of driver and object store.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from cluster.environment import load_platform_environment

ROUNDS = 3
COPIES = 16
BATCH = 64
PEERS = ("mosaicml-streaming", "webdataset", "torch DataLoader")
RECORDS_PER_FILE = 1024
NUM_KILLS = 20
RESUME_EPOCHS = 12


def write_records(folder: Path, images: list[Path], num_records: int) -> Path:
    """LLaVA records over the images, one caption each, as JSON Lines."""
    path = folder / "records.jsonl"
    with path.open("w") as file:
        for number in range(num_records):
            image = images[number % len(images)]
            turns = [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": f"{image.stem.rsplit('_', 1)[0].replace('_', ' ')}."},
            ]
            file.write(json.dumps({"id": f"r{number:07d}", "image": image.name, "conversations": turns}) + "\n")
    return path


def ingest_oasis_copies() -> dict[str, Any]:
    """The benchmark's records in S3 in all three forms; addresses of each."""
    from orchestration import storage
    from orchestration.assets import get_asset
    from orchestration.instruct_ingest import ingest_instruct

    images = sorted((get_asset("oasis") / "images").glob("*.jpg"))
    root = f"s3://{os.environ['TINYEMO_BUCKET']}"
    with tempfile.TemporaryDirectory() as name:
        records = write_records(Path(name), images, COPIES * len(images))
        report = ingest_instruct(
            records, images[0].parent, name="bench-oasis", root=f"{root}/datasets", split="train"
        )  # fmt: skip
    manifest = report.manifest
    data = [images[number % len(images)].read_bytes() for number in range(COPIES * len(images))]
    parts = [data[start : start + RECORDS_PER_FILE] for start in range(0, len(data), RECORDS_PER_FILE)]
    tars = []
    for number, part in enumerate(parts):
        uri = f"{root}/bench/tar/{number:05d}.tar"
        storage.write_bytes(uri, as_tar(part, number))
        bucket, key = storage.parse_s3_uri(uri)
        params = {"Bucket": bucket, "Key": key}
        tars.append(storage.client().generate_presigned_url("get_object", Params=params, ExpiresIn=7200))
    return {
        "dataset": manifest.uri,
        "shards": manifest.shard_uris("train"),
        "tars": tars,
        "mds": write_mds(data, f"{root}/bench/mds"),
        "batch": BATCH,
        "num_records": len(data),
        "num_bytes": sum(map(len, data)),
    }


def as_tar(images: list[bytes], number: int) -> bytes:
    """A WebDataset shard."""
    sink = BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for place, image in enumerate(images):
            info = tarfile.TarInfo(f"{number:05d}{place:05d}.jpg")
            info.size = len(image)
            tar.addfile(info, BytesIO(image))
    return sink.getvalue()


def write_mds(images: list[bytes], uri: str) -> str | None:
    """MosaicML's shards under `uri`, None where its package is not there."""
    script = (
        "import sys, types, pickle\n"
        "sys.modules['streaming.vision'] = types.ModuleType('streaming.vision')\n"
        "from streaming import MDSWriter\n"
        "with MDSWriter(out=sys.argv[1], columns={'image': 'bytes'}, size_limit=1 << 24) as out:\n"
        "    for image in pickle.load(sys.stdin.buffer):\n"
        "        out.write({'image': image})\n"
    )
    import pickle

    from orchestration import storage

    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-c", script, name], input=pickle.dumps(images), env=peer_environment(), check=False
        )  # fmt: skip
        if done.returncode:
            return None
        for path in sorted(Path(name).iterdir()):
            storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())
    return uri


def peer_environment() -> dict[str, str]:
    """Ours, with the peers' folder behind it."""
    folders = [os.environ.get("TINYEMO_PEERS", ""), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


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
    from orchestration.recipe import load_recipe
    from orchestration.stream_job import read_stream

    overrides = [
        f"name=bench-stream-{decode}-{number}-{int(time.time())}",
        f'records.datasets=["{settings["dataset"]}"]',
        f"records.decode={decode}",
        'records.tokenizer=""',
        f"train.global_batch_size={2 * settings['batch']}",
        "train.num_epochs=1",
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
            for decode in ("worker", "reader"):
                found.setdefault(f"ours, decode in {decode}", []).append(run_ours(settings, decode, number))
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


def measure_resume() -> dict[str, Any]:
    """Kill every worker NUM_KILLS times, each time after the next checkpoint and a random while; then the ledger."""
    from cluster.state import load_state, resolve_folder
    from orchestration import storage
    from orchestration.fit import read_state
    from orchestration.ledger import check_ledger, read_ledger
    from orchestration.recipe import load_recipe
    from orchestration.stream_job import prepare_records

    settings = ingest_oasis_copies()
    state = load_state(resolve_folder(None))
    assert state is not None
    rng, name = random.Random(0), f"bench-resume-{int(time.time())}"
    overrides = [
        f"name={name}",
        f'records.datasets=["{settings["dataset"]}"]',
        'records.tokenizer=""',
        "records.image_size=32",
        "records.shuffle_pool_rows=1440",
        "train.global_batch_size=24",
        f"train.num_epochs={RESUME_EPOCHS}",
        "checkpoint.every_steps=7",
        "workers.max_failures=0",
    ]
    killed_at = []
    while True:
        num_workers = len(killed_at) % 3 + 1
        recipe = load_recipe("emotion6", [*overrides, f"workers.num_workers={num_workers}"])
        folder = f"{recipe.checkpoint.root}/{name}"
        arguments = [f"--set={text}" for text in [*overrides, f"workers.num_workers={num_workers}"]]
        command = [str(Path(sys.executable).parent / "tinyemo"), "stream", "emotion6", "--ledger", *arguments]
        start = state_step(folder)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if len(killed_at) < NUM_KILLS:
            while process.poll() is None and state_step(folder) == start:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.5))
            for worker in psutil.Process(state.processes["ray"].pid).children(recursive=True):
                with suppress(psutil.Error):
                    if worker.name().startswith("ray::RayTrainWo") or "RayTrainWorker" in " ".join(worker.cmdline()):
                        worker.kill()
        _, errors = process.communicate()
        reached = read_state(f"{folder}/read")
        print(f"{num_workers} workers: step {state_step(folder)}, exit code {process.returncode}", flush=True)
        if reached is not None and reached.is_final:
            break
        if process.returncode not in (0, 2):
            raise RuntimeError(errors.decode()[-500:])
        killed_at.append(state_step(folder))
    plan = prepare_records(recipe)
    check = check_ledger(read_ledger(folder), plan, plan.num_steps)
    return {
        "resume": {
            "num_kills": len(killed_at),
            "last_checkpoint_before_each_kill": killed_at,
            "num_workers_in_turn": [1, 2, 3],
            "num_epochs": RESUME_EPOCHS,
            "ledger": {**asdict(check), "is_exact": check.is_exact},
            "ledger_files": len(storage.list_prefix(f"{folder}/ledger/")),
        }
    }


def state_step(folder: str) -> int:
    """Steps in the newest checkpoint of a reading."""
    from orchestration.fit import read_state

    state = read_state(f"{folder}/read")
    return 0 if state is None else state.step


def language_model_loop(config: dict[str, Any]) -> None:
    """Train a randomly initialised 135M language model on the stream's texts; reports the share spent waiting."""
    import ray.train
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from orchestration.ordered_stream import Waits
    from orchestration.record_stream import IMAGE_TOKEN_ID, open_record_stream

    job = config["job"]
    rank = ray.train.get_context().get_world_rank()
    shape = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True)  # fmt: skip
    model = torch.nn.parallel.DistributedDataParallel(LlamaForCausalLM(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stream = Waits(open_record_stream(ray.train.get_dataset_shard("samples"), job.plan, rank=rank, start_step=0))
    started_at = 0.0
    for batch in stream:
        started_at = started_at or time.perf_counter()
        ids = torch.where(batch.input_ids == IMAGE_TOKEN_ID, 0, batch.input_ids)
        loss = model(input_ids=ids, attention_mask=batch.attention_mask.long(), labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step = batch.step + 1
    seconds = time.perf_counter() - started_at
    figures = {"wait_share": stream.take_share(), "step_s": seconds / step, "first_batch_s": stream.first_s}
    ray.train.report({"step": step, "is_final": True, **figures}, checkpoint=empty_checkpoint(rank))


def empty_checkpoint(rank: int) -> Any:
    """What a report needs to be complete."""
    import ray.train

    folder = Path(tempfile.mkdtemp())
    (folder / "empty").touch()
    return ray.train.Checkpoint.from_directory(folder) if rank == 0 else None


def measure_wait() -> dict[str, Any]:
    """Share of the time between first and last step that rank 0 waited for a batch."""
    from orchestration.fit import ReportCallback, connect, read_curve, run_phase
    from orchestration.recipe import load_recipe
    from orchestration.stream_job import prepare_records
    from orchestration.stream_loop import StreamJob
    from orchestration.train import train

    settings = ingest_oasis_copies()
    projector = load_recipe("emotion6", [f"name=bench-wait-{int(time.time())}", "experiment=benchmarks"])
    train(projector)
    curve = read_curve(f"{projector.checkpoint.root}/{projector.name}/select")
    shares = [point["train/wait_share"] for _, point in curve if "train/wait_share" in point]
    overrides = [
        f"name=bench-wait-lm-{int(time.time())}",
        f'records.datasets=["{settings["dataset"]}"]',
        "train.global_batch_size=8",
        "train.num_epochs=0.008",
        "records.max_length=128",
    ]
    recipe = load_recipe("emotion6", overrides)
    connect()
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    job = StreamJob(recipe, prepare_records(recipe), folder, has_ledger=False)
    final = run_phase(job, language_model_loop, ReportCallback(f"{folder}/wait", None))
    return {
        "wait_share": {
            "projector, batch 32, by epoch": [round(share, 4) for share in shares],
            "135M language model, random weights, batch 8, images at 224 px": final.metrics["wait_share"],
            "seconds of a step of the 135M model": final.metrics["step_s"],
            "steps of the 135M model": final.step,
        }
    }


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peaks of this process's RSS and of Ray's object store while the block runs, MiB."""
    import ray

    peaks = {"driver_rss_mib": 0.0, "object_store_mib": 0.0}
    stop = threading.Event()

    def look() -> None:
        process = psutil.Process()
        while not stop.wait(0.5):
            peaks["driver_rss_mib"] = max(peaks["driver_rss_mib"], process.memory_info().rss / 2**20)
            if ray.is_initialized():
                total = ray.cluster_resources().get("object_store_memory", 0.0)
                free = ray.available_resources().get("object_store_memory", total)
                peaks["object_store_mib"] = max(peaks["object_store_mib"], (total - free) / 2**20)
                peaks["object_store_limit_mib"] = total / 2**20

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def main() -> None:
    """Run the parts that are named, all by default, and write benchmarks/results/streaming.json."""
    load_platform_environment()
    parts = sys.argv[1:] or ["speed"]
    for part in parts:
        figures = {"speed": measure_speed, "resume": measure_resume, "wait": measure_wait}[part]()
        print(json.dumps({key: value for key, value in figures.items() if key != "rounds"}, indent=1))
        print("written", write_results("streaming", figures))


if __name__ == "__main__":
    main()
