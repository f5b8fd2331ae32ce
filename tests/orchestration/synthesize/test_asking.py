"""A hostile teacher: every item ends with an answer or a code, stored once; the key of the endpoint is nowhere."""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from teacher_server import Teacher, good_text, running_teacher

from orchestration.jobs.lease import hold_lease
from orchestration.services import storage
from orchestration.synthesize.answer_ledger import AnswerLedger, Code, open_ledger, read_answers
from orchestration.synthesize.asking import ask_all
from orchestration.synthesize.gates import check_answer
from orchestration.synthesize.requesting import Endpoint, Limiter
from orchestration.synthesize.synthesis_recipe import (
    BudgetConfig,
    GatesConfig,
    RetryConfig,
    TaskConfig,
    TeacherConfig,
)
from orchestration.synthesize.work_items import WorkItem
from tinyemo.errors import ConfigError, PlatformError, TinyEmoError
from tinyemo.taxonomies import TAXONOMIES

KEY = "sk-planted-5f2c9e81d7"
FAST = RetryConfig(max_attempts=2, max_wait_s=1.2, patience_s=3)

EXPECTED = {
    "good": None, "recovers": None, "waits": None, "no_usage": None, "silly_usage": None,
    "error500": Code.SERVER_ERROR, "error503": Code.SERVER_ERROR,
    "rate": Code.RATE_LIMITED, "rate_after": Code.RATE_LIMITED, "rate_forever": Code.RATE_LIMITED,
    "rate_date": Code.RATE_LIMITED, "rate_nonsense": Code.RATE_LIMITED,
    "bad_request": Code.BAD_REQUEST, "redirects": Code.BAD_REQUEST,
    "hangs": Code.TIMEOUT, "drips": Code.TIMEOUT,
    "resets": {Code.CONNECTION_LOST, Code.BROKEN_RESPONSE}, "ends_early": Code.BROKEN_RESPONSE,
    "truncated": Code.BROKEN_RESPONSE, "not_an_object": Code.BROKEN_RESPONSE, "no_choices": Code.BROKEN_RESPONSE,
    "number_text": Code.BROKEN_RESPONSE, "deep": Code.BROKEN_RESPONSE, "compressed": Code.TOO_LARGE,
    "large": Code.TOO_LARGE, "long": Code.TOO_LONG, "null_text": Code.EMPTY, "blank": Code.EMPTY,
    "echoes_prompt": Code.COPIED_PROMPT, "echoes_key": Code.SECRET_ECHOED,
    "control": Code.CONTROL_CHARACTERS, "surrogate": Code.CONTROL_CHARACTERS, "other_model": Code.OTHER_MODEL,
    "refuses": Code.REFUSAL, "unfinished": Code.UNFINISHED, "language": Code.WRONG_LANGUAGE, "short": Code.TOO_SHORT,
}  # fmt: skip
"""Behaviour -> the code that its item ends with after requests and gates."""


@pytest.fixture(scope="module")
def teacher() -> Iterator[Teacher]:
    with running_teacher() as server:
        yield server


@pytest.fixture
def ledger(s3_root: str) -> Iterator[AnswerLedger]:
    with hold_lease(s3_root, None, {}) as lease:
        yield open_ledger(lease)


def work(case: str, number: int = 0) -> WorkItem:
    user = f"Here is what is known of photograph {number}: it shows a walk in winter. Write one caption. case: {case}"
    label = "awe"
    return WorkItem(
        f"{case}-{number}", "0" * 64, "caption", "t", 0, None, label, "Describe.", (), "", "You write.", user
    )


def endpoint(teacher: Teacher, **options: Any) -> Endpoint:
    retries = options.pop("retries", FAST)
    given = {"model": "teacher", "base_url": teacher.url, "timeout_s": 1.0, **options}
    return Endpoint("t", TeacherConfig(**given), retries)


def ask(
    ledger: AnswerLedger, items: list[WorkItem], asked: Endpoint, budget: BudgetConfig = BudgetConfig()
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    feeds = {"t": (item for item in items if item.key not in ledger.done)}
    stopped_by = asyncio.run(ask_all(feeds, {"t": asked}, ledger, budget, lambda _: b"", lambda _: None))
    return stopped_by, {row["key"]: row for row in read_answers(ledger.folder).to_pylist()}


@pytest.mark.slow
def test_every_behaviour_ends_as_an_answer_or_a_code_and_the_key_is_nowhere(
    teacher: Teacher, ledger: AnswerLedger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    items = [work("good", number) for number in range(40)] + [work(case) for case in EXPECTED if case != "good"]
    stopped_by, answers = ask(ledger, items, endpoint(teacher, api_key_env="TEACHER_KEY"))
    assert stopped_by is None
    assert set(answers) == {item.key for item in items}
    found: dict[str, str | None] = {}
    for item in items:
        answer, case = answers[item.key], item.key.rpartition("-")[0]
        verdict = check_answer(
            item, answer["text"], answer["finish_reason"], "text", TaskConfig(), GatesConfig(), TAXONOMIES["mikels"]
        )
        found[case] = answer["reason"] or verdict.code
    wrong = {
        case: code for case, code in found.items()
        if code not in (EXPECTED[case] if isinstance(EXPECTED[case], set) else {EXPECTED[case]})
    }  # fmt: skip
    assert wrong == {}
    assert f"Bearer {KEY}" in teacher.authorizations  # it was really sent
    assert answers["no_usage-0"]["is_estimated"]
    assert answers["no_usage-0"]["completion_tokens"] > 10
    assert not answers["good-0"]["is_estimated"]
    assert (answers["recovers-0"]["num_requests"], answers["bad_request-0"]["num_requests"]) == (2, 1)
    places = [storage.read_bytes(uri) for uri in storage.list_prefix(ledger.folder)] + [caplog.text.encode()]
    places.append(json.dumps(answers).encode())
    assert [place for place in places if KEY.encode() in place] == []


def test_retry_after_is_waited_for(teacher: Teacher, ledger: AnswerLedger) -> None:
    began_at = time.monotonic()
    _, answers = ask(ledger, [work("waits", 1)], endpoint(teacher))
    assert time.monotonic() - began_at >= 1.0
    assert answers["waits-1"]["reason"] is None


def test_structured_answers_are_repaired_once_and_fall_back_from_the_schema(
    teacher: Teacher, ledger: AnswerLedger
) -> None:
    items = [work(case) for case in ("json", "no_schema", "repairs", "wrong_json")]
    _, answers = ask(ledger, items, endpoint(teacher, answers="auto"))
    repaired = {key: (row["is_repaired"], row["num_requests"]) for key, row in answers.items()}
    assert repaired["json-0"] == (False, 1)
    assert repaired["repairs-0"] == (True, 2)
    assert repaired["wrong_json-0"] == (True, 2)
    codes = {
        item.key: check_answer(
            item, answers[item.key]["text"], "stop", "auto", TaskConfig(), GatesConfig(), TAXONOMIES["mikels"]
        ).code
        for item in items
    }
    assert codes == {"json-0": None, "no_schema-0": None, "repairs-0": None, "wrong_json-0": Code.NOT_JSON}


@pytest.mark.parametrize(
    ("limits", "name", "num_answers"),
    [
        ({"requests": 10}, "requests", 10),
        ({"tokens": 3_000}, "tokens", None),
        ({"money": 0.05}, "money", None),
    ],
)
def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(
    teacher: Teacher, ledger: AnswerLedger, limits: dict[str, Any], name: str, num_answers: int | None
) -> None:
    items = [work("good", number) for number in range(60)]
    prices = {"price_prompt": 10.0, "price_completion": 20.0}
    stopped_by, answers = ask(ledger, items, endpoint(teacher, **prices), BudgetConfig(**limits))
    assert stopped_by == name
    assert 0 < len(answers) < 60
    assert num_answers is None or len(answers) == num_answers
    spent = {"requests": ledger.spent.requests, "tokens": ledger.spent.tokens, "money": ledger.spent.money}
    assert spent[name] <= limits[name]
    assert ask(ledger, items, endpoint(teacher, **prices))[0] is None
    assert ledger.spent.requests == 60
    assert ledger.spent.tokens == 60 * 70


@pytest.mark.slow
def test_concurrency_grows_with_a_patient_teacher_and_falls_at_429(ledger: AnswerLedger) -> None:
    with running_teacher(delay_s=0.05) as patient:
        ask(ledger, [work("good", number) for number in range(300)], endpoint(patient, max_concurrency=32))
        assert 16 <= patient.most_at_once <= 32
    with running_teacher(delay_s=0.05, limit=6) as busy:
        asked = endpoint(busy, max_concurrency=32, retries=RetryConfig(max_attempts=8))
        _, answers = ask(ledger, [work("good", number) for number in range(300, 500)], asked)
        assert sum(row["reason"] is None for row in answers.values()) == 500
        assert asked.limiter.limit < 16


@pytest.mark.parametrize(("at_once", "lowest", "highest"), [(1, 1, 8), (12, 8, 24), (1000, 64, 64)])
def test_concurrency_follows_what_the_teacher_does_at_once(at_once: int, lowest: int, highest: int) -> None:
    """A teacher that works on few requests at a time gets few: more inside it make no answer come sooner."""
    now = 0.0

    async def drive() -> list[float]:
        nonlocal now
        limiter, limits = Limiter(64, clock=lambda: now), []
        for _ in range(300):
            limit = int(limiter.limit)
            for _ in range(limit):
                await limiter.acquire()
            for _ in range(limit):
                now += 0.1 / min(limit, at_once)
                await limiter.release(is_answer=True)
            limits.append(limiter.limit)
        return limits

    assert lowest <= statistics.median(asyncio.run(drive())[50:]) <= highest


def test_an_endpoint_that_goes_away_is_waited_for_and_then_given_up(ledger: AnswerLedger) -> None:
    with running_teacher() as first:
        asked = endpoint(first)
    with pytest.raises(PlatformError, match="has not answered for 3 s"):
        ask(ledger, [work("good", number) for number in range(5)], asked)
    assert ledger.done == set()


@pytest.mark.parametrize(
    ("options", "message"), [({"model": "x"}, "none of the first 20"), ({"api_key_env": "NOT_SET"}, "NOT_SET")]
)
def test_a_teacher_that_cannot_be_used_ends_the_run_in_one_line(
    teacher: Teacher, ledger: AnswerLedger, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TinyEmoError, match=message) as caught:
        ask(ledger, [work("good", number) for number in range(60)], endpoint(teacher, **options))
    assert isinstance(caught.value, ConfigError | PlatformError)
    assert "\n" not in str(caught.value)


def test_what_a_killed_driver_had_in_flight_is_known_to_the_next(s3_root: str, teacher: Teacher) -> None:
    items = [work("good", number) for number in range(8)]
    with hold_lease(s3_root, None, {}) as lease:
        first = open_ledger(lease)
        ask(first, items[:5], endpoint(teacher))
        first.commit([], {item.key: (100, 0.5) for item in items[5:]})  # and it is killed here
    with hold_lease(s3_root, None, {}) as lease:
        second = open_ledger(lease)
        assert second.num_lost == 3
        assert second.spent.requests == 8
        assert second.spent.tokens == 5 * 70 + 300
        assert second.spent.money == pytest.approx(1.5)
        ask(second, items, endpoint(teacher))
        assert second.spent.requests == 11
    with hold_lease(s3_root, None, {}) as lease:
        third = open_ledger(lease)
        assert (third.num_lost, third.spent.requests) == (3, 11)
    assert len(read_answers(s3_root)) == 8


def test_small_segments_are_merged_and_an_answer_counts_once(s3_root: str) -> None:
    from orchestration.synthesize.answer_ledger import SEGMENTS_TO_MERGE, Answer

    with hold_lease(s3_root, None, {}) as lease:
        ledger = open_ledger(lease)
        for number in range(2 * SEGMENTS_TO_MERGE + 3):
            ledger.commit([Answer(f"{number:04d}", "caption", "t", text=good_text(number))], {})
        segments = storage.list_prefix(f"{s3_root}/answers")
        assert len(segments) == 5
        storage.write_bytes(f"{s3_root}/answers/000000-000000.parquet", storage.read_bytes(next(iter(segments))))
        assert read_answers(s3_root)["key"].to_pylist() == [f"{n:04d}" for n in range(2 * SEGMENTS_TO_MERGE + 3)]
        assert open_ledger(lease).spent.requests == 2 * SEGMENTS_TO_MERGE + 3
