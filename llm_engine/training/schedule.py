"""What happens at which step: sequence lengths, learning rate, when attention becomes sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llm_engine.training.feed import Shape

PEAK_RATE: Final = 4e-3
LENGTHS: Final = (512, 1024, 3072)  # short rows first; long ones are dear
_TEXT_OF: Final = {512: 260, 1024: 640, 3072: 2550}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`steps` steps of `tokens` tokens. Shares are of the whole run.

    Until `medium_from` rows are short; until `sparse_from` attention is dense, while the indexer learns aside. The rate
    is constant until `decay_from`, then falls linearly to zero.
    """

    steps: int
    tokens: int = 1 << 16
    peak_rate: float = PEAK_RATE
    warm_up: int = 150
    medium_from: float = 0.2
    sparse_from: float = 0.5
    decay_from: float = 0.55
    lengths: tuple[int, ...] = LENGTHS
    long_every: int = 5

    def shape(self, step: int) -> Shape:
        """The batch of a step."""
        short, medium, long = self.lengths
        length = short
        if step >= self.medium_from * self.steps:
            length = long if step % self.long_every == 0 else short if step % 2 else medium
        return Shape(max(1, self.tokens // length), length, _TEXT_OF.get(length, length // 2))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.peak_rate * min(1.0, (step + 1) / self.warm_up, left)

    def is_sparse(self, step: int) -> bool:
        """Whether attention is limited to the indexer's choice."""
        return step >= self.sparse_from * self.steps

    def mtp_weight(self, step: int) -> float:
        """Weight of the draft loss: 0.3, and 0.1 while the rate decays."""
        return 0.3 if step < self.decay_from * self.steps else 0.1
