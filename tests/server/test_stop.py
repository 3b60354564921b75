"""Ending a run and what it left behind: all of that, and nothing else; and the words with which a run is resumed."""

from __future__ import annotations

import getpass
import hashlib
import os
import shlex
import subprocess
import sys
import time

import psutil
import pytest
import tomli_w
from flwr.common.config import parse_config_args

from chainward_server import stop
from chainward_server.run_folder import RunFolder
from chainward_server.run_process import RunProcess
from chainward_server.stop import left_behind, stop_leftovers, stop_run
from chainward_server.surroundings import Surroundings
from chainward_shared.config import OutputConfig, RunConfig
from chainward_shared.errors import ConfigError, RunFolderError

SLEEP = "import time; time.sleep(120)"


@pytest.fixture
def started():
    """Start processes that are ended with the test."""
    processes = []

    def start(*arguments, code=SLEEP):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments])
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def folder_of(tmp_path, process, **more) -> RunFolder:
    """Return the folder of a run that `process` coordinates."""
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(tmp_path / "runs")}))
    made = psutil.Process(process.pid).create_time()
    folder.begin(RunProcess.current().model_copy(update={"pid": process.pid, "created": made, **more}))
    return folder


def session(process) -> str:
    """Return an argument as Ray's own processes have it that `process` has started."""
    return f"--session-dir=/tmp/ray/session_2026-01-31_10-11-12_123456_{process.pid}"


def alive(process) -> bool:
    return process.poll() is None


@pytest.mark.slow
def test_a_stopped_run_is_ended_with_its_children_and_says_so(tmp_path, started):
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"
    run = started(code=child)
    while not psutil.Process(run.pid).children():
        time.sleep(0.02)
    (inner,) = psutil.Process(run.pid).children()
    folder = folder_of(tmp_path, run)
    done = stop_run(folder.path, grace=5)
    assert (done.was_running, done.ended) == (True, 2)
    assert not alive(run) and not inner.is_running()
    state = RunFolder.open(folder.path).state
    assert (state.status, state.reason) == ("stopped", "stopped by `chainward stop`")


def test_what_a_killed_run_left_behind_is_found_by_its_ray_session_and_ended(tmp_path, started):
    run, other = started(), started()
    folder = folder_of(tmp_path, run)
    raylet, of_another_run, ordinary = started(session(run)), started(session(other)), started("--session-dir=/tmp/x")
    run.kill()
    run.wait()
    assert [process.pid for process in left_behind(folder.state.process)] == [raylet.pid]
    (done,) = stop_leftovers(folder.path.parent)
    assert (done.was_running, done.ended) == (False, 1)
    assert not alive(raylet)
    assert alive(of_another_run) and alive(ordinary) and alive(other)
    assert RunFolder.open(folder.path).state.status == "stopped"
    assert stop_leftovers(folder.path.parent) == []


def test_processes_that_are_older_than_the_run_are_not_its(tmp_path, started):
    """The number of a process is given again: an old session may end with the number that the run has now."""
    run = started()
    older = started(session(run))
    folder = folder_of(tmp_path, run)
    process = folder.state.process.model_copy(update={"created": psutil.Process(older.pid).create_time() + 10})
    assert left_behind(process) == []


def test_runs_at_work_are_left_alone_unless_they_are_named(tmp_path, started):
    run = started()
    folder_of(tmp_path, run)
    assert stop_leftovers(tmp_path / "runs") == []
    assert alive(run)


def test_a_run_that_has_outlived_its_superlink_is_left_behind(tmp_path, started, monkeypatch):
    run = started()
    folder_of(tmp_path, run)
    monkeypatch.setattr(stop, "is_orphan", lambda process: process.pid == run.pid)
    (done,) = stop_leftovers(tmp_path / "runs")
    assert done.was_running and not alive(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "elsewhere"}, "was started on 'elsewhere'; stop it there"),
        ({"created": 1.0}, "has ended (finished) and left no process behind"),
    ],
)
def test_what_cannot_be_stopped_is_refused_in_one_line(tmp_path, started, changes, words):
    folder = folder_of(tmp_path, started(), **changes)
    folder.end("finished")
    with pytest.raises(RunFolderError) as refused:
        stop_run(folder.path)
    assert words in str(refused.value)


def test_a_run_at_work_is_not_resumed_beside_itself(tmp_path, started):
    folder = folder_of(tmp_path, started())
    config = RunConfig.from_flat({"output.dir": str(tmp_path / "runs"), "output.resume": folder.path.name})
    with pytest.raises(RunFolderError) as refused:
        RunFolder.resume(config)
    assert "is at work" in str(refused.value) and "chainward stop" in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "runs",
        "my runs",
        "it's",
        'a "quoted" one',
        "dollar $HOME",
        "back\\slash",
        "ends with \\",
        '\\" both',
        "Läufe",
        "a=b",
    ],
)
def test_what_is_printed_to_resume_a_run_resumes_it_wherever_its_folder_is(tmp_path, name):
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(tmp_path / name), "chain.laps": 3}))
    folder.end("failed", "the disk is full")
    option, pairs = shlex.split(folder.how_to_resume)
    assert option == "--run-config"
    resumed = RunFolder.resume(RunConfig.from_flat(parse_config_args([pairs])))
    assert resumed.path == folder.path
    assert resumed.config.chain.laps == 3


@pytest.mark.parametrize(("key", "value"), [("accept", "all"), ("accept", "better"), ("refit", "laps")])
def test_a_run_with_a_setting_that_there_is_no_more_can_be_read_and_is_resumed_only_where_it_said_nothing(
    tmp_path, key, value
):
    given = {"output.dir": str(tmp_path), "chain.laps": 3}
    folder = RunFolder.create(RunConfig.from_flat(given))
    folder.end("failed", "the disk is full")
    settings = tomli_w.dumps(folder.config.tables() | {"chain": folder.config.tables()["chain"] | {key: value}})
    (folder.path / "config.toml").write_text(settings)
    folder.state.config = hashlib.sha256(settings.encode()).hexdigest()
    folder.end("failed", "the disk is full")
    assert RunFolder.open(folder.path).config.chain.laps == 3
    again = RunConfig.from_flat({"output.dir": str(tmp_path), "output.resume": folder.run_id})
    if value == "all":
        assert RunFolder.resume(again).config.chain.laps == 3
        return
    with pytest.raises(
        RunFolderError, match=rf"chain\.{key} = '{value}', which there is no more; finish it with the version"
    ):
        RunFolder.resume(again)
    assert RunFolder.open(folder.path).state.status == "failed"


def test_what_is_printed_to_resume_a_run_in_the_usual_folder_is_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder.create(RunConfig())
    folder.end("failed", "the disk is full")
    assert folder.how_to_resume == f"--run-config 'output.resume=\"{folder.path.name}\"'"
    (pairs,) = shlex.split(folder.how_to_resume)[1:]
    assert RunFolder.resume(RunConfig.from_flat(parse_config_args([pairs]))).path == folder.path
    assert OutputConfig().dir == "~/.chainward/runs"


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_nothing_is_printed_where_resuming_would_not_help(tmp_path, status):
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(tmp_path)}))
    folder.end(status, "an unknown backbone", resumable=False)
    assert folder.how_to_resume is None


def test_settings_that_no_run_can_have_are_not_to_be_resumed(settings, coordinated):
    with pytest.raises(ConfigError):
        coordinated(settings | {"chain.strands": 1, "data.source": "relative/data.yaml"})
    for backbone in ("no_such_backbone",):
        with pytest.raises(Exception, match="no_such_backbone"):
            coordinated(settings | {"chain.backbone": backbone})
        from pathlib import Path

        (path,) = Path(settings["output.dir"]).iterdir()
        assert RunFolder.open(path).how_to_resume is None


def test_a_run_in_another_persons_superlink_is_noticed():
    here = Surroundings("ann", "/home/ann", "", "/opt/chainward")
    assert here.differences(here) == []
    assert here.differences(Surroundings("bob", "/home/bob", "", "")) == ["it works as user 'ann' and not as 'bob'"]
    assert here.differences(Surroundings("ann", "/home/ann", "/srv/flwr", "/home/ann/venv")) == [
        "its FLWR_HOME is the default and not /srv/flwr",
        "its installation is /opt/chainward and not /home/ann/venv",
    ]


def test_the_surroundings_of_a_process_are_read_from_it(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "FLWR_HOME": "/srv/flwr"}
    process = subprocess.Popen([sys.executable, "-c", SLEEP], env=environment)
    try:
        for _ in range(500):  # a process that has only just begun shows neither words nor environment
            if psutil.Process(process.pid).cmdline() and psutil.Process(process.pid).environ():
                break
            time.sleep(0.01)
        found = Surroundings.of(psutil.Process(process.pid))
        assert (found.user, found.home, found.flower_home) == (getpass.getuser(), str(tmp_path), "/srv/flwr")
        assert any("home folder" in words for words in Surroundings.current().differences(found))
    finally:
        process.kill()
        process.wait()
