"""Engines over the Triton table, on a card or interpreted, and the requests that are put to them.

Memory that nobody has written holds values that change everything, so that a wrong row shows within a token.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_engine.api.config import KvConfig
from llm_engine.api.messages import Role, Submit
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops, load_ops
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore, page_dtype, plan_layout
from llm_engine.runtime.recorded import Recorded
from llm_engine.runtime.weights import WeightStream
from llm_engine.sched import LayerSink, Reservation, Sequence
from llm_engine.serving.staging import Inbound, Mirror, Sending, Stager, staging_layout
from tests.unit.runtime.harness import Driver, config_of
from tests.unit.sched.requests import submit_of

BLOCK = 16
_POISON = 0x7F  # NaN as e4m3, about 3e38 as bf16 and fp32
_WAIT_S = 30.0
_pinned: list[torch.Tensor] = []  # for the life of the process, as `Ops.pin` says


@dataclass
class Lab:
    """One model on one device with one kind of pages."""

    spec: ModelSpec
    ops: Ops
    pages: torch.dtype
    model: CausalLM

    @classmethod
    def load(
        cls, path: Path, *, numerics: Any = "exact", dtype: str = "fp32", pages: Any = "auto", max_len: int = 256
    ) -> Lab:
        spec, ops = ModelSpec.from_dir(path), load_ops("triton", numerics, dtype)
        with WeightStream(path, spec, ops.dtype, ops.device, fp8_block=ops.fp8_block, progress=False) as stream:
            model = build_model(spec, stream.weights, ops, max_len)
        return cls(spec, ops, page_dtype(spec, KvConfig(format=pages), "triton", ops.dtype), model)

    def store(self, num_blocks: int, *, with_mtp: bool) -> KvStore:
        layout = plan_layout(
            self.spec, KvConfig(block_tokens=BLOCK, num_blocks=num_blocks), self.pages, with_mtp=with_mtp
        )
        store = KvStore.allocate(layout, self.pages, self.ops.device)
        store.arena.fill_(_POISON)
        return store

    def driver(
        self,
        role: Role = Role.AGGREGATED,
        *,
        num_drafts: int = 0,
        num_blocks: int = 160,
        graphs: bool = False,
        on_layer: LayerSink | None = None,
        max_num_seqs: int = 8,
        ahead: bool | None = None,
        **options: Any,
    ) -> tuple[Driver, KvStore]:
        config = config_of(num_drafts=num_drafts, max_num_seqs=max_num_seqs, **options)
        store = self.store(num_blocks, with_mtp=num_drafts > 0)
        recorded = None
        if graphs:
            recorded = Recorded(
                self.model, store, self.ops, num_drafts=num_drafts, max_num_seqs=max_num_seqs,
                max_len=self.model.max_len,
            )  # fmt: skip
            if self.ops.device.type != "cpu":
                recorded.prepare()
        engine = Engine(
            config, self.model, store, role=role, format_id="lab", on_layer=on_layer, recorded=recorded,
            race=self.ops.race, ahead=ahead,
        )  # fmt: skip
        return Driver(engine), store

    def alone(self, submits: Seq[Submit]) -> dict[str, list[int]]:
        """What every request gives by itself: no drafts, no recordings, no prefix, whole prompts."""
        outputs = {}
        for submit in submits:
            driver, _ = self.driver(chunk=256, prefix_cache=False, num_blocks=16)
            driver.add(submit)
            driver.run()
            outputs.update(driver.outputs)
        return outputs


def requests(spec: ModelSpec, lengths: Seq[int], num_output: int, seed: int = 5) -> list[Submit]:
    """Prompts of these lengths, every other one with a shared prefix; greedy and sampled with every option."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, spec.num_tokens) for _ in range(max(lengths))]
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}},
        {"temperature": 0.0, "frequency_penalty": 1.5, "min_tokens": 3},
    ]
    submits = []
    for i, length in enumerate(lengths):
        own = length if i % 2 == 0 else max(length - length // 2, 1)
        prompt = shared[: length - own] + [rng.randrange(3, spec.num_tokens) for _ in range(own)]
        extra = {"seed": 1000 + i, "max_tokens": num_output, "ignore_eos": True, **options[i % len(options)]}
        submits.append(submit_of(prompt, f"r{i}", **extra))
    return submits


@dataclass
class StagedPair:
    """A prefill and a decode engine, and the way of blocks between them through slots of host memory on both ends."""

    lab: Lab
    num_drafts: int
    graphs: bool
    chunk: int = 16
    arrived: dict[str, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))  # slots by layer

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._sending: dict[str, Sending] = {}
        self.failures: list[Exception] = []
        options: Any = {"num_drafts": self.num_drafts, "chunk": self.chunk}
        self.prefill, p_store = self.lab.driver(Role.PREFILL, on_layer=self, **options)
        self.decode, d_store = self.lab.driver(Role.DECODE, graphs=self.graphs, ahead=True, **options)
        ends = [self._end(store) for store in (p_store, d_store)]
        (p_mirror, self._layout, self._p_host), (d_mirror, _, self._d_host) = ends
        self.stager = Stager(p_mirror, self._layout.num_blocks, self.failures.append)
        self.inbound = Inbound(d_mirror, self._layout.num_blocks)

    def _end(self, store: KvStore) -> tuple[Mirror, Any, torch.Tensor]:
        layout = staging_layout(store.layout, KvConfig(block_tokens=BLOCK), self.lab.model.max_len)
        host = torch.full((layout.arena_bytes,), _POISON, dtype=torch.uint8, device="cpu")
        _pinned.append(host)
        return Mirror(store, layout, host, self.lab.ops), layout, host

    def started(self, seq: Sequence) -> None:
        """`LayerSink`."""

        def deliver(layer: int, first: int, slots: Seq[int]) -> None:
            with self._news:
                known = self.arrived[seq.request_id].setdefault(layer, [])
                assert first == len(known), "blocks arrive in order, each once"
                known += slots
                self._news.notify_all()

        num_blocks = -(-seq.submit.num_prompt // BLOCK)
        self._sending[seq.request_id] = self.stager.open(num_blocks, deliver)

    def layer_ready(self, seq: Sequence, layer: int, first: int, blocks: Seq[int]) -> None:
        """`LayerSink`."""
        self._sending[seq.request_id].layer_ready(layer, first, blocks)

    def run(self, submits: Seq[Submit]) -> dict[str, list[int]]:
        """Serve all requests from the first prompt token to the last of the output."""
        for submit in submits:
            self.prefill.add(submit)
        self.prefill.run()
        for prefilled in self.prefill.prefilled:
            seq = prefilled.seq
            self._wait_arrived(seq)
            num_tokens = seq.submit.num_prompt
            reservation = self.decode.engine.reserve(seq.submit, num_tokens)
            assert isinstance(reservation, Reservation)
            slots = self.inbound.take(len(reservation.blocks))
            assert slots is not None
            self._transfer(seq.request_id, reservation.have_tokens // BLOCK, slots)
            self.inbound.load(slots, reservation.blocks)
            self.inbound.give(slots)
            self.decode.engine.admit(seq.submit, reservation, prefilled.first)
            self._sending[seq.request_id].close()
            self.prefill.engine.release_sent(seq)
        self.decode.run()
        self.stager.close()
        assert not self.failures, self.failures
        return self.decode.outputs

    def _wait_arrived(self, seq: Sequence) -> None:
        wanted = -(-seq.submit.num_prompt // BLOCK)
        layers = self.lab.spec.num_layers + (self.num_drafts > 0)
        with self._news:
            got = self.arrived[seq.request_id]
            done = self._news.wait_for(
                lambda: self.failures or [len(got.get(layer, [])) for layer in range(layers)] == [wanted] * layers,
                _WAIT_S,
            )
        assert done, f"{seq.request_id}: {got}"
        assert not self.failures, self.failures

    def _transfer(self, request_id: str, skip: int, slots: Seq[int]) -> None:
        """As a transport would: the bytes of every slot, to those of another."""
        sources = self.arrived[request_id][0][skip:]
        for plane in self._layout.planes:
            for layer in range(plane.num_layers):
                for source, target in zip(sources, slots, strict=True):
                    here = plane.address(layer, source, self._layout.num_blocks)
                    there = plane.address(layer, target, self._layout.num_blocks)
                    self._d_host[there : there + plane.block_bytes] = self._p_host[here : here + plane.block_bytes]
