"""One truth: what the coordinator and the clients train through Flower is what the plain runner trains."""

from __future__ import annotations

import pytest

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.models import skeleton
from chainward_simulations.runner import Outcome, equal, open_sites, run_in_process, score


def assert_same_models(folder: RunFolder, outcome: Outcome) -> None:
    """Compare every model of a run folder with those of the plain runner, bit for bit."""
    large = skeleton(outcome.architecture).state_dict()
    for key, state in outcome.links.items():
        assert equal(folder.load_model(key, large), state), f"{key} differs"
    assert equal(folder.load_model("chain", large), outcome.chain), "the chain's model differs"
    assert outcome.student_architecture is not None
    assert outcome.student is not None
    small = skeleton(outcome.student_architecture).state_dict()
    assert equal(folder.load_model("student", small), outcome.student), "the student differs"


@pytest.mark.parametrize("nodes", [1, 2, 6])
def test_the_coordinator_trains_what_the_plain_runner_trains_whatever_the_number_of_nodes(settings, coordinated, nodes):
    folder, _ = coordinated(settings, nodes=nodes)
    config = RunConfig.from_flat(settings)
    assert_same_models(folder, run_in_process(config, open_sites(config)))


def test_students_of_another_image_size_taught_by_the_large_model_are_the_same_too(settings, coordinated):
    settings |= {
        "student.large-weight": 0.5,
        "student.image-size": 48,
        "student.selection": "random",
        "student.layers": "spread",
        "student.auxiliary": "frozen",
        "chain.epochs": 1,
    }
    folder, results = coordinated(settings)
    config = RunConfig.from_flat(settings)
    outcome = run_in_process(config, open_sites(config))
    assert_same_models(folder, outcome)
    assert outcome.student_architecture.image_size == 48
    assert results.models["student"].architecture.endswith(", 48 px")
    assert [round_.auxiliary_kept for round_ in results.student_rounds] == [1.0, 1.0, None]
    down = [round_.bytes_down for round_ in results.student_rounds]
    assert down[1] > down[2], "large models are sent for self-distillation only"
    final = score(outcome.student, outcome.student_architecture, open_sites(config), config)[1]
    assert results.final["student"].pooled.macro_auc == final.macro_auc


def test_an_ensemble_of_strands_teaches_the_same_student_too(settings, coordinated):
    settings |= {
        "chain.strands": 2,
        "chain.merge": "ensemble",
        "student.large-weight": 1.0,
        "student.ema-schedule": "constant",
        "chain.epochs": 1,
    }
    folder, _ = coordinated(settings)
    config = RunConfig.from_flat(settings)
    outcome = run_in_process(config, open_sites(config))
    assert len(outcome.strands) == 2
    assert_same_models(folder, outcome)


def test_two_laps_of_two_strands_with_fresh_starts_and_few_labels_are_the_same_too(settings, coordinated):
    settings |= {
        "chain.laps": 2,
        "chain.strands": 2,
        "chain.start": "fresh",
        "chain.order": "shuffled",
        "chain.label-fraction": 0.5,
        "chain.epochs": 1,
        "student.start": "single",
    }
    folder, _ = coordinated(settings)
    config = RunConfig.from_flat(settings)
    assert_same_models(folder, run_in_process(config, open_sites(config)))
