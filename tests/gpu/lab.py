"""Engines over the Triton table, on a card or interpreted, and the requests that are put to them.

Memory that nobody has written holds values that change everything, so that a wrong row shows within a token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
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
from llm_engine.serving.staging import Inbound, Mirror, staging_layout
from tests.unit.runtime.harness import Driver, config_of
from tests.unit.sched.requests import submit_of

BLOCK = 16
_POISON = 0x7F  # NaN as e4m3, about 3e38 as bf16 and fp32
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
    """A prefill and a decode engine, and the way of blocks between them through slots of host memory."""

    lab: Lab
    num_drafts: int
    graphs: bool
    chunk: int = 16

    def __post_init__(self) -> None:
        options: Any = {"num_drafts": self.num_drafts, "chunk": self.chunk}
        self._sent: dict[str, list[int]] = {}  # blocks of the prefill engine
        self.prefill, self._store = self.lab.driver(Role.PREFILL, on_layer=self, **options)
        self.decode, store = self.lab.driver(Role.DECODE, graphs=self.graphs, ahead=True, **options)
        self._layout = staging_layout(store.layout, KvConfig(block_tokens=BLOCK), self.lab.model.max_len)
        self._host = torch.full((self._layout.arena_bytes,), _POISON, dtype=torch.uint8, device="cpu")
        _pinned.append(self._host)
        self.inbound = Inbound(Mirror(store, self._layout, self._host, self.lab.ops), self._layout.num_blocks)
        self.inbound.prepare()

    def started(self, seq: Sequence) -> None:
        """`LayerSink`."""
        self._sent[seq.request_id] = []

    def layers_ready(self, seq: Sequence, layers: range, first: int, blocks: Seq[int]) -> None:
        """`LayerSink`."""
        if 0 in layers:
            assert first == len(self._sent[seq.request_id]), "blocks arrive in order, each once"
            self._sent[seq.request_id] += blocks

    def run(self, submits: Seq[Submit]) -> dict[str, list[int]]:
        """Serve all requests from the first prompt token to the last of the output."""
        for submit in submits:
            self.prefill.add(submit)
        self.prefill.run()
        for prefilled in self.prefill.prefilled:
            seq = prefilled.seq
            num_tokens = seq.submit.num_prompt
            reservation = self.decode.engine.reserve(seq.submit, num_tokens)
            assert isinstance(reservation, Reservation)
            slots = self.inbound.take(len(reservation.blocks))
            assert slots is not None
            self._transfer(self._sent[seq.request_id][reservation.have_tokens // BLOCK :], slots)
            self.inbound.load(slots, reservation.blocks)
            self.inbound.give(slots)
            self.decode.engine.admit(seq.submit, reservation, prefilled.first)
            self.prefill.engine.release_sent(seq)
        self.decode.run()
        return self.decode.outputs

    def _transfer(self, sources: Seq[int], slots: Seq[int]) -> None:
        """As a transport would: the bytes of every block, to those of a slot."""
        arena, layout = self._store.arena.cpu(), self._store.layout
        for plane in layout.planes:
            for layer in range(plane.num_layers):
                for source, slot in zip(sources, slots, strict=True):
                    here = plane.address(layer, source, layout.num_blocks)
                    [target] = [other for other in self._layout.planes if other.name == plane.name]
                    there = target.address(layer, slot, self._layout.num_blocks)
                    self._host[there : there + plane.block_bytes] = arena[here : here + plane.block_bytes]
