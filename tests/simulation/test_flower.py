"""`flwr run simulations/six_sites`, the real command: Flower's SuperLink, Ray, and our apps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_simulations.flower import own_superlink
from chainward_simulations.runner import equal, open_sites, run_in_process

SIX_SITES = Path(__file__).resolve().parents[2] / "simulations" / "six_sites"

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    """A SuperLink of our own, for all tests of this file."""
    with own_superlink(tmp_path_factory.mktemp("flwr-home")) as link:
        yield link


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
def test_flwr_run_trains_the_models_of_the_plain_runner_bit_for_bit(superlink, tiny, nodes):
    command = superlink.run(SIX_SITES, tiny, nodes=nodes, timeout=300)
    folder = only_run(tiny)
    assert folder.state.status == "finished", command.stdout + command.stderr
    config = RunConfig.from_flat(tiny)
    outcome = run_in_process(config, open_sites(config))
    assert len(outcome.links) == 6
    for key, state in outcome.links.items():
        assert equal(load_file(folder.model_path(key)), state), f"{key} differs"
    assert equal(load_file(folder.model_path("student")), outcome.student)
    assert {site.site for site in folder.load_results().data.sites} == {f"site-{i}" for i in range(1, 7)}
    assert (folder.path / "report.html").stat().st_size > 10_000


def test_a_bad_setting_stops_the_run_with_one_line_and_without_a_traceback(superlink, tiny):
    command = superlink.run(SIX_SITES, tiny | {"data.label-skew": 0.5}, timeout=300)
    printed = command.stdout + command.stderr
    assert "data.label-skew = 0.5 contradicts data.source = 'phantom'" in printed
    assert "Traceback" not in printed
    listed = json.loads(_flwr_list(superlink))
    assert listed["runs"][0]["status"].startswith("finished:failed")


def _flwr_list(superlink) -> str:
    script = Path(sys.executable).with_name("flwr")
    command = [str(script), "list", superlink.connection, "--format", "json"]
    return subprocess.run(
        command, env=superlink.environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
