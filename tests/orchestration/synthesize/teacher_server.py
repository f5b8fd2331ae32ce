"""An OpenAI-compatible server that behaves as the prompt asks it to: well, or in one of many bad ways.

The last user turn names the behaviour: `case: NAME`. `python teacher_server.py PORT [DELAY_S]` runs it as a process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

WORDS = (
    ("dog", "horse", "child", "woman", "boat", "train", "bird", "farmer", "cat", "car", "crowd", "tree"),
    ("rests", "moves", "waits", "turns", "stands", "appears", "passes", "shines", "leans", "grows"),
    ("snow", "grass", "water", "sand", "stone", "leaves", "asphalt", "wood", "ice", "gravel"),
    ("morning", "evening", "winter", "summer", "autumn", "spring", "noon", "midnight"),
)
NAMED = "The light and the quiet of this scene let people pause and look for a while, which is how they come to"
OTHER_LANGUAGE = "Ein brauner Hund läuft über den frischen Schnee, während hinter dem Hügel die Sonne untergeht."


def good_text(number: int) -> str:
    """A sentence that is like no other one of another number, most likely."""
    who, what, where, when = (words[number // 13**place % len(words)] for place, words in enumerate(WORDS))
    return f"There is a {who} that {what} slowly over the wet {where} while the light of {when} falls on the hills."


def completion(text: Any, *, model: str = "teacher", finish_reason: str = "stop", usage: Any = None) -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70} if usage is None else usage
    document: dict[str, Any] = {
        "id": "x", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }  # fmt: skip
    return json.dumps(document | ({"usage": usage} if usage != "missing" else {})).encode()


def response(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Teacher:
    """What the server has seen."""

    delay_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by the whole prompt."""
    num_at_once: int = 0
    most_at_once: int = 0
    limit: int | None = None
    """Requests at once beyond which it answers 429."""
    authorizations: set[str] = field(default_factory=set)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                found = re.search(r"authorization: (.*)\r\n", head, re.IGNORECASE)
                self.authorizations.add(found[1] if found else "")
                if head.startswith("GET"):
                    writer.write(response(200, b'{"data": []}'))
                    continue
                self.num_at_once += 1
                self.most_at_once = max(self.most_at_once, self.num_at_once)
                try:
                    is_open = await self.answer(json.loads(body), found[1] if found else "", writer)
                finally:
                    self.num_at_once -= 1
                if not is_open:
                    return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def answer(self, request: dict[str, Any], authorization: str, writer: asyncio.StreamWriter) -> bool:
        """Write what the prompt asks for; False where the connection ends."""
        text = request["messages"][-1]["content"]
        prompt = text if isinstance(text, str) else text[-1]["text"]
        first = request["messages"][-1 if len(request["messages"]) < 3 else -3]["content"]
        self.seen[prompt] += 1
        if self.limit is not None and self.num_at_once > self.limit:
            writer.write(response(429, b'{"error": "slow down"}'))
            return True
        await asyncio.sleep(self.delay_s)
        case = re.search(r"case: (\w+)", first if isinstance(first, str) else prompt)
        name = case[1] if case else "good"
        number = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
        if name == "hangs":
            await asyncio.sleep(60)
            return False
        if name == "resets":
            writer.transport.abort()
            return False
        if name == "ends_early":
            writer.write(response(200, completion("x" * 500))[:-100])
            return False
        if name == "drips":
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(300):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.2)
            return False
        writer.write(self.body(name, number, prompt, authorization, "response_format" in request))
        return True

    def body(self, name: str, number: int, prompt: str, authorization: str, has_schema: bool) -> bytes:
        """Return the response of a behaviour that is a response."""
        good = good_text(number)
        caption = json.dumps({"caption": good})
        if name == "recovers":  # the second request succeeds
            return response(500, b"oops") if self.seen[prompt] == 1 else response(200, completion(good))
        if name == "waits":
            is_first = self.seen[prompt] == 1
            return response(429, b"{}", "Retry-After: 1") if is_first else response(200, completion(good))
        if name == "repairs":
            return response(200, completion("no JSON") if "Answer again" not in prompt else completion(caption))
        if name == "no_schema" and has_schema:
            return response(400, b'{"error": "response_format is unknown"}')
        bodies = {
            "named": lambda: response(200, completion(f"{good} {NAMED} {prompt}.")),
            "good": lambda: response(200, completion(good)),
            "error500": lambda: response(500, b"<html>" + authorization.encode()),
            "error503": lambda: response(503, b""),
            "rate": lambda: response(429, b"{}"),
            "rate_after": lambda: response(429, b"{}", "Retry-After: 1"),
            "rate_forever": lambda: response(429, b"{}", "Retry-After: 100000000"),
            "rate_date": lambda: response(429, b"{}", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"),
            "rate_nonsense": lambda: response(429, b"{}", "Retry-After: soon"),
            "bad_request": lambda: response(400, b'{"error": "no"}'),
            "redirects": lambda: response(302, b"", "Location: http://127.0.0.1:9/v1"),
            "truncated": lambda: response(200, completion(good)[:40]),
            "not_an_object": lambda: response(200, b"[1, 2]"),
            "no_choices": lambda: response(200, b'{"choices": []}'),
            "null_text": lambda: response(200, completion(None)),
            "number_text": lambda: response(200, completion(7)),
            "deep": lambda: response(200, b"[" * 100_000),
            "large": lambda: response(200, completion("word " * 2_000_000)),
            "long": lambda: response(200, completion("word " * 10_000)),
            "compressed": lambda: response(200, b"\x1f\x8b", "Content-Encoding: gzip"),
            "echoes_prompt": lambda: response(200, completion(prompt)),
            "echoes_key": lambda: response(200, completion(f"{good} {authorization}")),
            "control": lambda: response(200, completion(f"{good}\x1b[2J\x00")),
            "surrogate": lambda: response(200, completion(good).replace(b"slowly", b"\\ud800")),
            "other_model": lambda: response(200, completion(good, model="cheap-model")),
            "no_usage": lambda: response(200, completion(good, usage="missing")),
            "silly_usage": lambda: response(200, completion(good, usage={"prompt_tokens": -5})),
            "refuses": lambda: response(200, completion("I'm sorry, but I can't help with that request, as you know.")),
            "unfinished": lambda: response(200, completion(good, finish_reason="length")),
            "language": lambda: response(200, completion(OTHER_LANGUAGE)),
            "blank": lambda: response(200, completion(" \n")),
            "short": lambda: response(200, completion("A dog.")),
            "json": lambda: response(200, completion(caption)),
            "no_schema": lambda: response(200, completion(f'```json\n{caption}\n```')),
            "wrong_json": lambda: response(200, completion('{"text": "x"}')),
        }  # fmt: skip
        return bodies[name]()


@contextmanager
def running_teacher(**options: Any) -> Iterator[Teacher]:
    """The server in a thread of this process, on a free port."""
    teacher = Teacher(**options)
    started, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(teacher.handle, "127.0.0.1", 0)
        teacher.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        started.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(serve())
        teacher_tasks.append(task)
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    teacher_tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield teacher
    finally:
        loop.call_soon_threadsafe(teacher_tasks[0].cancel)
        thread.join(10)


async def _serve_alone(port: int, delay_s: float) -> None:
    teacher = Teacher(delay_s=delay_s)
    server = await asyncio.start_server(teacher.handle, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve_alone(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
