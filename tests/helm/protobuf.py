"""Helm writes its release records as protobuf. This reads one Secret of that form and nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def secret(body: bytes) -> dict[str, Any]:
    """The Secret in `body`: an envelope (field 2: the object) around metadata (1), data (2) and type (3)."""
    content = dict(_fields(body.removeprefix(MAGIC)))[2]
    metadata: dict[str, Any] = {"labels": {}}
    data: dict[str, str] = {}
    kind = ""
    for number, value in _fields(content):
        if number == 1:
            for part, text in _fields(value):
                if part in (1, 3):
                    metadata["name" if part == 1 else "namespace"] = text.decode()
                elif part == 11:
                    entry = dict(_fields(text))
                    metadata["labels"][entry[1].decode()] = entry.get(2, b"").decode()
        elif number == 2:
            entry = dict(_fields(value))
            data[entry[1].decode()] = base64.b64encode(entry[2]).decode()
        elif number == 3:
            kind = value.decode()
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data, "type": kind}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Length-delimited fields; numbers are skipped."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        length, at = _number(message, at)
        if tag & 7 == 2:
            yield tag >> 3, message[at : at + length]
            at += length


def _number(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
