"""What is known of the next step before the tokens of the last one are: all but the tokens, and who ends with them.

Shapes: S sequences, B blocks of the longest table, X stop ids of the sequence that has most, K drafts of a step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_engine.runtime.batch import Ints, Tables
from llm_engine.runtime.draws import INVALID, Drawn
from llm_engine.sched.sequence import Sequence

_NO_TOKEN = -2  # neither an id nor `INVALID`


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of the sequences of a pass under way. Their blocks have room for all that it can give, and for a token more."""

    computed_S: Ints  # tokens in the cache, those of the pass left out
    room_S: Ints  # tokens that each may still get
    stop_ids_SX: Ints  # padded
    tables_SB: Tables

    @classmethod
    def of(cls, seqs: list[Sequence], tables_SB: Tables) -> Outlook:
        """Of `seqs`, over which a pass has just been launched. Looked up now, since the device computes meanwhile."""
        width = max(len(seq.stop_ids) for seq in seqs)
        stops = [[*seq.stop_ids, *([_NO_TOKEN] * (width - len(seq.stop_ids)))] for seq in seqs]
        return cls(
            computed_S=np.array([seq.num_computed for seq in seqs]),
            room_S=np.array([seq.max_len - len(seq.tokens) for seq in seqs]),
            stop_ids_SX=np.array(stops, dtype=np.int64).reshape(len(seqs), width),
            tables_SB=tables_SB,
        )

    def going_on(self, drawn: Drawn, here: Seq[bool]) -> npt.NDArray[np.bool_]:
        """[S]: the sequence is still here, and none of the tokens it is given is its last; see `ends.up_to_end`.

        `drawn`: of the pass. `here`: which sequences have not ended meanwhile.
        """
        kept_SK, num_S = drawn.kept_SK, drawn.num_kept_S
        ends_SK = (kept_SK[:, :, None] == self.stop_ids_SX[:, None, :]).any(axis=2) | (kept_SK == INVALID)
        ends_S = (ends_SK & (np.arange(kept_SK.shape[1]) < num_S[:, None])).any(axis=1) | (num_S >= self.room_S)
        going_S: npt.NDArray[np.bool_] = np.array(here) & ~ends_S
        return going_S
