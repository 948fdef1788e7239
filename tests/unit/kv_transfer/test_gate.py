import threading

from kv_transfer.gate import WriteGate


def test_no_write_starts_after_the_stop() -> None:
    gate = WriteGate()
    stopped: list[str] = []
    assert gate.enter()
    gate.leave()
    gate.stop(lambda: stopped.append("at once"))
    assert stopped == ["at once"]
    assert gate.stopped()
    assert not gate.enter()
    gate.stop(lambda: stopped.append("again"))
    assert stopped == ["at once", "again"]


def test_the_stop_is_reported_when_the_running_write_has_ended() -> None:
    gate = WriteGate()
    stopped: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def write() -> None:
        assert gate.enter()
        inside.set()
        go_on.wait(5)
        gate.leave()

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(5)
    gate.stop(lambda: stopped.append("first"))
    gate.stop(lambda: stopped.append("second"))
    assert stopped == []
    go_on.set()
    writer.join()
    assert stopped == ["first", "second"]
