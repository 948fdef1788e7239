"""The protocols behind every field of `Ops`: shapes, promises and the error they may raise.

Shapes: R rows (padding included, see ForwardBatch), N real rows, H hidden, h heads, E experts, F expert width,
K chosen, B blocks, P tokens of a block, L latent rank, J rope pairs (half the rope width), T positions.
"Compute dtype" is `Ops.dtype`. A `Weight` is a tensor, or fp8 blocks as stored, which a pack function may dequantise.
Packed weights and plans are opaque: only the backend that made them reads them.
A plan holds what attention needs to know of a batch, worked out once per forward pass and used by every layer.

With numerics `exact` every output row is a function of its own input row, its own visible cache rows and the weights
alone: bit for bit the same in any batch, in any chunk, at any place. `fast` promises closeness only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from llm_engine.ops.batch import ForwardBatch
from llm_engine.ops.fp8 import Weight

PackedLinear: TypeAlias = Any
PackedMlp: TypeAlias = Any
PackedExperts: TypeAlias = Any
PackedKvB: TypeAlias = Any
AttentionPlan: TypeAlias = Any
Selection: TypeAlias = Tensor | Callable[[], Tensor | None] | None  # positions, or a call that waits for them
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Group-limited sigmoid routing (`noaux_tc`)."""

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    normalise: bool = True  # weights of the chosen experts sum to one before scaling
    scale: float = 1.0  # routed_scaling_factor


class PackLinear(Protocol):
    """Lay out one [out, in] weight. `fp32`: multiply and answer in fp32, whatever the compute dtype."""

    def __call__(self, weight_OI: Weight, *, fp32: bool = False) -> PackedLinear: ...


class Linear(Protocol):
    """x · Wᵀ: [R, in] → [R, out], in the compute dtype or, if packed so, in fp32. Rows may be strided.

    `x` may also be [R, …] with `in` values in a row, as `MlaAttend` gives it.
    """

    def __call__(self, x_RI: Tensor, packed: PackedLinear) -> Tensor: ...


class PackMlp(Protocol):
    """Lay out a SwiGLU MLP: gate rows first, then up rows."""

    def __call__(self, gate_up_2FH: Weight, down_HF: Weight) -> PackedMlp: ...


class Mlp(Protocol):
    """(silu(x·Wgᵀ) · (x·Wuᵀ)) · Wdᵀ: [R, H] → [R, H]."""

    def __call__(self, x_RH: Tensor, packed: PackedMlp) -> Tensor: ...


class PackExperts(Protocol):
    """Lay out E routed experts and, where there is one, the shared expert every row goes through.

    `experts` yields gate rows over up rows [2F, H] and down [H, F] of each, so that nobody has to hold them all twice.
    """

    def __call__(
        self, experts: Iterable[tuple[Weight, Weight]], num_experts: int, *, shared: PackedMlp | None = None
    ) -> PackedExperts: ...


class Gate(Protocol):
    """Choose experts: logits fp32 [R, E], bias fp32 [E] → (ids int64 [R, K], weights fp32 [R, K]), best first.

    The bias takes part in the choice, never in the weights.
    """

    def __call__(self, logits_RE: Tensor, bias_E: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]: ...


class Moe(Protocol):
    """Σ_k weight_k · expert_k(x), summed in fp32 in rank order, plus the shared expert: [R, H] → [R, H]."""

    def __call__(self, x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: PackedExperts) -> Tensor: ...


class RmsNorm(Protocol):
    """w · x / sqrt(mean(x²) + eps) over the last dim, in fp32, cast once to the compute dtype. Rows may be strided."""

    def __call__(self, x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor: ...


class AddRmsNorm(Protocol):
    """(rms_norm(x + residual), x + residual)."""

    def __call__(self, x_RH: Tensor, residual_RH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class Plan(Protocol):
    """Prepare attention for a batch over planes of `block_tokens` tokens a block, with fp32 rope tables."""

    def __call__(self, batch: ForwardBatch, *, block_tokens: int, cos_TJ: Tensor, sin_TJ: Tensor) -> AttentionPlan: ...


class WriteLatent(Protocol):
    """Write the latent cache rows of a batch: kv [R, L + 2J] → plane [B, P, L + 2J].

    The first L columns are RMS-normed with `weight_L`, the last 2J rotated in interleaved pairs (2j, 2j + 1).
    """

    def __call__(self, plane_BPC: Tensor, kv_RC: Tensor, weight_L: Tensor, eps: float, plan: AttentionPlan) -> None: ...


class WriteIndexKeys(Protocol):
    """Write the indexer's cache rows of a batch: key [R, D] → plane [B, P, D].

    LayerNorm with weight and bias, first 2J columns rotated: pairs (j, j + J), or (2j, 2j + 1) if `interleaved`.
    """

    def __call__(
        self,
        plane_BPD: Tensor,
        key_RD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
        plan: AttentionPlan,
        *,
        interleaved: bool = False,
    ) -> None: ...


class Enter(Protocol):
    """`rms_norm` of queries [R, Q], `write_latent` and `write_index_keys` (with its own eps) in fewer launches.

    The results are theirs.
    """

    def __call__(
        self,
        query_RQ: Tensor,
        query_norm_Q: Tensor,
        latent_BPC: Tensor,
        kv_RC: Tensor,
        latent_norm_L: Tensor,
        index_BPD: Tensor,
        key_RD: Tensor,
        key_norm: tuple[Tensor, Tensor],
        eps: float,
        key_eps: float,
        plan: AttentionPlan,
        *,
        interleaved: bool = False,
    ) -> Tensor: ...


class IndexTopk(Protocol):
    """The `k` visible positions with the largest Σ_h g[h] · relu(query[h] · key): [N, K] ascending, -1 behind.

    `query_RhD` is not yet rotated (first 2J columns, as in WriteIndexKeys). The lowest position wins a tie.
    None when no row of the batch sees more than `k` positions: everything is selected.
    The integer type is the backend's choice.
    """

    def __call__(
        self,
        query_RhD: Tensor,
        g_Rh: Tensor,
        plane_BPD: Tensor,
        plan: AttentionPlan,
        k: int,
        *,
        interleaved: bool = False,
    ) -> Tensor | None: ...


class PackKvB(Protocol):
    """Lay out the two halves of kv_b_proj: keys [h, D, L] and values [h, V, L]."""

    def __call__(self, key_hDL: Tensor, value_hVL: Tensor) -> PackedKvB: ...


class MlaAttend(Protocol):
    """Latent attention: query [R, h, D + 2J] → [R, h, V].

    The last 2J query columns are rotated here (interleaved pairs). Row r sees the positions up to its own, or those in
    `selection` (ascending, -1 behind), for `made` as late as may be. Whether keys are expanded or queries absorbed is
    the backend's choice.
    A row without keys gives zeros, never NaN; a NaN in a cache row that is not seen changes nothing.
    """

    def __call__(
        self,
        query_RhD: Tensor,
        plane_BPC: Tensor,
        plan: AttentionPlan,
        selection: Selection,
        kv_b: PackedKvB,
        scale: float,
    ) -> Tensor: ...


def made(selection: Selection) -> Tensor | None:
    """The positions, once they are there."""
    return selection() if callable(selection) else selection


class Race(Protocol):
    """Draw a token of each row: the lowest id with the largest softmax(logits / temperature) / E. Waits for nothing.

    Logits fp32 [R, V], which are not modified; temperatures fp32 [R], above 0; keys of `noise.position_keys`, as int64
    [R]; E is `noise.ExponentialNoise`. Returns fp64 [R, 2]: ids, and scores up to a factor of the row, which are not
    finite where the row's distribution is not.
    """

    def __call__(self, logits_RV: Tensor, temperature_R: Tensor, keys_R: Tensor) -> Tensor: ...


class SelfCheck(Protocol):
    """Verify once, at start-up, that this machine's libraries keep the promise of `exact`. Raises ConfigError."""

    def __call__(self) -> None: ...


class WarmUp(Protocol):
    """Compile now what is compiled per shape, for passes of up to `max_rows` rows over what is packed so far."""

    def __call__(self, max_rows: int) -> None: ...


def nothing_to_warm_up(max_rows: int) -> None:
    """The warm-up of backends that compile nothing per shape."""


class Pin(Protocol):
    """Fix host memory in its place for the life of the process, so that copies from and to the device need no wait."""

    def __call__(self, host: Tensor) -> None: ...


def pin_nothing(host: Tensor) -> None:
    """The pin of backends whose device is the host."""


class Beside(Protocol):
    """Begin what `function` does; the call that is returned waits for it, and must be made.

    What `function` reads is there when it begins, and nobody writes it meanwhile; nobody else reads what it writes.
    """

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]: ...


def at_once(function: Callable[[], T]) -> Callable[[], T]:
    """The `Beside` of backends that do one thing at a time."""
    result = function()
    return lambda: result


class Capture(Protocol):
    """Record what `function` launches, and return a call that launches it again over the same memory.

    `function` reads its input from tensors that stay, has no other effect, and is called once or more meanwhile.
    The call returns the same tensors every time, with new contents. Without recording it is `function` itself.
    """

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]: ...


def run_again(function: Callable[[], T]) -> Callable[[], T]:
    """The capture of backends that record nothing."""
    return function
