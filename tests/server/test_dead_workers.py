"""A worker that dies in any phase of a simulated run: nothing is lost, or the run says everywhere that it is incomplete."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.config import parse_config_args
from safetensors.torch import load_file
from whole_run import CHAIN_ONLY

from chainward_server import exchange
from chainward_server.app import fail_if_incomplete
from chainward_server.run_folder import RunFolder
from chainward_server.watch.snapshot import look
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import EvaluateTask, LinkTask, StatisticsTask, StudentTask, kind_of, unpack

RAYS_WORDS = (
    "<class 'ray.exceptions.OutOfMemoryError'>:<'Task was killed due to the node running low on memory.\nTop 10 memory users:\n"
    "PID MEM(GB) COMMAND\n10 1.0 psql --password=secret'>"
)
TASKS = {
    "train.link": LinkTask,
    "train.student": StudentTask,
    "evaluate": EvaluateTask,
    "evaluate.statistics": StatisticsTask,
}
PHASES = {
    "chain": CHAIN_ONLY,
    "alone": CHAIN_ONLY | {"chain.compare-alone": True},
    "students": {"chain.compare-alone": False},
    "scoring": CHAIN_ONLY,
}
"""With what else of a run each can be told by itself."""
SITES = ["ash", "birch", "cedar", "dogwood"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(exchange, "WORKER_PAUSE", 0.0)
    monkeypatch.setattr(exchange, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.0)


@pytest.fixture
def quick(settings):
    return settings | {"chain.epochs": 1, "student.rounds": 1, "student.finetune-rounds": 0, "chain.retries": 0}


@pytest.fixture
def with_statistics(quick):
    return quick | {"chain.head": "statistics", "student.rounds": 0, "chain.compare-alone": False}


def dying(phases, sites, times):
    """Let the worker die that does the work of one of `phases` at one of `sites`, the first `times` times at each."""
    left = {(phase, site): times for phase in phases for site in sites}

    def interfere(message, answer):
        name = message.metadata.message_type
        expected = TASKS.get(name)
        if expected is None or kind_of(message.content) != expected.KIND:
            return answer()
        task, _ = unpack(message.content, expected)
        alone = isinstance(task, LinkTask) and task.trained_alone
        of = {
            "train.link": "alone" if alone else "chain",
            "train.student": "students",
            "evaluate": "scoring",
            "evaluate.statistics": "statistics",
        }[name]
        place = of, SITES[task.simulated.index]
        if left.get(place, 0) > 0:
            left[place] -= 1
            return Message(Error(code=0, reason=RAYS_WORDS), reply_to=message)
        return answer()

    return interfere


def models(folder):
    return {path.name: load_file(path) for path in sorted((folder.path / "models").iterdir())}


def same(first, second):
    one, two = models(first), models(second)
    return one.keys() == two.keys() and all(
        torch.equal(one[file][name], two[file][name]) for file in one for name in one[file]
    )


@pytest.fixture(scope="module")
def undisturbed(small_consortium, tmp_path_factory):
    """The run that every disturbed one is compared with."""
    found = {}

    def get(settings, coordinated):
        if "folder" not in found:
            there = settings | {"output.dir": str(tmp_path_factory.mktemp("undisturbed"))}
            found["folder"], _ = coordinated(there)
        return found["folder"]

    return get


def files(folder):
    return "".join((folder.path / name).read_text() for name in ("run.json", "metrics.json", "report.html"))


def test_workers_that_die_in_every_phase_and_are_replaced_cost_nothing(
    quick, coordinated, loopback, undisturbed, caplog
):
    folder, _ = coordinated(quick, loopback(2, dying(PHASES, ["birch"], 2)))
    assert folder.state.status == "finished"
    assert same(folder, undisturbed(quick, coordinated))
    assert caplog.text.count("the process that simulates it has died; it is asked again") == 2 * len(PHASES)
    assert "psql" not in caplog.text + files(folder)


@pytest.mark.parametrize("phase", PHASES)
def test_work_that_is_lost_for_want_of_a_worker_makes_the_run_incomplete_everywhere(
    phase, quick, coordinated, loopback, caplog
):
    folder, _ = coordinated(quick | PHASES[phase], loopback(2, dying([phase], ["birch", "cedar"], 99)))
    assert folder.state.status == "incomplete"
    assert look(folder.path).status == "incomplete"
    report = (folder.path / "report.html").read_text()
    assert "This run is incomplete" in report
    assert "the run is INCOMPLETE" in caplog.text
    assert "psql" not in caplog.text + files(folder)
    with pytest.raises(ChainwardError, match="the run is incomplete"):
        fail_if_incomplete(folder)


@pytest.mark.parametrize(
    ("phases", "lost"), [(["chain"], ["cedar", "dogwood"]), (["alone", "students"], ["birch"])], ids=["chain", "later"]
)
def test_a_resumed_run_ends_with_the_models_of_an_undisturbed_one(
    phases, lost, quick, coordinated, loopback, undisturbed
):
    """What is printed is what resumes it."""
    folder, _ = coordinated(quick, loopback(2, dying(phases, lost, 99)))
    assert folder.state.status == "incomplete"
    (pairs,) = shlex.split(folder.how_to_resume)[1:]
    resumed, results = coordinated(parse_config_args([pairs]))
    assert resumed.path == folder.path
    assert resumed.state.status == "finished", resumed.state.reason
    assert all(link.succeeded for link in results.links)
    assert same(resumed, undisturbed(quick, coordinated))


def test_a_hop_that_others_have_followed_is_made_up_for_at_the_end_and_once_only(quick, coordinated, loopback):
    chain_only = quick | CHAIN_ONLY
    folder, _ = coordinated(chain_only, loopback(2, dying(["chain"], ["birch"], 99)))
    assert folder.state.status == "incomplete"
    again = chain_only | {"output.resume": folder.path.name}
    still, _ = coordinated(again, loopback(2, dying(["chain"], ["birch"], 99)))
    assert still.state.status == "incomplete"
    resumed, results = coordinated(again)
    assert resumed.state.status == "finished", resumed.state.reason
    assert [(link.site, link.step, link.succeeded) for link in results.links] == [
        ("ash", 0, True),
        ("birch", 1, False),
        ("cedar", 2, True),
        ("dogwood", 3, True),
        ("birch", 4, True),
    ]


def test_a_chain_in_which_no_worker_lived_fails_and_can_be_resumed(quick, coordinated, loopback):
    chain_only = quick | CHAIN_ONLY
    with pytest.raises(ChainwardError, match="no link of the chain succeeded"):
        coordinated(chain_only, loopback(2, dying(["chain"], SITES, 99)))
    (stopped,) = Path(chain_only["output.dir"]).iterdir()
    assert RunFolder.open(stopped).how_to_resume is not None
    resumed, _ = coordinated(chain_only | {"output.resume": stopped.name})
    assert resumed.state.status == "finished"


def test_a_statistics_round_in_which_a_worker_dies_is_whole_or_made_up_for(
    with_statistics, coordinated, loopback, caplog
):
    folder, results = coordinated(with_statistics, loopback(2, dying(["statistics"], ["birch"], 1)))
    assert folder.state.status == "finished"
    assert [len(head.sites) for head in results.heads] == [4, 4]
    there = with_statistics | {"output.dir": str(folder.path.parent / "other")}
    lost, results = coordinated(there, loopback(2, dying(["statistics"], ["birch"], 99)))
    assert lost.state.status == look(lost.path).status == "incomplete"
    assert "not reached, and to be made up for: head" in lost.state.reason
    assert "This run is incomplete" in (lost.path / "report.html").read_text()
    assert "psql" not in caplog.text + files(lost)
    resumed, results = coordinated(there | {"output.resume": lost.path.name})
    assert resumed.state.status == "finished", resumed.state.reason
    assert len(results.heads[-1].sites) == 4
