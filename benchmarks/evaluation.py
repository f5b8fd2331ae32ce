"""Time and memory of an evaluation of 1,000,000 feature rows against 25 labels, and the measured table of a platform.

    python benchmarks/evaluation.py rows            # made features in a temporary folder; no platform
    python benchmarks/evaluation.py table RUN NAME  # the evaluation NAME of a run, from the platform in the environment

The rows are noise: their accuracy means nothing, their time does. Features are float16, 768 wide, as of CLIP ViT-L/14.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import write_results

from tinyemo.config import ProjectorConfig
from tinyemo.embedding_tables import random_table
from tinyemo.families import find_size
from tinyemo.label_embeddings import embed_labels, known_words
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES

NUM_ROWS, WIDTH, GROUP_ROWS, NUM_THEMES = 1_000_000, 768, 50_000, 5_000
WORDS = TAXONOMIES["parrott"].words


def write_inputs(folder: Path) -> None:
    """Write noise around a centre for each label, a table of themes, and a projector with random weights."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    kind = pa.schema([("id", pa.string()), ("label", pa.string()), ("features", pa.list_(pa.float16(), WIDTH))])
    with pq.ParquetWriter(folder / "rows.parquet", kind, compression="none", use_dictionary=["label"]) as file:
        for start in range(0, NUM_ROWS, GROUP_ROWS):
            places = rng.integers(len(WORDS), size=GROUP_ROWS)
            noise = rng.standard_normal((GROUP_ROWS, WIDTH), dtype=np.float32)
            values = pa.array((centres[places] + 3 * noise).astype(np.float16).ravel())
            columns = [
                pa.array([f"{start + row:07d}" for row in range(GROUP_ROWS)]),
                pa.array(list(WORDS)).take(pa.array(places)),
                pa.FixedSizeListArray.from_arrays(values, WIDTH),
            ]
            file.write_table(pa.table(columns, schema=kind))
    themes = pa.array([f"theme-{number}" for number in rng.integers(NUM_THEMES, size=NUM_ROWS)])
    ids = pa.array([f"{row:07d}" for row in range(NUM_ROWS)])
    pq.write_table(pa.table({"id": ids, "theme": themes}), folder / "groups.parquet")
    size = find_size("smollm2-135m")
    torch.manual_seed(0)
    labels = embed_labels(random_table(size.hidden_size, 0, name=size.llm), known_words(), "word")
    card = {"llm": size.name, "llm_weights": "random", "taxonomy": "parrott", "data": "generated"}
    projector = MetricProjector(ProjectorConfig(encoder_width=WIDTH, hidden_size=size.hidden_size)).eval()
    projector.save_pretrained(folder / "projector", labels=labels, card=card)


def measure_rows() -> dict[str, Any]:
    """Evaluate the rows as `tinyemo evaluate` does, and return seconds and the peak of resident memory."""
    from orchestration.evaluate.evaluate_job import evaluate
    from orchestration.evaluate.evaluation_recipe import EvaluationRecipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, so that the peak below is the evaluation's.
        import multiprocessing

        writer = multiprocessing.get_context("spawn").Process(target=write_inputs, args=(folder,))
        writer.start()
        writer.join()
        rows = {"dataset": f"{folder}/rows.parquet", "groups": f"{folder}/groups.parquet", "cluster_by": "theme"}
        recipe = EvaluationRecipe.model_validate(
            {"name": "rows", "models": [f"{folder}/projector"], "data": {"rows": rows}}
        )
        started, used = time.monotonic(), time.process_time()
        (document,) = evaluate(recipe, output=folder / "out")
        (data,) = document["data"]
        return {
            "num_rows": data["num_images"],
            "num_labels": len(data["labels"]),
            "num_clusters": data["num_clusters"],
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "num_threads": torch.get_num_threads(),
            "leakage": "no train data, so not compared",
        }


def read_table(run: str, name: str) -> dict[str, Any]:
    """Return the figures of a stored evaluation."""
    from orchestration.services import storage

    document = storage.read_json(f"s3://tinyemo/runs/{run}/evaluations/{name}/evaluation.json")
    kept = ("digest", "split", "taxonomy", "is_zero_shot", "unseen_labels", "num_images", "num_left_out", "cluster_by")
    return {
        "run": run,
        "llm": document["model"]["size"],
        "is_random_weights": document["model"]["is_random_weights"],
        "git_commit": document["git_commit"],
        "data": {
            data["name"]: {key: data[key] for key in (*kept, "num_clusters", "metrics")}
            | {"leakage": data["leakage"]["counts"], "is_checked": data["leakage"]["is_checked"]}
            for data in document["data"]
        },
    }


if __name__ == "__main__":
    if sys.argv[1] == "rows":
        figures = {"rows": measure_rows()}
    else:
        figures = {f"table_{sys.argv[2]}": read_table(*sys.argv[2:4])}
    print(figures)
    print(write_results("evaluation", figures))
