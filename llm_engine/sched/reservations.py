"""Blocks of the decode side that no sequence owns: reserved for a hand-off, or quarantined after one that failed."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Reservation, Sequence


class Reservations:
    """Every reservation from `take` to its one end: `adopt`, `release`, or `release` into quarantine and `free`."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._open: set[Reservation] = set()

    def __len__(self) -> int:
        """Reserved or quarantined."""
        return len(self._open)

    @property
    def num_reserved(self) -> int:
        """Those that may still become sequences."""
        return sum(reservation.state == "reserved" for reservation in self._open)

    def take(
        self, request_id: str, attempt: int, num_tokens: int, digests: Seq[bytes], *, deadline: float, headroom: int
    ) -> Reservation | None:
        """Pin the known prefix of `num_tokens` tokens and lease blocks for the rest. None: no room now.

        `digests`: of the full blocks of these tokens, or none.
        """
        found = self._cache.reserve(num_tokens, digests, headroom)
        if found is None:
            return None
        hits, blocks = found
        reservation = Reservation(
            request_id=request_id,
            attempt=attempt,
            num_tokens=num_tokens,
            deadline=deadline,
            have_tokens=len(hits) * self._cache.block_tokens,
            hits=hits,
            blocks=blocks,
            digests=list(digests),
        )
        self._open.add(reservation)
        return reservation

    def adopt(self, seq: Sequence, reservation: Reservation) -> None:
        """The hand-off is verified: the blocks are the sequence's."""
        self.expect(reservation, "reserved")
        reservation.state = "admitted"
        self._open.remove(reservation)
        self._cache.adopt(seq, reservation)

    def release(self, reservation: Reservation, *, quarantine: bool) -> None:
        """Give a reservation up. `quarantine`: its writer may still write, the leased blocks wait for `free`."""
        self.expect(reservation, "reserved")
        self._cache.pool.release(reservation.hits)
        reservation.hits = []
        if quarantine:
            reservation.state = "quarantined"
            self._cache.pool.quarantine(reservation.blocks)
        else:
            reservation.state = "released"
            self._cache.pool.release_leased(reservation.blocks)
            self._open.remove(reservation)

    def free(self, reservation: Reservation) -> None:
        """The writer is proven stopped."""
        self.expect(reservation, "quarantined")
        reservation.state = "released"
        self._cache.pool.free_quarantined(reservation.blocks)
        self._open.remove(reservation)

    def expect(self, reservation: Reservation, state: str) -> None:
        """Raises ValueError when the reservation is in another state."""
        if reservation.state != state:
            raise ValueError(f"{reservation.request_id}: the reservation is {reservation.state}, not {state}")
