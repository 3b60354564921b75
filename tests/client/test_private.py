"""Private training: what a step is, where its randomness comes from, and that every sabotage of it is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from small_recipes import SMALL_LINK
from torch import nn

from chainward_client import entropy as entropy_module
from chainward_client import private_training as private_module
from chainward_client.data.site_data import Cases
from chainward_client.entropy import Entropy, SeededForTests
from chainward_client.privacy_audit import checks, neighbours
from chainward_client.private_training import (
    PrivateTraining,
    declared_counts,
    keeps_labels,
    units_of,
)
from chainward_client.training import link as link_module
from chainward_client.training.link import LinkObjective
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch, Objective
from chainward_client.training.private_loop import WeightAverage
from chainward_shared.distillation.losses import class_counts
from chainward_shared.errors import ModelError, PrivacyError
from chainward_shared.models import build_model, ghost, resolve_architecture
from chainward_shared.models.ghost import ROOM
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.dp_sgd import DpSgd, dp_sgd_of, rounded_units
from chainward_shared.recipes import PrivacyRecipe, PrivilegedRecipe

RECIPE = SMALL_LINK.model_copy(
    update={
        "epochs": 3,
        "batch_size": 6,
        "temperature": 2.0,
    }
)
DP_SGD = DpSgd(unit="image", delta=1e-5, noise_multiplier=1.0, sample_rate=0.5, expected_batch=6.0, steps=5, clip=0.05)


def cases_of(n: int = 12, patients: list[str] | None = None) -> Cases:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=generator)
    names = [f"patient-{i}" for i in range(n)] if patients is None else patients
    return Cases(images, torch.arange(n) % 3, np.array(names))


@pytest.fixture(scope="module")
def architecture():
    return resolve_architecture("test_vit", num_classes=3, in_chans=1, image_size=32, patch_size=8)


class Projecting(Objective):
    """Cross-entropy plus a term through a projector beside the model; `images` without label only through the model."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.projector = nn.Linear(3, 4, bias=False)

    def extra_parameters(self):
        return list(self.projector.parameters())

    def extra_modules(self):
        return [self.projector]

    def losses(self, model, batch):
        logits = model(batch.view())
        n = len(batch.labels)
        loss = nn.functional.cross_entropy(logits[:n], batch.labels, reduction="none")
        loss = loss + self.projector(logits[:n]).square().sum(dim=1)
        return loss if len(logits) == n else torch.cat([loss, logits[n:].square().sum(dim=1)])


def batch_of(images, labels, unlabelled=None):
    return Batch(images, labels, torch.arange(len(labels)), unlabelled, "none", torch.Generator())


def slow_reference(model, objective, cases, rows, unlabelled, clip):
    """The clipped gradients of single examples, computed one by one, clipped and added up one by one."""
    parameters = [*model.parameters(), *objective.extra_parameters()]
    total = [torch.zeros_like(p) for p in parameters]
    n = len(cases)
    for row in rows:
        for parameter in parameters:
            parameter.grad = None
        if row < n:
            loss = objective.losses(model, batch_of(cases.images[[row]], cases.labels[[row]]))[0]
        else:
            loss = objective.losses(model, batch_of(cases.images[:0], cases.labels[:0], unlabelled[[row - n]]))[0]
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for sum_of, gradient in zip(total, gradients, strict=True):
            sum_of += gradient * min(1.0, ROOM * clip / length)
    for parameter in parameters:
        parameter.grad = None
    return total


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3, 64])
@pytest.mark.parametrize("clip", [0.05, 4.0, 1e6])
def test_a_step_is_the_sum_of_gradients_clipped_one_by_one_with_the_projector_over_the_expected_batch(
    architecture, together, clip
):
    cases, unlabelled = cases_of(), cases_of(5).images.flip(0)
    model, objective = build_model(architecture, 1), Projecting()
    chosen = [0, 2, 3, 7, 11, 12, 15]  # the last two are images without label
    expected = slow_reference(model, objective, cases, chosen, unlabelled, clip)
    private = PrivateTraining(
        DP_SGD.model_copy(update={"clip": clip, "noise_multiplier": 0.0}),
        unlabelled_patients=np.array(["u"] * 5),
        together=together,
    )
    parameters = [*model.parameters(), *objective.extra_parameters()]
    private.start(model, objective.extra_modules(), parameters, cases.patients)
    for rows in private.parts(torch.tensor(chosen)):
        mine, rest = rows[rows < 12], rows[rows >= 12] - 12
        private.accumulate(objective.losses(model, batch_of(cases.images[mine], cases.labels[mine], unlabelled[rest])))
    private.finish_step()
    for parameter, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference / 6.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-12])
def test_of_several_views_of_an_image_the_mean_gradient_is_clipped(name, magnitude):
    """Also where gradients are so small that rows are measured in units of their own."""
    options = {"patch_size": 8} if name == "test_vit" else {}
    found = resolve_architecture(name, num_classes=3, in_chans=1, image_size=32, **options)
    model, cases, views = build_model(found, 1).train(), cases_of(4), 3
    labels = cases.labels.repeat_interleave(views)
    seen = torch.stack([cases.images.float().roll(shift, 3) / 255 for shift in range(views)], dim=1).flatten(0, 1)

    def losses(rows):
        logits = model(seen[rows])
        return magnitude * nn.functional.cross_entropy(logits, labels[rows], reduction="none")

    parameters, clip = list(model.parameters()), 0.7 * magnitude
    expected = [torch.zeros_like(p) for p in parameters]
    for image in range(4):
        gradients = torch.autograd.grad(losses(torch.arange(views * image, views * (image + 1))).mean(), parameters)
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, ROOM * clip / length)
    private = PrivateTraining(DP_SGD.model_copy(update={"clip": clip, "noise_multiplier": 0.0}), views=views)
    private.start(model, [], parameters, cases.patients)
    calls = []

    def of_rows(rows):
        calls.append(rows.tolist())
        places = torch.tensor([views * row + calls[-1][:i].count(row) for i, row in enumerate(calls[-1])])
        return losses(places)

    private.sample = lambda: torch.arange(4)
    private.step(of_rows)
    assert calls == [[row for row in range(4) for _ in range(views)]]
    for parameter, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad / magnitude, reference / magnitude / 6.0, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_attention_transfer_is_in_the_clipped_gradient_of_each_image(name):
    """It leaves the model in its middle, where gradients taken at the model's output miss it."""
    patch_size = 8 if name == "test_vit" else 0
    found = resolve_architecture(name, num_classes=3, in_chans=1, image_size=32, patch_size=patch_size)
    model, predecessor, cases = build_model(found, 1).train(), build_model(found, 2), cases_of(5)
    recipe = RECIPE.model_copy(update={"attention_weight": 50.0})
    objective = LinkObjective(recipe, model, predecessor, class_counts(cases.labels, 3))
    objective.start(torch.device("cpu"), 1)
    expected = slow_reference(model, objective, cases, [0, 1, 4], None, 0.1)
    fresh = LinkObjective(recipe, model, predecessor, class_counts(cases.labels, 3))
    private = PrivateTraining(DP_SGD.model_copy(update={"clip": 0.1, "noise_multiplier": 0.0}))
    private.start(model, [], list(model.parameters()), cases.patients)
    chosen = torch.tensor([0, 1, 4])
    private.accumulate(fresh.losses(model, batch_of(cases.images[chosen], cases.labels[chosen])))
    private.finish_step()
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference / 6.0, rtol=1e-3, atol=1e-6)


def test_with_zero_noise_a_huge_clip_and_everyone_in_every_step_it_is_plain_training(architecture):
    cases = cases_of()
    plain, private_model = build_model(architecture, 1), build_model(architecture, 1)
    counts = class_counts(cases.labels, 3)
    recipe = RECIPE.model_copy(update={"batch_size": 12})
    train(plain, cases, recipe, LinkObjective(recipe, plain, None, counts), "link")
    everyone = DP_SGD.model_copy(
        update={"noise_multiplier": 0.0, "clip": 1e6, "sample_rate": 1.0, "expected_batch": 12.0, "steps": 3}
    )
    private = PrivateTraining(everyone)
    log = train(
        private_model, cases, recipe, LinkObjective(recipe, private_model, None, counts), "link", private=private
    )
    start, mine, theirs = (
        torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        for model in (build_model(architecture, 1), private_model, plain)
    )
    # Adam divides a gradient by its own size: where the true one is zero (a key's bias) it follows rounding errors
    assert float((mine - theirs).norm()) < 0.02 * float((theirs - start).norm())
    assert float((mine - theirs).abs().median()) < 1e-6
    assert (log.steps, log.images, log.loss) == (3, 36, [])


class Following(LinkObjective):
    """A link's objective that notes the weights after each step."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.weights: list[list[torch.Tensor]] = []

    def after_step(self, model):
        self.weights.append([parameter.detach().double().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_what_a_private_training_yields_is_the_moving_average_of_its_weights(architecture, decay):
    cases, model = cases_of(), build_model(architecture, 1)
    start = [parameter.detach().double().clone() for parameter in model.parameters()]
    objective = Following(RECIPE, model, None, class_counts(cases.labels, 3))
    private = PrivateTraining(DP_SGD.model_copy(update={"clip": 1.0}), average_decay=decay)
    train(model, cases, RECIPE, objective, "link", private=private)
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, DP_SGD.steps + 1)]
    shares = [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(DP_SGD.steps)]
    assert math.isclose(sum(shares) + math.prod(decays), 1.0)
    for i, parameter in enumerate(model.parameters()):
        expected = math.prod(decays) * start[i]
        for share, weights in zip(shares, objective.weights, strict=True):
            expected = expected + share * weights[i]
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_an_interrupted_moving_average_goes_on_as_if_it_had_not_been(architecture):
    def moved(average, parameter, steps):
        for step in steps:
            parameter.data.fill_(1.0 + step)
            average.step()

    parameter = nn.Parameter(torch.zeros(3))
    whole, first, second = (WeightAverage([parameter], 0.9) for _ in range(3))
    moved(whole, parameter, range(7))
    moved(first, parameter, range(4))
    second.load({name: value.clone() for name, value in first.state().items()}, 4)
    moved(second, parameter, range(4, 7))
    second.apply()
    assert torch.equal(parameter.data, whole.values[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_drops_out_and_leaves_the_others(architecture, bad):
    cases, objective = cases_of(), Projecting()
    images = cases.images[:4].float() / 255
    images[2] = bad

    def step(rows):
        model = build_model(architecture, 1).train()
        private = PrivateTraining(DP_SGD.model_copy(update={"noise_multiplier": 0.0}))
        private.start(
            model, objective.extra_modules(), [*model.parameters(), *objective.extra_parameters()], cases.patients
        )
        logits = model(images[rows])
        loss = nn.functional.cross_entropy(logits, cases.labels[rows], reduction="none")
        private.accumulate(loss + objective.projector(logits).square().sum(dim=1))
        private.finish_step()
        gradients = [p.grad for p in (*model.parameters(), *objective.extra_parameters())]
        private.close()
        return gradients

    for with_it, without in zip(step([0, 1, 2, 3]), step([0, 1, 3]), strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-4, atol=1e-7)


def test_the_model_bears_no_trace_of_single_examples_afterwards(architecture):
    model, cases = build_model(architecture, 1), cases_of()
    private = PrivateTraining(DP_SGD)
    train(model, cases, RECIPE, LinkObjective(RECIPE, model, None, class_counts(cases.labels, 3)), "x", private=private)
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert private.steps_done == DP_SGD.steps
    assert not private.entropy.seeded


def test_what_was_spent_is_known_after_a_crash(architecture):
    class Failing(LinkObjective):
        def after_step(self, model):
            raise RuntimeError("power cut")

    model, cases = build_model(architecture, 1), cases_of()
    private = PrivateTraining(DP_SGD)
    with pytest.raises(RuntimeError, match="power cut"):
        train(model, cases, RECIPE, Failing(RECIPE, model, None, class_counts(cases.labels, 3)), "x", private=private)
    assert private.steps_done == 1
    assert not any(m._forward_hooks for m in model.modules())


def test_no_step_goes_beyond_the_plan(architecture):
    private = PrivateTraining(DP_SGD.model_copy(update={"steps": 1}))
    model = build_model(architecture, 1)
    private.start(model, [], list(model.parameters()), cases_of().patients)
    private.finish_step()
    with pytest.raises(PrivacyError, match="one more was not reserved"):
        private.finish_step()


def test_a_parameter_that_would_not_be_clipped_is_found(architecture):
    class Forgetting(Projecting):
        def extra_modules(self):
            return []

    model = build_model(architecture, 1)
    with pytest.raises(ModelError, match="per-example gradients"):
        train(model, cases_of(), RECIPE, Forgetting(), "x", private=PrivateTraining(DP_SGD))


# --- randomness ---


@pytest.mark.slow
def test_two_private_trainings_with_one_seed_differ_and_two_with_a_seeded_entropy_are_marked(architecture):
    def weights(entropy):
        model, cases = build_model(architecture, 1), cases_of()
        private = PrivateTraining(DP_SGD, entropy=entropy)
        recipe = RECIPE.model_copy(update={"augmentation": "upright"})
        train(
            model,
            cases,
            recipe,
            LinkObjective(recipe, model, None, class_counts(cases.labels, 3)),
            "x",
            private=private,
        )
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), private.entropy.seeded

    (one, seeded), (other, _) = weights(None), weights(None)
    assert not torch.equal(one, other)
    assert not seeded
    (one, seeded), (other, _) = weights(SeededForTests(1)), weights(SeededForTests(1))
    assert torch.equal(one, other)
    assert seeded


@pytest.mark.slow
def test_the_run_seed_reaches_no_generator_of_a_private_training(architecture, monkeypatch):
    """Whatever the loop derives from the run's seed could as well be another number."""
    cases, ends = cases_of(), []
    for seed in (3, 4):
        model = build_model(architecture, 1)
        recipe = RECIPE.model_copy(update={"seed": seed, "augmentation": "upright"})
        private = PrivateTraining(DP_SGD, entropy=SeededForTests(9))
        train(
            model,
            cases,
            recipe,
            LinkObjective(recipe, model, None, class_counts(cases.labels, 3)),
            "x",
            private=private,
        )
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_torch_keeps_32_bits_of_a_seed_and_entropy_gives_its_generator_more():
    seeded = [torch.Generator().manual_seed(5 + high * 2**32) for high in (0, 1)]
    assert torch.equal(*(torch.randn(8, generator=g) for g in seeded))  # why there is a module `entropy`
    state = Entropy().generator().get_state()
    words = state[24 : 24 + 8 * 624].view(torch.int64)
    assert len(set(words.tolist())) > 600
    assert 0.45 < np.unpackbits(words.numpy().astype(np.uint32).view(np.uint8)).mean() < 0.55
    uniform = torch.rand(20_000, generator=Entropy().generator())
    assert abs(float(uniform.mean()) - 0.5) < 0.02
    assert not torch.equal(uniform, torch.rand(20_000, generator=Entropy().generator()))


def test_the_noise_is_normal_to_its_tails_secret_and_new_each_time():
    numbers = Entropy().normal([torch.Size([1000, 999]), torch.Size([]), torch.Size([3])], torch.device("cpu"))
    assert [tuple(part.shape) for part in numbers] == [(1000, 999), (), (3,)]
    assert stats.kstest(numbers[0].double().flatten().numpy(), "norm").pvalue > 1e-6
    beyond_four = float((numbers[0].abs() > 4).double().mean())
    assert beyond_four == pytest.approx(2 * stats.norm.sf(4), rel=0.8)
    torch.manual_seed(0)
    first = Entropy().normal([torch.Size([100])], torch.device("cpu"))[0]
    torch.manual_seed(0)
    assert not torch.equal(first, Entropy().normal([torch.Size([100])], torch.device("cpu"))[0])


def test_the_systems_numbers_are_uniform_and_normal():
    system = Entropy()
    counts = np.bincount((system.uniform(200_000) * 20).astype(int), minlength=20)
    assert len(counts) == 20
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 75  # chi-square, 19 degrees of freedom: one in 10^8
    (noise,) = system.normal([torch.Size([400, 500])], torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 6 / math.sqrt(200_000)
    assert abs(float(noise.square().mean()) - 1) < 6 * math.sqrt(2 / 200_000)
    assert (noise.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=0.0008)


def test_patients_are_sampled_at_the_specified_rate_and_give_one_image_each_of_theirs():
    patients = ["a"] * 6 + ["b"] * 3 + ["c"]
    private = PrivateTraining(DP_SGD.model_copy(update={"unit": "patient", "sample_rate": 0.3}))
    model = nn.Linear(2, 2)
    private.start(model, [], list(model.parameters()), np.array(patients))
    draws, images = 6000, np.zeros(10)
    for _ in range(draws):
        rows = private.sample().tolist()
        assert len({patients[row] for row in rows}) == len(rows)
        images[rows] += 1
    expected = draws * 0.3 / np.array([6] * 6 + [3] * 3 + [1])
    assert ((images - expected) ** 2 / expected).sum() < 60  # about chi-square with 10 degrees of freedom
    private.close()


# --- DP-SGD parameters ---


@pytest.mark.slow
def test_the_plan_solves_the_noise_and_stays_within_the_budget():
    found = dp_sgd_of(PrivacyRecipe(epsilon=3.0, delta=1e-5), units=1000, epochs=5, batch_size=50)
    assert (found.sample_rate, found.expected_batch, found.steps) == (0.05, 50.0, 100)
    assert 2.98 < spent([found.mechanism], 1e-5) <= 3.0


def test_a_batch_larger_than_the_site_takes_everyone():
    found = dp_sgd_of(PrivacyRecipe(noise_multiplier=2.0, delta=1e-5), units=20, epochs=5, batch_size=50)
    assert (found.sample_rate, found.expected_batch, found.steps, found.noise_multiplier) == (1.0, 20.0, 5, 2.0)


def test_a_plan_without_patients_or_with_a_delta_that_gives_one_away_is_refused():
    recipe = PrivacyRecipe(noise_multiplier=2.0, delta=0.01)
    with pytest.raises(PrivacyError, match="below 1 / 100"):
        dp_sgd_of(recipe, units=100, epochs=1, batch_size=10)
    with pytest.raises(PrivacyError, match="0 patients"):
        dp_sgd_of(recipe, units=0, epochs=1, batch_size=10)
    with pytest.raises(ValidationError, match="exactly one"):
        PrivacyRecipe(delta=1e-5)


def test_the_number_of_patients_is_rounded_down():
    assert [rounded_units(n) for n in (0, 1, 9, 10, 14, 15, 99, 149, 151, 1234)] == [
        1,
        1,
        9,
        10,
        10,
        15,
        95,
        100,
        150,
        1000,
    ]


# --- what is a function of one record ---


@pytest.mark.parametrize("balance", ["site-prior", "weighted"])
def test_counts_of_private_labels_are_refused_and_a_declared_prior_is_taken(architecture, balance):
    recipe = RECIPE.model_copy(update={"class_balance": balance})
    with pytest.raises(PrivacyError, match="declare the prior"):
        PrivateTraining(DP_SGD).check(recipe, 0)
    PrivateTraining(DP_SGD, declared_prior=True).check(recipe, 0)
    assert declared_counts([0.5, 0.3, 0.2], multilabel=False).tolist() == [500_000, 300_000, 200_000]
    assert declared_counts([0.5, 0.1], multilabel=True).tolist() == [[500_000, 500_000], [900_000, 100_000]]
    with pytest.raises(PrivacyError, match="expected 1"):
        declared_counts([0.5, 0.3], multilabel=False)


def test_a_teacher_trained_without_privacy_is_refused():
    taught = RECIPE.model_copy(
        update={"privileged": PrivilegedRecipe(use="all", logit_weight=1, embedding_weight=0, temperature=2, epochs=1)}
    )
    with pytest.raises(PrivacyError, match="privileged teachers"):
        PrivateTraining(DP_SGD).check(taught, 0)
    PrivateTraining(DP_SGD, private_teachers=True).check(taught, 0)


def test_images_without_label_need_patients_and_bf16_is_off():
    with pytest.raises(PrivacyError, match="their patients"):
        PrivateTraining(DP_SGD).check(RECIPE, 4)
    with pytest.raises(PrivacyError, match="bf16"):
        PrivateTraining(DP_SGD).check(RECIPE.model_copy(update={"precision": "bf16"}), 0)


def test_an_image_without_patient_is_refused_where_patients_are_protected():
    with pytest.raises(PrivacyError, match="image 1 has no patient"):
        units_of(np.array(["a", " ", "b"]), "patient")
    assert len(units_of(np.array(["a", " ", "b"]), "image")) == 3


@pytest.mark.slow
def test_whether_a_patient_keeps_its_labels_does_not_depend_on_the_others():
    patients = np.array([f"p{i // 2}" for i in range(4000)])
    kept = keeps_labels(patients, 0.3, 7, "oak")
    assert 0.25 < len(kept) / 4000 < 0.35
    without_some = patients[np.arange(4000) % 10 >= 2]
    of_rest = {without_some[row] for row in keeps_labels(without_some, 0.3, 7, "oak")}
    assert of_rest == {p for p in patients[kept] if p in set(without_some)}


def test_a_link_with_predecessor_attention_and_images_without_label_trains_privately(architecture):
    recipe = RECIPE.model_copy(update={"attention_weight": 0.5, "unlabelled_weight": 0.5})
    model, predecessor, cases = build_model(architecture, 1), build_model(architecture, 2), cases_of()
    before = [p.detach().clone() for p in model.parameters()]
    private = PrivateTraining(DP_SGD, unlabelled_patients=np.array(list("abcdefgh")))
    objective = LinkObjective(recipe, model, predecessor, class_counts(cases.labels, 3))
    train(model, cases, recipe, objective, "x", unlabelled=cases_of(8).images, private=private)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- sabotage that reaches into the modules; more of it is in `privacy_audit.sabotage` ---


@pytest.mark.slow
def test_the_honest_step_passes_every_check():
    assert checks.mechanism_problems() == []


def without_clipping(monkeypatch):
    monkeypatch.setattr(ghost, "clip_factors", lambda lengths, clip: torch.full_like(lengths[0], 1 / clip))


def clipping_each_layer_alone(monkeypatch):
    honest = ghost.clip_factors
    monkeypatch.setattr(ghost, "clip_factors", lambda lengths, clip: honest(lengths[-1:], clip))


def lengths_from_squares_of_float32(monkeypatch):
    def factors(lengths, clip):
        return torch.clamp(clip / lengths.float().square().sum(dim=0).sqrt(), max=1.0).double() / clip

    monkeypatch.setattr(ghost, "clip_factors", factors)


def splits_that_are_dealt_in_order(monkeypatch):
    monkeypatch.setattr(neighbours, "split_by_key", lambda patients, key: np.arange(len(patients)) % 10 < 7)


def labels_by_the_runs_seed(monkeypatch):
    monkeypatch.setattr(
        link_module, "labelled_by_key", lambda patients, fraction, key: keeps_labels(patients, fraction, 3, "x")
    )


def labels_by_rank(monkeypatch):
    monkeypatch.setattr(
        link_module, "labelled_by_key", lambda patients, fraction, key: np.arange(round(fraction * len(patients)))
    )


def a_seeded_entropy(monkeypatch):
    monkeypatch.setattr(private_module, "Entropy", lambda: SeededForTests(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (without_clipping, "move the sum of gradients"),
        (clipping_each_layer_alone, "move the sum of gradients"),
        (a_seeded_entropy, "seeded generator"),
        (lengths_from_squares_of_float32, "one image moves the sum of gradients by"),
        (splits_that_are_dealt_in_order, "who is in a split depends on other patients"),
        (labels_by_the_runs_seed, "a coordinator can compute it"),
        (labels_by_rank, "who keeps its labels depends on other patients"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sabotage_is_caught(sabotage, said, monkeypatch):
    sabotage(monkeypatch)
    problems = checks.mechanism_problems()
    assert any(any(part in problem for part in said.split("|")) for problem in problems), problems


def test_the_modules_under_sabotage_are_those_that_train():
    assert private_module.Entropy is entropy_module.Entropy
    assert private_module.GhostClipping is ghost.GhostClipping
