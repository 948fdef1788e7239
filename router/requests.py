"""Request bodies: from bytes to checked structs."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from llm_engine.api.errors import RequestError

T = TypeVar("T")

_PATH = re.compile(r"`\$\.?([^`]+)`$")  # how msgspec names the place in its messages


def decode_body(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Raises RequestError saying what is wrong and where."""
    try:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as exc:
            if not str(exc).startswith("Expected `int"):
                raise
            return msgspec.convert(_with_integers(msgspec.json.decode(data)), decoder.type)
    except msgspec.ValidationError as exc:
        path = _PATH.search(str(exc))
        raise RequestError(str(exc), param=path[1] if path else None) from None
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8: {exc.reason} at byte {exc.start}") from None
    except msgspec.DecodeError as exc:
        raise RequestError(f"the body is not JSON: {exc}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def _with_integers(tree: Any) -> Any:
    """`tree` with integral floats as integers: JSON knows one kind of number, and some clients write 16.0."""
    match tree:
        case float() if tree.is_integer():
            return int(tree)
        case list():
            return [_with_integers(item) for item in tree]
        case dict():
            return {key: _with_integers(item) for key, item in tree.items()}
    return tree
