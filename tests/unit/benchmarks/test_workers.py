"""Processes that answer in time or are killed, with all that they started."""

import os
import time

import psutil
import pytest
from denoisers.workers import Worker, WorkerError


def remember(state, value):
    state["seen"] = [*state.get("seen", []), value]
    return os.getpid(), state["seen"]


def fail(state):
    raise ValueError("no such kernel")


def sleep_beside_a_child(state, path):
    import subprocess

    child = subprocess.Popen(["sleep", "60"])
    path.write_text(f"{child.pid}")
    time.sleep(60)


def end(state):
    os._exit(3)


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_worker_remembers_and_survives_an_error(tmp_path):
    with Worker(tmp_path / "log") as worker:
        pid, _ = worker.ask(remember, 1, timeout=60)
        assert pid != os.getpid()
        with pytest.raises(WorkerError, match="ValueError: no such kernel"):
            worker.ask(fail, timeout=60)
        assert worker.ask(remember, 2, timeout=60) == (pid, [1, 2])
    assert not runs(pid)


def test_silent_worker_is_killed_with_what_it_started(tmp_path):
    noted = tmp_path / "child"
    worker = Worker(tmp_path / "log")
    worker.ask(remember, 0, timeout=60)  # the process has started
    with pytest.raises(WorkerError, match="no answer within 2 s"):
        worker.ask(sleep_beside_a_child, noted, timeout=2)
    assert not runs(int(noted.read_text()))


def test_lost_worker_is_named(tmp_path):
    with Worker(tmp_path / "log") as worker, pytest.raises(WorkerError, match="exit code 3"):
        worker.ask(end, timeout=60)
