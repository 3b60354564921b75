"""The live page of a run: what a busy person reads, without a browser."""

from __future__ import annotations

import re
import urllib.request
from datetime import timedelta

import pytest
from scripted_run import START, ScriptedRun
from typer.testing import CliRunner

from chainward_server.cli import app
from chainward_server.watch import web
from chainward_server.watch.curve import curve_of
from chainward_server.watch.snapshot import look

LOAD = web.Load(37.0, 50.0, 10**12, ("of 2 cores", "disk: 1.0 TB free"), False)


@pytest.fixture
def run(tmp_path):
    return ScriptedRun(tmp_path / "runs")


def words(run, seconds: float) -> str:
    html = web.render_live(look(run.path, START + timedelta(seconds=seconds)), LOAD)
    assert "style=" not in html and "<script" not in html and " onerror" not in html.replace("onerror=alert", "")
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_it_says_where_the_run_is_what_was_reached_and_when_it_will_end(run):
    run.enter("chain", 0)
    run.hop("ash", 100, took=100.0, value=0.5)
    text = words(run, 130)
    assert "Hop 2 of 3 is being trained, at birch." in text
    assert "2 min 10 s so far" in text and "expected end" in text
    assert "1 of 3 hops are done" in text and "0.500" in text
    assert "37 % of 2 cores" in text
    assert "differential privacy is off in this run" in text
    assert "1 · ash 1 min 40 s · 0.500 2 · birch at work 3 · cedar to come" in text


def test_what_a_run_has_not_is_not_shown_and_hops_that_are_done_are_not_said_to_be_trained(run):
    run.enter("chain", 0)
    for number, site in enumerate(("ash", "birch", "cedar")):
        run.hop(site, 10 + number, took=5.0, value=0.5)
    text = words(run, 40)
    assert "All hops of the chain are done; its model is being completed." in text
    assert "being trained" not in text
    assert "ε in this run" not in text, "privacy is off"
    assert ("hospitals alone" in text) == look(run.path).config.chain.compare_alone


def test_it_says_who_is_away_and_why(run):
    run.enter("chain", 0)
    run.hop("ash", 10, took=5.0, status="skipped", reason="site 'ash' is not connected", unreached=True)
    text = words(run, 20)
    assert "ash away when its turn came" in text
    assert "site &#39;ash&#39; is not connected" in text


def test_it_says_who_waits_for_approval(run):
    run.enter("chain", 0)
    run.hop("ash", 10, took=5.0)
    run.folder.await_approval({"birch": (START + timedelta(seconds=1)).timestamp()})
    text = words(run, 61)
    assert "Hop 2 of 3 waits until somebody at birch has approved the run." in text
    assert "waiting for the approval of a person at birch, for 1 min 00 s" in text
    assert "birch waits for a person there to approve the run" in text


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("finished", "The run has finished."), ("failed", "The run has failed."), ("stopped", "The run was stopped.")],
)
def test_it_says_how_the_run_ended(run, status, verdict):
    run.enter("chain", 0)
    run.hop("ash", 10, took=5.0)
    run.end(status, 20, None if status == "finished" else "the disk is full")
    text = words(run, 30)
    assert verdict in text
    assert ("the disk is full" in text) == (status != "finished")
    assert ("report.html" in text) == (status == "finished")


def test_words_from_outside_are_escaped(run):
    run.enter("chain", 0)
    run.hop("ash", 10, took=5.0, status="refused", reason="</td><script>alert(1)</script><img src=x onerror=alert(2)>")
    html = web.render_live(look(run.path, START + timedelta(seconds=20)), LOAD)
    assert "&lt;script&gt;" in html and "<script" not in html and "<img" not in html


def test_the_curve_has_a_point_for_every_scored_model_inside_its_frame(run):
    assert curve_of(look(run.path), 360) is None
    run.enter("chain", 0)
    for number, value in enumerate([0.0, 1.0, 0.5]):
        run.hop(("ash", "birch", "cedar")[number], 10 + number, took=5.0, value=value)
    run.round(1, 20, took=3.0)
    curve = curve_of(look(run.path), 360)
    assert [point.kind for point in curve.points] == ["chain"] * 3 + ["student"]
    assert all(0 < point.x < curve.width and 0 < point.y < curve.height for point in curve.points)
    heights = [point.y for point in curve.points]
    assert heights[1] < heights[3] < heights[2] < heights[0], "higher scores are further up"
    assert curve.path("chain").count(",") == 3


def test_the_curve_cuts_a_name_only_where_there_is_no_room(run):
    run.enter("chain", 0)
    for number, site in enumerate(("ash", "birch", "cedar")):
        run.hop(site, 10 + number, took=5.0, value=0.5)
    shot = look(run.path)
    for link in shot.links:
        link.site = "university hospital"
    names = [[point.name for point in curve_of(shot, width).points if point.name] for width in (1000, 360)]
    assert set(names[0]) == {"university hospital"}
    assert all(name.endswith("…") for name in names[1])


def test_watch_web_prints_an_address_that_answers_and_ends_with_the_run(run, monkeypatch):
    run.enter("chain", 0)
    run.end("finished", 20)
    read = []
    monkeypatch.setattr(web, "LINGER", 0.0)
    before = web.LocalPage.close

    def close(page):
        with urllib.request.urlopen(page.address) as answer:
            read.append(answer.read().decode())
        before(page)

    monkeypatch.setattr(web.LocalPage, "close", close)
    result = CliRunner().invoke(app, ["watch", str(run.path), "--web"])
    assert result.exit_code == 0
    assert re.search(r"page: http://127\.0\.0\.1:\d+/\S{32}/ \(on this machine only\)", result.stderr)
    assert "The run has finished." in read[0]
