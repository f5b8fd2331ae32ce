"""Requests to a teacher behind an OpenAI-compatible endpoint: adaptive concurrency, retries, time-outs, bounds.

`openai` sends the requests, without its own retries. What comes back is foreign: it is bounded in time and bytes,
parsed by hand, freed of the endpoint's key, and ends as an Answer with a code whatever it is.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx2
import openai
from PIL import Image

from orchestration.synthesize.answer_ledger import Answer, Code
from orchestration.synthesize.prompts import PromptVariables, open_prompt, read_structured, schema_of
from orchestration.synthesize.synthesis_recipe import RetryConfig, TeacherConfig
from orchestration.synthesize.work_items import WorkItem
from tinyemo.errors import ConfigError, PlatformError

logger = logging.getLogger(__name__)

MAX_TEXT_CHARS = 20_000
"""Longest text that the ledger keeps of an answer; longer ones are cut, and too long for every gate."""
FIRST_PAUSE_S = 0.5
PROBE_TIMEOUT_S = 5.0
PROBE_EVERY_S = 1.0
HOPELESS = 20
"""Items that fail before the first answer of an endpoint; then the run ends."""


class AnswerTooLargeError(Exception):
    """A response has more bytes than are read."""


@dataclass
class Limiter:
    """How many requests are under way at once: as many as still bring more answers a second.

    A window is twice as many answers as the limit, and the first half of it is not counted. The limit grows, twofold
    until the first growth that was in vain: one that brings less than a third of the answers that it promises, for
    instance because the endpoint works on one request at a time. Such a growth is undone, and tried again later. A 429,
    a 503 or a time-out halves the limit.
    """

    max_limit: int
    limit: float = 4.0
    num_active: int = 0
    paused_until: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _is_starting: bool = True
    _before: tuple[float, float] | None = None
    """Limit and rate before the growth that is being tried."""
    _hold: int = 0
    """Windows until the next growth."""
    _next_hold: int = 4
    _num_seen: int = 0
    _window_at: float = 0.0
    _cut_at: float = 0.0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.max_limit)

    async def acquire(self) -> None:
        """Wait for a place."""
        while True:
            await asyncio.sleep(max(0.0, self.paused_until - self.clock()))
            async with self._changed:
                await self._changed.wait_for(lambda: self.num_active < int(self.limit))
                if self.paused_until <= self.clock():
                    self.num_active += 1
                    return

    async def release(self, *, is_answer: bool) -> None:
        """Give the place back."""
        async with self._changed:
            self.num_active -= 1
            if is_answer:
                self._count()
            self._changed.notify_all()

    def _count(self) -> None:
        self._num_seen += 1
        size = max(4, int(self.limit))
        if self._num_seen == size:
            self._window_at = self.clock()
        elif self._num_seen >= 2 * size:
            self._adapt(size / max(1e-6, self.clock() - self._window_at))
            self._num_seen = 0

    def _adapt(self, rate: float) -> None:
        """Grow, or undo a growth; `rate` is in answers a second."""
        if self._before is not None:
            limit, former_rate = self._before
            self._before = None
            if rate / former_rate - 1 < (self.limit / limit - 1) / 3:
                self.limit, self._is_starting = limit, False
                self._hold, self._next_hold = self._next_hold, min(64, 2 * self._next_hold)
                return
            self._next_hold = 4
        if self._hold:
            self._hold -= 1
        elif self.limit < self.max_limit:
            self._before = (self.limit, rate)
            growth = self.limit if self._is_starting else max(1.0, self.limit / 4)
            self.limit = min(self.max_limit, self.limit + growth)

    def back_off(self, pause_s: float = 0.0) -> None:
        """Halve the limit, once for all requests that were under way together, and pause for `pause_s`."""
        now = self.clock()
        self.paused_until = max(self.paused_until, now + pause_s)
        if now >= self._cut_at:
            self._is_starting, self._before, self._num_seen, self._hold = False, None, 0, 4
            self.limit = max(1.0, self.limit / 2)
            self._cut_at = now + max(1.0, pause_s)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one request to a teacher.

    Attributes:
        code: None for an answer.
        is_final: whether no further attempt can help.
        is_away: the endpoint may be gone altogether.
        retry_after_s: what the endpoint asks for; None where it says nothing.
        is_cut: the endpoint has too much to do.
    """

    code: Code | None = None
    detail: str = ""
    is_final: bool = False
    is_away: bool = False
    is_cut: bool = False
    retry_after_s: float | None = None
    text: str = ""
    finish_reason: str = ""
    model: str = ""
    usage: tuple[int, int] | None = None


def read_key(name: str, teacher: TeacherConfig) -> str:
    """Return the key of an endpoint from the environment; empty for one without.

    Raises:
        ConfigError: the variable is not set.
    """
    key = os.environ.get(teacher.api_key_env, "") if teacher.api_key_env else ""
    if teacher.api_key_env and not key:
        raise ConfigError(f"teachers.{name}: the environment variable {teacher.api_key_env} is not set")
    return key


class Endpoint:
    """One teacher's endpoint."""

    def __init__(self, name: str, teacher: TeacherConfig, retries: RetryConfig) -> None:
        """Prepare a client; sends nothing.

        Raises:
            ConfigError: the key's variable is not set.
        """
        self.name, self.teacher, self.retries = name, teacher, retries
        self._key = read_key(name, teacher)
        connections = httpx2.Limits(max_connections=None, max_keepalive_connections=teacher.max_concurrency)
        http_client = httpx2.AsyncClient(
            limits=connections,
            timeout=teacher.timeout_s,
            follow_redirects=False,  # another host must not get the key
            event_hooks={"response": [self._bound]},
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
        )
        self.client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=teacher.base_url,
            max_retries=0,
            timeout=teacher.timeout_s,
            http_client=http_client,
        )
        self.limiter = Limiter(teacher.max_concurrency)
        self.num_answered = self.num_failed = 0
        self._wants_schema = teacher.answers in ("auto", "schema")
        self._next_at = 0.0
        self._up: asyncio.Task[None] | None = None
        self._repair = open_prompt("repair-1")

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def ask(self, item: WorkItem, image: bytes | None, may_send: Callable[[], bool]) -> Answer | None:
        """Return what comes of an item in the end; None where `may_send` forbids a further request.

        Raises:
            ConfigError: the endpoint refuses every request.
            PlatformError: the endpoint stays away, or has answered nothing so far.
        """
        messages = messages_of(item, image)
        found = await self._ask(item, messages, may_send)
        is_text = self.teacher.answers == "text"
        if found is None or found.reason is not None or is_text or found.finish_reason == "length":
            return found
        problem = read_structured(found.text, schema_of(item.task))
        if not isinstance(problem, str):
            return found
        turns = [
            *messages,
            {"role": "assistant", "content": found.text},
            {"role": "user", "content": self._repair.render(PromptVariables(problem=problem)).user},
        ]
        again = await self._ask(item, turns, may_send)
        if again is None:
            return None
        if again.reason is not None:
            again = replace(again, reason=Code.NOT_JSON, detail=f"{problem}; repair: {again.reason}", text=found.text)
        return replace(
            again,
            is_repaired=True,
            num_requests=found.num_requests + again.num_requests,
            prompt_tokens=found.prompt_tokens + again.prompt_tokens,
            completion_tokens=found.completion_tokens + again.completion_tokens,
            is_estimated=found.is_estimated or again.is_estimated,
            cost=found.cost + again.cost,
        )

    async def _ask(self, item: WorkItem, messages: list[dict[str, Any]], may_send: Callable[[], bool]) -> Answer | None:
        num_requests, num_attempts = 0, 0
        while True:
            await self.limiter.acquire()
            began_at = time.monotonic()
            outcome: Outcome | None = None
            try:
                await self._pace()
                if not may_send():
                    return None
                began_at = time.monotonic()
                outcome = await self._request(item, messages)
            finally:
                await self.limiter.release(is_answer=outcome is not None and outcome.code is None)
            latency_s = time.monotonic() - began_at
            num_requests += 1
            num_attempts += 1
            if outcome.is_cut:
                self.limiter.back_off(min(outcome.retry_after_s or 0.0, self.retries.max_wait_s))
            if outcome.is_away and not await self._is_up():
                await self._wait_until_up()
                num_attempts = 0
                continue
            if outcome.code is None or outcome.is_final or num_attempts >= self.retries.max_attempts:
                return self._answer(item, messages, outcome, num_requests, latency_s)
            pause_s = FIRST_PAUSE_S * 2 ** (num_attempts - 1)
            pause_s = max(outcome.retry_after_s or 0.0, pause_s * random.uniform(0.5, 1.5))
            await asyncio.sleep(min(pause_s, self.retries.max_wait_s))

    async def _pace(self) -> None:
        if self.teacher.requests_per_minute is None:
            return
        now = time.monotonic()
        self._next_at = max(self._next_at, now) + 60 / self.teacher.requests_per_minute
        await asyncio.sleep(self._next_at - 60 / self.teacher.requests_per_minute - now)

    async def _request(self, item: WorkItem, messages: list[dict[str, Any]]) -> Outcome:
        teacher = self.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            "messages": messages,
            teacher.token_limit_field: teacher.max_tokens,
            "temperature": teacher.temperature,
            "seed": item.seed,
        }
        if self._wants_schema:
            schema = {"name": item.task, "strict": True, "schema": schema_of(item.task)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            async with asyncio.timeout(teacher.timeout_s):
                # `post` in place of `chat.completions.create`: the same request, two thirds of the work.
                response = await self.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except (TimeoutError, openai.APITimeoutError):
            return Outcome(Code.TIMEOUT, f"no answer within {teacher.timeout_s:g} s", is_away=True, is_cut=True)
        except (openai.APIConnectionError, httpx2.HTTPError, AnswerTooLargeError) as error:
            return self._lost(error)
        except openai.APIStatusError as error:
            return self._refused(error.response)
        except openai.APIError as error:
            return Outcome(Code.BROKEN_RESPONSE, type(error).__name__)
        return self._read(response)

    def _lost(self, error: Exception) -> Outcome:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, AnswerTooLargeError):
                return Outcome(Code.TOO_LARGE, str(cause), is_final=True)
            if isinstance(cause, httpx2.DecodingError | httpx2.RemoteProtocolError):
                return Outcome(Code.BROKEN_RESPONSE, type(cause).__name__, is_away=True)
            cause = cause.__cause__
        return Outcome(Code.CONNECTION_LOST, type(error.__cause__ or error).__name__, is_away=True)

    def _refused(self, response: httpx2.Response) -> Outcome:
        status, said = response.status_code, self._redacted(response.text[:300])
        detail = f"HTTP {status}: {' '.join(said.split())}"
        if status == 429 and "insufficient_quota" in said:
            raise PlatformError(f"teachers.{self.name}: the endpoint's quota is used up ({detail[:200]})")
        if status in (401, 403, 404) and not self.num_answered:
            raise ConfigError(
                f"teachers.{self.name}: {self.teacher.base_url} refuses requests for {self.teacher.model} "
                f"({detail[:200]}): check model, base_url and api_key_env"
            )
        if status in (400, 422) and self._wants_schema and self.teacher.answers == "auto":
            logger.warning("teachers.%s takes no response_format: JSON is asked for in words from now on", self.name)
            self._wants_schema = False
            return Outcome(Code.BAD_REQUEST, detail)
        if status == 429:
            wait_s = _retry_after_s(response)
            return Outcome(Code.RATE_LIMITED, detail, is_cut=True, retry_after_s=wait_s)
        if status in (408, 409, 425) or status >= 500:
            return Outcome(Code.SERVER_ERROR, detail, is_cut=status == 503, retry_after_s=_retry_after_s(response))
        return Outcome(Code.BAD_REQUEST, detail, is_final=True)

    def _read(self, response: httpx2.Response) -> Outcome:
        """Return the first choice of a chat completion."""
        try:
            document = json.loads(response.content)
            choice = document["choices"][0]
            message = choice["message"]
            text = message.get("content") or message.get("refusal") or ""
            if not isinstance(text, str):
                raise TypeError(f"content is a {type(text).__name__}")
            is_refused = bool(message.get("refusal"))
            finish_reason, model = str(choice.get("finish_reason") or ""), str(document.get("model") or "")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            return Outcome(Code.BROKEN_RESPONSE, f"no chat completion ({type(error).__name__})")
        clean = text.encode("utf-8", "replace").decode()
        redacted = self._redacted(clean)
        model = self._redacted(model[:200])
        code, detail = None, ""
        names = (self.teacher.model, *self.teacher.accepts_models)
        if redacted != clean:
            code, detail = Code.SECRET_ECHOED, "the text holds the endpoint's key"
        elif clean != text:
            code, detail = Code.CONTROL_CHARACTERS, "lone surrogates"
        elif len(clean) > MAX_TEXT_CHARS:
            code, detail = Code.TOO_LONG, f"{len(clean)} characters"
        elif is_refused:
            code, detail = Code.REFUSAL, "the endpoint marks a refusal"
        elif model and not any(model.startswith(name) for name in names):
            code, detail = Code.OTHER_MODEL, f"{model} answered in place of {self.teacher.model}"
        return Outcome(
            code,
            detail,
            is_final=True,
            text=redacted[:MAX_TEXT_CHARS],
            finish_reason=finish_reason[:40],
            model=model,
            usage=_usage(document.get("usage")),
        )

    def _answer(
        self, item: WorkItem, messages: list[dict[str, Any]], outcome: Outcome, num_requests: int, latency_s: float
    ) -> Answer:
        is_paid = bool(outcome.text) or outcome.usage is not None
        self.num_answered += outcome.code is None
        self.num_failed += outcome.code is not None
        if not self.num_answered and self.num_failed >= HOPELESS:
            raise PlatformError(
                f"teachers.{self.name}: none of the first {self.num_failed} items got an answer, the last one "
                f"{outcome.code} ({outcome.detail}): see to the endpoint, then give the same command with --retry"
            )
        usage = outcome.usage or ((estimate_tokens(messages), estimate_tokens(outcome.text)) if is_paid else (0, 0))
        return Answer(
            key=item.key,
            task=item.task,
            teacher=item.teacher,
            reason=outcome.code,
            detail=outcome.detail[:300],
            text=outcome.text,
            finish_reason=outcome.finish_reason,
            model=outcome.model,
            prompt_tokens=usage[0],
            completion_tokens=usage[1],
            is_estimated=outcome.usage is None and is_paid,
            cost=self.teacher.cost(*usage),
            num_requests=num_requests,
            latency_s=latency_s,
        )

    async def _is_up(self) -> bool:
        """Return True where the endpoint answers anything at all."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self.client.get("/", cast_to=httpx2.Response)  # `transformers serve` lists models for seconds
        except openai.APIStatusError:
            return True
        except (openai.APIError, TimeoutError):
            return False
        return True

    async def _wait_until_up(self) -> None:
        """Wait, together with all other requests, until the endpoint answers again."""
        if self._up is None or self._up.done():
            self._up = asyncio.create_task(self._probe())
        await asyncio.shield(self._up)

    async def _probe(self) -> None:
        logger.warning("teachers.%s: %s is away; waiting for it", self.name, self.teacher.base_url)
        deadline = time.monotonic() + self.retries.patience_s
        while not await self._is_up():
            if time.monotonic() >= deadline:
                raise PlatformError(
                    f"teachers.{self.name}: {self.teacher.base_url} has not answered for "
                    f"{self.retries.patience_s:g} s: start it, then give the same command again"
                )
            await asyncio.sleep(PROBE_EVERY_S)
        logger.warning("teachers.%s: %s answers again", self.name, self.teacher.base_url)

    async def _bound(self, response: httpx2.Response) -> None:
        """Refuse encodings that were not asked for, and stop reading at the largest response."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise AnswerTooLargeError("the response is compressed, which was not asked for")
        stream = cast(httpx2.AsyncByteStream, response.stream)
        response.stream = BoundedStream(stream, self.retries.max_answer_bytes)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class BoundedStream(httpx2.AsyncByteStream):
    """A response body that ends with AnswerTooLargeError after `max_bytes`."""

    def __init__(self, stream: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self.stream, self.max_bytes = stream, max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body."""
        num_bytes = 0
        async for chunk in self.stream:
            num_bytes += len(chunk)
            if num_bytes > self.max_bytes:
                raise AnswerTooLargeError(f"more than {self.max_bytes} bytes")
            yield chunk

    async def aclose(self) -> None:
        """Close the body."""
        await self.stream.aclose()


def messages_of(item: WorkItem, image: bytes | None) -> list[dict[str, Any]]:
    """Return the turns of a request; an image goes in as a data URL."""
    content: Any = item.user
    if image is not None:
        url = f"data:{_mime_type(image)};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.user}]
    system = [{"role": "system", "content": item.system}] if item.system else []
    return [*system, {"role": "user", "content": content}]


def _mime_type(image: bytes) -> str:
    with Image.open(io.BytesIO(image)) as opened:
        return Image.MIME.get(opened.format or "", "image/jpeg")


def estimate_tokens(content: Any) -> int:
    """Return an upper estimate of the tokens of a text or of messages; an image counts as 1,500."""
    if isinstance(content, str):
        return len(content.encode()) // 3 + 4
    if isinstance(content, dict):
        return 1500 if content.get("type") == "image_url" else sum(map(estimate_tokens, content.values()))
    return sum(map(estimate_tokens, content)) if isinstance(content, list) else 0


def _usage(usage: Any) -> tuple[int, int] | None:
    """Return prompt and completion tokens; None where the endpoint gave none that can be believed."""
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 10**8 for count in counts):
        return None
    return cast(tuple[int, int], tuple(counts))


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Return the seconds in Retry-After: a number or a date; None where there is none that can be read."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
