"""What the stream hands out is the plan, from any step and at any world size; anything else is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestration.data.batch import Batch
from orchestration.data.ingest import ingest_features
from orchestration.data.sets import carve_validation
from orchestration.data.stream import Stream
from orchestration.jobs.prepare import Preparation, prepare
from orchestration.recipe import parse_recipe
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError, TrainingError
from tinyemo.taxonomies import TAXONOMIES

pytestmark = pytest.mark.usefixtures("tasks_in_process")

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
        "data": {"dataset": dataset, "pool_mib": 0.1} | data,
        "projector": {"encoder_width": WIDTH},
        "train": {"global_batch_size": 12, "num_epochs": 3},
        "workers": {"num_workers": num_workers},
    }
    return prepare(parse_recipe(content, source="test"))


class Handed:
    """Hands one rank's rows to the stream as Ray Data does: a block for each."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for row in self.rows:
            yield pa.Table.from_pylist([row])


def streams(dataset: str, *, num_workers: int = 2, num_epochs: float = 3) -> dict[str, Stream]:
    return preparation(dataset, num_workers=num_workers).streams(num_epochs=num_epochs, is_refit=False, is_tested=True)


def rows_by_rank(stream: Stream, start_step: int = 0) -> list[list[dict[str, Any]]]:
    rows = [row for window in stream.plan.windows(start_step) for row in stream.read(window, start_step)]
    return [rows[rank :: stream.world_size] for rank in range(stream.world_size)]


def read_all(stream: Stream, start_step: int = 0, resume_step: int | None = None) -> list[list[Batch]]:
    begin = start_step if resume_step is None else resume_step
    handed = rows_by_rank(stream, start_step)
    return [list(stream.batches(Handed(rows), rank=rank, start_step=begin)) for rank, rows in enumerate(handed)]


def ids_by_step(by_rank: list[list[Batch]]) -> dict[int, list[str]]:
    """Ids of each step's global batch, rank after rank."""
    steps: dict[int, list[str]] = {}
    for batches in by_rank:
        for batch in batches:
            steps.setdefault(batch.step, []).extend(batch.ids)
    return steps


def test_every_step_is_the_same_at_any_world_size(dataset: str) -> None:
    trains = [streams(dataset, num_workers=n)["train"] for n in (1, 2, 3, 4)]
    alone, *others = [ids_by_step(read_all(train)) for train in trains]
    assert list(alone) == list(range(trains[0].num_steps)) == list(range(3 * 206 // 12))
    assert all(other == alone for other in others)


def test_evaluation_rows_come_once_and_apart_from_those_of_training(dataset: str) -> None:
    found = {}
    for split, stream in streams(dataset, num_epochs=1).items():
        batches = [batch for batches in read_all(stream) for batch in batches]
        found[split] = [id_ for batch in batches for id_, real in zip(batch.ids, batch.is_real, strict=True) if real]
    assert sorted(found["test"]) == sorted(f"test/{i}" for i in range(31))
    assert len(set(found["validation"])) == len(found["validation"]) == 24
    assert not set(found["train"]) & set(found["validation"])
    assert not set(found["train"] + found["validation"]) & set(found["test"])


def test_labels_belong_to_their_rows_and_each_rank_has_those_of_the_whole_step(dataset: str) -> None:
    train = streams(dataset, num_epochs=1)["train"]
    by_rank = read_all(train)
    whole = ids_by_step(by_rank)
    for batches in by_rank:
        for batch in batches:
            assert batch.labels is not None
            assert batch.global_labels is not None
            assert [int(id_.split("/")[1]) % 6 for id_ in batch.ids] == batch.labels.tolist()
            assert [int(id_.split("/")[1]) % 6 for id_ in whole[batch.step]] == batch.global_labels.tolist()
            assert len(batch.global_labels) == 12


def test_features_are_the_ingested_bytes(dataset: str, tmp_path: Path) -> None:
    source = pq.read_table(tmp_path / "train.parquet")
    expected = dict(zip(source["id"].to_pylist(), source["features"].to_pylist(), strict=True))
    batch = read_all(streams(dataset, num_epochs=1)["train"])[1][0]
    assert batch.features is not None
    assert batch.features.dtype == torch.float16
    assert batch.features.tolist() == [expected[id_] for id_ in batch.ids]


def test_labels_that_are_left_out_are_nowhere(dataset: str) -> None:
    """Rows of the other labels are a selection of the data set, with indices into the words that are left."""
    ready = preparation(dataset, leave_out=["joy", "fear"])
    parts = ready.streams(num_epochs=1, is_refit=False, is_tested=True)
    seen = [batch for stream in parts.values() for batches in read_all(stream) for batch in batches]
    for batch in seen:
        assert batch.labels is not None
        for id_, label in zip(batch.ids, batch.labels.tolist(), strict=True):
            if id_:
                assert ready.words[label] == EKMAN[int(id_.split("/")[1]) % 6]
    assert len({id_ for batch in seen for id_ in batch.ids if id_}) > 100


@pytest.mark.parametrize(("stream_start", "resume_at"), [(0, 0), (16, 16), (7, 16), (0, 51)])
def test_a_resumed_stream_goes_on_where_it_stopped(dataset: str, stream_start: int, resume_at: int) -> None:
    train = streams(dataset)["train"]
    whole, rest = ids_by_step(read_all(train)), ids_by_step(read_all(train, stream_start, resume_at))
    assert rest == {step: ids for step, ids in whole.items() if step >= resume_at}


def test_a_stream_that_starts_too_late_is_refused(dataset: str) -> None:
    with pytest.raises(TrainingError, match="starts at step 16, after the checkpoint's step 9"):
        read_all(streams(dataset)["train"], 16, 9)


def test_a_stream_out_of_order_is_refused(dataset: str) -> None:
    train = streams(dataset)["train"]
    rows = rows_by_rank(train)
    swapped = [rows[0][0], rows[0][2], rows[0][1], *rows[0][3:]]
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(train.batches(Handed(swapped), rank=0))
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(train.batches(Handed(rows[1]), rank=0))
    with pytest.raises(TrainingError, match="ended 1 parts before"):
        list(train.batches(Handed(rows[0][:-1]), rank=0))


def test_a_corrupt_shard_is_one_clear_line(dataset: str) -> None:
    train = streams(dataset, num_epochs=1)["train"]
    manifest = train.sets[0].manifest
    uri = manifest.file_uri(manifest.shards[1].path)
    data = storage.read_bytes(uri)
    storage.write_bytes(uri, data[:100] + b"\x00" + data[101:])
    with pytest.raises(DataError, match="is corrupt") as caught:
        read_all(train)
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
