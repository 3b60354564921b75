"""One truth: what is trained over Flower's messages and in one process is the method, written out by hand."""

from __future__ import annotations

import oracle
import pytest
from in_process_run import Outcome, equal, run_in_process

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.models import skeleton
from chainward_simulations.runner import open_sites, score

SITES = ["ash", "birch", "cedar", "dogwood"]


@pytest.fixture
def large_teacher(settings):
    """Students of another image size, with every choice that is not the default, taught by the chain's model too."""
    return settings | {
        "federation.sites": "ash,birch",
        "student.large-weight": 0.5,
        "student.image-size": 48,
        "student.selection": "random",
        "student.layers": "spread",
        "student.auxiliary": "frozen",
        "chain.epochs": 1,
    }


@pytest.fixture
def strands(settings):
    """Two laps of two strands with fresh starts and few labels, which teach the students together."""
    return settings | {
        "federation.sites": "ash,birch",
        "chain.laps": 2,
        "chain.strands": 2,
        "chain.merge": "ensemble",
        "student.large-weight": 1.0,
        "chain.start": "fresh",
        "chain.label-fraction": 0.5,
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.start": "single",
        "student.ema-schedule": "constant",
    }


def assert_run_folder_holds(folder: RunFolder, outcome: Outcome) -> None:
    """Compare every model of a run folder with those of a run in one process, bit for bit."""
    large = skeleton(outcome.architecture).state_dict()
    for key, state in outcome.links.items():
        assert equal(folder.load_model(key, large), state), f"{key} differs"
    assert equal(folder.load_model("chain", large), outcome.chain), "the chain's model differs"
    small = skeleton(outcome.student_architecture).state_dict()
    assert equal(folder.load_model("student", small), outcome.student), "the student differs"


def test_the_chain_the_sites_alone_and_the_student_are_those_written_out_by_hand(settings, coordinated):
    config = RunConfig.from_flat(settings)
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    links = oracle.chain(config, sites, [SITES])
    assert links.keys() == outcome.links.keys()
    assert all(equal(outcome.links[key], state) for key, state in links.items())
    assert equal(outcome.chain, links["strand-0-lap-0-step-3"])
    for site, state in oracle.alone(config, sites).items():
        if site == SITES[0]:  # the first link of a chain of one lap is taken as its site alone
            state = links["strand-0-lap-0-step-0"]
        assert equal(outcome.alone[site], state)
    assert equal(outcome.student, oracle.student(config, sites, outcome.chain, []))
    for nodes in (1, 6):
        folder, _ = coordinated(settings, nodes=nodes)
        assert_run_folder_holds(folder, outcome)


def test_students_of_another_image_size_taught_by_the_large_model_are_the_same_too(large_teacher, coordinated):
    config = RunConfig.from_flat(large_teacher)
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    assert equal(outcome.student, oracle.student(config, sites, outcome.chain, [outcome.chain]))
    folder, results = coordinated(large_teacher)
    assert_run_folder_holds(folder, outcome)
    assert outcome.student_architecture.image_size == 48
    assert results.models["student"].architecture.endswith(", 48 px")
    assert [round_.auxiliary_kept for round_ in results.student_rounds] == [1.0, 1.0, None]
    down = [round_.bytes_down for round_ in results.student_rounds]
    assert down[1] > down[2], "large models are sent for self-distillation only"
    final = score(outcome.student, outcome.student_architecture, sites, config)[1]
    assert results.final["student"].pooled == final


def test_two_laps_of_two_strands_that_teach_together_are_the_same_too(strands, coordinated):
    config = RunConfig.from_flat(strands)
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    links = oracle.chain(config, sites, [["ash", "birch"] * 2, ["birch", "ash"] * 2])
    assert all(equal(outcome.links[key], state) for key, state in links.items())
    ends = [links[f"strand-{strand}-lap-1-step-1"] for strand in (0, 1)]
    assert any(equal(outcome.chain, end) for end in ends)
    assert all(equal(strand, end) for strand, end in zip(outcome.strands, ends, strict=True))
    assert equal(outcome.student, oracle.student(config, sites, outcome.chain, ends))
    folder, _ = coordinated(strands)
    assert_run_folder_holds(folder, outcome)
