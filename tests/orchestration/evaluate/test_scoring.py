"""Scores of rows: against the projector itself, in one pass, in bounded memory, and in the stored form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from small_projectors import EKMAN, save_features, save_projector

from orchestration.evaluate import scoring
from orchestration.evaluate.scoring import (
    Scoring,
    open_rows,
    read_scores,
    require_encoder,
    score_all,
    score_rows,
    scores_table,
    text_vectors,
)
from tinyemo.encoders import EncoderInfo, card_entries, parquet_metadata
from tinyemo.errors import DataError
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES


@pytest.fixture
def projector(tmp_path: Path) -> MetricProjector:
    return MetricProjector.from_pretrained(save_projector(tmp_path / "projector"))


def test_scores_are_the_cosines_of_the_projector(projector: MetricProjector) -> None:
    features = np.random.default_rng(0).normal(size=(20_000, 512)).astype(np.float16)
    few, many = ("joy", "fear"), EKMAN
    found = score_rows(projector, features, text_vectors(projector, few), text_vectors(projector, many))
    rows = slice(8000, 8400)  # over the edge of a forward pass
    for scores, words in zip(found, (few, many), strict=True):
        wanted = projector.classify(torch.from_numpy(features[rows].astype(np.float32)), words)
        np.testing.assert_allclose(scores[rows], wanted.numpy(), atol=1e-6)


def test_texts_of_a_label_are_averaged(projector: MetricProjector) -> None:
    """A template of its own changes the vector; the mean of one template is that template's."""
    assert projector.labels is not None
    plain = text_vectors(projector, EKMAN)
    torch.testing.assert_close(plain, F.normalize(projector.labels.select(EKMAN), dim=-1))
    torch.testing.assert_close(text_vectors(projector, EKMAN, ["word"]), plain)
    both = text_vectors(projector, EKMAN, ["word", "scene"])
    scene = text_vectors(projector, EKMAN, ["scene"])
    torch.testing.assert_close(both, F.normalize(plain + scene, dim=-1))
    parrott = TAXONOMIES["parrott"]
    with_synonyms = text_vectors(projector, ["sadness"], synonyms=parrott)
    words = projector.labels.select(["sadness", *parrott.synonyms["sadness"]])
    torch.testing.assert_close(with_synonyms[0], F.normalize(F.normalize(words, dim=-1).sum(0), dim=0))


def test_one_pass_serves_every_table(
    projector: MetricProjector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that two tables share are read once, and tables come back whole and in order."""
    path = save_features(tmp_path / "rows.parquet", [0, 1, 2, 3, 4, 5] * 5, list(EKMAN) * 5)
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    rows, reads = open_rows(str(path)), []
    read = scoring.FeatureRows.read
    monkeypatch.setattr(scoring.FeatureRows, "read", lambda self, part: reads.append(part) or read(self, part))
    wanted = [
        Scoring("ekman", rows, projector, text_vectors(projector, EKMAN)),
        Scoring("two", rows, projector, text_vectors(projector, ("joy", "fear"))),
    ]
    found = score_all(wanted)
    assert len(reads) == len(rows.parts) == 5
    table, scores = found["ekman"]
    assert table["id"].to_pylist() == [f"image-{number}" for number in range(30)]
    assert [EKMAN[place] for place in scores.argmax(axis=1)] == table["label"].to_pylist()
    assert found["two"][1].shape == (30, 2)


def test_a_table_of_scores_is_read_back(tmp_path: Path) -> None:
    scores = np.array([[0.1, 0.9], [0.3, 0.2]], np.float32)
    groups = pa.table({"theme": ["dogs", None]})
    table = scores_table(pa.chunked_array([["a", "b"]]), np.array([1, 1]), ("joy", "fear"), scores, groups)
    pq.write_table(table, tmp_path / "scores.parquet")
    found, labels, values = read_scores(str(tmp_path / "scores.parquet"))
    assert found.column_names == ["id", "label", "predicted", "scores", "theme"]
    assert found.schema.field("scores").type == pa.list_(pa.float32())
    assert (found["label"].to_pylist(), found["predicted"].to_pylist()) == (["fear", "fear"], ["fear", "joy"])
    assert (labels, values.tolist()) == (("joy", "fear"), scores.tolist())


def test_features_of_another_encoder_are_refused(tmp_path: Path) -> None:
    clip = EncoderInfo(name="clip-vit-base-patch16", revision="1", preprocessing="unknown")
    model = MetricProjector.from_pretrained(save_projector(tmp_path / "projector", **card_entries(clip)))
    path = save_features(tmp_path / "rows.parquet", [0, 1], ["anger", "disgust"])
    info = EncoderInfo(name="dinov2-large", revision="1", preprocessing="unknown")
    pq.write_table(pq.read_table(path).replace_schema_metadata(parquet_metadata(info)), path)
    with pytest.raises(DataError, match="another encoder"):
        require_encoder(model, open_rows(str(path)))


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    path = save_features(tmp_path / "rows.parquet", [0, 1], None)
    with pytest.raises(DataError, match="needs the columns id, features and label"):
        open_rows(str(path))
