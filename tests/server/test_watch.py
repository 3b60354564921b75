"""Watching a run from its folder: where it is, when it ends, and an exit code that a script can rely on."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from rich.console import Console
from scripted_run import START, ScriptedRun
from typer.testing import CliRunner

from chainward_server import run_folder
from chainward_server.cli import app
from chainward_server.run_folder import RunFolder
from chainward_server.run_process import RunProcess
from chainward_server.standing import expected_end, remaining_pieces
from chainward_server.watch import find_run, watch, watching
from chainward_server.watch.display import as_json, headline, news, picture, silence
from chainward_server.watch.snapshot import look
from chainward_shared.errors import RunFolderError


def created(pid: int) -> float:
    return psutil.Process(pid).create_time()


@pytest.fixture
def run(tmp_path):
    """A run of three sites, one lap, without hospitals alone and students."""
    return ScriptedRun(tmp_path / "runs")


def seen(run, seconds: float):
    return look(run.path, START + timedelta(seconds=seconds))


def watched(run, script, *, output="lines", **more):
    """Watch a run to which the next step of `script` happens at every pause; return the exit code and the lines."""
    lines, steps, clock = [], list(script), [0.0]

    def sleep(seconds):
        clock[0] += seconds
        if steps:
            steps.pop(0)()

    def now():
        return START + timedelta(seconds=clock[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching.time, "sleep", sleep)
        patch.setattr(watching, "look", lambda path: look(path, now()))
        code = watch(run.path, Console(file=io.StringIO()), output, write=lines.append, **more)
    return code, lines


# --- where it is ---


def test_a_run_tells_phase_hop_and_site(run):
    assert seen(run, 5).place is None
    run.enter("chain", 10)
    assert str(seen(run, 10).place) == "hop 1"
    run.hop("ash", 20, took=10)
    assert str(seen(run, 20).place) == "hop 2 of 3, at birch"
    run.hop("birch", 40, took=20)
    assert str(seen(run, 40).place) == "hop 3 of 3, at cedar"
    assert headline(seen(run, 40)).startswith(f"run {run.path.name}; chain: hop 3 of 3, at cedar; 40 s so far")


def test_the_sites_of_an_expected_consortium_are_counted_before_the_first_hop(tmp_path):
    run = ScriptedRun(tmp_path, **{"federation.sites": "ash,birch,cedar", "chain.laps": 2})
    run.enter("chain", 1)
    assert str(seen(run, 2).place) == "hop 1 of 6"


def test_strands_are_at_several_sites_at_once(tmp_path):
    run = ScriptedRun(tmp_path, **{"chain.strands": 2})
    run.enter("chain", 1)
    run.hop("ash", 5, took=4, step=0, strand=0)
    assert str(seen(run, 5).place) == "hop 2 of 6, at birch"
    run.hop("birch", 6, took=4, step=0, strand=1)
    assert seen(run, 6).place.sites == ("birch", "cedar")


def test_where_the_order_is_decided_on_the_way_no_site_is_guessed(tmp_path):
    run = ScriptedRun(tmp_path, **{"chain.order": "weakest-next"})
    run.enter("chain", 1)
    run.hop("cedar", 5, took=4)
    assert str(seen(run, 5).place) == "hop 2 of 3"


def test_a_hop_at_another_site_than_planned_ends_the_guessing(run):
    run.enter("chain", 1)
    run.hop("cedar", 5, took=4)
    assert str(seen(run, 5).place) == "hop 2 of 3"


def test_hospitals_alone_and_student_rounds_are_counted(tmp_path):
    run = ScriptedRun(tmp_path, **{"chain.compare-alone": True, "student.rounds": 2, "student.finetune-rounds": 1})
    run.hop("ash", 5, took=4)
    run.enter("alone", 6)
    run.alone("ash", 7, took=4)
    assert str(seen(run, 7).place) == "hospital alone 2 of 3"
    run.enter("students", 8)
    run.round(1, 9, took=1)
    assert str(seen(run, 9).place) == "student round 2 of 3"


def test_private_hospitals_do_not_train_alone_and_are_not_waited_for(tmp_path):
    run = ScriptedRun(tmp_path, **{"chain.compare-alone": True})
    run.hop("ash", 5, took=4)
    sites = {"ash": {"epsilon": None}, "birch": {"epsilon": 2.0}, "cedar": {"epsilon": None}}
    run.folder.write_text(
        "privacy.json", json.dumps({"mode": "dp-sgd at some sites", "sites": sites, "statements": [{}]})
    )
    run.enter("alone", 6)
    assert str(seen(run, 6).place) == "hospital alone 1 of 2"


# --- when it ends ---


def test_the_end_is_expected_in_proportion_to_the_sites_images(run):
    run.enter("chain", 0)
    assert expected_end(seen(run, 1)) is None
    run.hop("ash", 10, took=10)  # 100 images in 10 s
    assert remaining_pieces(seen(run, 10)) == pytest.approx([20, 10])
    assert expected_end(seen(run, 10)) == START + timedelta(seconds=40)
    run.hop("birch", 30, took=20)
    assert expected_end(seen(run, 31)) == START + timedelta(seconds=40)


def test_a_hop_that_takes_longer_moves_the_end(run):
    run.enter("chain", 0)
    run.hop("ash", 10, took=10)
    assert expected_end(seen(run, 29)) == START + timedelta(seconds=40)
    assert expected_end(seen(run, 100)) == START + timedelta(seconds=110)


def test_time_between_the_hops_counts_but_a_night_off_does_not_decide(run):
    run.enter("chain", 0)
    run.hop("ash", 15, took=10)  # 5 s of scoring
    assert expected_end(seen(run, 15)) == START + timedelta(seconds=15 + 1.5 * 30)
    run.at(50_000)
    assert expected_end(seen(run, 50_000)) == START + timedelta(seconds=50_000 + 2 * 30)


def test_what_comes_after_the_chain_is_in_the_estimate(tmp_path):
    run = ScriptedRun(tmp_path, **{"chain.compare-alone": True, "student.rounds": 2, "chain.epochs": 10})
    run.enter("chain", 0)
    run.hop("ash", 13.5, took=13.5)  # 1.35 per image and epoch, so 1 s for 100 images and an epoch alone
    hops, later = remaining_pieces(seen(run, 14))[:2], remaining_pieces(seen(run, 14))[2:]
    assert hops == pytest.approx([27, 13.5])
    # at the same time, the largest hospital decides: alone, 10 epochs of 200 images; three rounds of 4 epochs, half the cost
    assert later == pytest.approx([20, 4, 4, 4])
    (run.path / "simulated-sites").mkdir()  # one machine: one after the other; ash alone is the first link
    assert remaining_pieces(seen(run, 14))[2:] == pytest.approx([30, 8, 8, 8])
    run.enter("students", 90)
    run.round(1, 99, took=9)
    assert remaining_pieces(seen(run, 99)) == pytest.approx([9, 9])


# --- what is told ---


def test_a_watched_run_that_finishes_gives_0_and_its_scores(run):
    code, lines = watched(
        run,
        [
            lambda: run.enter("chain", 1),
            lambda: run.hop("ash", 3, took=2, value=0.25),
            lambda: run.hop("birch", 5, took=2, value=0.75),
            lambda: run.hop("cedar", 6, took=1, status="skipped", reason="site 'cedar' is silent"),
            lambda: run.end("finished", 8),
        ],
    )
    text = "\n".join(lines)
    assert code == 0
    assert "hop 1 of 3  ash: done, 2.0 s, validation balanced accuracy – -> 0.250" in text
    assert "hop 2 of 3  birch: done, 2.0 s, validation balanced accuracy 0.250 -> 0.750" in text
    assert "hop 3 of 3  cedar: skipped, 1.0 s. site 'cedar' is silent" in text
    assert "chain: balanced accuracy 0.700, macro AUC 0.700, 30 pooled test images" in text
    assert lines[-1] == f"report: {run.path / 'report.html'}"
    assert len([line for line in lines if "hop 1 of 3  ash" in line]) == 1


def test_a_watched_run_that_fails_gives_1_with_the_reason_and_how_to_go_on(run):
    code, lines = watched(run, [lambda: run.end("failed", 3, "the disk is full")])
    assert code == 1
    assert any(line.endswith("failed after 3.0 s: the disk is full") for line in lines)
    assert run.path.name in lines[-1]
    assert "output.resume" in lines[-1]


def test_a_run_has_its_report_before_it_counts_as_finished(run):
    seen_while_writing = []

    def report(folder):
        seen_while_writing.append(look(folder.path).status)
        return folder.write_text("report.html", "<!doctype html>")

    run.folder.finish([], report)
    assert seen_while_writing == ["running"]
    assert look(run.path).status == "finished"


def test_a_report_names_the_end_that_the_run_folder_names_however_long_it_took_to_write(run, monkeypatch):
    clock = datetime(2026, 1, 1, tzinfo=UTC)
    said = []

    def a_second_later(_):
        nonlocal clock
        clock += timedelta(seconds=1)
        return clock.isoformat()

    def report(folder):
        said.append(folder.state.updated)
        return folder.write_text("report.html", "<!doctype html>")

    monkeypatch.setattr(run_folder, "iso", a_second_later)
    run.folder.finish([], report)
    assert [RunFolder.open(run.path).state.updated] == said


def test_a_run_whose_report_cannot_be_written_is_not_finished(run):
    def report(folder):
        raise RunFolderError("report.html: can't be written")

    with pytest.raises(RunFolderError):
        run.folder.finish([], report)
    assert look(run.path).status == "running"


def test_a_watched_run_that_ends_incomplete_gives_3_and_says_so_and_how_to_go_on(run):
    def end():
        run.hop("ash", 3, took=2)
        run.folder.finish(["1 of 3 hops"], lambda folder: folder.write_text("report.html", "<!doctype html>"))

    code, lines = watched(run, [end])
    assert code == 3
    assert any(f"run {run.path.name} incomplete after" in line and line.endswith(": 1 of 3 hops") for line in lines)
    assert "output.resume" in lines[-1]


@pytest.mark.parametrize("output", ["lines", "json"])
def test_a_run_whose_process_was_killed_is_gone_at_once_and_not_silent_for_ever(run, output):
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run.folder.begin(RunProcess.current().model_copy(update={"pid": dead.pid, "created": created(dead.pid)}))
    assert look(run.path).status == "running"
    dead.kill()
    dead.wait()
    code, lines = watched(run, [], output=output)
    assert code == 1
    assert "gone" in lines[0] and f"its process {dead.pid} has ended without a word" in lines[0]
    (row,) = json.loads(CliRunner().invoke(app, ["runs", "--dir", str(run.path.parent), "--json"]).stdout)
    assert row["status"] == "gone"


def test_another_process_with_the_number_of_the_dead_one_is_not_taken_for_it(run):
    other = RunProcess.current()
    run.folder.begin(other.model_copy(update={"created": other.created - 3600}))
    assert look(run.path).status == "gone"


def test_of_a_run_on_another_machine_nobody_says_that_it_is_gone(run):
    run.folder.begin(RunProcess.current().model_copy(update={"host": "elsewhere", "pid": 2**22 + 1}))
    assert look(run.path).status == "running"


def test_json_lines_tell_the_same_to_scripts(run):
    code, lines = watched(
        run,
        [
            lambda: run.enter("chain", 1),
            lambda: run.hop("ash", 3, took=2, status="retried", attempts=2, reason="a first reply was damaged"),
            lambda: run.end("finished", 8),
        ],
        output="json",
    )
    told = [json.loads(line) for line in lines]
    assert code == 0
    assert [line["event"] for line in told] == ["progress", "progress", "progress", "end"]
    hop = told[2]
    assert hop["place"] == {"what": "hop", "number": 2, "of": 3, "sites": ["birch"]}
    assert hop["last_hop"]["attempts"] == 2
    assert hop["incidents"] == [{"what": "ash, link 1", "status": "retried", "reason": "a first reply was damaged"}]
    assert datetime.fromisoformat(hop["expected_end"]) > START
    assert (told[-1]["status"], told[-1]["exit"]) == ("finished", 0)
    assert told[-1]["final"]["chain"]["balanced_accuracy"] == 0.7


def test_silence_is_told_at_growing_intervals(run):
    run.enter("chain", 0)
    code, lines = watched(run, [lambda: None] * 50 + [lambda: run.end("failed", 0, "x")], interval=10)
    told = [re.search(r"for (\d+ s|\d+ min \d\d s)", line).group(1) for line in lines if "no sign of life" in line]
    assert told == ["1 min 00 s", "2 min 00 s", "4 min 00 s", "8 min 00 s"]
    assert code == 1


def test_a_run_whose_coordinator_died_is_given_up_after_the_timeout(run):
    run.enter("chain", 0)
    code, lines = watched(run, [], interval=10, timeout=100)
    assert code == 1
    assert "no sign of life for 1 min 40 s (--timeout 100); it may have died" in lines[-1]
    code, lines = watched(run, [], interval=10, timeout=100, output="json")
    assert (json.loads(lines[-1])["event"], json.loads(lines[-1])["exit"]) == ("timeout", 1)


def test_silence_longer_than_a_hop_may_take_is_called_a_likely_death(tmp_path):
    run = ScriptedRun(tmp_path, **{"federation.hop-deadline": 120.0})
    assert silence(seen(run, 59)) is None
    assert "may take up to 2 min 00 s" in silence(seen(run, 100))
    assert "the coordinator may have died" in silence(seen(run, 121))


def test_a_terminal_shows_the_last_hops_and_what_went_wrong(run):
    run.enter("chain", 0)
    run.hop("ash", 3, took=2)
    run.hop("birch", 4, took=1, status="skipped", reason="site 'birch' [is] silent")
    screen = io.StringIO()
    Console(file=screen, width=120).print(picture(seen(run, 100)))
    assert "ash" in screen.getvalue()
    assert "birch, link 2: skipped. site 'birch' [is] silent" in screen.getvalue()
    assert "no sign of life for 1 min 36 s" in screen.getvalue()


@pytest.mark.parametrize("height", [24, 40])
def test_a_terminal_of_few_lines_shows_the_last_of_everything(tmp_path, height):
    run = ScriptedRun(tmp_path)
    run.enter("chain", 0)
    for number in range(1, 21):
        status = "skipped" if number % 2 else "done"
        run.hop("ash", number, took=1, status=status, reason="away" if number % 2 else None)
    screen = io.StringIO()
    Console(file=screen, width=80).print(picture(seen(run, 20), height))
    lines = screen.getvalue().splitlines()
    assert len(lines) <= height
    assert any(re.search(r"\b20\b.*done", line) for line in lines), "the last hop"
    assert "skipped. away" in lines[-1], "the last incident"


def test_scores_that_no_site_lets_out_are_dashes(run):
    run.enter("chain", 0)
    run.hop("ash", 3, took=2, value=None)
    run.hop("birch", 6, took=2, value=None)
    assert "birch: done, 2.0 s, validation balanced accuracy – -> –" in "\n".join(news(None, seen(run, 6)))
    assert as_json(seen(run, 6), "progress")["last_hop"]["validation_balanced_accuracy"] is None


# --- which run ---


def test_without_a_name_the_run_last_at_work_is_watched(tmp_path):
    old, new = ScriptedRun(tmp_path), ScriptedRun(tmp_path)
    os.utime(old.path / "run.json", (2e9, 2e9))
    assert find_run(None, tmp_path) == old.path
    os.utime(new.path / "run.json", (2.1e9, 2.1e9))
    assert find_run(None, tmp_path) == new.path


def test_a_run_that_is_about_to_appear_is_waited_for(tmp_path, monkeypatch):
    made, clock = [], [0.0]

    def sleep(seconds):
        clock[0] += seconds
        if not made:
            made.append(ScriptedRun(tmp_path))

    monkeypatch.setattr(watching.time, "sleep", sleep)
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    old = ScriptedRun(tmp_path)
    os.utime(old.path / "run.json", (1e9, 1e9))
    assert find_run(None, tmp_path, wait=10) == made[0].path
    assert clock[0] <= 1


def test_waiting_is_bounded_and_an_old_run_is_not_taken_for_a_new_one(tmp_path):
    old = ScriptedRun(tmp_path)
    os.utime(old.path / "run.json", (1e9, 1e9))
    with pytest.raises(RunFolderError, match=r"no run has appeared in .* after 0\.2 s"):
        find_run(None, tmp_path, wait=0.2, interval=0.05)
    with pytest.raises(RunFolderError, match=r"no run\.json in"):
        find_run("other", tmp_path, wait=0.2, interval=0.05)


# --- as it is typed ---


def typed(*words: str):
    return CliRunner().invoke(app, list(words))


def test_the_command_has_a_true_exit_code(tmp_path):
    for status, code in (("finished", 0), ("failed", 1)):
        run = ScriptedRun(tmp_path)
        run.end(status, 1, "why")
        told = typed("watch", run.path.name, "--dir", str(tmp_path))
        assert told.exit_code == code
        assert f"{run.path.name} {status}" in told.stdout
    missing = typed("watch", "none", "--dir", str(tmp_path))
    assert isinstance(missing.exception, RunFolderError)  # which main() prints in one line, with exit code 2


def test_a_damaged_run_is_bad_input(run):
    (run.path / "run.json").write_text("{")
    told = typed("watch", str(run.path), "--interval", "0.1")
    assert isinstance(told.exception, RunFolderError)
    assert "damaged" in str(told.exception)


def test_ctrl_c_ends_the_watching_and_says_that_the_run_goes_on(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("chainward_server.cli.watch", interrupted)
    told = typed("watch", str(run.path))
    assert told.exit_code == 130
    assert "the run goes on" in told.stderr


def test_runs_are_listed_with_what_one_looks_for(tmp_path):
    run = ScriptedRun(tmp_path)
    run.enter("chain", 1)
    run.hop("ash", 3, took=2)
    failed = ScriptedRun(tmp_path)
    failed.end("failed", 2, "the disk is full")
    rows = {row["run"]: row for row in json.loads(typed("runs", "--dir", str(tmp_path), "--json").stdout)}
    under_way = rows[run.path.name]
    assert (under_way["status"], under_way["phase"], under_way["hops"], under_way["sites"]) == (
        "running",
        "chain",
        1,
        3,
    )
    assert under_way["started"] == START.isoformat()
    assert under_way["silent"] > 60
    assert rows[failed.path.name]["elapsed"] == 2
    listed = typed("runs", "--dir", str(tmp_path)).stdout
    assert run.path.name in listed
    assert f"{failed.path.name}: the disk is full" in listed
