"""A proxy before an S3 server that counts the bytes that clients receive, whatever library they use."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class CountingProxy:
    """Forward connections to `target` while the block runs; `num_bytes` is what the server has answered so far."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self.num_bytes = 0
        self.endpoint = ""

    def __enter__(self) -> Self:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _serve(self, client_reads: asyncio.StreamReader, client_writes: asyncio.StreamWriter) -> None:
        server_reads, server_writes = await asyncio.open_connection(*self._target)
        await asyncio.gather(
            self._pump(client_reads, server_writes, is_answer=False),
            self._pump(server_reads, client_writes, is_answer=True),
            return_exceptions=True,
        )

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_answer: bool) -> None:
        try:
            while data := await source.read(1 << 18):
                self.num_bytes += len(data) * is_answer
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()
