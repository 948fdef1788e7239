from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from llm_engine.api.config import SECRET_ENV, ClusterConfig, build
from llm_engine.api.errors import ConfigError
from llm_engine.serving import host_checks, preflight

HCCN = "address_0=10.20.0.1\nnetmask_0=255.255.255.0\naddress_1=10.20.0.2\nnetmask_1=255.255.255.0\n"


def config(**sections: Any) -> ClusterConfig:
    return build({"model": {"path": "/m"}, **sections})


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    code = cli.main(["preflight", *words])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[6:20].strip(): f"{line[:4].strip()} {line[22:]}" for line in lines}


def test_a_good_host_passes_with_one_line_a_check(
    nano_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_ENV, "s" * 32)
    code, lines = said(capsys, "--set", f"model.path={nano_dir}", "--set", "kv.memory_mb=8")
    assert code == 0
    assert list(lines)[:7] == ["checkpoint", "memory", "ports", "devices", "address", "direct ports", "device network"]
    assert lines["secret"] == "ok set"
    assert all(line.startswith(("ok", "warn")) for line in lines.values())


def test_everything_that_is_wrong_shows_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = [f"model.path={tmp_path}", f"worker.request_port={port}", "kv.memory_mb=99999999"]
        code, lines = said(capsys, *[word for setting in settings for word in ("--set", setting)])
    assert code == 2
    assert lines["checkpoint"].startswith("FAIL model.path=")
    assert "Address already in use" in lines["ports"]
    assert "lower kv.memory_mb" in lines["memory"]


def test_a_router_needs_no_weights(nano_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((nano_dir / name).read_bytes())
    assert said(capsys, "--set", f"model.path={tmp_path}", "--role", "router")[0] == 0
    assert said(capsys, "--set", f"model.path={tmp_path}", "--role", "decode")[0] == 2


def test_a_worker_makes_the_same_checks_before_it_loads(nano_dir: Path) -> None:
    tree = {"model": {"path": str(nano_dir)}, "worker": {"host": "192.0.2.77"}}
    with pytest.raises(ConfigError, match=r"worker\.host=192\.0\.2\.77: not an address of this host"):
        preflight.check(build(tree), uses_control_port=True)


@pytest.fixture
def ascend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that shows two Ascend devices."""
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    (tmp_path / "hccn.conf").write_text(HCCN, encoding="utf-8")
    monkeypatch.setattr(host_checks, "DAVINCI", tmp_path)
    monkeypatch.setattr(host_checks, "HCCN_CONF", tmp_path / "hccn.conf")
    return tmp_path


def test_ascend_ports_stay_clear_of_the_direct_transport(ascend: Path) -> None:
    npu = {"backend": "npu"}
    assert host_checks.direct_ports(config(engine=npu)) == "28000 and above"
    assert host_checks.direct_ports(config(engine=npu, worker={"request_port": 28000})) == "28000 and above"
    with pytest.raises(ConfigError, match=r"worker\.metrics_port=27999: .* choose 28000 or more"):
        host_checks.direct_ports(config(engine=npu, worker={"metrics_port": 27999}))
    for device in range(2, 16):
        (ascend / f"davinci{device}").touch()
    with pytest.raises(ConfigError, match="16 devices; choose 36000"):
        host_checks.direct_ports(config(engine=npu, worker={"metrics_port": 35999}))


def test_ascend_devices_need_their_addresses(ascend: Path) -> None:
    npu = config(engine={"backend": "npu"})
    assert host_checks.device_network(npu) == "2 device addresses"
    assert host_checks.hccn_addresses(HCCN) == {0: "10.20.0.1", 1: "10.20.0.2"}
    (ascend / "davinci2").touch()
    with pytest.raises(ConfigError, match="no address_2"):
        host_checks.device_network(npu)
    (ascend / "hccn.conf").unlink()
    with pytest.raises(ConfigError, match="mount it from the host"):
        host_checks.device_network(npu)
    assert host_checks.device_network(config()) == "not needed"


@pytest.mark.parametrize(("backend", "name"), [("npu", "torch_npu"), ("triton", "no device is visible")])
def test_a_missing_accelerator_is_one_line(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this host has one")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=name) as refused:
        host_checks.devices(config(engine={"backend": backend}))
    assert "\n" not in str(refused.value)


def test_shared_memory_that_is_too_small_says_how_to_enlarge_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_checks, "SHM", tmp_path / "missing")
    with pytest.raises(ConfigError, match="mount a tmpfs"):
        host_checks.shared_memory(config())
    monkeypatch.setattr(host_checks, "SHM", tmp_path)
    monkeypatch.setattr(host_checks, "_MIN_SHM_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="emptyDir"):
        host_checks.shared_memory(config())
