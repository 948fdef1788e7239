"""The cluster's key, and how it is replaced while everything runs.

Every process signs with one key and may accept another one beside it. A secret is replaced in three rounds of restarts,
one process after the other; in each round all that run accept what all others sign with:

    1. sign with the old secret, accept the new one    2. sign with the new, accept the old    3. only the new
"""

from __future__ import annotations

from typing import Self


class ClusterKey(bytes):
    """The key to sign with; `others` are accepted too."""

    others: tuple[bytes, ...]

    def __new__(cls, key: bytes, others: tuple[bytes, ...] = ()) -> Self:
        made = super().__new__(cls, key)
        made.others = others
        return made


def accepted(key: bytes) -> tuple[bytes, ...]:
    """Every key that a peer may have signed with, the own one first."""
    return (key, *key.others) if isinstance(key, ClusterKey) else (key,)
