"""Secure sums over a grid: they are the plain ones, whoever drops out, and no site's own are ever seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chainward_server.rendezvous import meet
from chainward_server.sites import TooFewSitesError, Trained, Work
from chainward_shared.config import RunConfig
from chainward_shared.models import build_model
from chainward_shared.pretrained.begin import begin
from chainward_shared.protocol import (
    MaskedSum,
    StatisticsResult,
    StatisticsTask,
    SumKeysTask,
    SumSharesTask,
    SumTask,
    SumUnmaskTask,
    kind_of,
    unpack,
)
from chainward_shared.secure_sums import flat, from_tensor, real_numbers
from chainward_shared.weights import digest, from_arrays

SITES = ["ash", "birch", "cedar", "dogwood"]
STEPS = [SumKeysTask, SumSharesTask, SumTask, SumUnmaskTask]


@pytest.fixture
def waiting(settings):
    """Settings under which nobody waits long for a site that is silent."""
    return settings | {"federation.deadline": 0.5, "federation.hop-deadline": 0.3, "federation.patience": 0.0}


@pytest.fixture
def consortium(waiting, loopback, tmp_path):
    """Meet the sites over a grid with some interference; return the sites and the same work for each of some."""

    def of(interference=None, asked=SITES):
        config = RunConfig.from_flat(waiting)
        sites = meet(loopback(2, interference), config, tmp_path)
        architecture = begin(config, classes=3, channels=1, image_size=32).architecture
        state = build_model(architecture, seed=0).state_dict()
        task = StatisticsTask(
            run_id="r",
            hop="head",
            architecture=architecture,
            label_fraction=1.0,
            seed=0,
            threads=1,
            digest=digest(state),
        )
        return sites, {site: Work(task, {"model": state}) for site in asked}

    return of


@pytest.fixture
def plain(consortium):
    """What each site answers to a round of statistics that is not secure."""
    sites, work = consortium()
    answers = dict(sites.statistics(work))
    assert all(isinstance(answer, Trained) for answer in answers.values())
    return {site: answer.model for site, answer in answers.items()}


def site_of(message):
    return SITES[
        unpack(message.content, next(step for step in STEPS if kind_of(message.content) == step.KIND))[
            0
        ].simulated.index
    ]


def silent_at(step, site):
    """Return an interference by which a site does not answer one step."""

    def interfere(message, answer):
        return None if kind_of(message.content) == step.KIND and site_of(message) == site else answer()

    return interfere


def is_sum_of(state, plain, sites):
    return all(
        torch.allclose(values, sum(plain[site][name] for site in sites), rtol=1e-9, atol=1e-6)
        for name, values in state.items()
    )


def test_a_secure_sum_is_the_plain_one(consortium, plain):
    sites, work = consortium()
    summed = sites.summed(work)
    assert summed.sites == SITES
    assert not summed.failed
    assert is_sum_of(summed.state, plain, SITES)
    assert int(summed.state["train.images"]) == 99


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.KIND)
def test_a_site_that_drops_out_at_any_step_costs_its_own_numbers_alone(consortium, plain, step):
    sites, work = consortium(silent_at(step, "birch"))
    summed = sites.summed(work)
    answered = SITES if step is SumUnmaskTask else ["ash", "cedar", "dogwood"]
    assert summed.sites == answered
    assert list(summed.failed) == ["birch"]
    assert is_sum_of(summed.state, plain, answered)


def test_the_coordinator_is_sent_nothing_from_which_fewer_than_all_sites_can_be_told(consortium, plain):
    replies = []

    def noted(message, answer):
        replies.append(answer())
        return replies[-1]

    sites, work = consortium(noted)
    sites.summed(work)
    assert StatisticsResult.KIND not in {kind_of(reply.content) for reply in replies}
    single = {site: flat(state) for site, state in plain.items()}
    expected = {"sum": torch.empty(len(single["ash"]), dtype=torch.int64)}
    sent = [unpack(reply.content, MaskedSum) for reply in replies if kind_of(reply.content) == MaskedSum.KIND]
    found = {body.site: from_tensor(from_arrays(arrays["sum"], expected)["sum"]) for body, arrays in sent}
    assert set(found) == set(SITES)
    for some in (["ash"], ["ash", "birch"], ["ash", "birch", "cedar"], SITES):
        total = real_numbers(sum(found[site] for site in some))
        assert not np.isclose(total, sum(single[site] for site in some), rtol=0.01).any()


def test_a_sum_over_two_is_refused_in_words(consortium):
    sites, work = consortium(asked=SITES[:2])
    with pytest.raises(TooFewSitesError, match="takes 3 sites"):
        sites.summed(work)


def test_two_of_four_that_drop_out_are_too_many(consortium):
    def interfere(message, answer):
        return None if kind_of(message.content) == SumTask.KIND and site_of(message) in SITES[:2] else answer()

    sites, work = consortium(interfere)
    with pytest.raises(TooFewSitesError, match="2 of 4 sites have answered") as error:
        sites.summed(work)
    assert set(error.value.failed) == set(SITES[:2])


def test_a_site_that_sends_nonsense_is_left_out(consortium, plain):
    def interfere(message, answer):
        reply = answer()
        if kind_of(message.content) == SumTask.KIND and site_of(message) == "birch":
            del reply.content.array_records["sum"]
        return reply

    sites, work = consortium(interfere)
    summed = sites.summed(work)
    assert "no arrays" in summed.failed["birch"].reason
    assert is_sum_of(summed.state, plain, ["ash", "cedar", "dogwood"])


def test_a_site_masks_no_other_task_than_the_one_that_was_agreed_on(consortium):
    refusals = []

    def interfere(message, answer):
        if kind_of(message.content) == SumTask.KIND:
            task, _ = unpack(message.content, SumTask)
            other = task.model_copy(update={"statistics": task.statistics.model_copy(update={"label_fraction": 0.5})})
            message.content.config_records["chainward"]["body"] = other.model_dump_json()
        reply = answer()
        refusals.append(str(reply.content.config_records["chainward"]["body"]))
        return reply

    sites, work = consortium(interfere)
    with pytest.raises(TooFewSitesError):
        sites.summed(work)
    assert sum("another sum" in refusal for refusal in refusals) == len(SITES)


@pytest.mark.slow
def test_a_run_with_secure_sums_ends_with_the_head_of_plain_ones(settings, coordinated):
    flat_settings = settings | {
        "chain.head": "statistics",
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.rounds": 1,
        "student.epochs": 1,
        "student.finetune-rounds": 0,
        "student.head": "statistics",
        "federation.transfer": "full",
    }

    def heads(**changes):
        folder, results = coordinated(flat_settings | changes)
        state = load_file(folder.path / "models" / "head-start.safetensors")
        return {name: values for name, values in state.items() if "head.fc" in name}, results

    expected, _ = heads()
    found, results = heads(**{"federation.secure-sums": "on"})
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)
    assert [(head.secure, head.sites, head.images) for head in results.heads] == [(True, SITES, 99)] * 3
