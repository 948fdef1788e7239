"""Typed access to a `config.json`: every error is one line that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_engine.api.errors import ConfigError

_MISSING = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object stored in a JSON file. Raises ConfigError naming the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; is this a checkpoint directory?") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: not JSON: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


class ConfigKeys:
    """Reads values of one JSON object. A key without a default is required; null counts as missing."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self._tree = tree
        self._where = where

    def __contains__(self, key: str) -> bool:
        return self._tree.get(key) is not None

    def integer(self, key: str, default: Any = _MISSING, *, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, least: float = 0.0) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise self.error(key, value, f"a number of at least {least}")
        return float(value)

    def boolean(self, key: str, default: Any = _MISSING) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = _MISSING) -> Any:
        value = self._get(key, default)
        if value not in allowed:
            raise self.error(key, value, " or ".join(json.dumps(item) for item in allowed))
        return value

    def names(self) -> list[str]:
        """All keys, in the order of the file."""
        return list(self._tree)

    def raw(self, key: str) -> Any:
        """The value as parsed, or None."""
        return self._tree.get(key)

    def section(self, key: str) -> ConfigKeys | None:
        """The nested object under `key`, or None when it is absent."""
        value = self._tree.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return ConfigKeys(value, f"{self._where}: {key}")

    def error(self, key: str, value: object, expected: str) -> ConfigError:
        found = "is missing" if value is None or value is _MISSING else f"is {value!r}"
        return ConfigError(f"{self._where}: {key} {found}; expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._tree.get(key)
        return default if value is None else value
