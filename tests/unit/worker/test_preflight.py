"""Start-up checks: one line, naming the setting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llm_engine.api.config import WorkerConfig, build
from llm_engine.api.errors import ConfigError
from llm_engine.serving import preflight
from llm_engine.serving.request_plane import RequestPlane
from tests.unit.worker.recorder import Recorder


def test_a_checkpoint_passes(nano_dir: Path) -> None:
    preflight.check(build({"model": {"path": str(nano_dir)}}), uses_control_port=True)
    assert preflight.checkpoint_bytes(nano_dir) > 100_000


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=.*gone: not a directory"):
        preflight.check_checkpoint(tmp_path / "gone")


def test_a_directory_without_weights_or_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        preflight.check_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"config\.json is missing or not readable"):
        preflight.check_checkpoint(tmp_path)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker = WorkerConfig(control_port=port)
        with pytest.raises(ConfigError, match=rf"worker\.control_port={port}: can't listen"):
            preflight.hold_ports(worker, uses_control_port=True)
        preflight.hold_ports(worker, uses_control_port=False).close()


def test_a_held_port_is_nobody_elses_but_can_be_listened_on() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with preflight.hold_ports(WorkerConfig(request_port=port), uses_control_port=False), socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        plane = RequestPlane(b"k" * 32, Recorder(), heartbeat_s=1.0, silence_s=1.0)
        try:
            assert plane.bind("127.0.0.1", port) == f"tcp://127.0.0.1:{port}"
        finally:
            plane.close()


def test_two_settings_must_not_name_one_port() -> None:
    with pytest.raises(ConfigError, match=r"worker\.metrics_port=1234\d: the same as worker\.request_port"):
        preflight.hold_ports(WorkerConfig(request_port=12345, metrics_port=12345), uses_control_port=False)


def test_a_host_that_peers_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"worker\.host=0\.0\.0\.0: peers are told this address"):
        preflight.hold_ports(WorkerConfig(host="0.0.0.0"), uses_control_port=False)


def test_more_memory_than_there_is_is_refused() -> None:
    available = preflight.available_memory()
    assert available > 0
    preflight.check_memory(available // 4)
    with pytest.raises(ConfigError, match=r"kv\.memory_mb: weights and cache need"):
        preflight.check_memory(available * 2)


def test_the_tighter_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_CGROUP", tmp_path)
    host = preflight.available_memory()
    (tmp_path / "memory.current").write_text("50000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 20000000\n")
    (tmp_path / "memory.max").write_text("100000000\n")
    assert preflight.available_memory() == 70_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight.available_memory() == pytest.approx(host, rel=0.2)
