"""Bring a checkpoint from an object store to a volume, and tell whether a volume holds all of one.

A file appears under its own name only when it is complete and its checksum is right, so an interrupted download goes on
where it stopped, and pods that share a volume wait for the one that downloads. Files of the source named SHA256SUMS are
taken as the checksums of their neighbours.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from llm_engine.api.errors import ConfigError, ServingError

Say = Callable[[str], None]

CHECKSUMS = "SHA256SUMS"
WEIGHTS = ".safetensors"
_PART = ".part"
_CHUNK = 8 << 20
_RESERVE = 1 << 30  # free space that is left alone
_HEADER_LIMIT = 256 << 20
_LOCK_POLL_S = 2.0


class FetchFailed(ServingError):
    """The checkpoint could not be brought here. Running the same command again goes on where it stopped."""


def fetch(
    url: str, dest: Path, *, weights: bool = True, workers: int = 8, timeout_s: float = 4 * 3600.0, say: Say = print
) -> None:
    """Download all files below `url` (s3, gs, az, file), or all but the weights, into `dest`.

    Credentials and endpoints come from the environment as usual for the store (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).
    Raises FetchFailed or ConfigError.
    """
    deadline = time.monotonic() + timeout_s
    dest.mkdir(parents=True, exist_ok=True)
    with _alone(dest, deadline, say):
        try:
            store, files = _listing(url, weights)
            sums = _checksums(store, files)
            missing = {path: size for path, size in files.items() if not _is_there(dest / path, size)}
            say(f"{url}: {len(files)} files, {_size(sum(files.values()))}; {_size(sum(missing.values()))} to fetch")
            _check_space(dest, sum(missing.values()))
            _Download(store, dest, sums, missing, deadline, say).run(workers)
        except ServingError:
            raise
        except Exception as exc:  # the store's library has errors of many kinds
            raise FetchFailed(f"{url}: {' '.join(str(exc).split())[:300]}") from exc


def verify(path: Path, *, weights: bool = True) -> int:
    """Number of weight files of a complete checkpoint. Raises ConfigError naming the first file that is not."""
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"{path}: no config.json: this is not a checkpoint, or its download has not finished")
    if not weights:
        return 0
    index = path / "model.safetensors.index.json"
    names = {file.name for file in path.glob(f"*{WEIGHTS}")}
    if index.is_file():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if not names:
        raise ConfigError(f"{path}: no *{WEIGHTS} in it")
    for name in sorted(names):
        _check_weights(path / name)
    return len(names)


class _Download:
    """The files of one checkpoint that are not here yet."""

    def __init__(
        self, store: Any, dest: Path, sums: Mapping[str, str], files: Mapping[str, int], deadline: float, say: Say
    ) -> None:
        self._store, self._dest, self._sums, self._files = store, dest, sums, files
        self._deadline = deadline
        self._say = say
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._total = sum(files.values())
        self._done = 0
        self._started = self._told = time.monotonic()

    def run(self, workers: int) -> None:
        """Fetch all, `workers` at a time. The first failure stops the rest and is raised."""
        with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
            futures = [pool.submit(self._one, path) for path in sorted(self._files)]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self._failed.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, path: str) -> None:
        import obstore

        target = self._dest / path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + _PART)
        digest = hashlib.sha256()
        with part.open("wb") as file:
            for chunk in obstore.get(self._store, path).stream(min_chunk_size=_CHUNK):
                if self._failed.is_set():
                    raise FetchFailed("stopped because another file failed")
                if time.monotonic() > self._deadline:
                    raise FetchFailed("time is up; run again to go on")
                file.write(chunk)
                digest.update(chunk)
                self._advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        wanted = self._sums.get(path)
        if wanted is not None and digest.hexdigest() != wanted:
            part.unlink()
            raise FetchFailed(
                f"{path}: its SHA-256 is not the one in {CHECKSUMS}; the object or the transfer is damaged"
            )
        if part.stat().st_size != self._files[path]:
            raise FetchFailed(f"{path}: {part.stat().st_size} bytes came, {self._files[path]} were listed")
        part.replace(target)

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._told < 10.0 and self._done < self._total:
                return
            self._told = now
            rate = self._done / max(now - self._started, 1e-3)
            left_s = (self._total - self._done) / max(rate, 1.0)
            percent = 100 * self._done // max(self._total, 1)
            self._say(
                f"{percent} %  {_size(self._done)} of {_size(self._total)}  {_size(rate)}/s  {left_s / 60:.0f} min left"
            )


def _listing(url: str, weights: bool) -> tuple[Any, dict[str, int]]:
    try:
        import obstore
        from obstore.store import from_url
    except ModuleNotFoundError as exc:
        raise ConfigError("obstore is not installed: `pip install obstore`") from exc
    store = from_url(url)
    files = {
        entry["path"]: int(entry["size"])
        for batch in obstore.list(store)
        for entry in batch
        if (weights or not entry["path"].endswith(WEIGHTS)) and not entry["path"].endswith(_PART)
    }
    for path in files:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise FetchFailed(f"{url}: {path!r} would leave the destination")
    if "config.json" not in files:
        raise ConfigError(f"{url}: no config.json there; give the directory of the checkpoint")
    return store, files


def _checksums(store: Any, files: Mapping[str, int]) -> dict[str, str]:
    import obstore

    sums: dict[str, str] = {}
    for path in files:
        where = PurePosixPath(path)
        if where.name == CHECKSUMS:
            for line in bytes(obstore.get(store, path).bytes()).decode().splitlines():
                digest, _, name = line.partition(" ")
                if name:
                    sums[str(where.parent / name.strip().lstrip("*"))] = digest.lower()
    return sums


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_space(dest: Path, needed: int) -> None:
    free = shutil.disk_usage(dest).free
    if needed and needed + _RESERVE > free:
        raise ConfigError(f"{dest}: {_size(needed)} to fetch, {_size(free)} free: a larger volume is needed")


def _check_weights(file: Path) -> None:
    """The header of a safetensors file says how long the file is."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, _HEADER_LIMIT):
                raise ConfigError(f"{file}: not a safetensors file, or cut off")
            header = json.loads(stream.read(length))
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"{file}: not a safetensors file, or cut off") from exc
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise ConfigError(f"{file}: {size} bytes, its header says {8 + length + max(ends, default=0)}: fetch it again")


@contextlib.contextmanager
def _alone(dest: Path, deadline: float, say: Say) -> Iterator[None]:
    """Only one process downloads into a directory; the kernel frees the lock of one that dies."""
    with (dest / ".lock").open("w") as lock:
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetchFailed(f"{dest}: another process has been downloading for too long") from None
            if not waited:
                say(f"{dest}: another process is downloading; waiting for it")
                waited = True
            time.sleep(_LOCK_POLL_S)
        yield


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
