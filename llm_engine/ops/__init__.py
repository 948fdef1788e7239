"""The kernel seam: what the models call (`Ops`), in which shapes (`spec`), and how a backend is chosen (`load`)."""

from llm_engine.ops.batch import ForwardBatch, to_device
from llm_engine.ops.load import load_ops
from llm_engine.ops.spec import AttentionPlan, GateConfig
from llm_engine.ops.table import Ops

__all__ = ["AttentionPlan", "ForwardBatch", "GateConfig", "Ops", "load_ops", "to_device"]
