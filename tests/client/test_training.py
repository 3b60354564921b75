"""The training loop and the recipes built on it: what is minimised, what repeats, and what is left untouched."""

from __future__ import annotations

import platform
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK
from torch import nn

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.precision import resolve_precision, training_environment
from chainward_client.training.augmentation import STRENGTHS, augmented
from chainward_client.training.link import LinkObjective, labelled_cases, train_link
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch, Objective
from chainward_client.training.setup import one_cycle
from chainward_client.training.student import StudentObjective, train_student
from chainward_shared.distillation.losses import classification_loss, distillation_loss, teacher_trust
from chainward_shared.distillation.schedules import ema_decay
from chainward_shared.errors import ModelError
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.preprocessing import resized, to_float
from chainward_shared.recipes import StudentRecipe, TrainingRecipe
from chainward_shared.weights import StateDict, digest

LINK = SMALL_LINK.model_copy(
    update={
        "augmentation": "upright",
        "class_balance": "site-prior",
    }
)
STUDENT = StudentRecipe(
    **LINK.model_dump(include=set(TrainingRecipe.model_fields)),
    stage="distil",
    distillation_weight=0.7,
    temperature=2.0,
    ema_decay=0.9,
    frozen_epochs=1,
    rounds=2,
)


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)


def weights_of(architecture: Architecture, seed: int) -> StateDict:
    return {name: tensor.detach().clone() for name, tensor in build_model(architecture, seed).state_dict().items()}


def random_cases(n: int, seed: int = 0) -> Cases:
    images = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 2, 0, 0, 1] * n)[:n]
    return Cases(images, labels, np.array([f"patient-{i}" for i in range(n)]))


def site_data(n: int = 20, seed: int = 0, site: str = "oak") -> SiteData:
    cases = random_cases(n, seed)
    return SiteData(site, ("a", "b", "c"), {"train": cases, "val": cases, "test": cases})


def link(
    data: SiteData,
    architecture: Architecture,
    predecessor: StateDict | None = None,
    *,
    strand=0,
    lap=0,
    alone=False,
    **changes,
):
    recipe = LINK.model_copy(update=changes)
    return train_link(data, architecture, recipe, predecessor, strand=strand, lap=lap, alone=alone)


def batch_of(cases: Cases, augmentation="none") -> Batch:
    return Batch(
        cases.images, cases.labels, torch.arange(len(cases)), None, augmentation, torch.Generator().manual_seed(0)
    )


def largest_difference(one: StateDict, other: StateDict) -> float:
    assert list(one) == list(other)
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# --- repeatability ---


def test_the_same_names_and_seed_give_the_same_weights_bit_for_bit(architecture):
    torch.manual_seed(1)
    one, log = link(site_data(), architecture)
    torch.manual_seed(2)  # what the process drew before must not matter
    again, log_again = link(site_data(), architecture)
    assert digest(one) == digest(again)
    assert log.loss == log_again.loss


@pytest.mark.slow
def test_other_names_another_seed_or_other_cases_give_other_weights(architecture):
    digests = [
        digest(state)
        for state, _ in (
            link(site_data(), architecture),
            link(site_data(), architecture, strand=1),
            link(site_data(), architecture, lap=1),
            link(site_data(), architecture, alone=True),
            link(site_data(site="ash"), architecture),
            link(site_data(), architecture, seed=4),
            link(site_data(seed=1), architecture),
        )
    ]
    assert len(set(digests)) == len(digests)


def what_one_image_meets(names: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Train on one image, whose order can't differ; return a pixel of each view and the losses behind a dropout."""
    pixels: list[float] = []

    class Watching(Recorder):
        def losses(self, model, batch):
            view = batch.view()
            pixels.append(view[0, 0, 7, 7].item())
            return model(torch.ones_like(view)).square().sum(dim=1)

    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * 32, 3))
    torch.random.set_rng_state(generator)
    return pixels, train(model, random_cases(1), LINK, Watching(), *names).loss


def test_views_and_dropout_repeat_with_the_names_and_differ_without():
    torch.manual_seed(1)
    pixels, losses = what_one_image_meets(("link", "oak"))
    torch.manual_seed(2)
    assert what_one_image_meets(("link", "oak")) == (pixels, losses)
    other_pixels, other_losses = what_one_image_meets(("link", "ash"))
    assert other_pixels[0] != pixels[0]
    assert other_losses[0] != losses[0]


def test_training_leaves_the_global_generator_and_the_thread_count_alone(architecture):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    link(site_data(), architecture, threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_failed_training_leaves_them_alone_too():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), training_environment(threads + 1, seed=5):
        assert torch.get_num_threads() == threads + 1
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# --- the loop ---


class Recorder(Objective):
    """An objective that notes which images it saw, and pulls all logits to zero."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seen: list[list[int]] = []

    def start(self, device, steps_per_epoch):
        self.events.append(f"start {steps_per_epoch}")

    def start_epoch(self, epoch):
        self.events.append(f"epoch {epoch}")

    def losses(self, model, batch):
        assert model.training
        self.seen.append(sorted(batch.images[:, 0, 0, 0].tolist()))
        return model(batch.view()).square().sum(dim=1)

    def after_step(self, model):
        self.events.append("step")

    def epoch_log(self):
        return {"temperature": float(len(self.seen))}


def numbered_cases(n: int) -> Cases:
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 32, 32).contiguous()
    return Cases(images, torch.zeros(n, dtype=torch.int64), np.arange(n).astype(str))


def test_every_epoch_sees_every_image_once_in_another_order(architecture):
    recorder = Recorder()
    log = train(build_model(architecture, 0), numbered_cases(20), LINK, recorder, "oak")
    assert [len(seen) for seen in recorder.seen] == [7, 7, 6] * 2
    first, second = recorder.seen[:3], recorder.seen[3:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    assert first != second
    assert (log.epochs, log.steps, log.images, log.precision) == (2, 6, 40, "fp32")


def test_an_objective_is_told_of_start_epochs_and_steps_in_order(architecture):
    recorder = Recorder()
    log = train(build_model(architecture, 0), numbered_cases(9), LINK, recorder, "oak")
    assert recorder.events == ["start 2", "epoch 0", "step", "step", "epoch 1", "step", "step"]
    assert log.temperature == [2.0, 4.0], "what the objective noted at the end of each epoch"


@pytest.mark.parametrize("n", [1, 3, 8, 9])
def test_a_site_with_fewer_images_than_a_batch_can_train(architecture, n):
    state, log = link(site_data(n), architecture)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert log.steps == 2 * -(-n // 8)


@pytest.mark.slow
def test_the_logged_loss_is_the_mean_over_the_images_and_falls(architecture):
    class Counter(Recorder):
        def losses(self, model, batch):
            return super().losses(model, batch) * 0 + batch.images[:, 0, 0, 0].float()

    log = train(build_model(architecture, 0), numbered_cases(20), LINK, Counter(), "oak")
    assert log.loss == pytest.approx([9.5, 9.5])  # not the mean of the batches' means
    fitted = link(site_data(), architecture, epochs=8, augmentation="none", learning_rate=3e-3)[1].loss
    assert fitted[-1] < fitted[0]


def test_a_trained_model_comes_back_on_the_cpu_ready_to_evaluate(architecture):
    model = build_model(architecture, 0)
    train(model, random_cases(4), LINK, Recorder(), "oak")
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_loss_that_is_not_finite_is_one_line_that_names_the_learning_rate(architecture):
    with pytest.raises(ModelError) as caught:
        link(site_data(), architecture, learning_rate=1e30, epochs=3)
    message = str(caught.value)
    assert "\n" not in message
    assert "of 3; lower the learning rate (now 1e+30)" in message


def test_precision_is_taken_as_asked_and_auto_is_one_of_the_two():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("auto", cpu) in {"fp32", "bf16"}


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "amx", "precision"),
    [
        ("x86_64", True, True, False, "bf16"),
        ("AMD64", True, False, True, "bf16"),
        ("x86_64", True, False, False, "fp32"),  # AVX-512 alone: oneDNN emulates bf16, and is slower than fp32
        ("x86_64", False, False, False, "fp32"),
        ("aarch64", True, False, False, "bf16"),
        ("aarch64", False, False, False, "fp32"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_has_instructions_for_it(
    monkeypatch, machine, onednn, avx512_bf16, amx, precision
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", torch.device("cpu")) == precision


def test_bf16_trains_to_fp32_weights_near_those_of_fp32(architecture):
    full, _ = link(site_data(), architecture)
    half, log = link(site_data(), architecture, precision="bf16")
    assert log.precision == "bf16"
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert 0 < largest_difference(full, half) < 0.05


# --- what a link minimises ---


@pytest.mark.parametrize("balance", ["site-prior", "weighted", "none"])
def test_a_link_without_predecessor_minimises_cross_entropy_alone(architecture, balance):
    cases, model = random_cases(8), build_model(architecture, 1).eval()
    counts = torch.bincount(cases.labels, minlength=3)
    objective = LinkObjective(LINK.model_copy(update={"class_balance": balance}), model, None, counts)
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(0)
    found = objective.losses(model, batch_of(cases))
    torch.testing.assert_close(found, classification_loss(model(to_float(cases.images)), cases.labels, counts, balance))
    assert objective.epoch_log() == {}


@pytest.mark.parametrize("trust", ["label", "none"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_link_minimises_cross_entropy_and_trusted_distillation_at_the_epochs_temperature(architecture, trust, epoch):
    cases, model, teacher = random_cases(8), build_model(architecture, 1).eval(), build_model(architecture, 2)
    counts = torch.bincount(cases.labels, minlength=3)
    objective = LinkObjective(LINK.model_copy(update={"teacher_trust": trust}), model, teacher, counts)
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(epoch)
    found = objective.losses(model, batch_of(cases)).detach().double().numpy()

    view = to_float(cases.images)
    with torch.no_grad():
        z, p = model(view).double().numpy(), teacher(view).double().numpy()

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()

    temperature = [4.0, 2.0, None, None, None, 1.0][epoch]
    prior = np.log(counts.numpy() / counts.sum().item())
    expected = []
    for i, label in enumerate(cases.labels.tolist()):
        cross_entropy = -np.log(softmax(z[i] + prior)[label])
        q, t = softmax(z[i] / temperature), softmax(p[i] / temperature)
        divergence = float((t * (np.log(t) - np.log(q))).sum())
        w = softmax(p[i])[label] / softmax(p[i]).max() if trust == "label" else 1.0
        expected.append(0.6 * cross_entropy + 0.4 * w * temperature**2 * divergence)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_link_and_its_predecessor_see_the_same_view(architecture):
    cases = random_cases(8)
    views: list[torch.Tensor] = []

    class Seeing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            views.append(images)
            return images.flatten(1)[:, :3]

    objective = LinkObjective(LINK, Seeing(), Seeing(), torch.tensor([4, 3, 1]))
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(0)
    objective.losses(Seeing(), batch_of(cases, "upright"))
    assert len(views) == 2
    assert torch.equal(*views)


def test_the_log_of_a_link_has_the_annealed_temperature_and_the_mean_trust(architecture):
    predecessor = weights_of(architecture, 9)
    _, log = link(site_data(), architecture, predecessor, epochs=4, augmentation="none")
    assert log.temperature == [4.0, 2.0, 1.0, 1.0]
    teacher = build_model(architecture, 9).eval()
    cases = site_data().splits["train"]
    with torch.no_grad():
        trust = teacher_trust(teacher(to_float(cases.images)), cases.labels, "label")
    assert log.teacher_trust == pytest.approx([trust.mean().item()] * 4, rel=1e-4)


def test_the_log_without_a_predecessor_has_neither(architecture):
    _, log = link(site_data(), architecture)
    assert (log.temperature, log.teacher_trust) == ([], [])


def test_with_the_weight_zero_a_predecessor_teaches_nothing(architecture):
    one, log = link(site_data(), architecture, weights_of(architecture, 9), distillation_weight=0.0, start="fresh")
    none, _ = link(site_data(), architecture, None)
    assert digest(one) == digest(none)
    assert log.temperature == []


# --- where a link starts ---


@pytest.mark.slow
def test_a_warm_start_starts_from_the_predecessor_and_a_fresh_one_from_the_runs_initial_weights(architecture):
    predecessor, initial = weights_of(architecture, 9), weights_of(architecture, LINK.seed)
    warm, _ = link(site_data(), architecture, predecessor, learning_rate=1e-9, start="warm")
    fresh, _ = link(site_data(), architecture, predecessor, learning_rate=1e-9, start="fresh")
    first, _ = link(site_data(), architecture, None, learning_rate=1e-9, start="warm")
    assert largest_difference(warm, predecessor) < 1e-6
    assert largest_difference(fresh, initial) < 1e-6
    assert largest_difference(first, initial) < 1e-6
    assert largest_difference(predecessor, initial) > 0.01


@pytest.mark.parametrize("start", ["warm", "fresh"])
def test_training_does_not_change_the_predecessor(architecture, start):
    predecessor = weights_of(architecture, 9)
    before = digest(predecessor)
    state, _ = link(site_data(), architecture, predecessor, start=start)
    assert digest(predecessor) == before
    assert digest(state) != before


def test_no_gradient_reaches_the_predecessor(architecture):
    teacher = build_model(architecture, 2)
    held = digest(teacher.state_dict())
    model = build_model(architecture, 1)
    objective = LinkObjective(LINK, model, teacher, torch.tensor([10, 6, 4]))
    train(model, random_cases(20), LINK, objective, "oak")
    assert digest(teacher.state_dict()) == held
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training


def test_a_label_fraction_trains_on_fewer_images_of_every_class(architecture):
    data = site_data(24)
    recipe = LINK.model_copy(update={"label_fraction": 0.25})
    kept = labelled_cases(data, recipe)
    assert torch.bincount(kept.labels).tolist() == [3, 2, 1]
    everything = {
        (image.numpy().tobytes(), int(label)) for image, label in zip(*_images(data.splits["train"]), strict=True)
    }
    assert {(image.numpy().tobytes(), int(label)) for image, label in zip(*_images(kept), strict=True)} <= everything
    _, log = link(data, architecture, label_fraction=0.25)
    assert log.images == 2 * 6
    assert labelled_cases(data, LINK) is data.splits["train"]


def _images(cases: Cases) -> tuple[torch.Tensor, torch.Tensor]:
    return cases.images, cases.labels


# --- the student ---


def test_a_student_minimises_cross_entropy_and_distillation_between_two_views(architecture):
    cases, model, auxiliary = random_cases(8), build_model(architecture, 1).eval(), build_model(architecture, 2)
    counts = torch.bincount(cases.labels, minlength=3)
    objective = StudentObjective(STUDENT, auxiliary, counts, round_index=0)
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(0)
    found = objective.losses(model, batch_of(cases, "upright"))

    views = torch.Generator().manual_seed(0)
    one, two = (augmented(cases.images, "upright", views) for _ in range(2))
    assert not torch.equal(one, two)
    with torch.no_grad():
        expected = classification_loss(model(one), cases.labels, counts, "site-prior") + 0.7 * distillation_loss(
            model(one), auxiliary(two), 2.0
        )
    torch.testing.assert_close(found, expected)


class Follower(StudentObjective):
    """A `StudentObjective` that also follows its auxiliary teacher by the slow, obvious rule, in float64."""

    def start(self, device, steps_per_epoch):
        super().start(device, steps_per_epoch)
        self.slow = {name: value.double() for name, value in self.auxiliary.named_parameters()}
        self.count = self.round_index * self.recipe.epochs * steps_per_epoch
        self.total = self.recipe.rounds * self.recipe.epochs * steps_per_epoch

    def start_epoch(self, epoch):
        super().start_epoch(epoch)
        self.frozen = self.round_index * self.recipe.epochs + epoch < self.recipe.frozen_epochs

    def after_step(self, model):
        super().after_step(model)
        m = ema_decay(self.count, self.total, self.recipe.ema_decay)
        self.count += 1
        if not self.frozen:
            for name, value in model.named_parameters():
                self.slow[name] = m * self.slow[name] + (1 - m) * value.detach().double()


@pytest.mark.parametrize("round_index", [0, 1])
def test_the_auxiliary_teacher_is_the_moving_average_of_the_student(architecture, round_index):
    auxiliary = build_model(architecture, 2)
    selected = weights_of(architecture, 2)
    objective = Follower(STUDENT, auxiliary, torch.tensor([10, 6, 4]), round_index)
    train(build_model(architecture, 1), random_cases(20), STUDENT, objective, "oak")
    for name, value in auxiliary.named_parameters():
        torch.testing.assert_close(value.double(), objective.slow[name], rtol=1e-4, atol=1e-6)
    assert largest_difference(dict(auxiliary.state_dict()), selected) > 1e-3
    assert all(parameter.grad is None for parameter in auxiliary.parameters()), "no gradient in the auxiliary teacher"
    assert not auxiliary.training


def test_the_share_of_its_own_selection_is_the_product_of_the_decays(architecture):
    objective = Follower(STUDENT, build_model(architecture, 2), torch.tensor([10, 6, 4]), 0)
    train(build_model(architecture, 1), random_cases(20), STUDENT, objective, "oak")
    expected = np.prod([ema_decay(step, 12, 0.9) for step in (3, 4, 5)])  # 3 steps frozen, 3 of 12 followed
    assert objective.kept == pytest.approx(expected)


def test_buffers_of_the_auxiliary_teacher_are_the_students():
    def with_buffer(value: float) -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("steps", torch.tensor(value))
        return module

    model, auxiliary = with_buffer(5.0), with_buffer(1.0)
    objective = StudentObjective(STUDENT.model_copy(update={"frozen_epochs": 0}), auxiliary, torch.ones(2), 0)
    objective.start(torch.device("cpu"), 3)
    objective.start_epoch(0)
    objective.after_step(model)
    assert auxiliary.steps.item() == 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen_epochs", "round_index", "moves"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (2, 1, True), (3, 1, True), (4, 1, False)],
)
def test_the_auxiliary_teacher_stays_as_selected_in_the_first_epochs_of_the_run(
    architecture, frozen_epochs, round_index, moves
):
    recipe = STUDENT.model_copy(update={"frozen_epochs": frozen_epochs})
    selected = weights_of(architecture, 2)
    trained = train_student(
        site_data(), architecture, recipe, weights_of(architecture, 1), selected, round_index=round_index
    )
    assert (digest(trained.auxiliary) != digest(selected)) == moves
    assert (trained.auxiliary_kept < 1.0) == moves


@pytest.mark.slow
@pytest.mark.parametrize("round_index", [0, 1])
def test_a_frozen_auxiliary_teacher_never_moves_and_is_all_its_own(architecture, round_index):
    recipe = STUDENT.model_copy(update={"auxiliary": "frozen", "frozen_epochs": 0})
    selected = weights_of(architecture, 2)
    trained = train_student(
        site_data(), architecture, recipe, weights_of(architecture, 1), selected, round_index=round_index
    )
    assert digest(trained.auxiliary) == digest(selected)
    assert trained.auxiliary_kept == 1.0
    following = train_student(
        site_data(),
        architecture,
        recipe.model_copy(update={"auxiliary": "ema"}),
        weights_of(architecture, 1),
        selected,
        round_index=round_index,
    )
    assert digest(following.student) != digest(trained.student), "the student learns from the teacher as it is"


class ConstantFollower(StudentObjective):
    """A `StudentObjective` that also follows its auxiliary teacher by ``B <- m B + (1-m) A`` with one m, in float64."""

    def start(self, device, steps_per_epoch):
        super().start(device, steps_per_epoch)
        self.slow = {name: value.double() for name, value in self.auxiliary.named_parameters()}
        self.steps = 0

    def after_step(self, model):
        super().after_step(model)
        if self.steps >= 3:  # 20 images in batches of 8: the first epoch, in which the teacher is frozen, has 3 steps
            for name, value in model.named_parameters():
                self.slow[name] = 0.9 * self.slow[name] + 0.1 * value.detach().double()
        self.steps += 1


def test_a_constant_moving_average_equals_a_hand_rolled_loop(architecture):
    auxiliary = build_model(architecture, 2)
    recipe = STUDENT.model_copy(update={"ema_schedule": "constant"})
    objective = ConstantFollower(recipe, auxiliary, torch.tensor([10, 6, 4]), 0)
    train(build_model(architecture, 1), random_cases(20), recipe, objective, "oak")
    assert objective.steps == 6
    for name, value in auxiliary.named_parameters():
        torch.testing.assert_close(value.double(), objective.slow[name], rtol=1e-4, atol=1e-6)
    assert objective.kept == pytest.approx(0.9**3)


@pytest.mark.slow
def test_a_constant_moving_average_does_not_slow_down_from_round_to_round(architecture):
    recipe = STUDENT.model_copy(update={"ema_schedule": "constant", "frozen_epochs": 0})
    kept = [
        train_student(
            site_data(), architecture, recipe, weights_of(architecture, 1), weights_of(architecture, 2), round_index=i
        ).auxiliary_kept
        for i in (0, 1)
    ]
    assert kept == [pytest.approx(0.9**6)] * 2


def slow_large_term(logits, large_logits, temperature):
    """T^2 times the sum over classes of p log(p / q), p the mean of the teachers' softened softmaxes; in float64."""
    soft = [(z.double() / temperature).exp() for z in large_logits]
    p = sum(z / z.sum(1, keepdim=True) for z in soft) / len(soft)
    q = (logits.double() / temperature).exp()
    q = q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p.log() - q.log())).sum(1)


@pytest.mark.parametrize("models", [1, 3])
def test_large_models_teach_by_the_gradient_of_the_reference_formula(architecture, models):
    cases = random_cases(8)
    counts = torch.bincount(cases.labels, minlength=3)
    large = [build_model(architecture, 5 + i) for i in range(models)]
    recipe = STUDENT.model_copy(update={"large_weight": 0.6, "distillation_weight": 0.0, "augmentation": "none"})
    grown = []
    for with_large in (True, False):
        model = build_model(architecture, 1).eval()
        objective = StudentObjective(
            recipe, None, counts, 0, large=large if with_large else (), large_size=architecture.image_size
        )
        objective.start(torch.device("cpu"), 1)
        objective.start_epoch(0)
        objective.losses(model, batch_of(cases)).mean().backward()
        grown.append([parameter.grad.clone() for parameter in model.parameters()])
    model = build_model(architecture, 1).eval()
    images = to_float(cases.images)
    with torch.no_grad():
        taught = [teacher(images) for teacher in large]
    (0.6 * slow_large_term(model(images), taught, 2.0)).mean().backward()
    for with_term, without, parameter in zip(*grown, model.parameters(), strict=True):
        torch.testing.assert_close(with_term - without, parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for teacher in large for parameter in teacher.parameters())


def test_a_student_and_its_large_teacher_see_the_same_view_each_at_its_own_size(architecture):
    seen = []

    class Seeing(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1)[:, :3]

    recipe = STUDENT.model_copy(update={"large_weight": 1.0})
    objective = StudentObjective(recipe, None, torch.tensor([4, 3, 1]), 0, large=[Seeing()], large_size=48)
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(0)
    objective.losses(Seeing(), batch_of(random_cases(8), "upright"))
    by_student, by_large = seen
    assert by_large.shape[-2:] == (48, 48)
    assert torch.equal(by_large, resized(by_student, 48))


def test_without_weight_large_models_are_not_even_asked(architecture):
    class Refusing(nn.Module):
        def forward(self, images):
            raise AssertionError("asked")

    objective = StudentObjective(STUDENT, None, torch.tensor([4, 3, 1]), 0, large=[Refusing()], large_size=32)
    objective.start(torch.device("cpu"), 1)
    objective.losses(build_model(architecture, 1), batch_of(random_cases(8)))


def test_large_models_that_were_not_sent_are_asked_for(architecture):
    recipe = STUDENT.model_copy(update={"large_weight": 1.0})
    with pytest.raises(ModelError, match="large models with weight 1, found none"):
        train_student(site_data(), architecture, recipe, weights_of(architecture, 1), None, round_index=0)


@pytest.mark.slow
def test_a_student_of_another_image_size_is_trained_on_images_of_its_size():
    small = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=48)
    data = site_data()
    cases = data.splits["train"]
    at_its_size = replace(data, splits={"train": replace(cases, images=resized(cases.images, 48))})
    student, auxiliary = weights_of(small, 1), weights_of(small, 2)
    found, expected = (
        train_student(given, small, STUDENT, student, auxiliary, round_index=0) for given in (data, at_its_size)
    )
    assert digest(found.student) == digest(expected.student)
    as_given = small.model_copy(update={"image_size": 32})
    plain = train_student(data, as_given, STUDENT, student, auxiliary, round_index=0)
    assert digest(found.student) != digest(plain.student)


def test_a_round_changes_the_student_but_not_what_was_handed_in(architecture):
    student, selected = weights_of(architecture, 1), weights_of(architecture, 2)
    before = digest(student), digest(selected)
    trained = train_student(site_data(), architecture, STUDENT, student, selected, round_index=0)
    assert (digest(student), digest(selected)) == before
    assert digest(trained.student) not in before
    assert {tensor.device.type for tensor in trained.auxiliary.values()} == {"cpu"}
    assert trained.log.images == 40


def test_fine_tuning_has_no_teacher(architecture):
    recipe = STUDENT.model_copy(update={"stage": "finetune", "distillation_weight": 0.0})
    trained = train_student(site_data(), architecture, recipe, weights_of(architecture, 1), None, round_index=2)
    assert (trained.auxiliary, trained.auxiliary_kept) == (None, None)
    assert digest(trained.student) != digest(weights_of(architecture, 1))
    cases, model = random_cases(8), build_model(architecture, 1).eval()
    counts = torch.bincount(cases.labels, minlength=3)
    found = StudentObjective(recipe, None, counts, 2).losses(model, batch_of(cases))
    expected = classification_loss(model(to_float(cases.images)), cases.labels, counts, "site-prior")
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_rounds_and_stages_draw_other_batches(architecture):
    finetune = STUDENT.model_copy(update={"stage": "finetune"})
    start = weights_of(architecture, 1)
    states = [
        train_student(site_data(), architecture, recipe, start, None, round_index=round_index).student
        for recipe, round_index in ((STUDENT, 0), (STUDENT, 1), (finetune, 0))
    ]
    assert len({digest(state) for state in states}) == 3


def test_a_round_tells_how_much_of_itself_the_auxiliary_teacher_keeps(architecture):
    student, selected = weights_of(architecture, 1), weights_of(architecture, 2)
    trained = train_student(site_data(), architecture, STUDENT, student, selected, round_index=0)
    assert trained.auxiliary_kept == pytest.approx(np.prod([ema_decay(step, 12, 0.9) for step in (3, 4, 5)]))


# --- augmentation ---


def smooth_images(n: int) -> torch.Tensor:
    """A bright blob in the upper left quarter of each image."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    blob = 200 * torch.exp(-((y - 9) ** 2 + (x - 9) ** 2) / 40) + 20
    return blob.to(torch.uint8).expand(n, 1, 32, 32).contiguous()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightest_quarters(views: torch.Tensor) -> set[tuple[int, int]]:
    """Which quarter of each view is the brightest: (row, column), 0 or 1."""
    quarters = nn.functional.avg_pool2d(views, 16).flatten(1)
    return {divmod(int(index), 2) for index in quarters.argmax(dim=1)}


def test_no_augmentation_is_the_scaling_of_pixels_alone():
    images = smooth_images(5)
    generator = seeded(0)
    assert torch.equal(augmented(images, "none", generator), to_float(images))
    assert torch.equal(generator.get_state(), seeded(0).get_state()), "nothing is drawn"


@pytest.mark.parametrize("kind", list(STRENGTHS))
def test_views_depend_on_the_generator_alone(kind):
    images = smooth_images(6)
    one = augmented(images, kind, seeded(0))
    assert one.shape == images.shape
    assert one.dtype == torch.float32
    torch.manual_seed(99)
    assert torch.equal(augmented(images, kind, seeded(0)), one)
    assert not torch.equal(augmented(images, kind, seeded(1)), one)


@pytest.mark.parametrize("kind", list(STRENGTHS))
def test_each_image_gets_a_view_of_its_own(kind):
    views = augmented(smooth_images(6), kind, seeded(0))
    assert all(not torch.equal(views[i], views[j]) for i in range(6) for j in range(i))


def test_upright_views_stay_upright_and_keep_the_mean_brightness():
    images = smooth_images(400)
    views = augmented(images, "upright", seeded(0))
    assert brightest_quarters(views) == {(0, 0)}
    assert views.mean().item() == pytest.approx(to_float(images).mean().item(), abs=0.05)


def test_views_in_all_orientations_turn_the_image_every_way():
    views = augmented(smooth_images(400), "all-orientations", seeded(0))
    assert brightest_quarters(views) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def handedness(views: torch.Tensor) -> torch.Tensor:
    """Sign of the turn from a bright blob to a dim one around the centre of each view: a mirror changes it."""
    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(32.0) - 15.5, indexing="ij")
    signs = []
    for view in views[:, 0]:
        bright = (view > 0.75 * view.max()).float()
        dim = ((view > 0.3 * view.max()) & (view < 0.6 * view.max())).float()
        (by, bx), (dy, dx) = (((m * y).sum() / m.sum(), (m * x).sum() / m.sum()) for m in (bright, dim))
        signs.append(torch.sign(by * dx - bx * dy))
    return torch.stack(signs)


def handed_images(n: int) -> torch.Tensor:
    image = torch.full((32, 32), 128.0)  # 128 is about 0 after scaling
    image[9:14, 13:18] = 255  # above the centre
    image[13:18, 20:25] = 185  # right of it
    return image.to(torch.uint8).expand(n, 1, 32, 32).contiguous()


def test_only_views_in_all_orientations_are_mirrored():
    images = handed_images(200)
    own = handedness(to_float(images[:1]))
    assert own.item() != 0
    upright = (handedness(augmented(images, "upright", seeded(0))) == own).float().mean().item()
    any_way = (handedness(augmented(images, "all-orientations", seeded(0))) == own).float().mean().item()
    assert upright == 1.0
    assert 0.35 < any_way < 0.65


def test_a_training_of_a_single_step_has_a_rate_at_which_something_is_learned():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}], lr=1e-3)
    one_cycle(optimizer, 1e-3, steps=1, part=(0, 1))
    assert optimizer.param_groups[0]["lr"] > 1e-4
