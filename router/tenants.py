"""Who may use the API, and how much: API keys of tenants from a file that is read again when it changes.

    [tenants.acme]
    keys = ["sk-acme-…", "sha256:9f86d0…"]   # several are valid at once, so that keys can be replaced one by one
    max_concurrent = 32                      # requests at once; absent: no limit
    requests_per_minute = 600                # absent: no limit
    burst = 20                               # requests that may come at once (default: a tenth of a minute's)
    cache_group = "acme"                     # tenants of one group share prefix caches (default: nobody else)

    [admin]
    keys = ["…"]                             # valid for /admin/ beside BATON_ADMIN_KEY

Each router process takes an equal part of the limits, so that together they keep them. Open streams outlive a change of
the file: a key is looked at once per request. A file that can't be used keeps the one before in force and is complained
about in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from llm_engine.api.errors import ConfigError, RequestError, TooManyRequests

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0  # between two looks at the file
_HASHED = "sha256:"
_MIN_KEY_CHARS = 16

_NO_TENANT = contextlib.nullcontext("")

Headers = Sequence[tuple[bytes, bytes]]
Key = Annotated[str, msgspec.Meta(min_length=_MIN_KEY_CHARS)]


class Unauthorized(RequestError):
    """No key, or one that is not (or no longer) valid."""

    status = 401


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[tenants.NAME]` table."""

    keys: list[Key]
    max_concurrent: Annotated[int, msgspec.Meta(ge=1)] | None = None
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    burst: Annotated[int, msgspec.Meta(ge=1)] | None = None
    cache_group: str = ""


class AdminSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[admin]` table."""

    keys: list[Key] = []


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    tenants: dict[str, TenantSettings] = {}
    admin: AdminSettings = AdminSettings()


class Tenant:
    """Limits of one tenant and what it uses of them now. Told the time; used on the event loop only."""

    def __init__(self, name: str, settings: TenantSettings) -> None:
        self.name = name
        self.open = 0
        self.adopt(settings)
        self._tokens = self._burst
        self._filled = 0.0

    def adopt(self, settings: TenantSettings) -> None:
        """New limits; what is in use stays in use."""
        self.salt = f"tenant:{settings.cache_group or self.name}:"
        self._max_open = settings.max_concurrent
        self._per_s = settings.requests_per_minute / 60 if settings.requests_per_minute is not None else None
        self._burst = float(settings.burst or max(1.0, (settings.requests_per_minute or 0.0) / 10))

    def take(self, now: float) -> None:
        """Begin a request. Raises TooManyRequests."""
        if self._max_open is not None and self.open >= self._max_open:
            raise TooManyRequests(f"tenant {self.name}: {self.open} requests are open (max_concurrent)")
        if self._per_s is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._per_s)
            self._filled = now
            if self._tokens < 1.0:
                wait_s = (1.0 - self._tokens) / self._per_s
                raise TooManyRequests(f"tenant {self.name}: over requests_per_minute", retry_after_s=wait_s)
            self._tokens -= 1.0
        self.open += 1

    def give_back(self) -> None:
        """A request that was taken is over."""
        self.open -= 1


class Tenants:
    """The file's content in force now. Without a file everybody is served and nothing is limited."""

    def __init__(self, path: Path | None, clock: Callable[[], float], *, share: Callable[[], int] = lambda: 1) -> None:
        """`share`: living router processes of the cluster; each takes its part of the limits. Raises ConfigError."""
        self._path = path
        self._clock = clock
        self._count_routers = share
        self._share = share()
        self._file = KeysFile()
        self._tenants: dict[str, Tenant] = {}
        self._by_digest: Mapping[bytes, Tenant] = {}
        self._admin_keys: tuple[str, ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        self._looked = clock()
        if path is not None:
            self._stamp = _stamp(path)
            self._adopt(read(path))

    def admit(self, headers: Headers) -> contextlib.AbstractContextManager[str]:
        """One request of a tenant, which counts until the end of the block; gives the salt of its prefix cache.

        Raises Unauthorized or TooManyRequests.
        """
        tenant = self.check(headers)
        return _NO_TENANT if tenant is None else self._count(tenant)

    @contextlib.contextmanager
    def _count(self, tenant: Tenant) -> Iterator[str]:
        tenant.take(self._clock())
        try:
            yield tenant.salt
        finally:
            tenant.give_back()

    def check(self, headers: Headers) -> Tenant | None:
        """Whose key the request carries; None when no keys are asked for. Raises Unauthorized."""
        if self._path is None:
            return None
        self._look()
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized("send an API key as Authorization: Bearer KEY")
        tenant = self._by_digest.get(_digest(key.strip()))  # of a digest: timing tells nothing about keys
        if tenant is None:
            raise Unauthorized("this API key is not valid")
        return tenant

    def admin_keys(self) -> tuple[str, ...]:
        """Keys of the `[admin]` table."""
        if self._path is not None:
            self._look()
        return self._admin_keys

    def _look(self) -> None:
        """Take over a changed file, and a changed number of routers."""
        now = self._clock()
        if now - self._looked < LOOK_PERIOD_S or self._path is None:
            return
        self._looked = now
        share = self._count_routers()
        if share != self._share:
            self._share = share
            self._adopt(self._file)
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._adopt(read(self._path))
        except ConfigError as exc:
            logger.error("%s; the keys read before stay valid", exc)
            return
        logger.info("%s: %d tenants", self._path, len(self._tenants))

    def _adopt(self, file: KeysFile) -> None:
        """Raises ConfigError, and changes nothing then."""
        by_digest: dict[bytes, str] = {}
        for name, settings in file.tenants.items():
            for key in settings.keys:
                digest = _key_digest(key, name)
                if by_digest.setdefault(digest, name) != name:
                    raise ConfigError(f"{self._path}: tenants {by_digest[digest]} and {name} have the same key")
        tenants: dict[str, Tenant] = {}
        for name, settings in file.tenants.items():
            part = _part(settings, self._share)
            tenants[name] = self._tenants.get(name) or Tenant(name, part)
            tenants[name].adopt(part)
        self._file, self._tenants = file, tenants
        self._by_digest = {digest: tenants[name] for digest, name in by_digest.items()}
        self._admin_keys = tuple(file.admin.keys)


def is_loopback(host: str) -> bool:
    """Whether an address is of this host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read(path: Path) -> KeysFile:
    """Raises ConfigError naming the file and the place."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(tree, KeysFile)
    except OSError as exc:
        raise ConfigError(f"router.tenants_file={path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise ConfigError(f"router.tenants_file={path}: {exc}") from exc


def _part(settings: TenantSettings, share: int) -> TenantSettings:
    """The limits of one of `share` processes."""
    seqs, rate = settings.max_concurrent, settings.requests_per_minute
    return msgspec.structs.replace(
        settings,
        max_concurrent=None if seqs is None else -(-seqs // share),
        requests_per_minute=None if rate is None else rate / share,
        burst=None if settings.burst is None else -(-settings.burst // share),
    )


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when the file is replaced or written."""
    try:
        found = os.stat(path)
    except OSError as exc:
        raise ConfigError(f"router.tenants_file={path}: {exc.strerror}") from exc
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key_digest(key: str, tenant: str) -> bytes:
    if not key.startswith(_HASHED):
        return _digest(key.encode())
    try:
        digest = bytes.fromhex(key.removeprefix(_HASHED))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"tenants.{tenant}.keys: sha256: is followed by 64 hexadecimal digits")
    return digest
