"""What the stream hands out is the plan, from any step and at any world size; anything else is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.data.dataset import carve_validation
from orchestration.datasets.ingest import ingest_features
from orchestration.jobs.prepare import Preparation, prepare
from orchestration.recipe import parse_recipe
from orchestration.services import storage
from orchestration.streaming.feature_stream import Batch, StreamPlan, open_stream
from tinyemo.errors import ConfigError, DataError, TrainingError
from tinyemo.taxonomies import TAXONOMIES

WIDTH = 512
EKMAN = TAXONOMIES["ekman"].words


def write_split(path: Path, num_rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal(num_rows * WIDTH).astype(np.float16)
    table = pa.table(
        {
            "id": [f"{path.stem}/{i}" for i in range(num_rows)],
            "emotion": [EKMAN[i % 6] for i in range(num_rows)],
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features), WIDTH),
        }
    )
    pq.write_table(table, path)


@pytest.fixture
def dataset(s3_root: str, tmp_path: Path) -> str:
    write_split(tmp_path / "train.parquet", 230, seed=1)
    write_split(tmp_path / "test.parquet", 31, seed=2)
    root = s3_root
    ingest_features(tmp_path, name="small", root=root, rows_per_shard=50)
    return f"{root}/small"


def preparation(dataset: str, *, num_workers: int = 2, **data: Any) -> Preparation:
    content = {
        "name": "x",
        "data": {"dataset": dataset, "steps_per_window": 7} | data,
        "projector": {"encoder_width": WIDTH},
        "train": {"global_batch_size": 12, "num_epochs": 3},
        "workers": {"num_workers": num_workers},
    }
    return prepare(parse_recipe(content, source="test"))


class Handed:
    """Hands one rank's rows to `open_stream` as Ray Data does: a block for each."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for row in self.rows:
            yield pa.Table.from_pylist([row])


def rows_by_rank(plan: StreamPlan, start_step: int) -> list[list[dict[str, Any]]]:
    rows = [row for item in plan.items(start_step) for row in plan.read(item, start_step)]
    return [rows[rank :: plan.world_size] for rank in range(plan.world_size)]


def read_all(plan: StreamPlan, start_step: int = 0, resume_step: int | None = None) -> list[list[Batch]]:
    begin = start_step if resume_step is None else resume_step
    handed = rows_by_rank(plan, start_step)
    return [list(open_stream(Handed(rows), plan, rank=rank, start_step=begin)) for rank, rows in enumerate(handed)]


def train_ids(by_rank: list[list[Batch]]) -> dict[int, list[str]]:
    """Ids of each step's global batch, rank after rank."""
    steps: dict[int, list[str]] = {}
    for batches in by_rank:
        for batch in batches:
            if batch.split == "train":
                steps.setdefault(batch.step, []).extend(batch.ids)
    return steps


def test_every_step_is_the_same_at_any_world_size(dataset: str) -> None:
    plans = [preparation(dataset, num_workers=n).plan(num_epochs=3, is_refit=False) for n in (1, 2, 3, 4)]
    alone, *others = [train_ids(read_all(plan)) for plan in plans]
    assert list(alone) == list(range(plans[0].train.num_steps))
    assert all(other == alone for other in others)


def test_evaluation_rows_come_once_and_whole_with_test_at_the_end(dataset: str) -> None:
    plan = preparation(dataset).plan(num_epochs=1, is_refit=False)
    by_rank = read_all(plan)
    for batches in by_rank:
        assert next(batch.split for batch in batches) == "validation"
        assert [batch.split for batch in batches][-1] == "test"
    tested = [id_ for batches in by_rank for batch in batches if batch.split == "test" for id_ in batch.ids]
    assert sorted(tested) == sorted(f"test/{i}" for i in range(31))
    trained = {id_ for ids in train_ids(by_rank).values() for id_ in ids}
    validated = {id_ for batches in by_rank for batch in batches if batch.split == "validation" for id_ in batch.ids}
    assert not trained & validated
    assert not (trained | validated) & set(tested)


def test_labels_belong_to_their_rows(dataset: str) -> None:
    plan = preparation(dataset).plan(num_epochs=1, is_refit=False)
    for rank, batches in enumerate(read_all(plan)):
        for batch in batches:
            labels = batch.labels
            if batch.split == "train":
                assert len(labels) == 12
                labels = labels[rank * 6 : rank * 6 + 6]
            assert [int(id_.split("/")[1]) % 6 for id_ in batch.ids] == labels.tolist()


def test_features_are_the_ingested_bytes(dataset: str, tmp_path: Path) -> None:
    source = pq.read_table(tmp_path / "train.parquet")
    expected = dict(zip(source["id"].to_pylist(), source["features"].to_pylist(), strict=True))
    plan = preparation(dataset).plan(num_epochs=1, is_refit=False)
    batch = next(b for b in read_all(plan)[1] if b.split == "train")
    assert batch.features.dtype == np.float16
    assert batch.features.tolist() == [expected[id_] for id_ in batch.ids]


@pytest.mark.parametrize(("stream_start", "resume_at"), [(0, 0), (16, 16), (7, 16), (0, 56)])
def test_a_resumed_stream_goes_on_where_it_stopped(dataset: str, stream_start: int, resume_at: int) -> None:
    plan = preparation(dataset).plan(num_epochs=3, is_refit=False)
    whole, rest = train_ids(read_all(plan)), train_ids(read_all(plan, stream_start, resume_at))
    assert rest == {step: ids for step, ids in whole.items() if step >= resume_at}


def test_a_stream_that_starts_too_late_is_refused(dataset: str) -> None:
    plan = preparation(dataset).plan(num_epochs=3, is_refit=False)
    with pytest.raises(TrainingError, match="starts at step 16, after the checkpoint's step 9"):
        read_all(plan, 16, 9)


def test_a_stream_out_of_order_is_refused(dataset: str) -> None:
    plan = preparation(dataset).plan(num_epochs=3, is_refit=False)
    rows = rows_by_rank(plan, 0)
    swapped = [rows[0][0], rows[0][2], rows[0][1], *rows[0][3:]]
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(open_stream(Handed(swapped), plan, rank=0, start_step=0))
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(open_stream(Handed(rows[1]), plan, rank=0, start_step=0))
    with pytest.raises(TrainingError, match="ended 1 items before"):
        list(open_stream(Handed(rows[0][:-1]), plan, rank=0, start_step=0))


def test_a_corrupt_shard_is_one_clear_line(dataset: str) -> None:
    plan = preparation(dataset).plan(num_epochs=1, is_refit=False)
    shard = plan.manifest.shards[1]
    uri = plan.manifest.file_uri(shard.path)
    data = storage.read_bytes(uri)
    storage.write_bytes(uri, data[:100] + b"\x00" + data[101:])
    with pytest.raises(DataError, match="is corrupt") as caught:
        read_all(plan)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_validation_is_stratified_and_folds_never_overlap(dataset: str) -> None:
    rows = preparation(dataset).selection.whole
    folds = [carve_validation(rows, fraction=0.2, fold=k) for k in range(5)]
    hashes = [set(fold.id_hash.tolist()) for _, fold in folds]
    assert sum(len(h) for h in hashes) == len(set().union(*hashes)) == len(rows)
    for rest, fold in folds:
        assert len(rest) + len(fold) == len(rows)
        shares = np.bincount(fold.label) / np.bincount(rows.label)
        assert np.allclose(shares, 0.2, atol=0.03)


def test_what_the_recipe_and_the_data_disagree_on_comes_at_once(dataset: str) -> None:
    content = {"name": "x", "data": {"dataset": dataset}, "train": {"global_batch_size": 256}}
    with pytest.raises(ConfigError) as caught:
        prepare(parse_recipe(content, source="test"))
    assert "projector.encoder_width: 768" in str(caught.value)
    assert "train.global_batch_size: 256 is more than the 206 train rows" in str(caught.value)
