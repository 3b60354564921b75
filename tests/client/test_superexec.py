"""Client processes that are copies of a prepared one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus, SubprocessExecutor
from prepared_copy import NEEDED, described

from chainward_client import superexec
from chainward_client.superexec import PREPARED, PreparedExecutor

pytestmark = pytest.mark.slow

PATIENCE = 180
RUN_CLIENT = superexec.run_client


@pytest.fixture(scope="module", autouse=True)
def _copies_describe_themselves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superexec, "run_client", described)
        yield


def request(token: Path, kind: TaskType = TaskType.CLIENT_APP) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=kind,
        runtime_api_address="127.0.0.1:1",
        token=str(token),
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=os.getpid(),
        suppress_output=False,
        task_id=1,
    )


@pytest.fixture(scope="module")
def executor():
    executor = PreparedExecutor()
    executor.prepare()
    return executor


def answer(executor: PreparedExecutor, path: Path) -> dict[str, object]:
    assert executor.launch(request(path)).status == LaunchResultStatus.ACCEPTED
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, "the copy has written nothing"
        time.sleep(0.02)
    return json.loads(path.read_text())


def prepared_process() -> psutil.Process:
    return psutil.Process(forkserver._forkserver._forkserver_pid)


def test_each_request_gets_a_process_of_its_own_with_everything_imported(executor, tmp_path):
    one, two = answer(executor, tmp_path / "one"), answer(executor, tmp_path / "two")
    assert len({one["pid"], two["pid"], os.getpid()}) == 3
    assert one["parent"] == two["parent"] == prepared_process().pid
    assert one["imported"] == list(NEEDED)
    assert one["sum"] == 512.0**3


def test_the_prepared_process_can_be_copied_it_has_one_thread_and_no_gpu(executor, tmp_path):
    assert prepared_process().num_threads() == 1
    about = answer(executor, tmp_path / "one")
    assert about["threads"] == 1
    assert not about["gpu"]


def test_two_copies_share_no_random_numbers(executor, tmp_path):
    one, two = answer(executor, tmp_path / "one"), answer(executor, tmp_path / "two")
    assert not set(one["random"]) & set(two["random"])


def test_a_prepared_process_that_was_killed_is_made_anew(executor, tmp_path):
    before = answer(executor, tmp_path / "one")
    prepared_process().send_signal(signal.SIGKILL)
    time.sleep(0.5)
    after = answer(executor, tmp_path / "two")
    assert after["parent"] != before["parent"]
    assert after["imported"] == list(NEEDED)


def test_where_nothing_can_be_prepared_the_superexec_goes_on_without(monkeypatch, caplog):
    def refused(*_args, **_settings):
        raise EOFError("unexpected EOF")

    executor = PreparedExecutor()
    monkeypatch.setattr(executor._context.Process, "start", refused)
    executor.prepare()
    assert "no process can be prepared (unexpected EOF); each request starts a new one" in caplog.text


def test_where_nothing_can_be_copied_the_request_starts_a_process_as_flower_does(monkeypatch, tmp_path, caplog):
    launched = []
    monkeypatch.setattr(SubprocessExecutor, "launch", lambda self, spec: launched.append(spec.task_type))

    def refused(*_args, **_settings):
        raise OSError("Resource temporarily unavailable")

    executor = PreparedExecutor()
    monkeypatch.setattr(executor._context.Process, "start", refused)
    executor.launch(request(tmp_path / "one"))
    assert launched == [TaskType.CLIENT_APP]
    assert "the prepared process can't be copied (Resource temporarily unavailable)" in caplog.text


def test_work_of_other_kinds_is_started_as_flower_does(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(SubprocessExecutor, "launch", lambda self, spec: launched.append(spec.task_type))
    PreparedExecutor().launch(request(tmp_path / "one", TaskType.SERVER_APP))
    assert launched == [TaskType.SERVER_APP]


def test_the_place_where_flower_chooses_how_processes_are_started_is_where_we_look():
    import flwr.supercore.superexec.run_superexec  # noqa: F401

    module = sys.modules["flwr.supercore.superexec.run_superexec"]
    assert module.get_executor is module.run_superexec.__globals__["get_executor"]
    assert "get_executor" in module.run_superexec.__code__.co_names


def test_what_is_prepared_can_be_imported():
    import importlib

    assert all(importlib.import_module(name) for name in PREPARED), (
        "Python's fork server is silent about what it can't import"
    )
    assert RUN_CLIENT.__module__ == "chainward_client.superexec"
