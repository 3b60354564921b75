"""The live pages in a real browser: a run that waits for a hospital's approval, which somebody gives on the hospital's page."""

from __future__ import annotations

import threading
from unittest.mock import Mock

import pytest
from browser import DESK, TELEPHONE, Browser, wait_for
from hospitals import deployed_hospitals
from loopback_grid import LoopbackGrid

from chainward_client.approval.record import Approvals
from chainward_client.approval.web import SitePage
from chainward_client.site_ledger import create_site_ledger
from chainward_server import approvals as waiting_module
from chainward_server.run_folder import RunFolder
from chainward_server.watch.web import live_page
from chainward_shared.local_page import LocalPage, Look


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


@pytest.mark.slow
def test_a_page_follows_what_it_shows_and_says_when_nobody_keeps_it_up_to_date(browser):
    looks = []

    def look(form: str) -> Look:
        looks.append(form)
        return Look(f"<p>look number {len(looks)}</p><p><script>document.title = 'owned'</script></p>")

    with LocalPage("a page", look, seconds=0.2) as page:
        browser.open(page.address)
        wait_for(lambda: "look number 5" in browser.text)
        assert "up to date at" in browser.text
    wait_for(lambda: "does not answer" in browser.text)
    assert browser.run("document.title") == "a page", "the policy keeps out scripts that a part may hold"


@pytest.mark.slow
def test_a_person_approves_a_run_on_the_hospitals_page_and_sees_it_go_on_on_the_other(
    browser, small_consortium, tmp_path, settings, coordinated, monkeypatch
):
    monkeypatch.setattr(waiting_module, "POLL_SECONDS", 0.3)
    hospitals = deployed_hospitals(
        small_consortium,
        tmp_path,
        ["ash", "birch", "cedar"],
        {"birch": {"runs": "ask", "privacy": {"epsilon": 8.0, "delta": 1e-2, "units": 20, "metrics": "exact"}}},
    )
    create_site_ledger(tmp_path / "birch" / "state", "birch")
    flat = {key: value for key, value in settings.items() if key != "data.source"} | {
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.rounds": 1,
        "privacy.mode": "by-policy",
        "privacy.epsilon": 4.0,
        "privacy.delta": 1e-2,
        "federation.contact": "Dr Elm, City Hospital, <b>telephone 12</b>",
    }
    grid = LoopbackGrid(3, hospitals=list(hospitals.values()))
    run = threading.Thread(target=coordinated, args=(flat, grid), daemon=True)
    run.start()
    runs = tmp_path / "runs"
    approvals = Approvals(tmp_path / "birch" / "state")
    wait_for(lambda: len(list(runs.glob("*/metrics.json"))) == 1 and approvals.runs(), 90)
    (folder,) = runs.iterdir()
    site = SitePage(hospitals["birch"])
    with live_page(folder, 0, Mock(), linger=0.0) as live, LocalPage("birch", site.look, site.act) as own:
        for size, name in ((DESK, "desk"), (TELEPHONE, "telephone")):
            browser.open(live.address, size)
            wait_for(lambda: "waiting for the approval of a person at birch" in browser.text)
            assert not browser.overflows
            browser.picture(tmp_path / f"live-waiting-{name}.png")
            browser.open(own.address, size)
            words = browser.text
            for part in (
                "A run waits for a decision here.",
                "“Dr Elm, City Hospital, <b>telephone 12</b>”",
                "at most epsilon 4 at delta 0.01 here",
                "None yet.",
            ):
                assert part in words
            assert not browser.overflows
            browser.picture(tmp_path / f"site-asks-{name}.png")
        browser.click("button.yes")
        assert browser.run("document.querySelector('input[name=read]').validity.valueMissing")
        assert approvals.runs()[0].decision is None, "the box was not ticked"
        browser.click("input[type=checkbox]")
        browser.click("button.yes")
        wait_for(lambda: approvals.runs()[0].decision == "approved")
        wait_for(lambda: "Take the approval back" in browser.text)
        assert "(page)" in browser.text
        run.join(120)
        state = RunFolder.open(folder).state
        assert (state.status, state.waiting) == ("finished", {})
        for size, name in ((DESK, "desk"), (TELEPHONE, "telephone")):
            browser.open(live.address, size)
            wait_for(lambda: "The run has finished." in browser.text and "Privacy spent ε" in browser.text)
            assert not browser.overflows
            browser.picture(tmp_path / f"live-ended-{name}.png")
            browser.open(own.address, size)
            wait_for(lambda: "a student" in browser.text)
            assert not browser.overflows
            browser.picture(tmp_path / f"site-after-{name}.png")
    assert {address.split("/")[2].split(":")[0] for address in browser.requested if "://" in address} == {"127.0.0.1"}
    assert browser.complaints == []
