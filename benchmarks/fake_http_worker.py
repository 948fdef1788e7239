"""OpenAI-speaking workers that compute nothing: what HTTP routers of other projects are measured on.

Answers any POST at once; a streaming request gets `--chunks` server-sent events `--gap-ms` apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import cast

import uvloop

_BODY = json.dumps(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "meta_info": {"id": "0", "prompt_tokens": 1, "completion_tokens": 1},
    }
).encode()
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_BODY) + _BODY
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = b"data: " + _BODY + b"\n\n"
_CHUNK = b"%x\r\n" % len(_EVENT) + _EVENT + b"\r\n"
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class FakeWorker(asyncio.Protocol):
    """One connection: requests are answered in order as they become complete."""

    def __init__(self, chunks: int, gap_s: float) -> None:
        self._chunks, self._gap_s = chunks, gap_s
        self._buffer = b""
        self._streams: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what still streams."""
        for task in self._streams:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        """Split the input into requests."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _content_length(self._buffer[:end])
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            if b'"stream":true' in body.replace(b" ", b""):
                task = asyncio.get_running_loop().create_task(self._stream())
                self._streams.add(task)
                task.add_done_callback(self._streams.discard)
            else:
                self._transport.write(_ANSWER)

    async def _stream(self) -> None:
        self._transport.write(_STREAM_HEAD)
        for _ in range(self._chunks):
            self._transport.write(_CHUNK)
            await asyncio.sleep(self._gap_s)
        self._transport.write(_END)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve(count: int, chunks: int, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: FakeWorker(chunks, gap_s), "127.0.0.1", 0) for _ in range(count)]
    print("READY " + json.dumps({"ports": [server.sockets[0].getsockname()[1] for server in servers]}), flush=True)
    await asyncio.gather(*[server.serve_forever() for server in servers])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_http_worker", description=__doc__)
    parser.add_argument("--count", type=int, default=1, help="workers, each at a port of its own")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    args = parser.parse_args(argv)
    uvloop.run(_serve(args.count, args.chunks, args.gap_ms / 1e3))


if __name__ == "__main__":
    main()
