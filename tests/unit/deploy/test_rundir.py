from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.desired import Desired
from deploy.identity import ProcessId, descendants, identify, kill_all, wait_gone
from deploy.rundir import AlreadyRunning, ClusterRecord, ControlRecord, NotRunning, RunDir
from llm_engine.api.config import SECRET_ENV
from llm_engine.api.errors import ConfigError

SLEEP = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


def sleeper() -> subprocess.Popen[bytes]:
    child = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


def myself() -> ProcessId:
    known = identify(os.getpid())
    assert known is not None
    return known


def test_only_one_supervisor_holds_a_run_directory(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    assert not second.is_locked()
    first.acquire()
    first.write(ClusterRecord(supervisor=myself()))
    assert second.is_locked()
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}.*baton down"):
        second.acquire()
    first.release()
    assert not second.is_locked()
    second.acquire()
    second.release()


def test_the_kernel_frees_the_lock_of_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"from deploy.rundir import *; RunDir(Path({str(tmp_path)!r})).acquire(); print('held', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    assert RunDir(tmp_path).is_locked()
    child.kill()
    child.communicate(timeout=10)
    assert not RunDir(tmp_path).is_locked()


def test_what_a_dead_supervisor_left_is_told_and_forgotten(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.acquire() is None
    left = ClusterRecord(supervisor=ProcessId(pid=1, started=0), ray_dir="/tmp/x")
    decode_7 = Desired(replicas={"decode": 7}, configured={})
    for record in (left, ControlRecord(control_addr="tcp://h:1", feed_addr="tcp://h:2"), decode_7):
        run_dir.write(record)
    os.close(run_dir._lock_fd or -1)
    heir = RunDir(tmp_path)
    assert heir.acquire() == left
    assert (heir.cluster(), heir.control(), heir.desired()) == (None, None, None)
    heir.release()


def test_the_secret_is_fresh_private_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    run_dir = RunDir(tmp_path / "run")
    run_dir.acquire()
    first = run_dir.create_secret()
    assert stat.S_IMODE((run_dir.path / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
    assert run_dir.key() == first.encode()
    assert run_dir.create_secret() != first
    run_dir.release()
    with pytest.raises(NotRunning, match="baton up"):
        run_dir.key()


def test_a_given_secret_is_used_and_a_short_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path)
    monkeypatch.setenv(SECRET_ENV, "s" * 20)
    assert run_dir.create_secret() == "s" * 20
    monkeypatch.setenv(SECRET_ENV, "short")
    with pytest.raises(ConfigError, match=SECRET_ENV):
        run_dir.create_secret()


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert (run_dir.cluster(), run_dir.control(), run_dir.desired()) == (None, None, None)
    cluster = ClusterRecord(supervisor=myself(), processes=[myself()], ray_dir="/tmp/x", url="http://h:1", ready=True)
    control = ControlRecord(control_addr="tcp://127.0.0.1:1", feed_addr="tcp://127.0.0.1:2")
    desired = Desired(replicas={"decode": 3}, configured={"decode": 1})
    for record in (cluster, control, desired):
        run_dir.write(record)
    assert (run_dir.cluster(), run_dir.control(), run_dir.desired()) == (cluster, control, desired)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.json", "control.json", "desired.json"]


def test_a_process_is_known_by_more_than_its_pid() -> None:
    child = sleeper()
    known = identify(child.pid)
    assert known is not None
    assert known.alive()
    assert known in descendants(os.getpid())
    stranger = ProcessId(pid=child.pid, started=known.started - 1)
    stranger.send(signal.SIGKILL)
    assert not stranger.alive()
    assert wait_gone([known], 0.1) == [known]
    assert kill_all([known, stranger], grace_s=0.1) == [known]
    assert not known.alive(), "a zombie does not count"
    child.communicate(timeout=10)
    assert identify(child.pid) is None


def test_a_bound_command_dies_with_its_parent() -> None:
    code = (
        "import subprocess, sys; from deploy.fate import bound_command;"
        f"c = subprocess.Popen(bound_command({SLEEP!r}), stdout=subprocess.PIPE); c.stdout.readline();"
        "print(c.pid, flush=True); input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = identify(int(parent.stdout.readline()))
    assert child is not None
    parent.kill()
    parent.communicate(timeout=10)
    assert wait_gone([child], 10.0) == []


def test_a_bound_command_does_not_start_for_a_parent_already_gone() -> None:
    command = [sys.executable, "-m", "deploy.fate", "1", sys.executable, "-c", "print('ran')"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
