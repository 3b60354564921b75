"""`flwr run simulations/six_sites`, the real command: Flower's SuperLink, Ray, and our apps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from in_process_run import equal, run_in_process
from safetensors.torch import load_file

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_simulations.flower import own_flower, processes_of, run_command
from chainward_simulations.runner import open_sites

SIX_SITES = Path(__file__).resolve().parents[2] / "simulations" / "six_sites"

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    """Environment of a Flower of our own, for all tests of this file."""
    with own_flower(tmp_path_factory.mktemp("flwr-home")) as environment:
        yield environment


def flwr(environment, *command, timeout=300) -> str:
    """Run a Flower command and return all that it printed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def tiny(small_consortium, tmp_path):
    """A whole run of four sites that trains as little as possible."""
    return {
        "data.source": str(small_consortium),
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "student.rounds": 1,
        "student.epochs": 1,
        "federation.threads": 1,
        "output.dir": str(tmp_path / "runs"),
    }


def only_run(settings) -> RunFolder:
    """Return the one run folder that a command has left."""
    (path,) = Path(settings["output.dir"]).iterdir()
    return RunFolder.open(path)


def test_flwr_run_on_fewer_nodes_than_sites_trains_the_models_of_the_plain_runner_bit_for_bit(flower, tiny):
    printed = flwr(flower, *run_command(SIX_SITES, tiny, nodes=2))
    folder = only_run(tiny)
    assert folder.state.status == "finished", printed
    config = RunConfig.from_flat(tiny)
    outcome = run_in_process(config, open_sites(config))
    assert len(outcome.links) == 4
    for key, state in outcome.links.items():
        assert equal(load_file(folder.model_path(key)), state), f"{key} differs"
    assert equal(load_file(folder.model_path("student")), outcome.student)
    assert {site.site for site in folder.load_results().data.sites} == {"ash", "birch", "cedar", "dogwood"}
    assert (folder.path / "report.html").stat().st_size > 10_000


def test_a_bad_setting_stops_the_run_with_one_line_and_without_a_traceback(flower, tiny):
    printed = flwr(flower, *run_command(SIX_SITES, tiny | {"data.source": "phantom", "data.label-skew": 0.5}))
    assert "data.label-skew = 0.5 contradicts data.source = 'phantom'" in printed
    assert "Traceback" not in printed
    listed = json.loads(flwr(flower, "flwr", "list", "--format", "json"))
    assert listed["runs"][0]["status"].startswith("finished:failed")


def workers(environment) -> list[psutil.Process]:
    """Return the processes of Ray that play the hospitals."""
    return [process for process in processes_of(Path(environment["FLWR_HOME"])) if "ClientAppActor" in process.name()]


def wait_for(true, seconds=240):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_worker_that_is_killed_in_the_middle_of_the_chain_costs_nothing(flower, tiny, tmp_path):
    settings = tiny | {"student.rounds": 0, "chain.compare-alone": False, "chain.epochs": 3}
    log = tmp_path / "log"
    with log.open("w") as out:
        run = subprocess.Popen(run_command(SIX_SITES, settings), env=flower, stdout=out, stderr=subprocess.STDOUT)
        wait_for(lambda: "hop 2 of 4" in log.read_text() or run.poll() is not None)
        for worker in workers(flower):
            worker.kill()
        run.wait(timeout=300)
    printed = log.read_text()
    folder = only_run(settings)
    assert folder.state.status == "finished", printed
    assert "the process that simulates it has died" in printed
    for words in ("ray.exceptions", "Worker exit type", "Traceback"):
        assert words not in printed
        assert words not in (folder.path / "run.json").read_text() + (folder.path / "report.html").read_text()
    config = RunConfig.from_flat(settings)
    for key, state in run_in_process(config, open_sites(config)).links.items():
        assert equal(load_file(folder.model_path(key)), state), f"{key} differs"


def test_chainward_run_ends_with_the_report_and_the_runs_status_and_leaves_no_process(tiny, tmp_path):
    settings = tiny | {"student.rounds": 0, "chain.compare-alone": False, "federation.sites": "ash,birch"}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    home = tmp_path / "home"
    environment = os.environ | {
        "HOME": str(home),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [
        sys.executable,
        "-c",
        "from chainward_simulations.cli import main; main()",
        "run",
        str(SIX_SITES),
        *pairs,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    folder = only_run(settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(folder.path / "report.html")
    assert folder.state.status == "finished"
    assert list((home / ".chainward" / "superlinks").iterdir()) == []
    assert not folder.state.process.find()
