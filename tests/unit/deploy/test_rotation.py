"""While a secret is being replaced, whatever runs at the same time understands each other, and nobody else."""

from __future__ import annotations

import itertools
import socket
import threading

import pytest

from kv_transfer.auth import Handshake, Verdict
from llm_engine.api.config import SECRET_ALSO_ENV, SECRET_ENV, cluster_key
from llm_engine.api.errors import ConfigError, ProtocolError
from llm_engine.api.keys import ClusterKey
from llm_engine.api.messages import Codec, Hello, RouterMessage

OLD, NEW, STRANGER = "old-secret-0123456789", "new-secret-0123456789", "strangers-secret-0123"
ROUNDS = [(OLD, ""), (OLD, NEW), (NEW, OLD), (NEW, "")]  # what a process signs with, what it accepts beside it
TOGETHER = [pair for a, b in itertools.pairwise(ROUNDS) for pair in itertools.product((a, b), repeat=2)]


def key(round_: tuple[str, str]) -> ClusterKey:
    return cluster_key({SECRET_ENV: round_[0], SECRET_ALSO_ENV: round_[1]})


def shake_hands(writer: bytes, receiver: bytes) -> None:
    """A handshake over a socket; raises what the receiver raised, or else the writer."""
    near, far = socket.socketpair()
    errors: list[Exception] = []

    def receive() -> None:
        try:
            handshake = Handshake(far, receiver, 2.0)
            handshake.challenge(transport="tcp", region="r")
            handshake.conclude(Verdict(ok=True))
        except Exception as exc:
            errors.append(exc)
            far.close()

    with near, far:
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            Handshake(near, writer, 2.0).introduce(transport="tcp", ticket="t", region="r")
        except ConnectionError as exc:
            errors.append(exc)  # the receiver has hung up, and says why
        finally:
            near.close()
            thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(("one", "other"), TOGETHER)
def test_neighbouring_rounds_understand_each_other(one: tuple[str, str], other: tuple[str, str]) -> None:
    hello = Hello(version=1, router_id="r")
    sender: Codec[RouterMessage] = Codec(key(one), RouterMessage)
    receiver: Codec[RouterMessage] = Codec(key(other), RouterMessage)
    assert receiver.decode(sender.encode(hello)) == hello
    shake_hands(key(one), key(other))


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_key_that_is_not_accepted_opens_nothing(round_: tuple[str, str]) -> None:
    for outsider in (key((STRANGER, "")), key((STRANGER, OLD))):
        frame = Codec(outsider, RouterMessage).encode(Hello(version=1, router_id="r"))
        with pytest.raises(ProtocolError, match="not authentic"):
            Codec(key(round_), RouterMessage).decode(frame)
        with pytest.raises(ProtocolError, match="not authentic"):
            shake_hands(outsider, key(round_))


def test_after_the_last_round_the_old_key_is_worthless() -> None:
    frame = Codec(key((OLD, "")), RouterMessage).encode(Hello(version=1, router_id="r"))
    with pytest.raises(ProtocolError):
        Codec(key((NEW, "")), RouterMessage).decode(frame)


def test_a_short_second_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match=SECRET_ALSO_ENV):
        key((OLD, "short"))
