"""What the writer says under a lease beside the bytes: the prompt's tokens, and the two parts of Commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kv_transfer.link import LeaseKey
from kv_transfer.metrics import Marks
from llm_engine.api.handoff import Commit, FirstToken, Manifest, Tokens
from llm_engine.api.messages import Message, Submit


class CommitParts:
    """Of one hand-off. Each leaves once, as soon as it is known and there is a lease, in the thread that brings it;
    the tokens leave before any part of Commit. Thread-safe."""

    def __init__(self, submit: Submit, weight_version: str, marks: Marks) -> None:
        self._submit = submit
        self._weight_version = weight_version
        self._marks = marks
        self._lock = threading.Lock()  # held while a message is sent: after `close` none is
        self._lease: LeaseKey | None = None
        self._send: Callable[[Message], None] = lambda _: None
        self.closed = False
        self._completed: tuple[FirstToken, float] | None = None  # with the end of compute
        self._manifest: Manifest | None = None  # once everything has landed
        self._told_tokens = False
        self.told_first = self.told_manifest = False

    @property
    def manifest(self) -> Manifest | None:
        """Of everything written, once it is known."""
        return self._manifest

    def open(self, lease: LeaseKey, send: Callable[[Message], None]) -> None:
        """There is a lease; nothing leaves before the next call, because the first blocks matter more."""
        with self._lock:
            self._lease, self._send = lease, send

    def close(self) -> None:
        """Nothing leaves any more."""
        with self._lock:
            self.closed = True

    def add_first(self, first: FirstToken, compute_end: float) -> None:
        """The prompt is computed; the first call counts. See Handoff.complete."""
        with self._lock:
            if self._completed is None:
                self._completed = first, compute_end
                self._marks.reach("completed")
                self._tell_parts()

    def add_manifest(self, manifest: Manifest) -> None:
        """Everything has landed."""
        with self._lock:
            self._manifest = manifest
            self._tell_parts()

    def tell(self) -> None:
        """What is known, if there is nothing but the tokens."""
        with self._lock:
            self._tell_tokens()
            self._tell_parts()

    # With the lock held.

    def _tell_tokens(self) -> None:
        if self._lease is None or self.closed or self._told_tokens:
            return
        self._told_tokens = True
        lease, submit = self._lease, self._submit
        self._send(
            Tokens(
                request_id=submit.request_id,
                attempt=submit.attempt,
                lease_id=lease.lease_id,
                epoch=lease.epoch,
                tokens=submit.tokens,
            )
        )

    def _tell_parts(self) -> None:
        lease, completed = self._lease, self._completed
        has_first = completed is not None and not self.told_first
        has_manifest = self._manifest is not None and not self.told_manifest
        if lease is None or self.closed or not (has_first or has_manifest):
            return
        self._tell_tokens()
        self._send(
            Commit(
                request_id=self._submit.request_id,
                attempt=self._submit.attempt,
                lease_id=lease.lease_id,
                epoch=lease.epoch,
                weight_version=self._weight_version,
                manifest=self._manifest if has_manifest else None,
                first=completed[0] if completed is not None and has_first else None,
                compute_end_age_s=max(0.0, time.monotonic() - completed[1]) if completed is not None else 0.0,
            )
        )
        if has_first:
            self.told_first = True
            self._marks.reach("told_first")
        if has_manifest:
            self.told_manifest = True
            self._marks.reach("told_manifest")
