"""Torch-free scheduling policy: block ids, prefix cache, who computes what in the next step.

Everything here is called from the one thread that owns the engine, and can run in a simulator.
"""

from llm_engine.sched.sequence import Phase, Refusal, Reservation, Sequence
from llm_engine.sched.step import Failure, LayerSink, Prefilled, StepResult, StepStats

__all__ = [
    "Failure",
    "LayerSink",
    "Phase",
    "Prefilled",
    "Refusal",
    "Reservation",
    "Sequence",
    "StepResult",
    "StepStats",
]
