"""A model whose answers can be worked out by hand: its state is a rolling hash of every token it finds in the cache.

A wrong block table, a row written twice, a stale or foreign block: any of them changes the hash and so the tokens. The
draft layer advances the same hash by one token, so a draft is right unless its state is divisible by `wrong_every`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm_engine.api.handoff import KvLayout, Plane
from llm_engine.models.sizes import size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch
from llm_engine.runtime.kv_store import KvStore

VOCAB = 24
EOS = 23
BLOCK = 4
NUM_LAYERS = 2
_PRIME = 1_048_573  # states are exact in fp32
_MAX_CHAINED = 4

SPEC = dataclasses.replace(
    ModelSpec.from_config(size_config("nano")),
    vocab_size=VOCAB,
    num_tokens=VOCAB,
    hidden_size=2,
    num_layers=NUM_LAYERS,
    eos_ids=(EOS,),
)


def make_store(num_blocks: int, *, with_mtp: bool = True) -> KvStore:
    """One fp32 number per token and layer."""
    planes = [Plane(name="latent", num_layers=NUM_LAYERS, block_bytes=BLOCK * 4, offset=0)]
    if with_mtp:
        offset = NUM_LAYERS * num_blocks * BLOCK * 4
        planes.append(Plane(name="mtp_latent", num_layers=1, block_bytes=BLOCK * 4, offset=offset))
    layout = KvLayout(block_tokens=BLOCK, num_blocks=num_blocks, planes=tuple(planes))
    return KvStore.allocate(layout, torch.float32)


def advance(state: int, token: int) -> int:
    """State after one more token; the state of nothing is 0."""
    return (state * 31 + token + 1) % _PRIME


class FakeModel:
    """See the module. `row_tile` pads batches; `poison` makes the state of that position NaN."""

    def __init__(self, *, max_len: int = 64, row_tile: int = 4, wrong_every: int = 3) -> None:
        self.spec = SPEC
        self.max_len = max_len
        self.row_tile = row_tile
        self.dtype = torch.float32
        self.has_mtp = True
        self.num_mtp_passes = 0
        self.poison: int | None = None
        self._wrong_every = wrong_every

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor:
        batch.check(BLOCK)
        assert len(batch.token_ids_R) % self.row_tile == 0
        for layer, cache in enumerate(store.layers):
            cache.latent.view(-1)[batch.slots_N] = (batch.token_ids_R[: batch.num_rows] + 1 + layer).float()
            if on_layer is not None:
                on_layer(layer)
        hidden = torch.full((len(batch.token_ids_R), 2), torch.nan)
        for seq, table in enumerate(batch.block_tables_SB.tolist()):
            first_row, end_row = batch.row_starts[seq : seq + 2]
            length = batch.context_lens[seq]
            start = length - (end_row - first_row)
            state = 0
            for position, token in enumerate(_read(store, table, length)):
                state = advance(state, token)
                if position >= start:
                    hidden[first_row + position - start] = torch.tensor([state, position])
                    if position == self.poison:
                        hidden[first_row + position - start] = torch.nan
        return hidden

    def logits(self, hidden_MH: Tensor) -> Tensor:
        return logits_of(hidden_MH)

    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor:
        batch.check(BLOCK)
        assert len(batch.token_ids_R) == len(hidden_RH)
        assert store.mtp is not None
        self.num_mtp_passes += 1
        n = batch.num_rows
        assert torch.equal(hidden_RH[:n, 1].long(), batch.positions_R[:n]), "a draft row has another position's state"
        store.mtp.latent.view(-1)[batch.slots_N] = (batch.token_ids_R[:n] + 1).float()
        for seq, table in enumerate(batch.block_tables_SB.tolist()):
            self._check_draft_rows(store, table, batch.context_lens[seq])
        states = (hidden_RH[:, 0].nan_to_num().long() * 31 + batch.token_ids_R + 1) % _PRIME
        states += (states % self._wrong_every == 0).long()
        return torch.stack([states.float(), hidden_RH[:, 1] + 1], dim=1)

    def draft_logits(self, hidden_MH: Tensor) -> Tensor:
        return logits_of(hidden_MH)

    def _check_draft_rows(self, store: KvStore, table: list[int], length: int) -> None:
        """Draft row i holds token i + 1, but for the last of a block, which another sequence may have written."""
        assert store.mtp is not None
        tokens = list(_read(store, table, max(length - _MAX_CHAINED, 0)))
        for i, token in enumerate(tokens[1:]):
            block, offset = divmod(i, BLOCK)
            if offset != BLOCK - 1:
                assert store.mtp.latent[table[block], offset, 0] == token + 1, f"draft row {i} is stale"


class LateModel(FakeModel):
    """Its passes may write until they are waited for: `land` writes once more what the last of them wrote.

    To be called before whatever waits for a pass under way. A pass of decode ends with `forward`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._writes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._launched = True

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor:
        hidden = super().forward(batch, store, on_layer)
        self._note([cache.latent for cache in store.layers], batch)
        self._launched = True
        return hidden

    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor:
        states = super().mtp(batch, hidden_RH, store)
        assert store.mtp is not None
        self._note([store.mtp.latent], batch)
        return states

    def land(self) -> None:
        """The pass under way writes for the last time."""
        for plane, slots, values in self._writes:
            plane.view(-1)[slots] = values

    def _note(self, planes: list[Tensor], batch: ForwardBatch) -> None:
        if self._launched:
            self._writes, self._launched = [], False
        slots = batch.slots_N.clone()
        self._writes += [(plane, slots, plane.view(-1)[slots].clone()) for plane in planes]


def logits_of(hidden_MH: Tensor) -> Tensor:
    """Pseudo-random logits [M, VOCAB] in (-3, 3) of states."""
    states = hidden_MH[:, 0].nan_to_num().long().unsqueeze(1)
    mixed = (states * 40_503 + torch.arange(1, VOCAB + 1) * 7_919 + states % 97 * torch.arange(VOCAB) * 613) % 65_537
    return torch.where(hidden_MH[:, :1].isnan(), torch.nan, mixed.float() / 65_537 * 6 - 3)


def copy_block(source: KvStore, block: int, target: KvStore, target_block: int) -> None:
    """All layers of one block, as a hand-off moves them."""
    for ours, theirs in _planes(source, target):
        theirs[target_block] = ours[block]


def block_bytes(store: KvStore, layer: int, block: int) -> bytes:
    """Content of one block of one layer; the draft layer is layer NUM_LAYERS."""
    cache = store.mtp if layer == NUM_LAYERS else store.layers[layer]
    assert cache is not None
    return cache.latent[block].numpy().tobytes()


def _planes(source: KvStore, target: KvStore) -> Iterator[tuple[Tensor, Tensor]]:
    for ours, theirs in zip(source.layers, target.layers, strict=True):
        yield ours.latent, theirs.latent
    if source.mtp is not None and target.mtp is not None:
        yield source.mtp.latent, target.mtp.latent


def _read(store: KvStore, table: list[int], length: int) -> Iterator[int]:
    """Tokens in the cache, which all layers must agree on."""
    for position in range(length):
        block, offset = divmod(position, BLOCK)
        values = {int(cache.latent[table[block], offset, 0]) - 1 - layer for layer, cache in enumerate(store.layers)}
        assert len(values) == 1, f"layers disagree on position {position}"
        yield values.pop()
