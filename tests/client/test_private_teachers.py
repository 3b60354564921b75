"""Privileged teachers of a private site: trained by DP-SGD, paid for once, and nothing else is told of the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK
from torch import Tensor, nn

from chainward_client.data.site_data import Cases, PrivilegedCases, SiteData
from chainward_client.entropy import SeededForTests
from chainward_client.precision import training_environment
from chainward_client.private_site import PrivateSite, PrivateWork, declared_units
from chainward_client.private_training import PrivateTraining, declared_counts
from chainward_client.privileged import results, targets
from chainward_client.privileged import teacher as teacher_module
from chainward_client.privileged.results import PrivilegedTargets
from chainward_client.privileged.targets import privileged_targets
from chainward_client.privileged.teacher import PrivilegedTeacher, train_teacher_privately
from chainward_client.training import link as link_module
from chainward_client.training.link import train_link
from chainward_client.training.passes import StartImages
from chainward_client.training.student import train_student
from chainward_shared.distillation.losses import classification_loss
from chainward_shared.errors import LedgerError, ModelError, PolicyRefusal, SpentError
from chainward_shared.models import Start, build_model, resolve_architecture
from chainward_shared.models.ghost import ROOM
from chainward_shared.privacy import dp_sgd as dp_sgd_module
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.dp_sgd import DpSgd, run_mechanisms
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.recipes import (
    LinkRecipe,
    PlannedTraining,
    PrivacyRecipe,
    PrivilegedRecipe,
    StudentRecipe,
    TrainingRecipe,
)
from chainward_shared.seeds import derive_seed
from chainward_simulations.phantoms.cases import phantom_site

POLICY = PrivacyPolicy(epsilon=50.0, delta=1e-5, privileged_teachers=True)
PRIVILEGED = PrivilegedRecipe(
    use="all", logit_weight=0.5, embedding_weight=0.5, temperature=2.0, epochs=3, text_features=64, hidden=8
)
RECIPE = SMALL_LINK.model_copy(
    update={
        "seed": 0,
        "batch_size": 16,
        "weight_decay": 0.01,
        "privileged": PRIVILEGED,
        "privacy": PrivacyRecipe(delta=1e-5, noise_multiplier=1.0),
        "distillation_weight": 0.5,
        "temperature": 2.0,
        "temperature_decay": 1.0,
        "teacher_trust": "none",
    }
)
DP_SGD = DpSgd(unit="patient", delta=1e-5, noise_multiplier=0.7, sample_rate=0.5, expected_batch=6.0, steps=5, clip=0.1)
TENSORS = ("logits", "taught", "embeddings", "present")


@pytest.fixture(scope="module")
def phantoms() -> SiteData:
    return phantom_site(0, 5, image_size=32)


@pytest.fixture
def site(tmp_path: Path) -> PrivateSite:
    return PrivateSite.open(POLICY, tmp_path, "site", create=True)


@pytest.fixture
def work(site: PrivateSite) -> PrivateWork:
    return site.work("run", "hop")


def asked(
    data: SiteData, work: PrivateWork | None, cache: Path | None = None, recipe: TrainingRecipe = RECIPE
) -> PrivilegedTargets | None:
    assert recipe.privileged is not None
    return privileged_targets(data, data.splits["train"], recipe.privileged, recipe, cache, work=work)


def answered(
    data: SiteData, work: PrivateWork, cache: Path | None = None, recipe: TrainingRecipe = RECIPE
) -> PrivilegedTargets:
    found = asked(data, work, cache, recipe)
    assert found is not None
    assert found.private
    return found


def phases(work: PrivateWork) -> list[str | None]:
    """What counts as spent, in order."""
    work.site.ledger.reload()
    return [one.reserved.phase for one in work.site.ledger.spendings() if one.counted is not None]


def with_train(data: SiteData, **changes: Any) -> SiteData:
    return replace(data, splits={**data.splits, "train": replace(data.splits["train"], **changes)})


def with_privileged(data: SiteData, **changes: Any) -> SiteData:
    return with_train(data, privileged=replace(data.splits["train"].privileged, **changes))


def recipe_with(**changes: Any) -> LinkRecipe:
    return RECIPE.model_copy(update={"privileged": PRIVILEGED.model_copy(update=changes)})


# --- the training ---


def vectors_of(n: int = 14) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    available = torch.rand(n, generator=generator) > 0.3
    return torch.randn(n, 10, generator=generator) * available[:, None], available


def slow_reference(
    vectors: Tensor,
    available: Tensor,
    labels: Tensor,
    patients: np.ndarray,
    training: TrainingRecipe,
    counts: Tensor,
    entropy: SeededForTests,
) -> PrivilegedTeacher:
    """Every patient asked alone whether it is in, its image drawn, its gradient computed and clipped, one after another."""
    with training_environment(1, derive_seed(training.seed, "x", "torch")):
        model = PrivilegedTeacher(vectors.shape[1], 8, 3, dropout=0.0).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=teacher_module.LEARNING_RATE, weight_decay=teacher_module.WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, teacher_module.LEARNING_RATE, total_steps=DP_SGD.steps)
    of = {
        patient: [row for row, other in enumerate(patients) if other == patient] for patient in dict.fromkeys(patients)
    }
    for _ in range(DP_SGD.steps):
        inside = [p for p, u in zip(of, entropy.uniform(len(of)), strict=True) if u < DP_SGD.sample_rate]
        rows = [of[p][int(u * len(of[p]))] for p, u in zip(inside, entropy.uniform(len(inside)), strict=True)]
        total = [torch.zeros_like(p) for p in parameters]
        for row in rows:
            if not available[row]:
                continue
            loss = classification_loss(
                model(vectors[[row]]), labels[[row]], counts, training.class_balance, training.prior_strength
            )
            gradients = torch.autograd.grad(loss.sum(), parameters)
            length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            for sum_of, gradient in zip(total, gradients, strict=True):
                sum_of += gradient * min(1.0, ROOM * DP_SGD.clip / length)
        noises = entropy.normal([p.shape for p in parameters], torch.device("cpu"))
        for parameter, sum_of, noise in zip(parameters, total, noises, strict=True):
            parameter.grad = (sum_of + DP_SGD.noise_multiplier * DP_SGD.clip * noise) / DP_SGD.expected_batch
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("balance", ["none", "site-prior", "weighted"])
def test_a_teacher_is_what_gradients_clipped_and_added_one_by_one_make_of_it(multilabel, balance):
    vectors, available = vectors_of()
    labels = torch.arange(14) % 3
    if multilabel:
        labels = (torch.rand(14, 3, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    patients = np.array([f"p{i // 2}" if i < 6 else f"q{i}" for i in range(14)])
    training = RECIPE.model_copy(update={"class_balance": balance})
    counts = declared_counts([0.5, 0.3, 0.2], multilabel=multilabel)
    private = PrivateTraining(DP_SGD, declared_prior=True, entropy=SeededForTests(4), together=3)
    trained = train_teacher_privately(
        vectors, available, labels, patients, 3, PRIVILEGED, training, counts, private, "x"
    )
    expected = slow_reference(vectors, available, labels, patients, training, counts, SeededForTests(4))
    for mine, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    assert private.steps_done == DP_SGD.steps
    assert not trained.training
    assert not any(hasattr(p, "grad_sample") for p in trained.parameters())


def first_gradient(keep: np.ndarray, available: Tensor, labels: Tensor, clip: float) -> Tensor:
    """The gradient of the first step, without noise, on the rows `keep`, everybody sampled."""
    dp_sgd = DP_SGD.model_copy(
        update={"noise_multiplier": 0.0, "sample_rate": 1.0, "expected_batch": 14.0, "steps": 1, "clip": clip}
    )
    private = PrivateTraining(dp_sgd, entropy=SeededForTests(2))
    found: list[Tensor] = []
    close = private.close

    def closing() -> None:
        found.extend(p.grad.clone().reshape(-1) for p in private._parameters)
        close()

    private.close = closing  # type: ignore[method-assign]
    vectors = vectors_of()[0]
    vectors[:, 0] += 1  # also where nothing is available: it must not count
    patients = np.array([f"p{i}" for i in range(14)])
    nothing = torch.ones(3, dtype=torch.int64)
    train_teacher_privately(
        vectors[keep], available[keep], labels[keep], patients[keep], 3, PRIVILEGED, RECIPE, nothing, private, "x"
    )
    return torch.cat(found)


def test_one_patient_moves_a_step_by_the_clipping_norm_over_the_expected_batch_at_most():
    all_rows, available, labels = np.arange(14), torch.ones(14, dtype=torch.bool), torch.arange(14) % 3
    for clip in (1e-3, 0.1, 1e6):
        whole = first_gradient(all_rows, available, labels, clip)
        without = [first_gradient(np.setdiff1d(all_rows, [row]), available, labels, clip) for row in all_rows]
        moved = [float((whole - other).norm()) for other in without]
        if clip < 1:  # every gradient here is longer, so that the bound is reached
            assert moved == pytest.approx([ROOM * clip / 14] * 14, rel=1e-3)
        else:
            assert min(moved) > 0.1 / 14  # without clipping the bound is far


def test_a_case_without_the_modality_moves_nothing_whatever_its_label_and_vector():
    rows, labels = np.arange(14), torch.arange(14) % 3
    available = torch.ones(14, dtype=torch.bool)
    available[5] = False
    missing = first_gradient(rows, available, labels, 0.1)
    torch.testing.assert_close(missing, first_gradient(np.setdiff1d(rows, [5]), available, labels, 0.1))
    relabelled = labels.clone()
    relabelled[5] = 0
    assert torch.equal(missing, first_gradient(rows, available, relabelled, 0.1))
    assert not torch.allclose(missing, first_gradient(rows, torch.ones(14, dtype=torch.bool), labels, 0.1))


@pytest.mark.slow
def test_without_noise_and_with_a_wide_clip_a_private_teacher_learns():
    """Whatever privacy costs is the noise and the clipping: nothing else is broken."""
    data = phantom_site(0, 0, image_size=32)
    texts, available = targets.text_vectors(data.splits["train"].privileged.texts, 256)
    cases, n = data.splits["train"], len(data.splits["train"])
    dp_sgd = DP_SGD.model_copy(update={"noise_multiplier": 0.0, "expected_batch": n / 2, "steps": 100, "clip": 10.0})
    there = torch.from_numpy(available)
    trained = train_teacher_privately(
        torch.from_numpy(texts),
        there,
        cases.labels,
        cases.patients,
        5,
        PRIVILEGED.model_copy(update={"hidden": 32}),
        RECIPE,
        torch.ones(5, dtype=torch.int64),
        PrivateTraining(dp_sgd),
        "x",
    )
    with torch.no_grad():
        guessed = trained(torch.from_numpy(texts)).argmax(dim=1)
    assert float((guessed == cases.labels)[there].float().mean()) > 0.8


def test_weights_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(teacher_module, "LEARNING_RATE", math.inf)
    vectors, available = vectors_of()
    private = PrivateTraining(DP_SGD)
    with pytest.raises(ModelError, match="not finite"):
        train_teacher_privately(
            vectors,
            available,
            torch.arange(14) % 3,
            np.array([f"p{i}" for i in range(14)]),
            3,
            PRIVILEGED,
            RECIPE,
            torch.ones(3, dtype=torch.int64),
            private,
            "x",
        )


# --- what it costs ---


@pytest.mark.slow
def test_each_modality_is_charged_once_at_the_plan_and_found_again_for_nothing(phantoms, work, tmp_path):
    first = answered(phantoms, work, tmp_path)
    assert set(first.report) == {"text", "table"}
    assert phases(work) == ["teacher-text", "teacher-table"]
    dp_sgd = work.dp_sgd(RECIPE, phantoms, epochs=PRIVILEGED.epochs, batch_size=64)
    for one in work.site.ledger.spendings():
        assert one.end is not None
        assert one.end.state == "committed"
        assert one.counted is not None
        assert one.counted.mechanism == dp_sgd.mechanism
        assert one.counted.clip_norm == 1.0
    entries = len(work.site.ledger.entries)
    again = answered(phantoms, replace(work, hop="another hop"), tmp_path)
    assert len(work.site.ledger.entries) == entries
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert again.report == first.report


@pytest.mark.slow
def test_what_a_run_lists_is_enough_for_its_teachers_and_its_link_and_for_nothing_more(
    phantoms, site, tmp_path, monkeypatch
):
    monkeypatch.setattr(dp_sgd_module, "_noise", lambda *_: 1.0)  # solving takes half a minute
    trainings = (PlannedTraining(epochs=2, batch_size=64), PlannedTraining(epochs=3, batch_size=64, times=2))
    listed = PrivacyRecipe(delta=1e-5, noise_multiplier=1.0, batch_size=64, run=trainings)
    cost = spent(run_mechanisms(listed, units=declared_units(site.policy, phantoms)), 1e-5)
    privacy = listed.model_copy(update={"noise_multiplier": None, "epsilon": cost})
    recipe = RECIPE.model_copy(update={"privacy": privacy})
    work = site.work("run", "hop")
    architecture = resolve_architecture("test_convnext", num_classes=5, in_chans=1, image_size=32)
    train_link(phantoms, architecture, recipe, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    assert phases(work) == ["teacher-text", "teacher-table", "link"]
    assert spent(site.ledger.mechanisms("run"), 1e-5) == pytest.approx(cost)
    with pytest.raises(PolicyRefusal, match="over what the run asks for"):
        answered(phantoms, work, None, recipe)  # without a cache it would be paid again


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"privileged": PRIVILEGED.model_copy(update={"epochs": 4})},
        {"privileged": PRIVILEGED.model_copy(update={"hidden": 9})},
        {"privacy": PrivacyRecipe(delta=1e-5, noise_multiplier=1.5)},
        {"privacy": PrivacyRecipe(delta=1e-5, noise_multiplier=1.0, clip=0.5)},
        {"seed": 1},
    ],
    ids=["epochs", "hidden", "noise", "clip", "seed"],
)
def test_another_plan_or_recipe_trains_and_pays_anew(phantoms, work, tmp_path, changed):
    recipe = recipe_with(use="table")
    answered(phantoms, work, tmp_path, recipe)
    changed = {
        key: value.model_copy(update={"use": "table"}) if key == "privileged" else value
        for key, value in changed.items()
    }
    answered(phantoms, work, tmp_path, recipe.model_copy(update=changed))
    assert phases(work) == ["teacher-table"] * 2


def test_another_run_pays_for_its_own_teachers(phantoms, site, tmp_path):
    """Else what is said to be spent in it would leave out what its models come from."""
    for run in ("one", "two"):
        answered(phantoms, site.work(run, "hop"), tmp_path, recipe_with(use="table"))
        assert len(site.ledger.mechanisms(run)) == 1


def test_answers_that_the_ledger_has_no_payment_for_are_not_used(phantoms, work, tmp_path):
    answered(phantoms, work, tmp_path / "state", recipe_with(use="table"))
    other = PrivateSite.open(POLICY, tmp_path / "other", "site", create=True).work("run", "hop")
    answered(phantoms, other, tmp_path / "state", recipe_with(use="table"))
    assert phases(other) == ["teacher-table"]


@pytest.mark.slow
def test_without_a_cache_or_with_a_lost_one_it_is_paid_again(phantoms, work, tmp_path):
    recipe = recipe_with(use="table")
    answered(phantoms, work, tmp_path, recipe)
    (kept,) = (tmp_path / "privileged").iterdir()
    kept.unlink()
    answered(phantoms, work, tmp_path, recipe)
    answered(phantoms, work, None, recipe)
    assert phases(work) == ["teacher-table"] * 3


def test_what_fails_in_the_second_modality_does_not_charge_the_first_twice(phantoms, work, tmp_path, monkeypatch):
    def failing(*arguments: Any) -> PrivilegedTeacher:
        if arguments[-2] == "table":  # of the names
            raise RuntimeError("power cut")
        return train_teacher_privately(*arguments)

    monkeypatch.setattr(targets, "train_teacher_privately", failing)
    with pytest.raises(SpentError, match="power cut"):
        asked(phantoms, work, tmp_path)
    assert phases(work) == ["teacher-text", "teacher-table"], "that it failed costs as much as if it had not"
    monkeypatch.undo()
    answered(phantoms, work, tmp_path)
    assert phases(work) == ["teacher-text", "teacher-table", "teacher-table"]


def test_nothing_is_kept_that_was_not_committed(phantoms, work, tmp_path, monkeypatch):
    def commit(self: Ledger, *_: object) -> None:
        raise LedgerError("disk full")

    monkeypatch.setattr(Ledger, "commit", commit)
    with pytest.raises(LedgerError, match="disk full"):
        asked(phantoms, work, tmp_path)
    assert not (tmp_path / "privileged").exists()
    assert phases(work) == ["teacher-text"]  # and it stays spent


def test_answers_of_teachers_without_privacy_are_never_taken_for_private_ones_nor_the_other_way(
    phantoms, work, tmp_path, caplog
):
    recipe = recipe_with(use="table")
    plain = asked(phantoms, None, tmp_path, recipe)
    assert plain is not None
    assert not plain.private
    private = answered(phantoms, work, tmp_path, recipe)
    assert phases(work) == ["teacher-table"]
    assert not torch.equal(plain.logits, private.logits)
    again = asked(phantoms, None, tmp_path, recipe)
    assert again is not None
    assert torch.equal(again.logits, plain.logits)
    (of_private,) = (tmp_path / "privileged").glob("private-*")
    (of_plain,) = set((tmp_path / "privileged").iterdir()) - {of_private}
    of_private.write_bytes(of_plain.read_bytes())
    answered(phantoms, work, tmp_path, recipe)
    assert "not what was written" in caplog.text
    assert phases(work) == ["teacher-table"] * 2


def test_files_of_other_trainings_push_no_private_answers_out(phantoms, work, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT_FILES", 2)
    answered(phantoms, work, tmp_path, recipe_with(use="table"))
    for epochs in (1, 2, 3):
        asked(phantoms, None, tmp_path, recipe_with(use="table", epochs=epochs))
    answered(phantoms, work, tmp_path, recipe_with(use="table"))
    assert phases(work) == ["teacher-table"]


# --- what is refused ---


def test_a_policy_without_privileged_teachers_refuses_before_anything_is_read_or_reserved(
    phantoms, tmp_path, monkeypatch
):
    site = PrivateSite.open(POLICY.model_copy(update={"privileged_teachers": False}), tmp_path, "site", create=True)
    read = Mock()
    monkeypatch.setattr(targets, "text_vectors", read)
    with pytest.raises(PolicyRefusal, match="privileged_teachers: false"):
        asked(phantoms, site.work("run", "hop"), tmp_path)
    assert not read.called
    assert len(site.ledger.entries) == 1  # its creation


def test_over_budget_nothing_is_trained(phantoms, tmp_path, monkeypatch):
    site = PrivateSite.open(POLICY.model_copy(update={"epsilon": 0.5}), tmp_path, "site", create=True)
    train = Mock()
    monkeypatch.setattr(targets, "train_teacher_privately", train)
    with pytest.raises(PolicyRefusal, match="over budget"):
        asked(phantoms, site.work("run", "hop"), tmp_path)
    assert not train.called


@pytest.mark.slow
def test_what_the_link_would_refuse_is_refused_before_its_teachers_spend(phantoms, work, tmp_path):
    ready = resolve_architecture("test_convnext", num_classes=5, in_chans=1, image_size=32)
    mixing = resolve_architecture("test_efficientnet", num_classes=5, in_chans=1, image_size=32)
    with pytest.raises(ModelError, match="batch norm"):
        train_link(phantoms, mixing, RECIPE, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    half = RECIPE.model_copy(update={"precision": "bf16"})
    with pytest.raises(PolicyRefusal, match="bf16"):
        train_link(phantoms, ready, half, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    assert phases(work) == []


def test_a_link_refuses_teachers_that_were_trained_without_privacy(phantoms, work, tmp_path, monkeypatch):
    def without_privacy(*arguments: Any, work: PrivateWork, image: None) -> PrivilegedTargets | None:
        return privileged_targets(*arguments)

    monkeypatch.setattr(link_module, "privileged_targets", without_privacy)
    architecture = resolve_architecture("test_convnext", num_classes=5, in_chans=1, image_size=32)
    with pytest.raises(PolicyRefusal, match="have seen every patient"):
        train_link(phantoms, architecture, RECIPE, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    student = student_recipe()
    state = build_model(architecture, 0).state_dict()
    with pytest.raises(PolicyRefusal, match="have seen every patient"):
        train_student(phantoms, architecture, student, state, state, round_index=0, state_dir=tmp_path, work=work)
    assert phases(work) == []


# --- nothing is told of the data ---


def made(labels: Tensor, texts: list[str | None]) -> SiteData:
    cases = Cases(
        torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8),
        labels,
        np.array([f"p{index}" for index in range(len(labels))]),
        PrivilegedCases(texts=tuple(texts)),
    )
    task = "single" if labels.ndim == 1 else "multilabel"
    return SiteData("north", ("healthy", "ill", "rare"), {"train": cases}, task=task)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize(
    "texts",
    [["a", "b"] * 4, [None] * 8, ["a", *[None] * 7]],
    ids=["few cases", "no report at all", "one report"],
)
@pytest.mark.parametrize("one_class", [True, False])
@pytest.mark.filterwarnings("error")
def test_there_is_a_teacher_of_all_classes_whatever_the_declared_column_holds(work, multilabel, texts, one_class):
    labels = torch.zeros(8, dtype=torch.int64) if one_class else torch.arange(8) % 3
    if multilabel:
        labels = nn.functional.one_hot(labels, 3).float()
    found = answered(made(labels, texts), work)
    has = torch.tensor([text is not None for text in texts])
    assert found.available.tolist() == has.tolist()
    assert torch.equal(found.taught, has[:, None].expand(8, 3))
    assert found.logits[has].all()
    assert not found.logits[~has].any()
    assert found.multilabel == multilabel
    assert phases(work) == ["teacher-text"]
    assert work.site.ledger.mechanisms() == [
        work.dp_sgd(RECIPE, made(labels, texts), epochs=3, batch_size=64).mechanism
    ]


def test_a_site_that_declares_neither_reports_nor_table_has_no_teacher_and_pays_for_none(phantoms, work):
    assert asked(with_privileged(phantoms, texts=None, table=None), work) is None
    assert phases(work) == []


@pytest.mark.slow
def test_what_is_said_of_a_case_comes_from_its_own_record_and_the_weights(phantoms, work, monkeypatch):
    fixed: dict[int, PrivilegedTeacher] = {}

    def same_weights(vectors: Tensor, *arguments: Any) -> PrivilegedTeacher:
        torch.manual_seed(vectors.shape[1])
        return fixed.setdefault(vectors.shape[1], PrivilegedTeacher(vectors.shape[1], 8, 5).eval())

    monkeypatch.setattr(targets, "train_teacher_privately", same_weights)
    train = phantoms.splits["train"]
    before = answered(phantoms, work)
    table = {name: (values[0], *values[:0:-1]) for name, values in train.privileged.table.items()}
    texts = (train.privileged.texts[0], *train.privileged.texts[:0:-1])
    others = with_train(with_privileged(phantoms, texts=texts, table=table), labels=train.labels.flip(0))
    after = answered(others, work)
    for name in TENSORS:
        torch.testing.assert_close(getattr(before, name)[0], getattr(after, name)[0])
        assert not torch.equal(getattr(before, name)[1:], getattr(after, name)[1:]) or name == "taught"


def test_a_private_teacher_that_sees_the_image_pays_as_another_and_is_kept_by_the_images(phantoms, work, tmp_path):
    train = phantoms.splits["train"]
    recipe = recipe_with(use="table", image=True)
    plain = resolve_architecture("test_vit", num_classes=5, in_chans=1, image_size=32, pretrained=True)
    start = Start(name="test_vit", file="0" * 64, digest="1" * 64, part="head")
    base = {name: tensor for name, tensor in build_model(plain, 3).state_dict().items() if not name.startswith("head.")}
    images = StartImages(plain.model_copy(update={"start": start}), base, train.images, 1)

    def of(image: StartImages) -> PrivilegedTargets:
        found = privileged_targets(phantoms, train, recipe.privileged, recipe, tmp_path, work=work, image=image)
        assert found is not None and found.private
        return found

    first = of(images)
    assert phases(work) == ["teacher-table"]
    assert torch.equal(of(images).logits, first.logits)
    assert phases(work) == ["teacher-table"]
    assert not torch.equal(of(replace(images, images=train.images.flip(0))).logits, first.logits)
    assert phases(work) == ["teacher-table"] * 2


def test_labels_are_counted_nowhere_and_declared_shares_are_used(phantoms, tmp_path, monkeypatch):
    spy = Mock(wraps=train_teacher_privately)
    monkeypatch.setattr(targets, "train_teacher_privately", spy)
    recipe = recipe_with(use="table").model_copy(update={"class_balance": "site-prior"})
    undeclared = PrivateSite.open(POLICY, tmp_path / "a", "site", create=True)
    answered(phantoms, undeclared.work("run", "hop"), None, recipe)
    training, counts = spy.call_args.args[6:8]
    assert training.class_balance == "none"
    assert counts.tolist() == [1] * 5
    shares = dict(zip(phantoms.classes, (0.4, 0.3, 0.1, 0.1, 0.1), strict=True))
    policy = POLICY.model_copy(update={"class_shares": shares})
    declared = PrivateSite.open(policy, tmp_path / "b", "site", create=True)
    answered(phantoms, declared.work("run", "hop"), None, recipe)
    training, counts = spy.call_args.args[6:8]
    assert training.class_balance == "site-prior"
    assert counts.tolist() == [400_000, 300_000, 100_000, 100_000, 100_000]


def test_two_trainings_with_one_seed_differ(phantoms, work):
    one, other = (answered(phantoms, work, None, recipe_with(use="table")) for _ in range(2))
    same = torch.isclose(one.logits, other.logits)[one.available]
    assert float(same.float().mean()) < 0.1  # of many secret numbers two may meet by accident


def test_the_sites_own_log_says_on_which_cases_the_accuracy_is(phantoms, work, caplog):
    caplog.set_level(logging.INFO, logger="chainward.client")
    answered(phantoms, work, None, recipe_with(use="table"))
    assert "on its own training cases" in caplog.text
    assert "out of fold" not in caplog.text


# --- whole trainings ---


def student_recipe() -> StudentRecipe:
    settings = {name: getattr(RECIPE, name) for name in TrainingRecipe.model_fields}
    return StudentRecipe(
        **settings, stage="distil", distillation_weight=1.0, temperature=2.0, ema_decay=0.9, frozen_epochs=0, rounds=1
    )


@pytest.fixture
def changed() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    return lambda before, after: all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_links_and_students_with_private_teachers_train_and_share_them(phantoms, work, tmp_path, changed):
    architecture = resolve_architecture("test_convnext", num_classes=5, in_chans=1, image_size=32)
    first, log = train_link(phantoms, architecture, RECIPE, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    assert phases(work) == ["teacher-text", "teacher-table", "link"]
    assert log.privacy is not None
    assert log.loss == log.privileged == []
    second, _ = train_link(
        phantoms, architecture, RECIPE, first, strand=0, lap=1, state_dir=tmp_path, work=replace(work, hop="lap 1")
    )
    assert changed(first, second)
    trained = train_student(
        phantoms,
        architecture,
        student_recipe(),
        second,
        second,
        round_index=0,
        state_dir=tmp_path,
        work=replace(work, hop="round 0"),
    )
    assert changed(second, trained.student)
    assert phases(work) == ["teacher-text", "teacher-table", "link", "link", "student"]


@pytest.mark.slow
def test_the_teachers_are_clipped_into_the_links_step_with_the_projector(phantoms, work, tmp_path, monkeypatch):
    """The projector's gradient is in the vector that is clipped: all that the optimiser changes is."""
    seen = []
    start = PrivateTraining.start

    def starting(self: PrivateTraining, model: nn.Module, others: Any, parameters: Any, patients: np.ndarray) -> None:
        start(self, model, others, parameters, patients)
        seen.append([tuple(p.shape) for p in self._parameters])

    monkeypatch.setattr(PrivateTraining, "start", starting)
    architecture = resolve_architecture("test_convnext", num_classes=5, in_chans=1, image_size=32)
    train_link(phantoms, architecture, RECIPE, None, strand=0, lap=0, state_dir=tmp_path, work=work)
    width = build_model(architecture, 0).num_features
    assert len(seen) == 3  # two teachers, and the link
    assert (16, width) in seen[2]  # two embeddings of 8 units each
