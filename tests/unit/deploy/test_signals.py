"""What a signal does to `baton up`: it ends a pause at once, whenever it comes, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from deploy.control import ControlClient, GetStatus
from deploy.signals import Signals

KEY = b"k" * 64


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        yield signals
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_a_pause_lasts_its_time(signals: Signals) -> None:
    started = time.monotonic()
    signals.pause(0.05)
    assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_pause_it_finds(signals: Signals, number: int) -> None:
    timer = threading.Timer(0.05, os.kill, [os.getpid(), number])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        signals.pause(30.0)
    timer.join()


def test_a_signal_outside_of_a_pause_cuts_nothing_and_is_not_forgotten(signals: Signals) -> None:
    for _ in range(100_000):  # more than the pipe holds
        os.kill(os.getpid(), signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signals.pause(30.0)


def test_a_signal_counts_after_another_handler_had_its_place(signals: Signals) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.install()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signals.pause(30.0)


def test_an_interrupted_request_does_not_wait_for_its_socket() -> None:
    """The interrupt comes after ZeroMQ's socket exists and before anybody could close it."""
    client = ControlClient("tcp://127.0.0.1:1", KEY)
    left_open: list[zmq.Socket[bytes]] = []

    def interrupt(kind: int) -> zmq.Socket[bytes]:
        left_open.append(zmq.Socket(client._context, kind))
        raise KeyboardInterrupt

    client._context.socket = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt), client:
        client.ask(GetStatus(), timeout_s=1.0)
    left_open[0].close(linger=0)
    client._context.term()
