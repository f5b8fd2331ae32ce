"""A projector, many feature rows and their groups, and one bias report of them: run by `benchmarks/bias.py`."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

WIDTH, NUM_LABELS, ROWS_AT_ONCE = 768, 25, 20_000


def make(folder: Path, num_rows: int) -> None:
    """Write an untrained projector with random label embeddings, features and a table of groups."""
    import torch

    from tinyemo.config import ProjectorConfig
    from tinyemo.embedding_tables import random_table
    from tinyemo.label_embeddings import embed_labels, known_words
    from tinyemo.projector import MetricProjector

    torch.manual_seed(0)
    words = known_words()[:NUM_LABELS]
    labels = embed_labels(random_table(576, 0, name="SmolLM2-135M"), words, "word")
    model = MetricProjector(ProjectorConfig(encoder_width=WIDTH, hidden_size=576)).eval()
    card = {"labels": ",".join(words), "llm_weights": "random", "llm": "smollm2-135m"}
    model.save_pretrained(folder / "projector", labels=labels, card=card)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(NUM_LABELS, WIDTH)).astype(np.float32)
    names = pa.array(words)
    schema = pa.schema({"id": pa.string(), "label": pa.string(), "features": pa.list_(pa.float16(), WIDTH)})
    with pq.ParquetWriter(folder / "rows.parquet", schema, compression="none") as writer:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, num_rows - start)
            label = rng.integers(NUM_LABELS, size=size)
            features = (centres[label] + rng.normal(size=(size, WIDTH)).astype(np.float32)).astype(np.float16)
            columns = {
                "id": pa.array(np.arange(start, start + size)).cast(pa.string()),
                "label": names.take(pa.array(label)),
                "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), WIDTH),
            }
            writer.write_table(pa.table(columns, schema=schema))
    groups = {
        "id": pa.array(np.arange(num_rows)).cast(pa.string()),
        "country": pa.array(["north", "south", "west"]).take(pa.array(rng.integers(3, size=num_rows))),
        "camera": pa.array(["a", "b"]).take(pa.array(rng.integers(2, size=num_rows))),
        "brightness": pa.array(rng.random(num_rows)),
    }
    pq.write_table(pa.table(groups), folder / "groups.parquet")


def report(folder: Path, num_rows: int) -> None:
    """Make the report, and print its processor time and memory as JSON."""
    import torch

    from orchestration.bias.bias_inputs import DataChoice
    from orchestration.bias.bias_job import BiasOptions, report_bias

    torch.set_num_threads(2)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    choice = DataChoice(
        str(folder / "rows.parquet"), groups=(str(folder / "groups.parquet"),), covariates=("brightness",)
    )
    document = report_bias(str(folder / "projector"), [choice], BiasOptions(), output=folder / "out")
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "rows": num_rows,
                "labels": NUM_LABELS,
                "tests": document["num_tests"],
                "significant": sum(row["is_significant"] for row in document["findings"]),
                "processor_s": round(used.ru_utime + used.ru_stime, 1),
                "peak_gib": round(used.ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    folder, count, step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    (make if step == "make" else report)(folder, count)
