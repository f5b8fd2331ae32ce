"""Streaming under hardship: killed workers, a training step beside it, and a million rows."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.streaming_data import (
    FEATURE_WIDTH,
    ONCE_PREFIX,
    ingest_oasis_once,
    ingest_photographs,
    write_feature_rows,
    write_small_images,
)

NUM_KILLS = 20
RESUME_EPOCHS = 3
NUM_FEATURE_ROWS = 1_000_000
NUM_IMAGES = 50_000


def measure_resume() -> dict[str, Any]:
    """Kill every worker behind NUM_KILLS random steps spread over the whole run, then read the ledger."""
    from cluster.state import load_state, resolve_folder
    from orchestration.data.ledger import check_ledger, read_ledger
    from orchestration.jobs.checkpoints import read_state
    from orchestration.jobs.reading import prepare_records
    from orchestration.recipe import load_recipe
    from orchestration.services import storage

    settings = ingest_photographs("oasis")
    state = load_state(resolve_folder(None))
    assert state is not None
    rng, name = random.Random(0), f"bench-resume-{int(time.time())}"
    overrides = [
        f"name={name}",
        f'records.datasets=["{settings["dataset"]}"]',
        'records.tokenizer=""',
        "records.image_size=32",
        "records.pool_mib=16",
        "train.global_batch_size=24",
        f"train.num_epochs={RESUME_EPOCHS}",
        "checkpoint.every_steps=25",
        "workers.max_failures=0",
    ]
    num_steps = prepare_records(load_recipe("emotion6", overrides)).num_steps
    targets = sorted(rng.sample(range(1, int(0.95 * num_steps)), NUM_KILLS))
    killed_at: list[int] = []
    while True:
        num_workers = len(killed_at) % 3 + 1
        recipe = load_recipe("emotion6", [*overrides, f"workers.num_workers={num_workers}"])
        folder = f"{recipe.checkpoint.root}/{name}"
        arguments = [f"--set={text}" for text in [*overrides, f"workers.num_workers={num_workers}"]]
        command = [str(Path(sys.executable).parent / "tinyemo"), "stream", "emotion6", "--ledger", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if len(killed_at) < NUM_KILLS:
            target = targets[len(killed_at)]
            while process.poll() is None and state_step(folder) < target:
                time.sleep(0.02)
            kill_workers(state.processes["ray"].pid)
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
            "num_steps": num_steps,
            "random_steps_drawn": targets,
            "last_checkpoint_after_each_kill": killed_at,
            "num_workers_in_turn": [1, 2, 3],
            "num_epochs": RESUME_EPOCHS,
            "ledger": {**asdict(check), "is_exact": check.is_exact},
            "ledger_files": len(storage.list_prefix(f"{folder}/ledger/")),
        }
    }


def measure_mix() -> dict[str, Any]:
    """One job over an abundant and a small data set by weight: what its ledger holds of each."""
    from orchestration.data.ledger import read_ledger
    from orchestration.jobs.reading import prepare_records, read_stream
    from orchestration.recipe import load_recipe

    abundant, small = ingest_photographs("oasis")["dataset"], ingest_oasis_once()
    weights = (3.0, 1.0)
    recipe = load_recipe(
        "emotion6",
        [
            f"name=bench-mix-{int(time.time())}",
            f'records.datasets=["{abundant}", "{small}"]',
            f"records.weights={list(weights)}",
            'records.tokenizer=""',
            "records.image_size=32",
            "train.global_batch_size=64",
            "train.num_epochs=1",
        ],
    )
    result = read_stream(recipe, has_ledger=True)
    ids = read_ledger(result.folder)["id"].to_pylist()
    sets = prepare_records(recipe).sets
    return {
        "mix": {
            "weights": weights,
            "records_of_each": [part.num_rows for part in sets],
            "share_of_the_first_in_the_ledger": sum(not one.startswith(ONCE_PREFIX) for one in ids) / len(ids),
            "times_a_small_set_record_comes": sum(one.startswith(ONCE_PREFIX) for one in ids) / sets[1].num_rows,
            "ledger": result.ledger,
        }
    }


def kill_workers(ray_pid: int) -> None:
    """SIGKILL for every rank on the node whose first Ray process this is."""
    for worker in psutil.Process(ray_pid).children(recursive=True):
        with suppress(psutil.Error):
            if worker.name().startswith("ray::RayTrainWo") or "RayTrainWorker" in " ".join(worker.cmdline()):
                worker.kill()


def state_step(folder: str) -> int:
    """Steps in the newest checkpoint of a reading."""
    from orchestration.jobs.checkpoints import read_state

    state = read_state(f"{folder}/read")
    return 0 if state is None else state.step


def measure_wait() -> dict[str, Any]:
    """Share of the time that rank 0 waited for a batch, in two real jobs."""
    from benchmarks.lm import run_job, speed_recipe
    from orchestration.jobs.checkpoints import read_curve
    from orchestration.jobs.job import train
    from orchestration.recipe import load_recipe

    stamp = int(time.time())
    projector = load_recipe("emotion6", [f"name=bench-wait-{stamp}", "experiment=benchmarks"])
    train(projector)
    curve = read_curve(f"{projector.checkpoint.root}/{projector.name}/select")
    shares = [point["train/wait_share"] for _, point in curve if "train/wait_share" in point]
    _, share = run_job(speed_recipe("connector"), f"s3://tinyemo/runs/bench-wait-lm/{stamp}")
    return {
        "wait_share": {
            "projector, batch 32, by epoch": [round(share, 4) for share in shares],
            "reasoning model of 135M, real weights, steps of 8, the first 4 left out": share,
        }
    }


def run_watched(*arguments: str) -> dict[str, Any]:
    """A command of ours with its peak RSS and that of Ray's object store, MiB, and whether Ray spilled."""
    import ray

    from cluster.state import load_state, resolve_folder
    from orchestration.services.ray_cluster import connect

    connect()
    state = load_state(resolve_folder(None))
    assert state is not None
    started_at = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        command = [str(Path(sys.executable).parent / "tinyemo"), *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        driver, peak, store, has_spilled = psutil.Process(process.pid), 0.0, 0.0, False
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, driver.memory_info().rss / 2**20)
            total = ray.cluster_resources().get("object_store_memory", 0.0)
            free = ray.available_resources().get("object_store_memory", total)
            store = max(store, (total - free) / 2**20)
            session = state.ray_folder / "session_latest"
            has_spilled |= any(path.is_file() for path in session.glob("ray_spilled_objects*/**/*"))
            time.sleep(0.5)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {log.read()[-1500:]}")
    figures = {
        "seconds": round(time.perf_counter() - started_at, 1),
        "driver_peak_rss_mib": round(peak),
        "object_store_peak_mib": round(store),
        "object_store_limit_mib": round(total / 2**20),
        "has_spilled": has_spilled,
    }
    print(arguments[0], arguments[1], figures, flush=True)
    return figures


def measure_scale() -> dict[str, Any]:
    """Ingest and one epoch of many small things."""
    stamp = int(time.time())
    root = f"s3://{os.environ['TINYEMO_BUCKET']}/datasets"
    found: dict[str, Any] = {"num_feature_rows": NUM_FEATURE_ROWS, "num_images": NUM_IMAGES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "features").mkdir()
        write_feature_rows(folder / "features" / "train.parquet", NUM_FEATURE_ROWS - 10_000, seed=1)
        write_feature_rows(folder / "features" / "test.parquet", 10_000, seed=2)
        found["ingest of feature rows"] = run_watched(
            "ingest", "features", str(folder / "features"), "--name", "bench-rows", "--rows-per-shard", "16384"
        )  # fmt: skip
        records = write_small_images(folder, NUM_IMAGES)
        found["ingest of images"] = run_watched(
            "ingest", "instruct", "--records", str(records), "--images", str(folder / "images"), "--name",
            "bench-images", "--split", "train",
        )  # fmt: skip
    settings = [f"name=bench-rows-{stamp}", f"data.dataset={root}/bench-rows", "experiment=benchmarks",
                f"projector.encoder_width={FEATURE_WIDTH}", "train.num_epochs=1", "train.global_batch_size=512",
                "data.validation_fraction=0.01"]  # fmt: skip
    found["one epoch of feature rows"] = run_watched("train", "emotion6", *(f"--set={text}" for text in settings))
    settings = [f"name=bench-images-{stamp}", f'records.datasets=["{root}/bench-images"]', "records.image_size=48",
                'records.tokenizer=""', "train.global_batch_size=128", "train.num_epochs=1"]  # fmt: skip
    found["one epoch of images"] = run_watched(
        "stream", "emotion6", "--ledger", *(f"--set={text}" for text in settings)
    )  # fmt: skip
    return {"scale": found}
