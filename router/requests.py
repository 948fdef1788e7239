"""Request bodies: from bytes to checked structs."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from llm_engine.api.errors import RequestError

T = TypeVar("T")


def decode_body(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Raises RequestError saying what is wrong and where."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as exc:
        message, _, path = str(exc).partition(" - at `")
        field = path.removeprefix("$.").rstrip("`") or None
        raise RequestError(f"{message} - at `{field}`" if field else message, param=field) from None
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8: {exc.reason} at byte {exc.start}") from None
    except msgspec.DecodeError as exc:
        raise RequestError(f"the body is not JSON: {exc}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
