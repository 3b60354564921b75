"""A run whose hospitals want to approve it: it waits or goes on without them, says so, and takes them up when they agree."""

from __future__ import annotations

import pytest
from hospitals import deployed_hospitals
from loopback_grid import LoopbackGrid

from chainward_client.approval.record import Approvals
from chainward_server import approvals as waiting_module
from chainward_server.attempts import Attempted
from chainward_server.run_folder import RunFolder
from chainward_server.sites import Failure
from chainward_server.watch.snapshot import look
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import EvaluateTask, LinkTask, kind_of, unpack
from chainward_shared.protocol.run_plan import RunPlan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(waiting_module, "POLL_SECONDS", 0.05)


@pytest.fixture
def hospitals(small_consortium, tmp_path):
    """The site.yaml of three hospitals, of which the second asks a person."""
    return deployed_hospitals(small_consortium, tmp_path, ["ash", "birch", "cedar"], {"birch": {"runs": "ask"}})


@pytest.fixture
def short(settings):
    return {key: value for key, value in settings.items() if key != "data.source"} | {
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "chain.retries": 1,
        "student.rounds": 0,
        "federation.patience": 0.0,
        "federation.check-every": 0.0,
        "federation.min-complete": 0.0,
        "federation.contact": "Dr Ash",
    }


def decided(hospitals, name, decision):
    """Decide at a hospital on the plan that waits there."""
    approvals = Approvals(hospitals[name].parent / "state")
    (one,) = approvals.runs()
    approvals.decide(one.plan.digest, decision, "a person")


def kinds(grid, node):
    return [kind_of(message.content) for message in grid.sent if message.metadata.dst_node_id == node]


def test_the_chain_waits_for_a_person_and_goes_on_when_the_run_is_approved(hospitals, short, coordinated, caplog):
    asked = []

    def interfere(message, answer):
        reply = answer()
        if kind_of(message.content) == RunPlan.KIND:
            asked.append(unpack(message.content, RunPlan)[0])
            if len(asked) == 3:
                folder = next((hospitals["ash"].parent.parent / "runs").iterdir())
                assert list(RunFolder.open(folder).state.waiting) == ["birch"]
                assert list(look(folder).waiting) == ["birch"]
                decided(hospitals, "birch", "approved")
        return reply

    grid = LoopbackGrid(3, interfere, hospitals=list(hospitals.values()))
    folder, results = coordinated(short, grid)
    assert [(link.site, link.status) for link in results.links] == [(name, "done") for name in hospitals]
    assert len({plan.digest for plan in asked}) == 1 and asked[0].asked_by == "Dr Ash"
    assert (folder.state.status, folder.state.waiting) == ("finished", {})
    assert "waiting for the approval of a person at birch" in caplog.text
    assert "birch: a person there has approved the run" in caplog.text
    assert {kinds(grid, node).count(RunPlan.KIND) for node in (101, 103)} == {0}, "only where a person is asked"
    asked_at = [place for place, kind in enumerate(kinds(grid, 102)) if kind == RunPlan.KIND]
    assert kinds(grid, 102).index(LinkTask.KIND) > asked_at[3], "no work before the answer that the run is approved"


def test_without_an_approval_the_run_goes_on_with_the_others_and_can_be_made_up_for(hospitals, short, coordinated):
    grid = LoopbackGrid(3, hospitals=list(hospitals.values()))
    folder, results = coordinated(short | {"federation.approval-patience": 0.2}, grid)
    by_site = {link.site: link for link in results.links}
    assert [by_site[name].status for name in hospitals] == ["done", "skipped", "done"]
    assert "waits for a person there to approve the run" in by_site["birch"].reason
    assert by_site["birch"].attempts == 1, "a person who was waited for is not waited for again at once"
    assert (LinkTask.KIND in kinds(grid, 102), EvaluateTask.KIND in kinds(grid, 102)) == (False, False)
    assert (folder.state.status, folder.state.resumable) == ("incomplete", True)
    decided(hospitals, "birch", "approved")
    again = short | {"output.resume": folder.state.run_id}
    _, results = coordinated(again, LoopbackGrid(3, hospitals=list(hospitals.values())))
    assert [link.site for link in results.links if link.succeeded] == ["ash", "cedar", "birch"]


def test_a_run_that_a_person_refuses_goes_on_without_that_hospital(hospitals, short, coordinated, caplog):
    def interfere(message, answer):
        reply = answer()
        if kind_of(message.content) == RunPlan.KIND:
            decided(hospitals, "birch", "refused")
        return reply

    _, results = coordinated(short, LoopbackGrid(3, interfere, hospitals=list(hospitals.values())))
    refused = next(link for link in results.links if link.site == "birch")
    assert (refused.status, refused.unreached) == ("refused", False)
    assert "a person there has refused run" in refused.reason
    assert "site 'birch' refused: a person there has refused run" in caplog.text


def test_an_approval_that_is_lost_on_the_way_is_waited_for_again(hospitals, short, coordinated):
    taken_back = []

    def interfere(message, answer):
        if kind_of(message.content) == RunPlan.KIND:
            reply = answer()
            decided(hospitals, "birch", "approved")
            return reply
        if kind_of(message.content) == LinkTask.KIND and message.metadata.dst_node_id == 102 and not taken_back:
            taken_back.append(message)
            (hospitals["birch"].parent / "state" / "approvals.json").unlink()
        return answer()

    _, results = coordinated(short, LoopbackGrid(3, interfere, hospitals=list(hospitals.values())))
    assert taken_back
    assert [link.status for link in results.links] == ["done", "done", "done"]


def test_a_run_in_which_nobody_approves_stops_and_can_be_resumed(hospitals, short, coordinated):
    for name in ("ash", "cedar"):
        hospitals[name].write_text(hospitals[name].read_text() + "runs: ask\n")
    grid = LoopbackGrid(3, hospitals=list(hospitals.values()))
    with pytest.raises(ChainwardError, match="waits for a person there to approve the run"):
        coordinated(short | {"federation.approval-patience": 0.1}, grid)
    assert {LinkTask.KIND, EvaluateTask.KIND}.isdisjoint(kind_of(message.content) for message in grid.sent)
    folder = RunFolder.open(next((hospitals["ash"].parent.parent / "runs").iterdir()))
    assert (folder.state.status, folder.state.resumable) == ("failed", True)


@pytest.mark.parametrize(
    ("failure", "again", "unreached"),
    [
        (Failure("x", 0.0, waiting=True), False, True),
        (Failure("x", 0.0, lost=True), True, True),
        (Failure("x", 0.0, refused=True, final=True), False, False),
        (Failure("x", 0.0), True, False),
    ],
)
def test_what_waits_for_a_person_is_not_tried_again_at_once_and_is_made_up_for_later(failure, again, unreached):
    outcome = Attempted(failure=failure)
    assert (outcome.open, outcome.unreached) == (again, unreached)
