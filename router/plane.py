"""The router's end of the request plane: one ZeroMQ DEALER per worker, read in batches on the event loop.

The raw sockets are watched through their notification descriptor instead of `zmq.asyncio`, which costs a future and a
task step a message. That descriptor is edge-triggered: it fires when the socket's state changes, so a reader must go on
until the socket is empty, and any other call on the socket (a send) may swallow an edge and must look for input.

What is sent in one turn of the loop leaves together at its end: each message handed to an idle ZeroMQ wakes its I/O
thread, which costs more than the message.

What a broken connection still carried is gone, in both directions, so `disconnected` means that every attempt on that
worker has to be recovered. Messages are queued to established connections only, and a broken connection takes its queue
with it. Should a message yet reach the successor of the worker it was meant for, that one refuses it: nobody has said
Hello on the new connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from llm_engine.api.errors import ProtocolError
from llm_engine.api.messages import MAX_FRAME_BYTES, Codec, Message, WorkerMessage

logger = logging.getLogger(__name__)

SEND_QUEUE_MESSAGES = 4096
RECV_QUEUE_MESSAGES = 16384
READ_BATCH = 256  # messages handled before other callbacks of the loop get their turn
RECONNECT_MS = 50
RECONNECT_MAX_MS = 500
CLOSE_LINGER_MS = 200  # at shutdown: time for the last cancels to leave


class LinkHandler(Protocol):
    """What a link tells its owner, always from the event loop."""

    def connected(self) -> None:
        """A connection (the first one or a new one) is up: messages can be sent."""

    def received(self, message: WorkerMessage) -> None:
        """An authentic message arrived."""

    def disconnected(self) -> None:
        """The connection broke: what was in flight either way is lost."""


class Plane:
    """Owns the ZeroMQ context and the codec of one router. Call from the event loop's thread only."""

    def __init__(self, key: bytes, router_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.router_id = router_id
        self.loop = loop
        self.codec: Codec[WorkerMessage] = Codec(key, WorkerMessage)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.num_bad_frames = 0
        self._links: set[Link] = set()

    def connect(self, address: str, handler: LinkHandler) -> Link:
        """Connect to a worker's `request_addr`, and again until closed. Raises ProtocolError when it is no address."""
        link = Link(self, address, handler)
        self._links.add(link)
        return link

    def forget(self, link: Link) -> None:
        """A link was closed."""
        self._links.discard(link)

    def close(self) -> None:
        """Close every link; messages just sent get CLOSE_LINGER_MS to leave."""
        for link in list(self._links):
            link.close(linger_ms=CLOSE_LINGER_MS)
        self.context.term()


class Link:
    """The connection to one worker."""

    def __init__(self, plane: Plane, address: str, handler: LinkHandler) -> None:
        self.address = address
        self._plane = plane
        self._loop = plane.loop
        self._codec = plane.codec
        self._handler = handler
        self._closed = False
        self._connected = False
        self._turn_due = False
        self._outbox: deque[bytes] = deque()  # of this turn; of an earlier one while `_blocked`
        self._blocked = False  # the worker does not read: its queue was full at the end of the last turn
        self._socket = _dealer(plane.context, plane.router_id)
        self._monitor = self._socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
        self._loop.add_reader(self._socket.FD, self._turn)
        self._loop.add_reader(self._monitor.FD, self._drain_monitor)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as exc:
            self.close()
            raise ProtocolError(f"worker address {address!r}: {exc}; expected tcp://host:port") from exc
        self._loop.call_soon(self._drain_monitor)  # its descriptor first fires after the socket was found empty

    def send(self, message: Message) -> bool:
        """Queue a message. False: there is no connection, or the worker does not read and its queue is full."""
        return self.send_frame(self._codec.encode(message))

    def send_frame(self, frame: bytes) -> bool:
        """`send` for a frame that is already encoded."""
        if not self._connected:
            return False
        if not self._turn_due:
            self._schedule_turn()
        if self._blocked or len(self._outbox) >= SEND_QUEUE_MESSAGES:
            return False
        self._outbox.append(frame)
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading and drop the connection. No callback follows."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        self._connected = False
        self._loop.remove_reader(self._socket.FD)
        self._loop.remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)
        self._plane.forget(self)

    def _schedule_turn(self) -> None:
        self._turn_due = True
        self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Send what is due, and handle what has arrived: at most READ_BATCH messages before the loop's other work."""
        self._turn_due = False
        self._flush()
        if self._read(READ_BATCH) and not self._turn_due:
            self._schedule_turn()

    def _flush(self) -> None:
        outbox, send = self._outbox, self._socket.send
        try:
            while outbox:
                send(outbox[0], zmq.NOBLOCK)
                outbox.popleft()
        except zmq.Again:
            pass
        self._blocked = bool(outbox)

    def _read(self, limit: int) -> bool:
        """Handle up to `limit` messages; True if there may be more."""
        recv, decode, received = self._socket.recv, self._codec.decode, self._handler.received
        for _ in range(limit):
            if self._closed:
                return False
            try:
                frame = recv(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                message = decode(frame)
            except ProtocolError as exc:
                self._bad_frame(exc)
                continue
            try:
                received(message)
            except BaseException:
                self._schedule_turn()  # the edge is used up: without this the rest would wait for the next message
                raise
        return True

    def _bad_frame(self, exc: ProtocolError) -> None:
        self._plane.num_bad_frames += 1
        if self._plane.num_bad_frames.bit_count() == 1:  # the 1st, 2nd, 4th, 8th…: a noisy peer can't flood the log
            logger.warning("dropped frame from %s: %s", self.address, exc)

    def _drain_monitor(self) -> None:
        while not self._closed:
            try:
                parts = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(parts)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._handler.connected()
            elif event == zmq.Event.DISCONNECTED:
                self._connected = self._blocked = False
                self._outbox.clear()
                self._read(RECV_QUEUE_MESSAGES)  # nothing that the old connection brought may follow
                if not self._closed:
                    self._handler.disconnected()


def _dealer(context: zmq.Context[zmq.Socket[bytes]], router_id: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, router_id.encode())
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, RECV_QUEUE_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    return socket
