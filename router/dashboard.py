"""The router's own page at /dashboard: static files that come with the package. All data comes from /admin/.

The page itself says nothing about the cluster, so it is open; what it shows needs what the admin API needs.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping

from router.exchange import Exchange
from router.failures import NotFound

PATH = "/dashboard"
_INDEX = "dashboard.html"
_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
}
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


def _load() -> Mapping[str, tuple[bytes, bytes]]:
    """Path → (media type, content)."""
    files: dict[str, tuple[bytes, bytes]] = {}
    for file in importlib.resources.files("router.static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            path = PATH if file.name == _INDEX else f"{PATH}/{file.name}"
            files[path] = (_TYPES[suffix], file.read_bytes())
    return files


_FILES = _load()
PATHS = tuple(_FILES)


async def dashboard(_edge: object, exchange: Exchange) -> None:
    """One file of the page."""
    found = _FILES.get(exchange.path)
    if found is None:
        raise NotFound(f"there is no {exchange.path}")
    media_type, content = found
    exchange.respond(200, content, media_type, _HEADERS)
