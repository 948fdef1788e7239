"""What a link costs, measured while it works: a fixed time per call, and a time per byte. Batches follow from it.

A call that moves x bytes takes about `call_s + x / bytes_per_s`. The sender measures every call and fits the line with
older calls weighing less. How much goes into one call, and into one turn of a hand-off, is a pure function of that
curve: a link of 5 MB/s gets small turns, so that others are served and a revoked write ends soon; a link of 400 GB/s
gets large ones, so that its fixed costs don't show.
"""

from __future__ import annotations

from typing import NamedTuple

_SHARE = 0.02  # of a call's time that its fixed part may take
_TURN_S = 0.005  # what the next hand-off in line waits for at most, about
_LEAST_CALL, _MOST_CALL = 4 << 20, 64 << 20  # small ones cost the sender more than the link
_LEAST_TURN, _MOST_TURN = 1 << 20, 2 << 30
_DECAY = 0.97  # a call counts half as much after 23 others


class CostCurve(NamedTuple):
    """Seconds of a call of x bytes: call_s + x / bytes_per_s."""

    call_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """Expected duration of one call."""
        return self.call_s + num_bytes / self.bytes_per_s


class Batching(NamedTuple):
    """Bytes given to the link at once, and bytes of one hand-off before the next one's turn."""

    call_bytes: int
    turn_bytes: int


def choose_batching(curve: CostCurve) -> Batching:
    """Calls whose fixed cost is at most a fiftieth of their time, and turns of about 5 ms, of one call at least."""
    call = curve.call_s * curve.bytes_per_s * (1 - _SHARE) / _SHARE
    turn = (_TURN_S - curve.call_s) * curve.bytes_per_s
    turn_bytes = int(min(max(turn, call, _LEAST_TURN), _MOST_TURN))
    return Batching(min(int(min(max(call, _LEAST_CALL), _MOST_CALL)), turn_bytes), turn_bytes)


START = CostCurve(100e-6, 2e9)  # of a link through host memory, until it is measured


class CostMeter:
    """Fits the curve of one link. One thread at a time; `curve` may be read from any."""

    def __init__(self, start: CostCurve = START) -> None:
        """`start`: what is assumed until calls were measured; it counts like two of them."""
        self.curve = start
        self.batching = choose_batching(start)
        self.num_calls = 0
        self._sums = [0.0] * 5  # weights, x, y, x², xy
        for num_bytes in (64 << 10, 8 << 20):
            self._add(num_bytes, start.seconds(num_bytes))

    def measured(self, num_bytes: int, seconds: float) -> None:
        """A call has moved so many bytes in so long."""
        self.num_calls += 1
        self._add(num_bytes, max(seconds, 1e-7))
        self.curve = self._fit()
        self.batching = choose_batching(self.curve)

    def _add(self, x: float, y: float) -> None:
        terms = (1.0, x, y, x * x, x * y)
        self._sums = [_DECAY * old + new for old, new in zip(self._sums, terms, strict=True)]

    def _fit(self) -> CostCurve:
        """Least squares; where the calls were too much alike to tell the two parts apart, the fixed part is kept."""
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        if spread > 1e-3 * weight * xx:
            slope = (weight * xy - x * y) / spread
            fixed = (y - slope * x) / weight
        else:
            fixed = min(self.curve.call_s, y / weight)
            slope = (y - fixed * weight) / x
        if slope <= 0 or fixed < 0:  # noise: all of it is due to the bytes
            fixed, slope = 0.0, y / x
        return CostCurve(fixed, 1 / max(slope, 1e-13))
