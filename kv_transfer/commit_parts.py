"""The writer's two parts of Commit: each leaves once, as soon as it is known and there is a lease."""

from __future__ import annotations

import time

from kv_transfer.link import LeaseKey
from llm_engine.api.handoff import Commit, FirstToken, Manifest


class CommitParts:
    """Of one hand-off. Not thread-safe: its owner holds a lock from `due` until the message has been sent."""

    def __init__(self, request_id: str, attempt: int, weight_version: str) -> None:
        self._request_id = request_id
        self._attempt = attempt
        self._weight_version = weight_version
        self._completed: tuple[FirstToken, float] | None = None  # with the end of compute
        self._manifest: Manifest | None = None  # once everything has landed
        self.told_first = self.told_manifest = False

    @property
    def manifest(self) -> Manifest | None:
        """Of everything written, once it is known."""
        return self._manifest

    def add_first(self, first: FirstToken, compute_end: float) -> None:
        """The prompt is computed; the first call counts."""
        if self._completed is None:
            self._completed = first, compute_end

    def add_manifest(self, manifest: Manifest) -> None:
        """Everything has landed."""
        self._manifest = manifest

    def due(self, lease: LeaseKey) -> Commit | None:
        """What is known and not yet told. None: nothing."""
        completed = self._completed
        has_first = completed is not None and not self.told_first
        has_manifest = self._manifest is not None and not self.told_manifest
        if not has_first and not has_manifest:
            return None
        self.told_first, self.told_manifest = self.told_first or has_first, self.told_manifest or has_manifest
        return Commit(
            request_id=self._request_id,
            attempt=self._attempt,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            weight_version=self._weight_version,
            manifest=self._manifest if has_manifest else None,
            first=completed[0] if completed is not None and has_first else None,
            compute_end_age_s=max(0.0, time.monotonic() - completed[1]) if completed is not None else 0.0,
        )
