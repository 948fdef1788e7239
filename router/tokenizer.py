"""Text ↔ token ids for one checkpoint.

Encoding never recognises special tokens by itself: the caller marks which pieces of a prompt may contain them
(`Segment.trusted`). Neighbouring text is merged before it is encoded, so that marking pieces does not move the borders
of byte-pair merges: for text without special tokens the ids equal those of encoding the whole string at once.

Decoding is a table of bytes per id (byte-level BPE has no other state), so it costs no tokenizer call per token.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from llm_engine.api.errors import ConfigError, Overloaded

INLINE_CHARS = 2048  # about a millisecond of encoding; longer prompts go to a thread
ENCODE_THREADS = 2
MAX_PENDING_ENCODES = 256

Run = str | int  # plain text, or the id of a special token


class Segment(msgspec.Struct, frozen=True):
    """A piece of a prompt. Special tokens are recognised in trusted text only; anything a caller wrote is not."""

    text: str
    trusted: bool = False


class Tokenizer:
    """The checkpoint's byte-level BPE. Safe to use from several threads."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, *, bos_id: int | None = None, adds_bos: bool = False
    ) -> None:
        """`vocab_size` is the model's, padding rows included; `adds_bos`: raw prompts start with `bos_id` by default.

        Raises ConfigError for anything but byte-level BPE.
        """
        try:
            tree = json.loads(tokenizer_json)
        except ValueError as exc:
            raise ConfigError(f"not JSON: {exc}") from exc
        _require_byte_level(tree)
        added = {token["content"]: token for token in tree.get("added_tokens", [])}
        tree["added_tokens"] = []
        tree["post_processor"] = None
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(tree))
        except Exception as exc:  # the library has no narrower type
            raise ConfigError(f"not a tokenizer: {exc}") from exc
        self._executor = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="encode")
        self._pending = 0
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.adds_bos = adds_bos and bos_id is not None
        self.added_ids: Mapping[str, int] = {text: token["id"] for text, token in added.items()}
        self.special_ids = frozenset(token["id"] for token in added.values() if token.get("special"))
        self._added_pattern = _any_of(self.added_ids)
        self.token_bytes: list[bytes] = _byte_table(self._model.get_vocab(), self.added_ids, vocab_size)
        self.longest_token = max(map(len, self.token_bytes))
        self._check_plain_text_is_plain()

    @classmethod
    def from_dir(cls, model_dir: Path) -> Tokenizer:
        """Read the tokenizer files and config.json of a checkpoint directory. Raises ConfigError naming the file."""
        config = read_json(model_dir / "config.json")
        path = model_dir / "tokenizer.json"
        options = model_dir / "tokenizer_config.json"
        adds_bos = bool(read_json(options).get("add_bos_token")) if options.exists() else False
        try:
            return cls(
                path.read_text(encoding="utf-8"),
                int(config["vocab_size"]),
                bos_id=config.get("bos_token_id"),
                adds_bos=adds_bos,
            )
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}") from exc
        except KeyError as exc:
            raise ConfigError(f"{model_dir}: no {exc} in config.json or tokenizer.json") from exc
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of the concatenated segments."""
        runs = self._runs(segments)
        if len(runs) == 1 and isinstance(runs[0], str):
            return self._model.encode(runs[0], add_special_tokens=False).ids
        ids: list[int] = []
        for run in runs:
            if isinstance(run, int):
                ids.append(run)
            else:
                ids.extend(self._model.encode(run, add_special_tokens=False).ids)
        return ids

    async def encode_async(self, segments: Sequence[Segment]) -> list[int]:
        """`encode`, without holding up the event loop. Raises Overloaded when too many long prompts are waiting."""
        if sum([len(segment.text) for segment in segments]) <= INLINE_CHARS:
            return self.encode(segments)
        if self._pending >= MAX_PENDING_ENCODES:
            raise Overloaded(f"{self._pending} long prompts are waiting to be tokenised")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self.encode, segments)
        finally:
            self._pending -= 1

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a whole sequence, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[token] for token in ids]).decode("utf-8", "replace")

    def visible_bytes(self, keep: Iterable[str] = ()) -> list[bytes]:
        """The byte table with special tokens silenced, except those whose text is in `keep`."""
        kept = {self.added_ids[text] for text in keep if text in self.added_ids}
        hidden = self.special_ids - kept
        return [b"" if token in hidden else data for token, data in enumerate(self.token_bytes)]

    def close(self) -> None:
        """Stop the encoding threads; running encodes finish first."""
        self._executor.shutdown(cancel_futures=True)

    def _runs(self, segments: Sequence[Segment]) -> list[Run]:
        runs: list[Run] = []
        text = ""  # not yet in `runs`
        for segment in segments:
            if not segment.trusted or self._added_pattern is None:
                text += segment.text
                continue
            plain, *rest = self._added_pattern.split(segment.text)
            text += plain
            for special, plain in zip(rest[::2], rest[1::2], strict=True):
                if text:
                    runs.append(text)
                runs.append(self.added_ids[special])
                text = plain
        if text:
            runs.append(text)
        return runs

    def _check_plain_text_is_plain(self) -> None:
        added = set(self.added_ids.values())
        for text in self.added_ids:
            if not added.isdisjoint(self._model.encode(text, add_special_tokens=False).ids):
                raise ConfigError(f"the merges spell the special token {text!r}: user text could not be told apart")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint file. Raises ConfigError naming the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: not JSON: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return tree


def _require_byte_level(tree: dict[str, Any]) -> None:
    decoder = tree.get("decoder") or {}
    kinds = {decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", []))}
    if tree.get("model", {}).get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ConfigError("expected a byte-level BPE tokenizer (model BPE, decoder ByteLevel)")
    for token in tree.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ConfigError(f"added token {token['content']!r}: lstrip, rstrip and single_word are not supported")


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of `texts`, as a group. Factored by common beginnings: checkpoints have hundreds of them."""
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(f"({_trie_pattern(trie)})") if trie else None


def _trie_pattern(node: dict[str, Any]) -> str:
    ends = "" in node
    branches = [re.escape(char) + _trie_pattern(child) for char, child in sorted(node.items()) if char]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and not ends else f"(?:{'|'.join(branches)})"
    return f"{pattern}?" if ends else pattern


def _byte_table(vocab: Mapping[str, int], added: Mapping[str, int], vocab_size: int) -> list[bytes]:
    char_to_byte = _byte_level_alphabet()
    size = max(vocab_size, 1 + max([*vocab.values(), *added.values()]))
    table = [b""] * size
    for piece, token in vocab.items():
        try:
            table[token] = bytes([char_to_byte[char] for char in piece])
        except KeyError:  # a special token that is listed in the base vocabulary too
            table[token] = piece.encode()
    missing = [byte for char, byte in char_to_byte.items() if char not in vocab]
    if missing:
        raise ConfigError(f"the vocabulary lacks {len(missing)} of the 256 bytes: text could not be encoded")
    for text, token in added.items():
        table[token] = text.encode()
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary: itself if printable, else 256 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
