"""A trained model as a checkpoint directory in the official layout, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from llm_engine.models.checkpoint import SINGLE_FILE, expected_tensors
from llm_engine.models.spec import ModelSpec
from llm_engine.training.architecture import CONFIG
from llm_engine.training.model import NanoModel
from llm_engine.training.tokenizer import write_tokenizer

_STACKED = re.compile(r"(.*\.mlp)\.((?:gate|up|down)_proj)")
_BIAS = "e_score_correction_bias"


def export_model(model: NanoModel, tokenizer: Tokenizer, out_dir: Path) -> Path:
    """Write configuration, bf16 weights and tokenizer files into `out_dir` and return it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = dict(_official(model.state_dict()))
    expected = expected_tensors(model.spec, with_mtp=True)
    wrong = {name for name, info in expected.items() if name not in tensors or tensors[name].shape != info.shape}
    if wrong or tensors.keys() != expected.keys():
        raise ValueError(f"not the tensors of the official layout: {sorted(wrong | tensors.keys() ^ expected.keys())}")
    save_file(dict(sorted(tensors.items())), out_dir / SINGLE_FILE, metadata={"format": "pt"})
    (out_dir / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, out_dir, model.spec.max_position)
    return out_dir


def import_model(path: Path) -> NanoModel:
    """The trainable model of a checkpoint directory."""
    model = NanoModel(ModelSpec.from_dir(path))
    stored = load_file(path / SINGLE_FILE)
    state = {name: _stacked(name, value.shape, stored) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def _official(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        value = value.detach().cpu()
        match = _STACKED.fullmatch(name)
        if match is None:
            yield name, value.clone() if name.endswith(_BIAS) else value.bfloat16()
            continue
        for expert, weight in enumerate(value):
            yield f"{match[1]}.experts.{expert}.{match[2]}.weight", weight.bfloat16().contiguous()


def _stacked(name: str, shape: torch.Size, stored: Mapping[str, Tensor]) -> Tensor:
    match = _STACKED.fullmatch(name)
    if match is None:
        return stored[name].float()
    names = (f"{match[1]}.experts.{expert}.{match[2]}.weight" for expert in range(shape[0]))
    return torch.stack([stored[part].float() for part in names])
