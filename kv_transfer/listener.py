"""Accepting and authenticating data connections: one thread each, all of them ended by `close`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from kv_transfer.auth import Handshake, Verdict
from kv_transfer.link import Landed, LeaseKey, Stretch
from llm_engine.api.errors import ProtocolError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
_IDS = itertools.count(1)


def next_connection() -> int:
    """A connection id, unique in the process whatever inlet it belongs to."""
    return next(_IDS)


class Events(Protocol):
    """What an inlet tells its owner, from its own threads."""

    def connected(self, connection: int, transport: str, ticket: str) -> str | None:
        """An authentic writer is here; a text refuses it. Returns once the owner knows the connection."""
        ...

    def closed(self, connection: int, proven: bool) -> None:
        """The connection is over. `proven`: no byte of that writer can land any more; else only the writer can say."""
        ...

    def refused(self, cause: str) -> None:
        """A connection was turned away or cut, or broke a rule: auth | peer | bounds | data | full."""
        ...


class Listener:
    """Base of the inlets that listen on a socket. Subclasses add `serve` and what their handshake needs."""

    transport = ""

    def __init__(self, sock: socket.socket, key: bytes, region: str, events: Events) -> None:
        sock.listen(64)
        self._listening = sock
        self._key = key
        self._region = region
        self._events = events
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: dict[int, tuple[socket.socket, threading.Thread]] = {}
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-{self.transport}-accept", daemon=True)
        self._acceptor.start()

    def check_peer(self, sock: socket.socket) -> None:
        """Checks before the handshake; raises ProtocolError."""

    def welcome(self, sock: socket.socket) -> None:
        """Sent right after the verdict."""

    def serve(self, sock: socket.socket, connection: int) -> bool:
        """Run the connection until it ends. True: the *writer's* end is proven to write no more.

        Raises ProtocolError when the peer breaks the rules.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop listening, cut every connection, join every thread."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            _shutdown(self._listening)
            for sock, _ in self._connections.values():
                _shutdown(sock)
            threads = [thread for _, thread in self._connections.values()]
        self._acceptor.join()
        self._listening.close()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError as exc:
                if self._closing.is_set():
                    return
                log.warning("%s listener: accept failed: %s", self.transport, exc)
                self._closing.wait(0.1)  # out of descriptors, say: do not spin
                continue
            with self._lock:
                if self._closing.is_set() or len(self._connections) >= MAX_CONNECTIONS:
                    sock.close()
                    self._events.refused("full")
                    continue
                connection = next_connection()
                thread = threading.Thread(
                    target=self._run, args=(sock, connection), name=f"kv-{self.transport}-{connection}", daemon=True
                )
                self._connections[connection] = (sock, thread)
                thread.start()

    def _run(self, sock: socket.socket, connection: int) -> None:
        known = proven = False
        try:
            known = self._admit(sock, connection)
            if known:
                self.welcome(sock)
                sock.settimeout(None)
                proven = self.serve(sock, connection)
        except ProtocolError as exc:
            log.warning("%s connection %d cut: %s", self.transport, connection, exc)
            self._events.refused("bounds")
        except OSError as exc:
            log.info("%s connection %d ended: %s", self.transport, connection, exc)
        finally:
            with self._lock:
                del self._connections[connection]
                # After a local shutdown an end of file says nothing about the writer.
                proven = proven and not self._closing.is_set()
            sock.close()
            if known:
                self._events.closed(connection, proven)

    def _admit(self, sock: socket.socket, connection: int) -> bool:
        handshake = Handshake(sock, self._key)
        try:
            self.check_peer(sock)
            greeting = handshake.challenge(transport=self.transport, region=self._region)
        except (ProtocolError, OSError) as exc:
            log.warning("%s connection refused: %s", self.transport, exc)
            self._events.refused("auth")
            with contextlib.suppress(OSError):
                handshake.conclude(Verdict(ok=False, reason="not authentic"))
            return False
        refusal = self._events.connected(connection, self.transport, greeting.ticket)
        if refusal is not None:
            self._events.refused("peer")
            with contextlib.suppress(OSError):
                handshake.conclude(Verdict(ok=False, reason=refusal))
            return False
        with contextlib.suppress(OSError):  # a writer that died here is noticed by `serve`
            handshake.conclude(Verdict(ok=True))
        return True


class UnseenInlet(Listener):
    """Base of the inlets whose writers store into the region unseen: the writer's word is all that is known."""

    @property
    def late_bytes(self) -> int:
        """Not visible here."""
        return 0

    def open_lease(self, lease: LeaseKey, connection: int, blocks: Sequence[int]) -> None:
        """The writer is told by the grant."""

    def watch(self, lease: LeaseKey, on_landed: Callable[[Stretch], None]) -> None:
        """Not visible here."""

    def landed(self, lease: LeaseKey) -> Landed | None:
        """Not visible here."""
        return None

    def end_lease(self, lease: LeaseKey) -> bool:
        """Only the writer knows when it has stopped."""
        return False


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
