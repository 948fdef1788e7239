"""The admin API in front of a real control channel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from deploy.control import ControlServer
from llm_engine.api.config import Resolved, build
from llm_engine.api.control import (
    ClusterStatus,
    ControlRefused,
    ControlRequest,
    ControlTimeout,
    GetStatus,
    PoolStatus,
    Reply,
    RouterStatus,
    ScalePool,
)
from router import control
from router.admin import build_admin
from router.control import ControllerPort

KEY = b"k" * 32


class Controller:
    """Answers on a control channel; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[ControlRequest] = []
        self.error = ""
        self._context = zmq.asyncio.Context()
        self._server = ControlServer(self._context, KEY, self._handle)
        self.address = self._server.bind("tcp://127.0.0.1:*")
        self._task = asyncio.create_task(self._server.run())

    async def _handle(self, request: ControlRequest) -> Reply:
        self.asked.append(request)
        pools = {"decode": PoolStatus(desired=2, ready=1, high=8)}
        status = ClusterStatus(ready=False, model="m", router=RouterStatus(), pools=pools, workers=[])
        return Reply(status=status, error=self.error)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._server.close()
        self._context.term()


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    controller = Controller()
    yield controller
    await controller.close()


@pytest.fixture
async def port(controller: Controller) -> AsyncIterator[ControllerPort]:
    port = ControllerPort(controller.address, KEY)
    yield port
    port.close()


async def call(port: ControllerPort, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    resolved = Resolved(build({"model": {"path": str(Path("/m"))}}), {})
    app = build_admin(None, resolved, tuple, port)  # type: ignore[arg-type]  # these routes ask no dispatcher
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "client": ("127.0.0.1", 5)}
    await app({**scope, "headers": []}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_an_order_says_who_gave_it_and_why(controller: Controller, port: ControllerPort) -> None:
    status, pools = await call(port, "PUT", "/admin/pools/decode", b'{"replicas": 2, "reason": "peak"}')
    assert (status, pools) == (200, {"decode": {"desired": 2, "ready": 1, "high": 8}})
    assert controller.asked == [ScalePool(pool="decode", replicas=2, by="admin", reason="peak")]
    assert (await call(port, "GET", "/admin/pools"))[1]["pools"] == pools
    assert controller.asked[1:] == [GetStatus()]


async def test_a_refusal_is_passed_on(controller: Controller, port: ControllerPort) -> None:
    controller.error = "replicas=9: expected 0 to 8"
    status, answer = await call(port, "PUT", "/admin/pools/decode", b'{"replicas": 9}')
    assert (status, answer["error"]["message"]) == (409, "replicas=9: expected 0 to 8")


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"replicas": "2"}', b'{"replicas": 1.5}', b'{"replicas": 1, "x": 0}', b"[]"]
)
async def test_a_body_that_is_no_order_asks_nobody(controller: Controller, port: ControllerPort, body: bytes) -> None:
    status, answer = await call(port, "PUT", "/admin/pools/decode", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert controller.asked == []


async def test_a_controller_that_is_away_or_has_another_key_costs_a_bounded_wait(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TIMEOUT_S", 0.2)
    for address, key in (("tcp://127.0.0.1:1", KEY), (controller.address, b"o" * 32)):
        port = ControllerPort(address, key)
        with pytest.raises(ControlTimeout, match="did not answer"):
            await port.ask(GetStatus())
        assert (await call(port, "GET", "/admin/pools"))[0] == 503
        port.close()
    assert controller.asked == []


async def test_without_an_address_every_question_is_refused() -> None:
    with pytest.raises(ControlRefused, match=r"router\.controller is not set"):
        await ControllerPort("", KEY).ask(GetStatus())
