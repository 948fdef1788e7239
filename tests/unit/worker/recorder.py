"""The far end of a request plane in tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm_engine.api.messages import Cancel, Drain, Load, Submit


@dataclass
class Recorder:
    """A worker that only writes down what it is told."""

    got: list[Any] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    loads: int = 0
    when_lost: Callable[[str], None] = lambda router_id: None

    def on_submit(self, submit: Submit) -> None:
        self.got.append(submit)

    def on_cancel(self, cancel: Cancel) -> None:
        self.got.append(cancel)

    def on_drain(self, drain: Drain) -> None:
        self.got.append(drain)

    def on_snapshot_request(self, router_id: str) -> None:
        self.got.append(router_id)

    def on_router_lost(self, router_id: str) -> None:
        self.lost.append(router_id)
        self.when_lost(router_id)

    def load(self) -> Load:
        self.loads += 1
        return Load(seq=self.loads)
