"""What a process read last: Ray keeps a process for many tasks, and the next ones often read the same shards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Condition
from typing import Any, ParamSpec, TypeVar

from cachetools import LRUCache, cached

P = ParamSpec("P")
R = TypeVar("R")


def remember(
    max_bytes: int, *, key: Callable[P, Hashable], num_bytes: Callable[[Any], int]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: what a function returned for a key is kept until what was used later needs its place.

    Threads may call at the same time; of those that ask for the same key, one reads and the others wait for it.

    Args:
        max_bytes: of all values together; a value that is larger is kept too, alone.
        key: of a call's arguments; calls with the same key return the same.
        num_bytes: of a value.
    """
    cache: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=lambda value: min(num_bytes(value), max_bytes))
    return cached(cache, key=key, condition=Condition())
