"""The coordinator's command, as it is typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chainward_server.run_folder import RunFolder
from chainward_simulations.cli import main


@pytest.fixture
def chainward(monkeypatch, capsys):
    """Type a command, in this process; return its exit code and what it printed and said."""

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["chainward", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return typed


@pytest.fixture
def finished(finished_chain, tmp_path):
    """A finished run, for one test to damage."""
    there = finished_chain.folder.path
    return RunFolder.open(Path(shutil.copytree(there, tmp_path / "runs" / there.name)))


@pytest.mark.slow
def test_runs_are_listed_for_people_and_for_scripts(chainward, finished):
    code, listed, _ = chainward("runs", "--dir", str(finished.path.parent))
    assert code == 0
    assert finished.state.run_id in listed
    (row,) = json.loads(chainward("runs", "--json", "--dir", str(finished.path.parent))[1])
    assert (row["run"], row["status"]) == (finished.state.run_id, "finished")
    assert float(row["chain"]) == pytest.approx(
        finished.load_results().final["chain"].pooled.balanced_accuracy, abs=6e-4
    )


@pytest.mark.slow
def test_a_damaged_run_is_listed_as_such(chainward, finished):
    (finished.path / "metrics.json").write_text("{")
    (row,) = json.loads(chainward("runs", "--json", "--dir", str(finished.path.parent))[1])
    assert row["status"] == "damaged"


@pytest.mark.slow
def test_a_report_is_rendered_anew_with_its_pictures(chainward, finished, drawn):
    (finished.path / "report.html").unlink()
    code, rendered, _ = chainward("report", finished.state.run_id, "--dir", str(finished.path.parent))
    assert code == 0
    page = Path(rendered.strip()).read_text(encoding="utf-8")
    assert page.startswith("<!") and "dogwood</text>" in page


@pytest.mark.slow
def test_an_unknown_run_is_refused_in_one_line_with_the_nearest(finished):
    misspelt = finished.state.run_id[:-1] + "z"
    script = Path(sys.executable).with_name("chainward")
    words = ["report", misspelt, "--dir", str(finished.path.parent)]
    refused = subprocess.run([str(script), *words], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert f"did you mean '{finished.state.run_id}'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_settings_are_checked_without_a_run(chainward):
    code, shown, _ = chainward("config", "chain.laps=2 chain.epochs=3")
    assert code == 0
    assert "chain.laps" in shown
    assert "chain.epochs" in shown
    code, _, said = chainward("config", "chain.lap=2")
    assert code == 2
    assert "did you mean 'chain.laps'" in said
    assert "Traceback" not in said


def test_settings_that_are_no_settings_are_refused_in_one_line(chainward):
    code, _, said = chainward("config", "chain.laps=[")
    assert code == 2
    assert len(said.strip().splitlines()) == 1
