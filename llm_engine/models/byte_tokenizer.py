"""The tokenizer and chat files of the small checkpoints that the repository generates.

A byte-level BPE without merges: ids 0 to 2 are begin, end and padding, 3 to 258 the bytes in order, 259 to 263 the chat
markers. Any text survives a round trip.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKERS = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "｜DSML｜")
FIRST_BYTE_ID = 3
NUM_TOKENS = FIRST_BYTE_ID + 256 + len(MARKERS)

# Chat files of the family carry this constant in `encoding/encoding_dsv32.py`; the server reads it without running it.
_ENCODING_FILE = '''"""Text blocks of the chat encoding. Data: servers read the constant and never run this file."""

TOOLS_SYSTEM_TEMPLATE = """## Tools

The functions listed at the end of this section can be called while answering.

To call them, end the message with one block of this form, one invoke element for each call:

<{dsml_token}function_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="ARGUMENT" string="true|false">VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}function_calls>

Write text arguments as they are and mark them string="true".
Write numbers, booleans, lists and objects as JSON and mark them string="false".

Results come back inside <function_results>.
With {thinking_start_token} open, reason about them up to {thinking_end_token} before the next call or the answer.

<functions>
{tool_schemas}
</functions>
"""
'''


def byte_id(byte: int) -> int:
    """The token of one byte."""
    return FIRST_BYTE_ID + byte


def build_tokenizer() -> Tokenizer:
    """The 264-token tokenizer."""
    alphabet = _byte_alphabet()
    vocab = {token: i for i, token in enumerate((BOS, EOS, PAD))}
    vocab |= {char: byte_id(byte) for byte, char in enumerate(alphabet)}
    vocab |= {token: byte_id(256) + i for i, token in enumerate(MARKERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in the released tokenizer, the role and thinking markers are added tokens but not special ones.
    special = (BOS, EOS, PAD, MARKERS[-1])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS[:-1]])
    return tokenizer


def write_tokenizer(out_dir: Path, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and the chat encoding file."""
    build_tokenizer().save(str(out_dir / "tokenizer.json"))
    _write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
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
    (out_dir / "encoding" / "encoding_dsv32.py").write_text(_ENCODING_FILE, encoding="utf-8")


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """The printable stand-in of every byte in the byte-level alphabet: itself, or the next free code point from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
