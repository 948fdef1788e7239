"""The trainable model computes what the reference and the serving engine compute from the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llm_engine.models.spec import ModelSpec
from llm_engine.ops import load_ops
from llm_engine.training.architecture import CONFIG, VOCAB_SIZE
from llm_engine.training.export import export_model, import_model
from llm_engine.training.model import NanoModel
from llm_engine.training.tokenizer import train_tokenizer
from tests.models.harness import Harness, random_tokens
from tests.models.oracle import Oracle, assert_agrees

LENGTH = 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(VOCAB_SIZE, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = NanoModel(ModelSpec.from_config(CONFIG))
    for gate in model.gates():
        gate.e_score_correction_bias.normal_(std=0.1)
    for name, weight in model.named_parameters():
        if name.endswith("wq_b.weight"):  # heads in opposite pairs, so that no key scores exactly zero like another
            heads = weight.data.view(-1, CONFIG["index_head_dim"], weight.shape[1])
            heads[1::2] = -heads[0::2]
    return export_model(model, tokenizer, tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def outputs(checkpoint: Path) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Tokens, logits and draft logits of the trainable model, attention limited to the indexer's choice."""
    model = import_model(checkpoint).eval()
    ids = random_tokens(model.spec, LENGTH)
    with torch.no_grad():
        logits, drafts, _ = model(torch.tensor([ids]), torch.ones(1, LENGTH), sparse=True)
    return ids, logits[0], drafts[0]


def test_logits_equal_the_reference(checkpoint: Path, outputs: tuple[list[int], torch.Tensor, torch.Tensor]) -> None:
    ids, logits, _ = outputs
    assert_agrees(logits, Oracle(checkpoint).run(ids))


def test_logits_and_drafts_equal_the_engine(
    checkpoint: Path, outputs: tuple[list[int], torch.Tensor, torch.Tensor]
) -> None:
    ids, _, drafts = outputs
    harness = Harness.load(checkpoint, load_ops("cpu", "exact", "fp32"))
    hidden = harness.run([(0, 0, ids)])
    reference = Oracle(checkpoint).run(ids)
    assert_agrees(harness.logits(hidden), reference)
    drafted = harness.model.draft_logits(harness.run_mtp([(0, 0, ids[1:])], hidden[:-1]))
    error = (drafted - drafts[:-1]).abs().amax(1)
    assert (error > 1e-4).float().mean() <= 0.02
