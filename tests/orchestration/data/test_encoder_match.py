"""Whose features: a data set names its encoder, and training and use refuse those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_files import good_rows, write_splits
from typer.testing import CliRunner
from vision_files import CLIP_WIDTH, EKMAN, OTHER

from orchestration.cli import app
from orchestration.data.ingest import ingest_features
from orchestration.data.manifest import load_manifest
from orchestration.jobs.prepare import prepare
from orchestration.recipe import parse_recipe
from tinyemo.config import ProjectorConfig
from tinyemo.embedding_tables import random_table
from tinyemo.encoders import EncoderInfo, card_entries, parquet_metadata
from tinyemo.errors import ConfigError, DataError
from tinyemo.label_embeddings import embed_labels, known_words
from tinyemo.projector import MetricProjector

pytestmark = pytest.mark.usefixtures("tasks_in_process")


def test_ingested_features_keep_the_encoder_that_their_files_name(s3_root: str, tmp_path: Path) -> None:
    plain = {split: good_rows(split, 20, seed) for seed, split in enumerate(("train", "test"))}
    folder = write_splits(tmp_path / "plain", **plain)
    assert ingest_features(folder, name="x", root=s3_root).manifest.encoder is None
    marked = {split: table.replace_schema_metadata(parquet_metadata(OTHER)) for split, table in plain.items()}
    report = ingest_features(write_splits(tmp_path / "marked", **marked), name="x", root=s3_root)
    assert report.is_unchanged  # the same rows
    assert report.manifest.encoder == load_manifest(f"{s3_root}/x", "features").encoder == OTHER
    second = OTHER.model_copy(update={"name": "second"})
    mixed = {**marked, "test": plain["test"].replace_schema_metadata(parquet_metadata(second))}
    with pytest.raises(DataError, match="holds features of 2 encoders"):
        ingest_features(write_splits(tmp_path / "mixed", **mixed), name="y", root=s3_root)


def recipe_for(uri: str, encoder: str) -> Any:
    return parse_recipe(
        {
            "name": "x",
            "data": {"dataset": uri},
            "projector": {"encoder_width": CLIP_WIDTH, "encoder": encoder},
            "train": {"global_batch_size": 4},
        },
        source="test",
    )


def test_training_refuses_features_of_another_or_an_unknown_encoder(s3_root: str, tmp_path: Path) -> None:
    rows = {
        split: pa.table(
            {
                "id": [f"{split}{n}" for n in range(12)],
                "emotion": [EKMAN[n % 6] for n in range(12)],
                "features": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.random.default_rng(seed).standard_normal(12 * CLIP_WIDTH).astype(np.float16)),
                    CLIP_WIDTH,
                ),
            }
        )
        for seed, split in enumerate(("train", "test"))
    }
    ingest_features(write_splits(tmp_path / "plain", **rows), name="unknown", root=s3_root)
    marked = {split: table.replace_schema_metadata(parquet_metadata(OTHER)) for split, table in rows.items()}
    ingest_features(write_splits(tmp_path / "marked", **marked), name="known", root=s3_root)
    for wanted in ("", "other", "other@r"):
        assert prepare(recipe_for(f"{s3_root}/known", wanted)).manifest.encoder == OTHER
    with pytest.raises(ConfigError, match=r"projector\.encoder: clip and the features of .* are of other@r"):
        prepare(recipe_for(f"{s3_root}/known", "clip"))
    with pytest.raises(ConfigError, match=r"projector\.encoder: other@2 and the features"):
        prepare(recipe_for(f"{s3_root}/known", "other@2"))
    assert prepare(recipe_for(f"{s3_root}/unknown", "")).manifest.encoder is None
    with pytest.raises(ConfigError, match="do not say which encoder made them"):
        prepare(recipe_for(f"{s3_root}/unknown", "other"))


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    """Trained, so its card says, on features of OTHER."""
    table = random_table(576, 0, name="HuggingFaceTB/SmolLM2-135M-Instruct")
    model = MetricProjector(ProjectorConfig(encoder_width=CLIP_WIDTH, hidden_size=576)).eval()
    card = {"taxonomy": "ekman", "data": "real", "llm": "smollm2-135m", **card_entries(OTHER)}
    model.save_pretrained(tmp_path / "projector", labels=embed_labels(table, known_words(), "word"), card=card)
    return tmp_path / "projector"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("encoder", "conflict"),
    [
        (OTHER, None),
        (None, None),
        (OTHER.model_copy(update={"name": "clip"}), "name clip is not other"),
        (OTHER.model_copy(update={"preprocessing": "q"}), "preprocessing q is not p"),
    ],
)
def test_a_projector_refuses_features_of_another_encoder(
    command: str, encoder: EncoderInfo | None, conflict: str | None, projector: Path, tmp_path: Path
) -> None:
    values = pa.array(np.ones(2 * CLIP_WIDTH, np.float16))
    columns = {"id": ["a", "b"], "emotion": ["joy", "fear"]}
    table = pa.table({**columns, "features": pa.FixedSizeListArray.from_arrays(values, CLIP_WIDTH)})
    pq.write_table(
        table.replace_schema_metadata(parquet_metadata(encoder) if encoder else None), tmp_path / "f.parquet"
    )
    arguments = [command, "--projector", str(projector), "--features", str(tmp_path / "f.parquet"), "--json"]
    result = CliRunner().invoke(app, arguments)
    if conflict is None:
        assert result.exit_code == 0, result.exception
        return
    assert isinstance(result.exception, DataError)
    assert str(result.exception).endswith(f"of another encoder than the projector was trained on: {conflict}")


def test_the_command_says_what_is_wrong_in_one_line(s3_root: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["--encoder", "owner/model"], "pin owner/model with --revision"),
        (["--encoder", str(tmp_path), "--cpus-per-actor", "0"], "the pool cannot be used: cpus_per_actor"),
        (["--encoder", str(tmp_path)], f"no data set at {s3_root}/nothing"),
    ):
        result = CliRunner().invoke(app, ["features", "nothing", "--name", "x", "--root", s3_root, *arguments])
        assert isinstance(result.exception, ConfigError | DataError)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
