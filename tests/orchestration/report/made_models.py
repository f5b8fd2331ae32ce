"""Made models for tests of the report and of promotions: files in S3, a version in MLflow, and documents about both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestration.data.manifest import parquet_bytes
from orchestration.services import storage, tracking
from orchestration.use.locations import digest_of_export

LABELS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
NUM_IMAGES = 400
DATA_DIGEST = "d" * 64
EXPERIMENT = "report"
NOW = "2026-11-24T14:00:00+00:00"


@dataclass(frozen=True)
class MadeModel:
    """A registered version and the S3 folder of its run."""

    version: tracking.ModelVersion
    folder: str
    run_id: str


def put(address: str, content: bytes) -> None:
    """Store bytes in S3 or in a local file."""
    if address.startswith("s3://"):
        storage.write_bytes(address, content)
        return
    Path(address).parent.mkdir(parents=True, exist_ok=True)
    Path(address).write_bytes(content)


def make_folder(folder: Path, *, llm_weights: str = "real") -> MadeModel:
    """Write a made projector without a run into a local folder."""
    card = {"llm": "smollm2-135m", "llm_weights": llm_weights, "data_digest": DATA_DIGEST, "loss": "nt_xent"}
    put(f"{folder}/config.json", json.dumps({"card": card, "sha256": {}}).encode())
    return MadeModel(tracking.ModelVersion("made", "1", str(folder), "", {}, ""), str(folder), "")


def make_run(runs: str, name: str, *, model: str = "made", llm_weights: str = "real") -> MadeModel:
    """Store a made projector as a finished run and register it."""
    folder, source = f"{runs}/{name}", f"{runs}/{name}/projector"
    card = {"run": name, "llm": "smollm2-135m", "llm_weights": llm_weights, "data_digest": DATA_DIGEST}
    files = {"projector.safetensors": name.encode(), "label_embeddings.safetensors": b"labels"}
    for file, content in files.items():
        storage.write_bytes(f"{source}/{file}", content)
    storage.write_json(f"{source}/config.json", {"card": card, "sha256": dict.fromkeys(files, "")})
    with tracking.open_run(EXPERIMENT, name, params={}, tags={"folder": folder, "llm_weights": llm_weights}) as run:
        pass
    result = {
        "name": name, "run_id": run.run_id, "run_url": run.url, "model": source, "llm": "smollm2-135m",
        "llm_weights": llm_weights, "hidden_size": 576, "data": "generated", "num_train": 1109, "num_validation": 277,
        "num_test": NUM_IMAGES, "best_epoch": 7, "val_top1_accuracy": 0.7, "test_top1_accuracy": 0.7,
        "test_confusion": [[1] * 6] * 6, "words": list(LABELS), "samples_per_s": 9000.0, "encoder_weights": "real",
    }  # fmt: skip
    storage.write_json(f"{folder}/result.json", result)
    version = tracking.model_version(model, tracking.register(run.run_id, source, model, tags={}))
    assert version is not None
    return MadeModel(version, folder, run.run_id)


def scores_of(accuracy: float, seed: int = 0) -> pa.Table:
    """Return scores of NUM_IMAGES images, the share `accuracy` of them right: of two models the same images first."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(LABELS), NUM_IMAGES)
    predicted = np.where(np.arange(NUM_IMAGES) < accuracy * NUM_IMAGES, labels, (labels + 1) % len(LABELS))
    scores = rng.uniform(-0.1, 0.3, (NUM_IMAGES, len(LABELS)))
    scores[np.arange(NUM_IMAGES), predicted] = rng.uniform(0.31, 0.8, NUM_IMAGES)
    order = rng.permutation(NUM_IMAGES)
    words = np.array(LABELS)
    return pa.table(
        {
            "id": [f"image-{place:04d}" for place in order],
            "label": words[labels[order]],
            "predicted": words[predicted[order]],
            "scores": pa.array(scores[order].tolist(), pa.list_(pa.float32())),
            "theme": [f"theme-{place % 80}" for place in order],
        }
    )


def evaluation(
    made: MadeModel, accuracy: float = 0.7, *, leaked: int = 0, seed: int = 0, is_random: bool = False
) -> dict[str, Any]:
    """Store an evaluation of a made model and return its document."""
    table = scores_of(accuracy, seed)
    scores = f"{made.folder}/evaluations/main/emotion6.parquet"
    put(scores, parquet_bytes(table))
    index = {word: place for place, word in enumerate(LABELS)}
    confusion = np.zeros((len(LABELS), len(LABELS)), dtype=int)
    pairs = zip(table["label"].to_pylist(), table["predicted"].to_pylist(), strict=True)
    for label, guess in pairs:
        confusion[index[label], index[guess]] += 1
    recall = confusion.diagonal() / confusion.sum(axis=1)
    precision = confusion.diagonal() / confusion.sum(axis=0)
    findings = [{"kind": "same_image", "test_id": f"t{i}", "train_id": f"r{i}", "data": "emotion6", "value": 1.0}
                for i in range(leaked)]  # fmt: skip
    around = lambda value: {"value": float(value), "low": float(value) - 0.04, "high": float(value) + 0.04}  # noqa: E731
    counts = {"same_id": 0, "same_image": leaked, "near_image": 0, "same_features": 0, "near_features": 0}
    names = ("top1_accuracy", "top2_accuracy", "balanced_accuracy", "macro_f1", "expected_calibration_error")
    document = {
        "kind": "evaluation", "name": "main", "made_at": NOW, "git_commit": "0123456789abcdef",
        "model": {
            "location": made.version.source, "run": made.folder.rpartition("/")[2], "run_id": made.run_id,
            "size": "smollm2-135m", "is_random_weights": is_random, "digest": digest_of_export(made.version.source),
        },
        "recipe": {"name": "main"},
        "data": [{
            "name": "emotion6", "uri": "s3://tests/datasets/emotion6", "digest": DATA_DIGEST, "split": "test",
            "taxonomy": "ekman", "labels": list(LABELS), "is_zero_shot": False, "num_images": NUM_IMAGES,
            "cluster_by": "theme", "num_clusters": 80,
            "metrics": dict(zip(names, map(around, (accuracy, accuracy + 0.1, accuracy, accuracy, 0.06)), strict=True)),
            "per_class": [
                {"label": word, "count": int(confusion[place].sum()), "recall": around(recall[place]),
                 "precision": around(precision[place])}
                for word, place in index.items()
            ],
            "confusion": confusion.tolist(),
            "reliability": [
                {"low": i / 10, "high": (i + 1) / 10, "count": 40, "confidence": i / 10 + 0.05,
                 "accuracy": min(1.0, i / 11 + 0.1)}
                for i in range(10)
            ],
            "leakage": {"has_leakage": leaked > 0, "counts": counts, "findings": findings},
            "scores": scores,
        }],
        "comparisons": [{
            "baseline": "linear probe", "data": "emotion6", "difference": 0.021, "low": -0.012, "high": 0.053,
            "p_mcnemar": 0.21, "smallest_detectable": 0.041, "num_images": NUM_IMAGES,
        }],
        "published": [{"system": "EmoVIT", "data": "emotion6", "metric": "top-1", "value": 0.5787,
                       "source": "arXiv 2410.07062, table 2"}],
    }  # fmt: skip
    put(f"{made.folder}/evaluations/main/evaluation.json", json.dumps(document).encode())
    return document


def finding(number: int, effect: float, *, part: str = "groups", is_significant: bool = True) -> dict[str, Any]:
    """Return a finding of a bias report."""
    return {
        "id": f"{part}-{number}", "part": part, "title": f"recall of theme {number} against the rest",
        "data": "emotion6", "group": f"theme-{number}", "other": "rest", "metric": "recall", "effect": effect,
        "low": effect - 0.05, "high": effect + 0.05, "p": 0.001, "q": 0.004, "power": 0.9, "explained_by": None,
        "is_significant": is_significant,
    }  # fmt: skip


def bias(made: MadeModel, findings: list[dict[str, Any]], decisions: dict[str, str]) -> None:
    """Store a bias report of a made model, and the decisions about its findings."""
    folder = f"{made.folder}/bias/main"
    digest = digest_of_export(made.version.source)
    document = {
        "kind": "bias", "name": "main", "made_at": NOW, "model": {"location": made.version.source, "digest": digest},
        "data": [{"name": "emotion6", "digest": DATA_DIGEST}], "alpha": 0.05, "findings": findings, "words": {},
        "groups": [], "slices": [], "association": [], "counterfactuals": [], "spurious": [],
        "changes": ["new: recall of theme 1"],
    }  # fmt: skip
    put(f"{folder}/bias.json", json.dumps(document).encode())
    rows = [
        "\n".join(["[[finding]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items())])
        for item in findings
        if (row := {"id": item["id"], "title": item["title"], "effect": item["effect"],
                    "decision": decisions.get(item["id"], "open"), "note": "looked at"})
    ]  # fmt: skip
    put(f"{folder}/review.toml", "\n\n".join(rows).encode())
