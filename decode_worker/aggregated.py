"""The aggregated worker: one engine prefills and decodes; nothing is handed over."""

from __future__ import annotations

from typing import Self

from kv_transfer.memory import Arena
from llm_engine.api.config import ClusterConfig, cluster_key
from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import TOKEN_BYTES
from llm_engine.sched import Refusal, Sequence
from llm_engine.serving.assembly import assemble, plan
from llm_engine.serving.ledger import Live
from llm_engine.serving.worker import Worker


class AggregatedWorker(Worker[None]):
    """One replica of the aggregated pool."""

    @classmethod
    def build(cls, config: ClusterConfig, name: str) -> Self:
        """Load the model and allocate the caches; blocks for as long as that takes. Raises ConfigError."""
        key = cluster_key()
        planned = plan(config, uses_control_port=False)

        def host_memory(num_bytes: int) -> memoryview:
            return Arena.create(num_bytes, shared=False).buffer

        return cls(config, name, Role.AGGREGATED, key, assemble(config, planned, host_memory, Role.AGGREGATED))

    def on_submit(self, submit: Submit) -> None:
        """Queue a request that is computed here to its end."""
        if submit.decode is not None:
            self._refuse(submit, "invalid", "an aggregated worker does not hand over", retryable=False)
            return
        if self._draining:
            self._refuse(submit, "draining", "this worker takes no new work", retryable=True)
            return
        live = self._take_over(submit, None)
        if live is None:
            return
        num_tokens = len(submit.tokens) // TOKEN_BYTES
        if not self._steps.offer(lambda engine: engine.add(submit), lambda out: self._added(live, out, num_tokens)):
            self._fail(live, "full", "the worker's inbox is full")

    def _added(self, live: Live[None], outcome: Sequence | Refusal, num_tokens: int) -> None:
        if isinstance(outcome, Refusal):
            self._metrics.refused(outcome.code)
            self._fail(live, outcome.code, outcome.reason, retryable=outcome.retryable)
        else:
            self._metrics.accepted(num_tokens)

    def _end(self, live: Live[None], reason: str) -> None:
        self._steps.post(lambda engine: engine.abort(live.request_id, live.attempt))
