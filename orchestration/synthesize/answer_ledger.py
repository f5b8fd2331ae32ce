"""The ledger of a synthesis in S3: every answer once, under the key of its work item, and what may be in flight.

<root>/<name>/answers/<token>-<number>.parquet   ANSWER_SCHEMA; written once, by the driver with this lease token
<root>/<name>/inflight.json                      items that may have been sent and have no answer stored yet
<root>/<name>/lost.json                          what earlier drivers had in flight when they were killed

An item is sent only after its key stands in inflight.json, so what a killed driver may have paid for without an answer
is known. Small segments are merged; an item whose answer stands in two segments counts once, the later one.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestration.data.manifest import parquet_bytes
from orchestration.jobs.lease import Lease
from orchestration.services import storage
from tinyemo.errors import DataError, LostLeaseError

IN_FLIGHT, LOST = "inflight.json", "lost.json"
SEGMENTS_TO_MERGE = 64
"""Small segments that become one."""


class Code(StrEnum):
    """Why an answer is no record. The first group comes from requests, the second from gates over what came back."""

    RATE_LIMITED = "rate_limited"
    """429 at every attempt."""
    SERVER_ERROR = "server_error"
    """5xx at every attempt."""
    TIMEOUT = "timeout"
    """No answer in time at any attempt."""
    CONNECTION_LOST = "connection_lost"
    """The connection broke at every attempt, while the endpoint was up."""
    BROKEN_RESPONSE = "broken_response"
    """What came is no chat completion, at every attempt."""
    BAD_REQUEST = "bad_request"
    """The endpoint refuses this request; asking again would not help."""
    TOO_LARGE = "too_large"
    """The response has more bytes than are read."""
    SECRET_ECHOED = "secret_echoed"
    """The answer held the endpoint's key, which was taken out."""
    OTHER_MODEL = "other_model"
    """Another model answered."""
    NO_IMAGE = "no_image"
    """The photograph cannot be read any more."""

    EMPTY = "empty"
    CONTROL_CHARACTERS = "control_characters"
    """The text holds control characters or lone surrogates."""
    UNFINISHED = "unfinished"
    """The answer ended at its token limit."""
    REFUSAL = "refusal"
    NOT_JSON = "not_json"
    """Structured answers: no JSON of the asked form, after one repair."""
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    COPIED_PROMPT = "copied_prompt"
    """Much of the text stands in the prompt, or a turn of the chat is repeated."""
    WRONG_LANGUAGE = "wrong_language"
    LABEL_MISSING = "label_missing"
    """The text names none of the labels."""
    LABEL_DIFFERENT = "label_different"
    """The text names another label than the photograph's."""
    SEVERAL_LABELS = "several_labels"
    """The text names more than one label."""
    HELD_OUT_TEXT = "held_out_text"
    """The text stands in a held-out split of a data set that the recipe names."""
    DUPLICATE_ACROSS_SPLITS = "duplicate_across_splits"
    """Nearly the same text is in a split that is held out more."""
    NEAR_DUPLICATE = "near_duplicate"
    """An earlier record of the task and split has nearly the same text."""
    JUDGED_POOR = "judged_poor"
    """The judge gives less than the least score."""


TRANSIENT = (Code.RATE_LIMITED, Code.SERVER_ERROR, Code.TIMEOUT, Code.CONNECTION_LOST, Code.BROKEN_RESPONSE)
"""Codes of items that `--retry` asks for again."""

ANSWER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("teacher", pa.string()),
        ("reason", pa.string()),  # null where the teacher answered
        ("detail", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("model", pa.string()),  # as the endpoint names it
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("is_estimated", pa.bool_()),  # the endpoint gave no usage
        ("cost", pa.float64()),
        ("num_requests", pa.int32()),
        ("is_repaired", pa.bool_()),
        ("latency_s", pa.float32()),  # of the last request
    ]
)


@dataclass(frozen=True)
class Answer:
    """Stored outcome of one work item; the fields are those of ANSWER_SCHEMA."""

    key: str
    task: str
    teacher: str
    reason: str | None = None
    detail: str = ""
    text: str = ""
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False
    cost: float = 0.0
    num_requests: int = 1
    is_repaired: bool = False
    latency_s: float = 0.0


@dataclass(frozen=True)
class Spent:
    """Requests, tokens and money of all starts of a name."""

    requests: int = 0
    tokens: int = 0
    money: float = 0.0

    def plus(self, requests: int, tokens: int, money: float) -> Spent:
        """Return the sum."""
        return Spent(self.requests + requests, self.tokens + tokens, self.money + money)


@dataclass
class AnswerLedger:
    """The answers that are stored, as the driver that holds the lease sees them.

    Attributes:
        lease: of the synthesis.
        done: keys with a stored answer.
        spent: by all starts, lost requests included at their worst case.
        num_lost: requests that earlier drivers may have paid for without an answer.
    """

    lease: Lease
    done: set[str] = field(default_factory=set)
    spent: Spent = Spent()
    num_lost: int = 0
    _number: int = 0
    _etag: str | None = None
    _small: list[tuple[str, list[Answer]]] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """S3 folder of the synthesis."""
        return self.lease.folder

    def commit(self, answers: Sequence[Answer], in_flight: dict[str, tuple[int, float]]) -> None:
        """Store answers, then which items may be in flight from now on.

        Args:
            answers: of items that were in flight.
            in_flight: key of each item that may be sent -> tokens and money that it may cost.

        Raises:
            LostLeaseError: another driver took the synthesis over.
        """
        self.lease.check()
        if answers:
            self._append(answers)
        self._write_in_flight(in_flight)

    def _append(self, answers: Sequence[Answer]) -> None:
        uri = self._put(answers)
        self._small.append((uri, list(answers)))
        self.done |= {answer.key for answer in answers}
        for answer in answers:
            tokens = answer.prompt_tokens + answer.completion_tokens
            self.spent = self.spent.plus(answer.num_requests, tokens, answer.cost)
        if len(self._small) >= SEGMENTS_TO_MERGE:
            self.merge()

    def merge(self) -> None:
        """Put the small segments of this driver into one."""
        if len(self._small) > 1:
            self._put([answer for _, answers in self._small for answer in answers])
            for uri, _ in self._small:  # a reader between sees an answer twice, and counts it once
                storage.delete(uri)
        self._small.clear()

    def _put(self, answers: Sequence[Answer]) -> str:
        # The token is this driver's alone, so nobody else writes the name; `commit` has checked the lease.
        uri = f"{self.folder}/answers/{self.lease.token:06d}-{self._number:06d}.parquet"
        self._number += 1
        table = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=ANSWER_SCHEMA)
        storage.write_bytes(uri, parquet_bytes(table))
        return uri

    def _write_in_flight(self, in_flight: dict[str, tuple[int, float]]) -> None:
        uri = f"{self.folder}/{IN_FLIGHT}"
        data = json.dumps({"nonce": secrets.token_hex(8), "items": in_flight}).encode()
        if self._etag is None:
            self.lease.write(uri, data)
            self._etag = storage.read_with_etag(uri)[1]
            return
        self._etag = storage.write_bytes_if_match(uri, data, self._etag)
        if self._etag is None:
            self.lease.check()
            raise LostLeaseError(f"{uri} was written by another process: this driver stops")


def open_ledger(lease: Lease) -> AnswerLedger:
    """Read what earlier drivers stored, and count what they had in flight as lost.

    Raises:
        DataError: a segment is corrupt.
        StorageError: S3 fails.
    """
    ledger = AnswerLedger(lease)
    columns = ("key", "num_requests", "prompt_tokens", "completion_tokens", "cost", "latency_s")
    answers = _read_segments(lease.folder, columns)
    ledger.done = set(answers["key"].to_pylist())
    # A killed merge leaves the same answer in two segments; an item that was asked again has two answers, both paid.
    paid = answers.group_by(list(columns)).aggregate([])
    tokens = (pc.sum(paid["prompt_tokens"]).as_py() or 0) + (pc.sum(paid["completion_tokens"]).as_py() or 0)
    ledger.spent = Spent(pc.sum(paid["num_requests"]).as_py() or 0, tokens, pc.sum(paid["cost"]).as_py() or 0.0)
    lost = _read_items(f"{lease.folder}/{LOST}")
    lost |= {key: cost for key, cost in _read_items(f"{lease.folder}/{IN_FLIGHT}").items() if key not in ledger.done}
    ledger.num_lost = len(lost)
    if lost:
        lease.write_json(f"{lease.folder}/{LOST}", {"items": lost})
        ledger.spent = ledger.spent.plus(len(lost), sum(i[0] for i in lost.values()), sum(i[1] for i in lost.values()))
    ledger.commit([], {})
    return ledger


def _read_items(uri: str) -> dict[str, Any]:
    try:
        return dict(storage.read_json(uri)["items"])
    except storage.MissingObjectError:
        return {}


def read_answers(folder: str, *, columns: Sequence[str] = ANSWER_SCHEMA.names) -> pa.Table:
    """Return the last answer of each key, sorted by key.

    Args:
        folder: S3 folder of the synthesis.
        columns: of ANSWER_SCHEMA; `key` must be among them.

    Raises:
        DataError: a segment is corrupt.
    """
    table = _read_segments(folder, columns)
    newest = table.append_column("place", pa.array(range(table.num_rows), pa.int64()))
    places = newest.group_by("key").aggregate([("place", "max")]).sort_by("key")["place_max"]
    return table.take(places.combine_chunks()).combine_chunks()


def _read_segments(folder: str, columns: Sequence[str]) -> pa.Table:
    schema = pa.schema([ANSWER_SCHEMA.field(name) for name in columns])
    tables = [_read_segment(uri, columns) for uri in storage.list_prefix(f"{folder}/answers")]
    return pa.concat_tables([schema.empty_table(), *tables])


def _read_segment(uri: str, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=list(columns))
    except pa.ArrowException as error:
        raise DataError(f"{uri} is corrupt: delete it, and its answers are asked for again") from error


def forget(answers: AnswerLedger, reasons: Iterable[str]) -> int:
    """Let items whose answer ended with one of `reasons` be asked again; return how many.

    What was paid for them stays counted.
    """
    table = read_answers(answers.folder, columns=("key", "reason"))
    keys = table.filter(pc.is_in(table["reason"], pa.array(list(reasons), pa.string())))["key"].to_pylist()
    answers.done -= set(keys)
    return len(keys)
