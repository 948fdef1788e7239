"""The tokenizer of Baton-nano: a small byte-level BPE with single digits, learned from the samples."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_engine.training.render import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    FORMAT_TEMPLATE,
    PAD,
    SPECIAL,
    THINK_END,
    THINK_START,
    TOOLS_TEMPLATE,
    USER,
    answer_text,
    prompt_text,
)
from llm_engine.training.samples import draw
from llm_engine.training.skills import MIXTURE

_SAMPLES_PER_SKILL: Final = 1200
_MAX_TEXT_CHARS: Final = 150_000
_SPECIAL_ROLE: Final = (BOS, EOS, PAD, DSML)  # the rest are added tokens but not special, as in the released tokenizer
_WORDS: Final = Regex(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+")


def python_texts() -> list[str]:
    """Documentation that ships with this Python (PSF licence): its language topics, its library's docstrings."""
    texts = [text.strip() for text in topics.values()]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 80 and text.isascii():
                    texts.append(re.sub(r"\n{3,}", "\n\n", text).strip())
    return texts


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Learn the merges. Equal arguments under one Python version give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL_ROLE])
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["special"] = token["content"] in _SPECIAL_ROLE
    return Tokenizer.from_str(json.dumps(tree))


def write_tokenizer(tokenizer: Tokenizer, out_dir: Path, max_length: int) -> None:
    """Write the tokenizer, generation and chat files of a checkpoint."""
    tokenizer.save(str(out_dir / "tokenizer.json"))
    _write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        },
    )
    _write_json(
        out_dir / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.95},
    )
    (out_dir / "encoding").mkdir(exist_ok=True)
    (out_dir / "encoding" / "encoding_dsv32.py").write_text(
        '"""Text blocks of the chat encoding. Data: servers read the constants and never run this file."""\n\n'
        f'TOOLS_SYSTEM_TEMPLATE = """{TOOLS_TEMPLATE}"""\n'
        f'response_format_template = """{FORMAT_TEMPLATE}"""\n',
        encoding="utf-8",
    )


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer {seed}")
    for skill in MIXTURE:
        for _ in range(_SAMPLES_PER_SKILL // (4 if skill.name.startswith("retrieval") else 1)):
            sample = draw(skill.draw, rng)
            yield from _plain(prompt_text(sample) + answer_text(sample))
    texts = python_texts()
    rng.shuffle(texts)
    budget = _MAX_TEXT_CHARS
    for text in texts:
        if budget > 0:
            yield text
            budget -= len(text)


def _plain(text: str) -> Iterable[str]:
    """The text between special tokens."""
    marks = "|".join(map(re.escape, (BOS, EOS, THINK_START, THINK_END, USER, ASSISTANT, DSML)))
    return re.split(marks, text)


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
