"""The coordinator's command, as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chainward_server.run_folder import RunFolder


def chainward(*words: str) -> subprocess.CompletedProcess[str]:
    """Type a command."""
    script = Path(sys.executable).with_name("chainward")
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [str(script), *words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.fixture
def finished(finished_chain, tmp_path):
    """A finished run, for one test to damage."""
    there = finished_chain.folder.path
    return RunFolder.open(Path(shutil.copytree(there, tmp_path / "runs" / there.name)))


@pytest.mark.slow
def test_runs_are_listed_for_people_and_for_scripts(finished):
    listed = chainward("runs", "--dir", str(finished.path.parent))
    assert listed.returncode == 0
    assert finished.state.run_id in listed.stdout
    (row,) = json.loads(chainward("runs", "--json", "--dir", str(finished.path.parent)).stdout)
    assert (row["run"], row["status"]) == (finished.state.run_id, "finished")
    assert float(row["chain"]) == pytest.approx(
        finished.load_results().final["chain"].pooled.balanced_accuracy, abs=6e-4
    )


@pytest.mark.slow
def test_a_damaged_run_is_listed_as_such(finished):
    (finished.path / "metrics.json").write_text("{")
    (row,) = json.loads(chainward("runs", "--json", "--dir", str(finished.path.parent)).stdout)
    assert row["status"] == "damaged"


@pytest.mark.slow
def test_a_report_is_rendered_anew(finished):
    (finished.path / "report.html").unlink()
    rendered = chainward("report", finished.state.run_id, "--dir", str(finished.path.parent))
    assert rendered.returncode == 0
    assert Path(rendered.stdout.strip()).read_text(encoding="utf-8").startswith("<!")


@pytest.mark.slow
def test_an_unknown_run_is_refused_in_one_line_with_the_nearest(finished):
    misspelt = finished.state.run_id[:-1] + "z"
    refused = chainward("report", misspelt, "--dir", str(finished.path.parent))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert f"did you mean '{finished.state.run_id}'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_settings_are_checked_without_a_run():
    fine = chainward("config", "chain.laps=2 chain.epochs=3")
    assert fine.returncode == 0
    assert "chain.laps" in fine.stdout
    assert "chain.epochs" in fine.stdout
    refused = chainward("config", "chain.lap=2")
    assert refused.returncode == 2
    assert "did you mean 'chain.laps'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_settings_that_are_no_settings_are_refused_in_one_line():
    refused = chainward("config", "chain.laps=[")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
