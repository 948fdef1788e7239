"""The plane against real ROUTER sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import zmq

from llm_engine.api.errors import ProtocolError
from llm_engine.api.messages import Cancel, Codec, Hello, Load, Message, RouterMessage, WorkerMessage
from router.plane import READ_BATCH, SEND_QUEUE_MESSAGES, Link, Plane
from tests.unit.router.router_cluster import KEY, until


class Recorder:
    def __init__(self) -> None:
        self.events: list[object] = []

    def connected(self) -> None:
        self.events.append("connected")

    def received(self, message: WorkerMessage) -> None:
        self.events.append(message)

    def disconnected(self) -> None:
        self.events.append("disconnected")


class Server:
    """A worker's socket and nothing else."""

    def __init__(self, port: int = 0) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(self.address.rpartition(":")[2])
        self.codec: Codec[RouterMessage] = Codec(KEY, RouterMessage)

    def send(self, message: Message) -> None:
        self.send_raw(self.codec.encode(message))

    def send_raw(self, frame: bytes) -> None:
        self.socket.send_multipart([b"router-1", frame])

    async def receive(self) -> tuple[bytes, RouterMessage]:
        await until(lambda: self.socket.poll(0))
        route, frame = self.socket.recv_multipart()
        return route, self.codec.decode(frame)

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    plane = Plane(KEY, "router-1", asyncio.get_running_loop())
    yield plane
    plane.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


async def connect(plane: Plane, server: Server) -> tuple[Link, Recorder]:
    recorder = Recorder()
    link = plane.connect(server.address, recorder)
    await until(lambda: recorder.events == ["connected"])
    assert link.send(Hello(version=1, router_id="router-1"))
    assert (await server.receive())[0] == b"router-1"
    recorder.events.clear()
    return link, recorder


async def test_messages_travel_both_ways_under_the_routers_identity(plane: Plane, server: Server) -> None:
    link, recorder = await connect(plane, server)
    assert link.send(Cancel(request_id="r", attempt=1))
    assert await server.receive() == (b"router-1", Cancel(request_id="r", attempt=1))
    server.send(Load(seq=1))
    await until(lambda: recorder.events == [Load(seq=1)])


async def test_a_burst_is_read_to_its_end_in_order(plane: Plane, server: Server) -> None:
    _, recorder = await connect(plane, server)
    count = 10 * READ_BATCH + 7
    for seq in range(count):
        server.send(Load(seq=seq))
    await until(lambda: len(recorder.events) == count)
    assert [event.seq for event in recorder.events if isinstance(event, Load)] == list(range(count))


async def test_input_is_not_forgotten_when_a_send_uses_up_its_notification(plane: Plane, server: Server) -> None:
    """A send handles the socket's internal events, after which its descriptor does not fire for them again."""
    link, recorder = await connect(plane, server)
    for seq in range(20):
        server.send(Load(seq=seq))
        time.sleep(0.01)  # noqa: ASYNC251  the message arrives while the loop is busy
        link.send(Cancel(request_id="r", attempt=seq))
        await until(lambda seq=seq: len(recorder.events) == seq + 1, 2)


async def test_a_worker_may_speak_first(plane: Plane, server: Server) -> None:
    recorder = Recorder()
    plane.connect(server.address, recorder)
    await until(lambda: recorder.events == ["connected"])
    for seq in range(3):
        server.send(Load(seq=seq))
        await until(lambda seq=seq: len(recorder.events) == seq + 2, 2)


async def test_a_handler_that_raises_does_not_stall_the_link(plane: Plane, server: Server) -> None:
    _, recorder = await connect(plane, server)
    reported: list[BaseException | None] = []
    plane.loop.set_exception_handler(lambda loop, context: reported.append(context.get("exception")))
    broken = recorder.received

    def fail_once(message: WorkerMessage) -> None:
        broken(message)
        if message == Load(seq=0):
            raise ZeroDivisionError

    recorder.received = fail_once  # type: ignore[method-assign]
    plane._links.copy().pop()._handler = recorder
    for seq in range(3):
        server.send(Load(seq=seq))
    await until(lambda: len(recorder.events) == 3)
    assert [type(error) for error in reported] == [ZeroDivisionError]


@pytest.mark.parametrize(
    "frame",
    [b"", b"short", b"x" * 64, Codec(b"another key of some length", WorkerMessage).encode(Load(seq=1))],
)
async def test_frames_that_are_not_authentic_are_dropped_and_counted(
    plane: Plane, server: Server, frame: bytes
) -> None:
    _, recorder = await connect(plane, server)
    server.send_raw(frame)
    server.send(Load(seq=2))
    await until(lambda: recorder.events == [Load(seq=2)])
    assert plane.num_bad_frames == 1


async def test_a_message_of_the_other_direction_is_dropped(plane: Plane, server: Server) -> None:
    _, recorder = await connect(plane, server)
    server.send(Hello(version=1, router_id="router-2"))
    server.send(Load(seq=2))
    await until(lambda: recorder.events == [Load(seq=2)])
    assert plane.num_bad_frames == 1


async def test_nothing_is_queued_for_a_worker_that_is_not_there(plane: Plane, server: Server) -> None:
    recorder = Recorder()
    port = server.port
    server.close()
    link = plane.connect(f"tcp://127.0.0.1:{port}", recorder)
    assert not link.send(Cancel(request_id="old", attempt=1))
    revived = Server(port)
    try:
        await until(lambda: recorder.events == ["connected"])
        assert link.send(Cancel(request_id="new", attempt=1))
        assert (await revived.receive())[1] == Cancel(request_id="new", attempt=1)
    finally:
        revived.close()


async def test_a_broken_connection_is_reported_once_and_made_again(plane: Plane) -> None:
    server = Server()
    _, recorder = await connect(plane, server)
    for seq in range(50):
        server.send(Load(seq=seq))
    server.socket.setsockopt(zmq.LINGER, 1000)
    server.socket.close()
    server.context.term()
    revived = Server(server.port)
    try:
        await until(lambda: recorder.events[-1:] == ["connected"])
        assert recorder.events[-2:] == ["disconnected", "connected"]
        arrived = recorder.events[:-2]
        assert arrived == [Load(seq=seq) for seq in range(len(arrived))]
    finally:
        revived.close()


async def test_what_could_not_leave_before_the_connection_broke_never_leaves(plane: Plane) -> None:
    server = Server()
    link, recorder = await connect(plane, server)
    server.close()
    time.sleep(0.1)  # noqa: ASYNC251  the connection breaks while the loop is busy
    assert link.send(Cancel(request_id="old", attempt=1)), "the link does not know yet"
    await until(lambda: recorder.events == ["disconnected"])
    revived = Server(server.port)
    try:
        await until(lambda: recorder.events == ["disconnected", "connected"])
        assert link.send(Cancel(request_id="new", attempt=1))
        assert (await revived.receive())[1] == Cancel(request_id="new", attempt=1)
    finally:
        revived.close()


async def test_the_send_queue_is_bounded(plane: Plane, server: Server) -> None:
    link, _ = await connect(plane, server)
    server.socket.setsockopt(zmq.RCVHWM, 1)
    message = Cancel(request_id="r" * 4096, attempt=1)
    sent = 0
    while link.send(message):
        sent += 1
        assert sent < 20 * SEND_QUEUE_MESSAGES, "the queue never fills"


async def test_no_callback_follows_close(plane: Plane, server: Server) -> None:
    link, recorder = await connect(plane, server)
    server.send(Load(seq=1))
    link.close()
    link.close()
    assert not link.send(Cancel(request_id="r", attempt=1))
    await asyncio.sleep(0.05)
    assert recorder.events == []


async def test_an_address_that_is_none_is_refused(plane: Plane) -> None:
    with pytest.raises(ProtocolError, match="tcp://host:port"):
        plane.connect("nonsense", Recorder())
