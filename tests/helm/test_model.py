"""The checkpoint's way to a pod: complete, verified, resumed, or refused."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from deploy.kube.__main__ import main
from deploy.kube.fetch import FetchFailed, fetch, verify
from llm_engine.api.errors import ConfigError


def safetensors(payload: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}}).encode()
    return len(header).to_bytes(8, "little") + header + payload


def files() -> dict[str, bytes]:
    shards = {f"model-0000{i}-of-00002.safetensors": safetensors(bytes([i]) * 100_000) for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
    found = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "assets/template.jinja": b"hello",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
    }
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in found.items()]
    return {**found, "SHA256SUMS": "\n".join(lines).encode()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name, content in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_checkpoint_arrives_whole_and_is_not_fetched_twice(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    dest = tmp_path / "models" / "checkpoint"
    fetch(source.as_uri(), dest, say=said.append)
    assert {str(p.relative_to(dest)) for p in dest.rglob("*") if p.is_file()} == {*files(), ".lock"}
    assert verify(dest) == 2
    assert any(line.startswith("100 %") for line in said)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*.safetensors")}
    said.clear()
    fetch(source.as_uri(), dest, say=said.append)
    assert "; 0 B to fetch" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in dest.rglob("*.safetensors")}


def test_an_interrupted_download_goes_on(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    fetch(source.as_uri(), dest, say=lambda _: None)
    lost = dest / "model-00002-of-00002.safetensors"
    content = lost.read_bytes()
    lost.rename(lost.with_name(lost.name + ".part"))
    with pytest.raises(ConfigError, match="model-00002"):
        verify(dest)
    fetch(source.as_uri(), dest, say=lambda _: None)
    assert lost.read_bytes() == content
    assert verify(dest) == 2


def test_a_damaged_file_never_gets_its_name(source: Path, tmp_path: Path) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FetchFailed, match=r"model-00001.*SHA-256"):
        fetch(source.as_uri(), tmp_path / "dest", say=lambda _: None)
    assert not (tmp_path / "dest" / shard.name).exists()


def test_a_router_takes_everything_but_the_weights(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    fetch(source.as_uri(), dest, weights=False, say=lambda _: None)
    assert (dest / "tokenizer.json").exists()
    assert not list(dest.glob("*.safetensors"))
    assert verify(dest, weights=False) == 0


def test_only_one_pod_downloads_into_a_volume(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    with (dest / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FetchFailed, match="another process"):
            fetch(source.as_uri(), dest, timeout_s=0.0, say=lambda _: None)
    fetch(source.as_uri(), dest, say=lambda _: None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model-00001-of-00002.safetensors", None, "model-00001"),
        ("model-00002-of-00002.safetensors", safetensors(b"x" * 50)[:-1], "its header says"),
        ("model-00002-of-00002.safetensors", b"\xff" * 40, "not a safetensors file"),
        ("config.json", None, "config.json"),
    ],
)
def test_an_incomplete_checkpoint_is_named(
    source: Path, name: str, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    assert main(["model", "--path", str(source)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert said in line


class Bucket(http.server.BaseHTTPRequestHandler):
    """A bucket of S3: lists and gives. Whoever does not sign is turned away."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects = {f"models/v32/{name}": content for name, content in files().items()}

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        key = urllib.parse.unquote(url.path).removeprefix("/weights").strip("/")
        if "Credential=reader/" not in self.headers.get("Authorization", ""):
            return self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
        if not key:
            prefix = dict(urllib.parse.parse_qsl(url.query)).get("prefix", "")
            entries = "".join(
                f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;e&quot;</ETag><Size>{len(content)}</Size></Contents>"
                for name, content in self.objects.items()
                if name.startswith(prefix)
            )
            return self._send(200, f"<ListBucketResult><KeyCount>1</KeyCount>{entries}</ListBucketResult>".encode())
        content = self.objects.get(key)
        return self._send(404 if content is None else 200, content or b"<Error><Code>NoSuchKey</Code></Error>")

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_s3_with_credentials_from_the_environment(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the init container gets them, from a Secret."""
    for name, value in {
        "AWS_ENDPOINT_URL": bucket,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "eu",
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    dest = tmp_path / "dest"
    assert main(["model", "--path", str(dest), "--source", "s3://weights/models/v32"]) == 0
    assert "complete (2 weight files)" in capsys.readouterr().out
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    assert main(["model", "--path", str(tmp_path / "other"), "--source", "s3://weights/models/v32"]) == 1
    assert "s3://weights/models/v32" in capsys.readouterr().err
