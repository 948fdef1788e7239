"""The real HTTP edge over real sockets, on a dispatcher that says what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llm_engine.api.config import RouterConfig
from llm_engine.api.request import FinishReason, TokenLogprobs
from router import answers
from router import tokenizer as router_tokenizer
from router.app import App
from router.chat import dsml
from router.chat.format import DeepseekV32Format
from router.chat.template import PromptTexts
from router.dispatch_api import GenerationRequest, OutputChunk
from router.edge import Edge
from router.server import HttpServer, listen

PAD = "<｜▁pad▁｜>"
SPECIALS = (dsml.BOS, dsml.EOS, PAD, dsml.DSML)
MARKERS = (dsml.THINK_START, dsml.THINK_END, dsml.USER, dsml.ASSISTANT)
EOS_ID = 1
VOCAB_SIZE = 320
MODEL = "nano"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def byte_tokenizer_json() -> str:
    """Byte-level BPE without merges: 0-2 begin, end, padding; 3-258 the bytes; then the chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS[:3], *alphabet))}
    tree = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tree.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tree.decoder = decoders.ByteLevel()
    tree.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tree.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return tree.to_str()


def byte_tokenizer() -> router_tokenizer.Tokenizer:
    return router_tokenizer.Tokenizer(byte_tokenizer_json(), VOCAB_SIZE, bos_id=0)


def ids_of(tokenizer: router_tokenizer.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([router_tokenizer.Segment(text, trusted=True)])


@dataclass
class Script:
    """What the dispatcher answers to one request: chunks of tokens, then how it ends."""

    chunks: Sequence[Sequence[int]]
    finish: FinishReason = FinishReason.STOP
    error: Exception | None = None  # raised after the chunks
    pace_s: float = 0.0  # between chunks
    hang: bool = False  # after the chunks, until closed


@dataclass
class ScriptedDispatcher:
    """Answers with `script(request)`; remembers the requests, and which generators were closed before their end."""

    script: Callable[[GenerationRequest], Script]
    model_names: tuple[str, ...] = (MODEL,)
    max_model_len: int = 4096
    is_ready: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    closed_early: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def ready(self) -> bool:
        return self.is_ready

    def status(self) -> dict[str, Any]:
        return {"workers": []}

    def submit(self, request: GenerationRequest) -> ScriptedStream:
        self.requests.append(request)
        return ScriptedStream(self, request, self.script(request))


class ScriptedStream(AsyncGenerator[OutputChunk, None]):
    """Only an explicit `aclose` counts as closing: neither cancellation nor garbage collection does it."""

    def __init__(self, dispatcher: ScriptedDispatcher, request: GenerationRequest, script: Script) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._script = script
        self._position = 0
        self._ended = False

    async def __anext__(self) -> OutputChunk:
        script, i = self._script, self._position
        await asyncio.sleep(script.pace_s)
        if i == len(script.chunks):
            if script.hang:
                await asyncio.Event().wait()
            self._ended = True
            raise script.error or StopAsyncIteration
        self._position += 1
        tokens = list(script.chunks[i])
        self._ended = i == len(script.chunks) - 1 and script.error is None and not script.hang
        return OutputChunk(
            tokens=tokens,
            logprobs=_logprobs(self._request, tokens),
            finish=script.finish if self._ended else None,
            cached_tokens=2 if i == 0 else None,
        )

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._dispatcher.closed_early.append(self._request.request_id)
            self._dispatcher.closed.set()

    async def asend(self, value: None) -> OutputChunk:
        return await self.__anext__()

    async def athrow(self, *args: Any) -> OutputChunk:  # type: ignore[override]
        raise NotImplementedError


def _logprobs(request: GenerationRequest, tokens: Sequence[int]) -> list[TokenLogprobs] | None:
    """Made up, but different for every token: -(id)/1000, with the two neighbours as alternatives."""
    count = request.sampling.logprobs
    if count is None:
        return None
    return [
        TokenLogprobs(-t / 1000, [t, *range(t + 1, t + count)][:count], [-(t + i) / 1000 for i in range(count)])
        for t in tokens
    ]


class RecordingMetrics:
    """Keeps what the edge reported."""

    def __init__(self) -> None:
        self.responses: list[tuple[str, int]] = []

    def http_response(self, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.responses.append((route, status))

    def render(self) -> bytes:
        return b"# HELP up a test\n# TYPE up gauge\nup 1\n"


@dataclass
class RunningEdge:
    """The server, on its own thread and event loop."""

    url: str
    port: int
    dispatcher: ScriptedDispatcher
    metrics: RecordingMetrics
    tokenizer: router_tokenizer.Tokenizer
    http: httpx.Client
    server: HttpServer


def make_edge(dispatcher: ScriptedDispatcher, **options: Any) -> Edge:
    chat = DeepseekV32Format(PromptTexts())
    return Edge(RouterConfig(**options), dispatcher, RecordingMetrics(), byte_tokenizer(), chat)


@contextlib.contextmanager
def running_edge(dispatcher: ScriptedDispatcher, **options: Any) -> Iterator[RunningEdge]:
    edge = make_edge(dispatcher, **options)
    metrics, tokenizer = edge.metrics, edge.tokenizer
    assert isinstance(metrics, RecordingMetrics)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    server = HttpServer(App(edge), stall_s=edge.config.client_stall_s)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sock)

    thread = threading.Thread(target=lambda: uvloop.run(serve()), name="edge")
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30, verify=False) as client:
            yield RunningEdge(url, port, dispatcher, metrics, tokenizer, client, server)
    finally:
        loops[0].call_soon_threadsafe(server.stop, 1.0)
        thread.join(timeout=20)
        sock.close()
        tokenizer.close()
        assert not thread.is_alive()


def connect(edge: RunningEdge) -> socket.socket:
    """A client of its own making."""
    return socket.create_connection(("127.0.0.1", edge.port), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    """Until the edge closes the connection."""
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """For what another thread brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def sse_events(body: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must be as documented and end with [DONE]."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    assert all(line.startswith("data: ") for line in lines[:-1])
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    for event in events:
        kind = answers.ErrorBody if "error" in event else _CHUNKS[event["object"]]
        assert msgspec.to_builtins(msgspec.convert(event, kind)) == event, "a member is not documented"
    return events


_CHUNKS = {"text_completion": answers.CompletionChunk, "chat.completion.chunk": answers.ChatChunk}
