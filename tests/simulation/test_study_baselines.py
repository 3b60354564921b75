"""The baselines do what their names say: every training is watched, its start and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from in_process_run import equal
from small_recipes import SMALL_LINK

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training import link
from chainward_client.training.link import LinkObjective, labelled_cases
from chainward_client.training.loop import train
from chainward_shared.distillation.losses import class_counts
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.weights import StateDict, rounded
from chainward_simulations.study import baselines
from chainward_simulations.study.baselines import (
    chain_steps,
    state_of,
    train_alone,
    train_cyclic,
    train_federated,
)
from chainward_simulations.study.further import scaffold
from chainward_simulations.study.further.scaffold import CorrectedObjective, train_scaffold
from chainward_simulations.study.further.union import train_union
from chainward_simulations.study.start import Start

RECIPE = SMALL_LINK.model_copy(
    update={
        "augmentation": "upright",
        "class_balance": "site-prior",
        "distillation_weight": 0.0,
        "temperature_decay": 0.9,
        "transfer": "full",  # nothing comes between the end of one training and what follows
    }
)
SIZES = {"oak": 20, "elm": 9, "fir": 13}


def site_of(name: str, n: int) -> SiteData:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 1, 2, 0] * n)[:n]
    cases = Cases(images, labels, np.array([f"{name}-{i}" for i in range(n)]))
    return SiteData(name, ("a", "b", "c"), {"train": cases, "val": cases, "test": cases})


SITES = {name: site_of(name, n) for name, n in SIZES.items()}


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)


@dataclass
class Training:
    """What was seen of one training."""

    names: tuple[str | int, ...]
    images: torch.Tensor
    epochs: int
    part: tuple[int, int]
    start: StateDict
    end: StateDict = field(default_factory=dict)


@pytest.fixture
def trainings(monkeypatch) -> list[Training]:
    """All trainings, in their order."""
    seen: list[Training] = []

    def watched(model, cases, recipe, objective, *names, part=(0, 1), **others):
        seen.append(Training(names, cases.images, recipe.epochs, part, state_of(model)))
        log = train(model, cases, recipe, objective, *names, part=part, **others)
        seen[-1].end = state_of(model)
        return log

    monkeypatch.setattr(baselines, "train", watched)
    monkeypatch.setattr(link, "train", watched)
    return seen


def quiet(step: str) -> None:
    """Take no notice of progress."""


def explicit_average(states: list[StateDict], weights: list[int]) -> StateDict:
    """The weighted mean, number by number, in Python's floats."""
    average = {}
    for name in states[0]:
        columns = zip(*(state[name].flatten().tolist() for state in states), strict=True)
        values = [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]
        average[name] = torch.tensor(values).reshape(states[0][name].shape)
    return average


def assert_handed_on(trainings: list[Training]) -> None:
    for before, after in pairwise(trainings):
        assert equal(before.end, after.start), f"{after.names} did not start from what {before.names} ended with"


@pytest.mark.parametrize("laps", [1, 2])
def test_cyclic_starts_each_site_from_exactly_the_weights_of_the_one_before(trainings, architecture, laps):
    model, logs = train_cyclic(SITES, ["elm", "oak", "fir"], Start(architecture), RECIPE, laps, quiet)
    assert [training.names[1] for training in trainings] == ["elm", "oak", "fir"] * laps
    assert_handed_on(trainings)
    assert equal(trainings[-1].end, model)
    assert [training.part for training in trainings] == [(lap, laps) for lap in range(laps) for _ in SITES]
    assert sum(log.images for log in logs) == RECIPE.epochs * sum(SIZES.values())


@pytest.mark.slow
def test_baselines_round_what_would_travel_as_a_run_does(trainings, architecture):
    half = RECIPE.model_copy(update={"transfer": "half"})
    model, _ = train_cyclic(SITES, list(SITES), Start(architecture), half, 1, quiet)
    for before, after in pairwise(trainings):
        assert equal(rounded(before.end), after.start)
    assert equal(rounded(trainings[-1].end), model)
    assert not equal(trainings[-1].end, model)
    alone, _ = train_alone(SITES, Start(architecture), half, quiet)
    averaged, _ = train_federated(SITES, Start(architecture), half, 1, quiet)
    assert all(equal(rounded(state), state) for state in (*alone.values(), averaged))


@pytest.mark.slow
def test_a_cyclic_baseline_that_hands_nothing_on_is_caught(trainings, architecture, monkeypatch):
    """The fault of a published benchmark: every site starts from the initial weights."""
    monkeypatch.setattr(baselines, "state_of", lambda model: state_of(build_model(architecture, RECIPE.seed)))
    train_cyclic(SITES, list(SITES), Start(architecture), RECIPE, 1, quiet)
    with pytest.raises(AssertionError, match="did not start from"):
        assert_handed_on(trainings)


def test_alone_trains_every_site_from_the_initial_weights_on_its_own_images(trainings, architecture):
    models, _ = train_alone(SITES, Start(architecture), RECIPE, quiet)
    initial = state_of(build_model(architecture, RECIPE.seed))
    for training, (name, data) in zip(trainings, SITES.items(), strict=True):
        assert equal(training.start, initial)
        assert torch.equal(training.images, data.splits["train"].images)
        assert equal(training.end, models[name])


@pytest.mark.slow
def test_alone_long_takes_as_many_steps_at_every_site_as_the_whole_chain(architecture):
    whole = chain_steps(SITES, RECIPE)
    assert whole == 2 * (3 + 2 + 2)  # epochs times batches of 8
    _, logs = train_alone(SITES, Start(architecture), RECIPE, quiet, steps=whole)
    for log, n in zip(logs, SIZES.values(), strict=True):
        assert abs(log.steps - whole) <= -(-n // 8) / 2


def test_the_union_sees_every_labelled_image_of_every_site_at_once(trainings, architecture):
    _, logs = train_union(SITES, Start(architecture), RECIPE, quiet)
    (training,) = trainings
    everything = torch.cat([data.splits["train"].images for data in SITES.values()])
    assert torch.equal(training.images, everything)
    assert logs[0].images == RECIPE.epochs * sum(SIZES.values())


@pytest.mark.slow
def test_a_label_fraction_leaves_every_baseline_the_same_images(trainings, architecture):
    recipe = RECIPE.model_copy(update={"label_fraction": 0.4})
    kept = {site: labelled_cases(data, recipe).images for site, data in SITES.items()}
    assert 0 < sum(map(len, kept.values())) < sum(SIZES.values())
    train_union(SITES, Start(architecture), recipe, quiet)
    train_cyclic(SITES, list(SITES), Start(architecture), recipe, 1, quiet)
    train_federated(SITES, Start(architecture), recipe, 1, quiet)
    train_alone(SITES, Start(architecture), recipe, quiet)
    assert torch.equal(trainings[0].images, torch.cat(list(kept.values())))
    for training, site in zip(trainings[1:], list(SITES) * 3, strict=True):
        assert torch.equal(training.images, kept[site])


@pytest.mark.slow
def test_fedavg_averages_what_the_sites_trained_by_their_labelled_images(trainings, architecture):
    model, logs = train_federated(SITES, Start(architecture), RECIPE, 2, quiet)
    first, second = trainings[:3], trainings[3:]
    assert [training.epochs for training in trainings] == [1] * 6
    assert [training.part for training in trainings] == [(0, 2)] * 3 + [(1, 2)] * 3
    for training in first:
        assert equal(training.start, state_of(build_model(architecture, RECIPE.seed)))
    average = explicit_average([training.end for training in first], list(SIZES.values()))
    for training in second:
        assert equal(training.start, second[0].start)
        torch.testing.assert_close(training.start, average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model, explicit_average([training.end for training in second], list(SIZES.values())), rtol=1e-5, atol=1e-6
    )
    assert sum(log.images for log in logs) == RECIPE.epochs * sum(SIZES.values())


def test_fedavg_of_one_site_in_one_round_is_plain_training(architecture):
    data = SITES["oak"]
    averaged, _ = train_federated({"oak": data}, Start(architecture), RECIPE, 1, quiet)
    model = build_model(architecture, RECIPE.seed)
    cases = data.splits["train"]
    objective = LinkObjective(RECIPE, model, None, class_counts(cases.labels, 3))
    train(model, cases, RECIPE, objective, "federated", "oak", "round", 0)
    assert equal(averaged, state_of(model))


def distance(first: StateDict, second: StateDict) -> float:
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


@pytest.mark.slow
def test_fedprox_without_its_term_is_fedavg_to_the_bit_and_a_large_one_holds_the_weights(architecture):
    initial = state_of(build_model(architecture, RECIPE.seed))
    fedavg, _ = train_federated(SITES, Start(architecture), RECIPE, 1, quiet)
    without, _ = train_federated(SITES, Start(architecture), RECIPE, 1, quiet, mu=0.0)
    held, _ = train_federated(SITES, Start(architecture), RECIPE, 1, quiet, mu=1000.0)
    assert equal(fedavg, without)
    assert distance(held, initial) < 0.5 * distance(fedavg, initial)


def test_the_proximal_term_is_half_mu_times_the_squared_distance(architecture, monkeypatch):
    model = build_model(architecture, 1)
    monkeypatch.setattr(LinkObjective, "losses", lambda self, model, batch: torch.zeros(3))
    objective = baselines.ProximalObjective(model, SITES["oak"].splits["train"], 3, RECIPE, 0.3)
    objective.start(torch.device("cpu"), 1)
    expected = 0.0
    for value in model.parameters():
        step = torch.randn_like(value)
        expected += 0.15 * float(step.double().square().sum())
        value.data += step
    assert objective.losses(model, None).tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_scaffold_corrects_each_step_by_what_the_site_and_everybody_have_seen(monkeypatch):
    """Two sites, plain gradient descent on |w - a|^2 / 2: control variates are the gradients at the points passed (option II)."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)

    def towards(self, model, batch):
        return ((model.weight - 3.0).square() / 2).flatten()

    monkeypatch.setattr(LinkObjective, "losses", towards)
    site, everybody = torch.tensor([[-1.0]]), torch.tensor([[0.5]])
    objective = CorrectedObjective(model, SITES["oak"].splits["train"], 3, RECIPE)
    objective.corrections = [everybody - site]
    objective.start(torch.device("cpu"), 1)
    passed, rate = [], 0.1
    for _ in range(3):
        passed.append(float(model.weight.detach()))
        model.zero_grad()
        objective.losses(model, None).sum().backward()
        assert float(model.weight.grad) == pytest.approx(passed[-1] - 3.0 + 1.5)
        model.weight.data -= rate * model.weight.grad
        objective.after_step(model)
    (control,) = objective.control()
    start, end = 0.0, float(model.weight.detach())
    paper = float(site) - float(everybody) + (start - end) / (3 * rate)
    assert float(control) == pytest.approx(paper) == pytest.approx(np.mean(passed) - 3.0)


@pytest.mark.slow
def test_scaffold_in_its_first_round_is_federated_averaging_and_then_is_not(architecture, monkeypatch):
    monkeypatch.setattr(baselines, "train", lambda *args, **more: train(*args[:4], "same", args[5], **more))
    monkeypatch.setattr(scaffold, "train", lambda *args, **more: train(*args[:4], "same", args[5], **more))
    once = RECIPE.model_copy(update={"epochs": 1})
    first, _ = train_scaffold(SITES, Start(architecture), once, quiet)
    assert equal(first, train_federated(SITES, Start(architecture), once, 1, quiet)[0])
    second, logs = train_scaffold(SITES, Start(architecture), RECIPE, quiet)
    assert not equal(second, train_federated(SITES, Start(architecture), RECIPE, 2, quiet)[0])
    assert sum(log.images for log in logs) == RECIPE.epochs * sum(SIZES.values())
