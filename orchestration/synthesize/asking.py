"""Work items to teachers and their answers into the ledger, within the budget.

An item is admitted (its key is stored as in flight), sent, answered and stored. One coroutine stores answers and admits
items; it runs when requests wait for admission, when many answers wait for storage, or after FLUSH_S. So at any moment
the requests that a killed driver may have paid for in vain are few, and S3 knows which.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestration.synthesize.answer_ledger import Answer, AnswerLedger
from orchestration.synthesize.requesting import Endpoint, estimate_tokens
from orchestration.synthesize.synthesis_recipe import BudgetConfig, TeacherConfig
from orchestration.synthesize.work_items import WorkItem

logger = logging.getLogger(__name__)

FLUSH_S = 0.5
MAX_UNSTORED = 256
LEAST_AHEAD, MOST_AHEAD = 2, 128
"""Items that are admitted beyond those that an endpoint takes at once: what it answers while S3 stores the next."""

ReadImage = Callable[[str], bytes]
OnProgress = Callable[[int], None]
"""Called with the number of answers stored so far."""


@dataclass
class Budget:
    """Budget that is left. The worst case of every item is set aside before the item is sent."""

    config: BudgetConfig
    ledger: AnswerLedger
    reserved: dict[str, tuple[int, float]] = field(default_factory=dict)
    num_sent: int = 0
    """Requests of items whose answer is not stored yet."""

    def exhausted(self, tokens: int = 0, money: float = 0.0, requests: int = 1) -> str | None:
        """Return the first limit that so much more could pass, or None."""
        spent, limits = self.ledger.spent, self.config
        under_way = max(self.num_sent, len(self.reserved))
        if limits.requests is not None and spent.requests + under_way + requests > limits.requests:
            return "requests"
        tokens += spent.tokens + sum(item[0] for item in self.reserved.values())
        if limits.tokens is not None and tokens > limits.tokens:
            return "tokens"
        if limits.money is not None and spent.money + sum(i[1] for i in self.reserved.values()) + money > limits.money:
            return "money"
        return None

    def may_send(self) -> bool:
        """Count one more request, and return whether the budget of requests allows it."""
        if self.config.requests is not None and self.ledger.spent.requests + self.num_sent >= self.config.requests:
            return False
        self.num_sent += 1
        return True


def worst_case(item: WorkItem, teacher: TeacherConfig) -> tuple[int, float]:
    """Return the most tokens and money of an item: its prompt and a full answer, twice where a repair may follow."""
    completion = teacher.max_tokens
    prompt = estimate_tokens(item.system) + estimate_tokens(item.user) + (1500 if teacher.sees_image else 0)
    if teacher.answers != "text":
        prompt, completion = 2 * prompt + completion + 64, 2 * completion
    return prompt + completion, teacher.cost(prompt, completion)


@dataclass
class Flow:
    """The state of one `ask_all`."""

    feeds: Mapping[str, Iterator[WorkItem]]
    endpoints: Mapping[str, Endpoint]
    ledger: AnswerLedger
    budget: Budget
    read_image: ReadImage
    on_progress: OnProgress
    stopped_by: str | None = None
    finished: list[Answer] = field(default_factory=list)
    unsent: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    num_open: dict[str, int] = field(default_factory=dict)
    """By teacher: items that are admitted and not finished."""
    fed: set[str] = field(default_factory=set)
    """Teachers whose feed has ended."""
    waiting: dict[str, WorkItem] = field(default_factory=dict)
    """By teacher: an item that the budget had no room for yet."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None
    num_ahead: int = LEAST_AHEAD
    last_stored_at: float = field(default_factory=time.monotonic)

    async def run(self) -> str | None:
        """Ask until the feeds end or the budget does; return what stopped it."""
        self.num_open = dict.fromkeys(self.endpoints, 0)
        try:
            while True:
                fresh = self._admit()
                await self._store(fresh)
                for item in fresh:
                    self.tasks[item.key] = asyncio.create_task(self._ask(item))
                if self.failure is not None:
                    raise self.failure
                if not (self.tasks or self.finished) and (self.stopped_by or not self.waiting):
                    return self.stopped_by
                await self._rest()
        finally:
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
            if self.finished:
                await self._store([])  # also where the run was stopped: what has been paid for is kept
            for endpoint in self.endpoints.values():
                await endpoint.close()

    async def _rest(self) -> None:
        """Wait until there is something to admit, or enough to store, or FLUSH_S after the first answer."""
        deadline = None
        while self.tasks and self.failure is None and not self._is_hungry() and len(self.finished) < MAX_UNSTORED:
            if self.finished and deadline is None:
                deadline = asyncio.get_running_loop().time() + FLUSH_S
            self.wake.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.wake.wait()
            except TimeoutError:
                return

    def _is_hungry(self) -> bool:
        """Return True where an endpoint could take an item that is not admitted yet."""
        return any(
            not (name in self.fed or name in self.waiting or self.stopped_by)
            and self.num_open[name] < int(endpoint.limiter.limit)
            for name, endpoint in self.endpoints.items()
        )

    def _admit(self) -> list[WorkItem]:
        fresh: list[WorkItem] = []
        for name, endpoint in self.endpoints.items():
            limit = int(endpoint.limiter.limit)
            while self.stopped_by is None and name not in self.fed:
                if self.num_open[name] >= limit + self.num_ahead:
                    break
                item = self.waiting.pop(name, None) or next(self.feeds[name], None)
                if item is None:
                    self.fed.add(name)
                    break
                cost = worst_case(item, endpoint.teacher)
                limit_reached = self.budget.exhausted(*cost)
                if limit_reached is not None:
                    self.waiting[name] = item
                    # Items under way may cost less than their worst case, and then there is room again.
                    if not self.budget.reserved:
                        self.stopped_by = limit_reached
                    break
                self.budget.reserved[item.key] = cost
                self.num_open[name] += 1
                fresh.append(item)
        return fresh

    async def _store(self, fresh: list[WorkItem]) -> None:
        finished, unsent = list(self.finished), list(self.unsent)
        if not (finished or fresh or unsent):
            return
        for key in [*(answer.key for answer in finished), *unsent]:
            self.budget.reserved.pop(key, None)
        began_at = time.monotonic()
        storing = asyncio.create_task(asyncio.to_thread(self.ledger.commit, finished, dict(self.budget.reserved)))
        try:
            await asyncio.shield(storing)
        finally:
            # Answers that have been paid for are stored before a stopped run ends; where S3 failed, they are kept.
            await asyncio.wait([storing])
            if storing.exception() is None:
                del self.finished[: len(finished)], self.unsent[: len(unsent)]
        now = time.monotonic()
        rate = len(finished) / max(1e-3, now - self.last_stored_at)
        self.num_ahead = min(MOST_AHEAD, max(LEAST_AHEAD, math.ceil(1.5 * rate * (now - began_at))))
        self.last_stored_at = now
        self.budget.num_sent -= sum(answer.num_requests for answer in finished)
        self.on_progress(len(self.ledger.done))

    async def _ask(self, item: WorkItem) -> None:
        endpoint = self.endpoints[item.teacher]
        try:
            image = None
            if endpoint.teacher.sees_image:
                image = await asyncio.to_thread(self.read_image, item.image)
            answer = await endpoint.ask(item, image, self.budget.may_send)
            if answer is None:
                self.unsent.append(item.key)
                self.stopped_by = "requests"
            else:
                self.finished.append(answer)
        except Exception as error:  # noqa: BLE001  # the one that asks for all raises it
            self.failure = self.failure or error
        finally:
            self.tasks.pop(item.key, None)
            self.num_open[item.teacher] -= 1
            self.wake.set()


async def ask_all(
    feeds: Mapping[str, Iterator[WorkItem]],
    endpoints: Mapping[str, Endpoint],
    ledger: AnswerLedger,
    budget: BudgetConfig,
    read_image: ReadImage,
    on_progress: OnProgress,
) -> str | None:
    """Ask every endpoint for its items; return the limit of the budget that stopped it, or None.

    Args:
        feeds: items without an answer, by teacher.
        endpoints: by teacher; closed at the end.
        ledger: takes the answers.
        budget: over all starts of the name.
        read_image: returns the bytes of a photograph by its sha256.
        on_progress: see OnProgress.

    Raises:
        TinyEmoError: an endpoint stays away or refuses, S3 fails, or the lease was lost; answers so far are stored.
    """
    flow = Flow(feeds, endpoints, ledger, Budget(budget, ledger), read_image, on_progress)
    began_at, before = time.monotonic(), len(ledger.done)
    stopped_by = await flow.run()
    seconds = time.monotonic() - began_at
    num_new = len(ledger.done) - before
    if num_new:
        logger.info("%d answers in %.1f s, %.1f a second", num_new, seconds, num_new / seconds)
    return stopped_by
