"""Privileged teachers at a site: what they say of its cases, out of fold, and how it is kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_recipes import SMALL_TRAINING

from chainward_client.data.site_data import Cases, PrivilegedCases, PrivilegedSetup, SiteData
from chainward_client.data.splits import folds
from chainward_client.privileged import results, targets
from chainward_client.privileged.results import PrivilegedTargets
from chainward_client.privileged.targets import privileged_targets
from chainward_client.training.privileged import PrivilegedTerm
from chainward_shared.distillation.losses import distillation_loss
from chainward_shared.recipes import PrivilegedRecipe
from chainward_simulations.phantoms.cases import phantom_site

TRAINING = SMALL_TRAINING.model_copy(
    update={
        "seed": 0,
        "epochs": 1,
        "batch_size": 16,
        "weight_decay": 0.01,
        "class_balance": "site-prior",
    }
)
TENSORS = ("logits", "taught", "embeddings", "present")


def recipe(**changes: object) -> PrivilegedRecipe:
    settings = {
        "use": "all",
        "logit_weight": 0.5,
        "embedding_weight": 0.5,
        "temperature": 2.0,
        "epochs": 3,
        "text_features": 64,
        "hidden": 8,
    }
    return PrivilegedRecipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def phantoms() -> SiteData:
    return phantom_site(0, 5, image_size=32)


def with_privileged(data: SiteData, **changes: object) -> SiteData:
    train = data.splits["train"]
    changed = replace(train, privileged=replace(train.privileged, **changes))
    return replace(data, splits={**data.splits, "train": changed})


def asked(data: SiteData, cache: Path | None = None, **changes: object) -> PrivilegedTargets | None:
    return privileged_targets(data, data.splits["train"], recipe(**changes), TRAINING, cache)


def answered(data: SiteData, cache: Path | None = None, **changes: object) -> PrivilegedTargets:
    found = asked(data, cache, **changes)
    assert found is not None
    return found


def made(labels: torch.Tensor, texts: list[str | None], patients: list[str] | None = None) -> SiteData:
    """A site with reports and images of no use."""
    cases = Cases(
        torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8),
        labels,
        np.array(patients or [f"p{index}" for index in range(len(labels))]),
        PrivilegedCases(texts=tuple(texts)),
    )
    task = "single" if labels.ndim == 1 else "multilabel"
    return SiteData("north", ("healthy", "ill", "rare"), {"train": cases}, task=task)


# what the teachers know


@pytest.mark.slow
def test_teachers_of_phantoms_know_more_than_chance_on_cases_that_they_have_not_seen():
    report = answered(phantom_site(0, 0, image_size=32), epochs=40, text_features=1024, hidden=64).report
    assert set(report) == {"text", "table"}
    assert report["text"].balanced_accuracy > 0.45  # chance 0.2
    assert report["table"].balanced_accuracy > 0.3
    assert report["text"].cases < report["table"].cases


@pytest.mark.slow
def test_reports_that_have_nothing_to_do_with_the_label_teach_nothing():
    generator = np.random.default_rng(0)
    words = [f"w{index}" for index in range(30)]
    texts = [" ".join(generator.choice(words, 6)) for _ in range(200)]
    labels = torch.from_numpy(generator.integers(0, 2, 200))
    report = answered(made(labels, texts), epochs=40).report["text"]
    # a teacher asked about its own training cases would know nearly all of them by heart
    assert report.balanced_accuracy == pytest.approx(0.5, abs=0.12)


def test_the_answers_have_the_shapes_of_cases_classes_and_teachers(phantoms):
    found, n = answered(phantoms), len(phantoms.splits["train"])
    assert found.logits.shape == found.taught.shape == (n, 5)
    assert found.embeddings.shape == found.present.shape == (n, 16)
    assert found.logits.dtype == found.embeddings.dtype == torch.float32
    assert not found.multilabel
    assert found.logits.isfinite().all()


# text, table, both, neither


@pytest.mark.parametrize(("use", "teachers"), [("text", {"text"}), ("table", {"table"}), ("all", {"text", "table"})])
def test_the_recipe_says_which_teachers_there_are(phantoms, use, teachers):
    assert set(answered(phantoms, use=use).report) == teachers


@pytest.mark.parametrize(
    ("missing", "use", "teachers"),
    [
        ({"texts": None}, "all", {"table"}),
        ({"table": None}, "all", {"text"}),
        ({"texts": None}, "text", None),
        ({"table": None}, "table", None),
        ({"texts": None, "table": None}, "all", None),
    ],
)
def test_a_site_without_what_is_asked_for_takes_part_without(phantoms, missing, use, teachers):
    found = asked(with_privileged(phantoms, **missing), use=use)
    assert (None if found is None else set(found.report)) == teachers


def test_a_table_of_which_every_column_is_excluded_has_no_teacher(phantoms):
    assert asked(replace(phantoms, privileged=PrivilegedSetup()), use="table") is None


def test_columns_that_are_excluded_decide_nothing(phantoms):
    columns = dict(phantoms.privileged.columns)
    del columns["crp"]
    data = replace(phantoms, privileged=PrivilegedSetup(columns))
    table = data.splits["train"].privileged.table
    assert table is not None
    other = with_privileged(data, table={**table, "crp": table["crp"][::-1]})
    assert torch.equal(answered(data, use="table").logits, answered(other, use="table").logits)


def test_teachers_are_mixed_where_a_case_has_both_and_alone_where_it_has_one(phantoms):
    n = len(phantoms.splits["train"])
    texts = phantoms.splits["train"].privileged.texts
    assert texts is not None
    table = phantoms.splits["train"].privileged.table
    assert table is not None
    # the second half without a table
    table = {name: tuple(v if i < n // 2 else None for i, v in enumerate(values)) for name, values in table.items()}
    data = with_privileged(phantoms, table=table)
    text, tabular, both = (answered(data, use=use) for use in ("text", "table", "all"))
    has_text, has_table = text.available, tabular.available
    assert both.available.tolist() == (has_text | has_table).tolist()
    for row in range(n):
        assert both.present[row].tolist() == [bool(has_text[row])] * 8 + [bool(has_table[row])] * 8
        torch.testing.assert_close(both.embeddings[row], torch.cat([text.embeddings[row], tabular.embeddings[row]]))
        if has_text[row] and has_table[row]:
            taught = text.taught[row] & tabular.taught[row]
            expected = torch.where(taught, (text.logits[row] + tabular.logits[row]) / 2, 0.0)
        else:
            alone = text if has_text[row] else tabular
            taught, expected = alone.taught[row], alone.logits[row]
        assert torch.equal(both.taught[row], taught)
        torch.testing.assert_close(both.logits[row], expected)
    assert {(bool(a), bool(b)) for a, b in zip(has_text, has_table, strict=True)} >= {
        (True, True),
        (True, False),
        (False, True),
    }


def test_each_teachers_embedding_has_length_one(phantoms):
    found = answered(phantoms)
    for part in (slice(0, 8), slice(8, 16)):
        lengths = found.embeddings[:, part].norm(dim=1)
        assert torch.allclose(lengths, found.present[:, part].any(dim=1).float(), atol=1e-5)


def test_blanking_takes_the_class_names_and_the_sites_own_words(phantoms):
    texts = tuple(f"{name} seen" for name in ("ill", "healthy") * 20)
    labels = torch.tensor([1, 0] * 20)
    assert answered(made(labels, list(texts)), epochs=20).report["text"].balanced_accuracy == 1
    blanked = answered(made(labels, list(texts)), epochs=20, blank_label_words=True)
    assert blanked.report["text"].balanced_accuracy < 0.75
    own = replace(made(labels, list(texts)), privileged=PrivilegedSetup(label_words=("seen",)))
    assert asked(own, blank_label_words=True) is None  # nothing is left of any report


# too little to learn from


def test_too_few_cases_have_no_teacher_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO, logger="chainward.client")
    assert asked(made(torch.tensor([0, 1] * 4), ["a", "b"] * 4)) is None
    assert "north: no text teacher: 8 training cases of 8 patients have the modality" in caplog.text


def test_one_class_alone_has_no_teacher():
    assert asked(made(torch.zeros(20, dtype=torch.int64), ["a", "b"] * 10)) is None


def test_a_class_that_no_case_has_is_not_taught():
    found = answered(made(torch.tensor([0, 1] * 10), ["a", "b"] * 10))
    assert found.taught.tolist() == [[True, True, False]] * 20
    assert not found.logits[:, 2].any()


def test_a_class_of_one_patient_is_not_taught_to_the_teacher_of_this_patient():
    labels = torch.tensor([0, 1] * 10 + [2, 2])
    patients = [f"p{index}" for index in range(20)] + ["x", "x"]
    found = answered(made(labels, ["a", "b"] * 11, patients))
    assert found.taught[20:].tolist() == [[True, True, False]] * 2
    assert found.taught[:20, 2].any()


# out of fold


@pytest.mark.parametrize("multilabel", [False, True])
def test_no_patient_is_on_both_sides_of_a_fold_and_every_case_is_held_out_once(multilabel):
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 3, 90))
    if multilabel:
        labels = torch.from_numpy(generator.integers(0, 2, (90, 3))).float()
    patients = np.array([f"p{index // 3}" for index in range(90)])
    dealt = folds(labels, patients, seed=1)
    assert len(dealt) == 5
    assert sorted(np.concatenate(dealt).tolist()) == list(range(90))
    for held_out in dealt:
        rest = np.setdiff1d(np.arange(90), held_out)
        assert not set(patients[held_out]) & set(patients[rest])
    if not multilabel:
        shares = [np.bincount(labels[rows].numpy(), minlength=3) / len(rows) for rows in dealt]
        assert np.ptp(shares, axis=0).max() < 0.2


def test_few_patients_are_dealt_into_few_folds():
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert len(folds(labels, np.array(["a", "a", "b", "b", "c", "c"]), seed=0)) == 3
    assert len(folds(labels, np.array(["a"] * 6), seed=0)) == 1


def test_a_patients_own_labels_do_not_decide_what_is_said_of_this_patient(monkeypatch):
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 2, 40))
    texts = [("well" if label == 0 else "bad") + f" x{index}" for index, label in enumerate(labels)]
    patients = [f"p{index // 2}" for index in range(40)]
    # Folds are stratified by the labels; held fixed, so that the flip reaches the teachers alone.
    dealt = folds(labels, np.array(patients), seed=0)
    monkeypatch.setattr(targets, "folds", lambda *_: dealt)
    before = answered(made(labels, list(texts), patients), epochs=10)
    own = dealt[2]
    flipped = labels.clone()
    flipped[own] = 1 - flipped[own]
    after = answered(made(flipped, list(texts), patients), epochs=10)
    others = np.setdiff1d(np.arange(40), own)
    assert torch.equal(before.logits[own], after.logits[own])
    assert not torch.isclose(before.logits[others, :2], after.logits[others, :2]).any()


# multi-label


@pytest.mark.slow
def test_findings_are_taught_one_by_one():
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 2, (120, 3))).float()
    labels[:, 2] = 0  # nobody has it
    texts = [f"{'warm' if first else 'cold'} {'wet' if second else 'dry'}" for first, second, _ in labels.tolist()]
    found = answered(made(labels, list(texts)), epochs=30)
    assert found.multilabel
    assert found.taught.tolist() == [[True, True, False]] * 120
    assert found.report["text"].balanced_accuracy == 1


# the cache


@pytest.fixture
def train_teacher(monkeypatch: pytest.MonkeyPatch) -> Mock:
    spy = Mock(wraps=targets.train_teacher)
    monkeypatch.setattr(targets, "train_teacher", spy)
    return spy


def test_teachers_are_trained_once_and_then_found(phantoms, tmp_path, train_teacher):
    first = answered(phantoms, tmp_path)
    trained = train_teacher.call_count
    second = answered(phantoms, tmp_path)
    assert train_teacher.call_count == trained > 0
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert (second.report, second.multilabel) == (first.report, first.multilabel)


def test_the_same_seed_gives_the_same_teachers_without_a_cache(phantoms):
    first, second = answered(phantoms), answered(phantoms)
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_weights_in_the_students_loss_train_no_new_teacher(phantoms, tmp_path, train_teacher):
    answered(phantoms, tmp_path)
    trained = train_teacher.call_count
    answered(phantoms, tmp_path, logit_weight=3.0, embedding_weight=0.0, temperature=5.0)
    assert train_teacher.call_count == trained


@pytest.mark.parametrize(
    "changes", [{"epochs": 4}, {"use": "text"}, {"hidden": 9}, {"text_features": 65}, {"blank_label_words": True}]
)
def test_another_recipe_trains_anew(phantoms, tmp_path, train_teacher, changes):
    answered(phantoms, tmp_path)
    trained = train_teacher.call_count
    answered(phantoms, tmp_path, **changes)
    assert train_teacher.call_count > trained


@pytest.mark.slow
def test_other_cases_reports_tables_labels_columns_or_seeds_train_anew(phantoms, tmp_path, train_teacher):
    train = phantoms.splits["train"]
    texts, table = train.privileged.texts, train.privileged.table
    assert texts is not None
    assert table is not None
    columns = dict(list(phantoms.privileged.columns.items())[:3])
    labels = train.labels.clone()
    labels[0] = (labels[0] + 1) % 5
    others = [
        with_privileged(phantoms, texts=("changed", *texts[1:])),
        with_privileged(phantoms, table={**table, "age": (18.0, *table["age"][1:])}),
        replace(phantoms, splits={**phantoms.splits, "train": replace(train, labels=labels)}),
        replace(phantoms, splits={**phantoms.splits, "train": train.take(range(40))}),
        replace(phantoms, privileged=PrivilegedSetup(columns)),
        replace(phantoms, privileged=PrivilegedSetup(phantoms.privileged.columns, label_words=("x",))),
        replace(phantoms, site="another"),
    ]
    answered(phantoms, tmp_path)
    for other in others:
        trained = train_teacher.call_count
        answered(other, tmp_path)
        assert train_teacher.call_count > trained
    trained = train_teacher.call_count
    privileged_targets(phantoms, train, recipe(), TRAINING.model_copy(update={"seed": 1}), tmp_path)
    assert train_teacher.call_count > trained


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_file_is_said_and_trained_anew(phantoms, tmp_path, caplog, damage):
    first = answered(phantoms, tmp_path)
    (path,) = (tmp_path / "privileged").iterdir()
    contents = bytearray(path.read_bytes())
    if damage == "cut":
        contents = contents[: len(contents) // 2]
    elif damage == "bit":
        contents[-5] ^= 1
    else:
        answered(phantoms, tmp_path, epochs=1)
        (other,) = set((tmp_path / "privileged").iterdir()) - {path}
        contents = bytearray(other.read_bytes())
    path.write_bytes(contents)
    caplog.clear()
    again = answered(phantoms, tmp_path)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "damaged" in caplog.text
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_only_the_newest_files_are_kept(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT_FILES", 2)
    for epochs in (1, 2, 3):
        answered(phantoms, tmp_path, use="table", epochs=epochs)
    assert len(list((tmp_path / "privileged").iterdir())) == 2


def test_a_folder_that_cant_be_written_costs_the_cache_and_nothing_else(phantoms, tmp_path, caplog):
    (tmp_path / "privileged").write_text("in the way")
    assert asked(phantoms, tmp_path) is not None
    assert "can't be written" in caplog.text


# the term in a training's loss


def small_targets() -> PrivilegedTargets:
    generator = torch.Generator().manual_seed(0)
    taught = torch.tensor([[True] * 3, [True] * 3, [False] * 3, [True, True, False]])
    present = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4, [True] * 4])
    return PrivilegedTargets(
        logits=torch.randn(4, 3, generator=generator),
        taught=taught,
        embeddings=torch.randn(4, 4, generator=generator) * present,
        present=present,
        multilabel=False,
        report={},
    )


def term(**changes: object) -> PrivilegedTerm:
    return PrivilegedTerm(small_targets(), recipe(**changes), 6, seed=3)


LOGITS = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
EMBEDDING = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([3, 0, 2])


def test_the_term_is_the_weighted_sum_of_its_two_parts():
    both = term(logit_weight=0.3, embedding_weight=2.0)
    assert both.projector is not None
    held = small_targets()
    projected = EMBEDDING @ both.projector.weight.T.detach()
    expected = [
        0.3 * float(distillation_loss(LOGITS[:1, :2], held.logits[3:, :2], 2.0))
        + 2.0 * (1 - float(torch.cosine_similarity(projected[0], held.embeddings[3], dim=0))),
        0.3 * float(distillation_loss(LOGITS[1:2], held.logits[:1], 2.0))
        + 2.0 * (1 - float(torch.cosine_similarity(projected[1], held.embeddings[0], dim=0))),
        0.0,
    ]
    assert both.losses(LOGITS, EMBEDDING, ROWS).tolist() == pytest.approx(expected, rel=1e-5)


def test_each_part_can_be_switched_off():
    logits_only, embedding_only = term(embedding_weight=0), term(logit_weight=0)
    assert logits_only.projector is None
    assert list(logits_only.parameters()) == []
    both = term().losses(LOGITS, EMBEDDING, ROWS)
    apart = logits_only.losses(LOGITS, EMBEDDING, ROWS) + embedding_only.losses(LOGITS, EMBEDDING, ROWS)
    torch.testing.assert_close(both, apart)
    assert not term(logit_weight=0, embedding_weight=0).losses(LOGITS, EMBEDDING, ROWS).any()


def test_model_and_projector_are_trained_by_it_and_the_teachers_are_not():
    logits, embedding = LOGITS.clone().requires_grad_(), EMBEDDING.clone().requires_grad_()
    guide = term()
    guide.losses(logits, embedding, ROWS).mean().backward()
    assert logits.grad is not None
    assert embedding.grad is not None
    assert guide.projector is not None
    assert guide.projector.weight.grad is not None
    assert [bool(row.any()) for row in logits.grad] == [True, True, False]
    assert [bool(row.any()) for row in embedding.grad] == [True, True, False]
    assert not any(buffer.requires_grad for buffer in guide.buffers())


def test_the_projector_starts_by_its_seed():
    first, second = term(), term()
    assert first.projector is not None
    assert second.projector is not None
    assert torch.equal(first.projector.weight, second.projector.weight)


def test_nothing_of_the_teachers_is_in_a_state_dict_but_the_projector():
    assert set(term().state_dict()) == {"projector.weight"}
