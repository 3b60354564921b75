"""A whole run with a hospital that wants the student to be its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from chainward_server.aggregation import distance, length
from chainward_shared.models import skeleton
from chainward_shared.protocol import SiteCard, StudentResult, StudentTask, kind_of, pack, unpack
from chainward_shared.weights import digest, to_arrays


@pytest.fixture
def one_round(settings):
    return settings | {
        "student.rounds": 1,
        "student.finetune-rounds": 0,
        "chain.epochs": 1,
        "chain.retries": 0,
        "chain.compare-alone": False,
    }


def takeover(value, train=10**9):
    """Let the third site declare `train` cases, and send a student all of whose weights are `value`."""

    def interfere(message, answer):
        reply = answer()
        if kind_of(reply.content) == SiteCard.KIND:
            card, _ = unpack(reply.content, SiteCard)
            if card.site == "cedar":
                counts = {split: of for split, of in card.class_counts.items() if split != "train"}
                reply.content = pack(card.model_copy(update={"train": train, "class_counts": counts}))
        elif kind_of(message.content) == StudentTask.KIND:
            task, _ = unpack(message.content, StudentTask)
            result, _ = unpack(reply.content, StudentResult)
            if result.site == "cedar":
                template = skeleton(task.architecture).state_dict()
                state = {
                    name: torch.full(tensor.shape, value, dtype=tensor.dtype)
                    if tensor.is_floating_point()
                    else torch.zeros(tensor.shape, dtype=tensor.dtype)
                    for name, tensor in template.items()
                }
                reply.content = pack(result.model_copy(update={"digest": digest(state)}), {"student": to_arrays(state)})
        return reply

    return interfere


def test_a_site_that_declares_everything_and_sends_its_own_student_does_not_get_it(
    one_round, coordinated, loopback, caplog
):
    honest, before = coordinated(one_round)
    assert all(part.factor == 1 and part.share < 0.5 for part in before.student_rounds[0].influence.values())
    folder, results = coordinated(one_round, loopback(2, takeover(0.125)))
    part = results.student_rounds[0].influence["cedar"]
    assert part.share == pytest.approx(0.5)
    assert part.factor < 1
    good, found = (load_file(of.model_path("student")) for of in (honest, folder))
    wanted = {name: torch.full_like(tensor, 0.125) for name, tensor in good.items()}
    assert distance(found, good) < 0.2 * distance(found, wanted)
    allowed = 3 * sorted(one.moved for one in results.student_rounds[0].influence.values())[1]
    assert part.moved * part.factor == pytest.approx(allowed)
    assert "site 'cedar' declares 100% of all training cases; it counts as 50% (student.max-share)" in caplog.text
    assert "the update of site 'cedar' is" in caplog.text
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Largest influence of one hospital on the student: cedar in round 1, with 50 % of the weight" in page


def test_a_student_implausibly_far_away_is_left_out_and_the_reason_is_kept(one_round, coordinated, loopback):
    _, results = coordinated(one_round, loopback(2, takeover(50.0)))
    assert results.student_rounds[0].sites == ["ash", "birch", "dogwood"]
    assert "student.max-drift allows 10" in results.student_rounds[0].failed["cedar"]


@pytest.mark.parametrize("mean", ["median", "trimmed-mean"])
def test_a_robust_mean_can_be_chosen(one_round, coordinated, loopback, mean):
    folder, results = coordinated(one_round | {"student.aggregation": mean}, loopback(2, takeover(0.125)))
    assert {part.share for part in results.student_rounds[0].influence.values()} == {0.25}
    student = load_file(folder.model_path("student"))
    wanted = {name: torch.full_like(tensor, 0.125) for name, tensor in student.items()}
    assert distance(student, wanted) > 0.5 * length(wanted)
