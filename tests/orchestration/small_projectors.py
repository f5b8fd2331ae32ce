"""Projectors whose label of every row is known, and feature files for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from tinyemo.config import ProjectorConfig
from tinyemo.embedding_tables import random_table
from tinyemo.families import find_size
from tinyemo.label_embeddings import embed_labels, known_words
from tinyemo.projector import MetricProjector

EKMAN = ("anger", "disgust", "fear", "joy", "sadness", "surprise")


def save_projector(folder: Path, **card: str | int | bool) -> Path:
    """A projector that sends feature k to the k-th Ekman word's random embedding."""
    table = random_table(find_size("smollm2-135m").hidden_size, 0, name=find_size("smollm2-135m").llm)
    labels = embed_labels(table, known_words(), "word")
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=576)).eval()
    first, last = model.layers[0], model.layers[4]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    for layer in (first, last):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        first.weight[range(6), range(6)] = 1
        last.weight[:, :6] = labels.select(EKMAN).T
    complete = {
        "llm": "smollm2-135m",
        "llm_weights": "random",
        "llm_seed": 0,
        "taxonomy": "ekman",
        "data": "real",
        **card,
    }
    model.save_pretrained(folder, labels=labels, card=complete)
    return folder


def save_features(path: Path, places: list[int], emotions: list[str] | None, width: int = 512) -> Path:
    features = (10 * torch.eye(width)[places]).half().numpy()
    columns: dict[str, Any] = {
        "id": [f"image-{number}" for number in range(len(places))],
        "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), width),
    }
    if emotions is not None:
        columns["emotion"] = emotions
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
