"""One process at a time is at work on a task, and others can see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from chainward_client.work_lock import WorkLock
from chainward_shared.errors import StoreError

HOLDER = """
import sys, time
from pathlib import Path
from chainward_client.work_lock import WorkLock
with WorkLock(Path(sys.argv[1])).hold(float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "at-work-abc.lock"


@pytest.fixture
def other(path):
    """Start another process that holds the lock."""
    started = []

    def start(until, sleeping):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), str(until), str(sleeping)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_can_be_seen_whether_anyone_is_at_work(path):
    lock = WorkLock(path)
    assert not lock.held
    with lock.hold(10):
        assert WorkLock(path).held
    assert not lock.held
    assert not path.exists()


def test_a_process_that_is_killed_is_no_longer_at_work(path, other):
    process = other(60, 60)
    assert WorkLock(path).held
    process.kill()
    process.wait()
    assert not WorkLock(path).held
    with WorkLock(path).hold(1):
        assert WorkLock(path).held


@pytest.mark.slow
def test_who_comes_second_waits_for_the_first(path, other):
    process = other(60, 1.5)
    with WorkLock(path).hold(30):
        assert process.wait(timeout=20) == 0, "it has finished by itself"
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.slow
def test_a_process_for_whose_answer_nobody_waits_any_more_is_ended(path, other):
    process = other(0.2, 600)
    started = time.monotonic()
    with WorkLock(path).hold(30):
        assert process.wait(timeout=20) == -9
    assert time.monotonic() - started < 15


@pytest.mark.slow
def test_a_process_that_is_still_waited_for_is_not_ended(path, other):
    process = other(600, 600)
    with pytest.raises(StoreError, match="another process has kept it"), WorkLock(path).hold(1.5):
        pass
    assert process.poll() is None


@pytest.mark.slow
def test_a_process_of_the_same_number_that_does_not_hold_the_lock_is_not_ended(path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with WorkLock(path).hold(600):
            path.write_text(json.dumps({"pid": bystander.pid, "until": 0}))
            with pytest.raises(StoreError), WorkLock(path).hold(1.5):
                pass
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
def test_several_who_wait_come_one_after_the_other(path):
    inside, most = [], []

    def work():
        with WorkLock(path).hold(60):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 5
