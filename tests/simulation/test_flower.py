"""`flwr run simulations/six_sites`, the real command: Flower's SuperLink, Ray, and our apps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_simulations.flower import own_flower, run_command
from chainward_simulations.runner import equal, open_sites, run_in_process

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
def tiny(tmp_path):
    """A whole run on the six phantom sites that trains as little as possible."""
    return {
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.label-fraction": 0.3,
        "student.rounds": 1,
        "student.epochs": 1,
        "output.dir": str(tmp_path / "runs"),
    }


def only_run(settings) -> RunFolder:
    """Return the one run folder that a command has left."""
    (path,) = Path(settings["output.dir"]).iterdir()
    return RunFolder.open(path)


@pytest.mark.parametrize("nodes", [2, 6])
def test_flwr_run_trains_the_models_of_the_plain_runner_bit_for_bit(flower, tiny, nodes):
    printed = flwr(flower, *run_command(SIX_SITES, tiny, nodes))
    folder = only_run(tiny)
    assert folder.state.status == "finished", printed
    config = RunConfig.from_flat(tiny)
    outcome = run_in_process(config, open_sites(config))
    assert len(outcome.links) == 6
    for key, state in outcome.links.items():
        assert equal(load_file(folder.model_path(key)), state), f"{key} differs"
    assert equal(load_file(folder.model_path("student")), outcome.student)
    assert {site.site for site in folder.load_results().data.sites} == {f"site-{i}" for i in range(1, 7)}
    assert (folder.path / "report.html").stat().st_size > 10_000


def test_a_bad_setting_stops_the_run_with_one_line_and_without_a_traceback(flower, tiny):
    printed = flwr(flower, *run_command(SIX_SITES, tiny | {"data.label-skew": 0.5}))
    assert "data.label-skew = 0.5 contradicts data.source = 'phantom'" in printed
    assert "Traceback" not in printed
    listed = json.loads(flwr(flower, "flwr", "list", "--format", "json"))
    assert listed["runs"][0]["status"].startswith("finished:failed")
