"""Packed and padded records give a model the same as each record alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_reasoners import pad

from tinyemo.conversation import IGNORED
from tinyemo.packing import TokenRecord, micro_batches, pack


def token_record(ids: list[int], labels: list[int]) -> TokenRecord:
    return torch.tensor(ids), torch.tensor(labels)


@st.composite
def token_records(draw: st.DrawFn) -> list[TokenRecord]:
    """One to six records of 1 to 12 tokens; a label is its token or ignored."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(1, 511), min_size=1, max_size=12))
        found.append(token_record(ids, [token if draw(st.booleans()) else IGNORED for token in ids]))
    return found


def test_two_records_packed_and_padded() -> None:
    records = [token_record([5, 6, 7], [5, IGNORED, 7]), token_record([8, 9], [8, 9])]
    packed = pack(records)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.labels.tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9]]
    assert packed.num_answer_tokens == 2
    padded = pad(records)
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert padded.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert padded.labels.tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert padded.num_answer_tokens == 2


@settings(deadline=None)
@given(records=token_records())
def test_both_forms_hold_every_token_in_order(records: list[TokenRecord]) -> None:
    """And count what a loss that shifts labels by one counts."""
    packed, padded = pack(records), pad(records)
    ids = torch.cat([input_ids for input_ids, _ in records])
    assert torch.equal(packed.input_ids[0], ids)
    assert torch.equal(padded.input_ids[padded.attention_mask], ids)
    assert torch.equal(padded.labels[padded.attention_mask], packed.labels[0])
    starts = torch.nonzero(packed.position_ids[0] == 0).flatten().tolist()
    assert starts == [sum(len(one[0]) for one in records[:place]) for place in range(len(records))]
    count = sum(int((labels[1:] != IGNORED).sum()) for _, labels in records)
    assert packed.num_answer_tokens == padded.num_answer_tokens == count
    assert int((packed.labels[:, 1:] != IGNORED).sum()) == int((padded.labels[:, 1:] != IGNORED).sum()) == count


@settings(deadline=None)
@given(num_records=st.integers(0, 50), size=st.integers(1, 60))
def test_micro_batches_are_the_records_in_order(num_records: int, size: int) -> None:
    parts = [list(range(num_records))[rows] for rows in micro_batches(num_records, size)]
    assert [one for part in parts for one in part] == list(range(num_records))
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts)


@pytest.fixture(scope="module")
def stories() -> Path:
    mirror = os.environ.get("TINYEMO_MIRROR")
    if not mirror:
        pytest.skip("the small Llama lies in the mirror: set TINYEMO_MIRROR")
    return Path(mirror) / "models" / "stories260k"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_record_sees_another_one(stories: Path, attention: str) -> None:
    """Reference: each record alone through a trained Llama, a record of one token among them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    records = [(ids, ids) for ids in (torch.randint(3, 512, (length,)) for length in (7, 1, 12, 5))]
    model: Any = AutoModelForCausalLM.from_pretrained(
        stories, attn_implementation=attention, dtype=torch.float32
    ).eval()
    packed, padded = pack(records), pad(records)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids, _ in records])
        row = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
        rows = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask.long()).logits
        mixed = model(input_ids=packed.input_ids, use_cache=False).logits[0]
    torch.testing.assert_close(row, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(rows[padded.attention_mask], alone, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(mixed, alone, atol=0.1)

    def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    torch.testing.assert_close(nats(row[None], packed.labels), nats(rows, padded.labels))
