"""Request bodies: from bytes to checked structs."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from llm_engine.api.errors import RequestError

T = TypeVar("T")

_PATH = re.compile(r"`\$\.?([^`]+)`$")  # how msgspec names the place in its messages


def decode_body(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Raises RequestError saying what is wrong and where."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as exc:
        path = _PATH.search(str(exc))
        raise RequestError(str(exc), param=path[1] if path else None) from None
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8: {exc.reason} at byte {exc.start}") from None
    except msgspec.DecodeError as exc:
        raise RequestError(f"the body is not JSON: {exc}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
