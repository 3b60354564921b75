"""What a site's privileged teachers say of its training cases: trained once, kept in the site's state folder.

A teacher asked about the cases that it was trained on only repeats their labels. So the logits are cross-fitted: the
patients are dealt into folds, and a case's logits come from a teacher that was trained on the other folds and has seen no
case of this patient. Embeddings of different teachers have nothing to do with each other, so those come from one teacher
trained on all cases; what it knows of the labels by heart is kept small by dropout and few units.

Under privacy one teacher of each modality gives both. Trained by DP-SGD on all cases it knows little of any one of them by
heart, and folds would spend five times. What it says of a case is then a function of this case's own record and of noisy
weights, and nothing else here may depend on the data: whether there is a teacher follows from the columns that the site
declares, and its classes are all those of the task.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.data.splits import folds
from chainward_client.policy import check_run
from chainward_client.precision import training_environment
from chainward_client.private_site import Prepared, PrivateWork
from chainward_client.privileged.checks import MIN_CASES
from chainward_client.privileged.image import Read, SeenImages, beside
from chainward_client.privileged.kept import key_of, key_of_private, load, path_of, save
from chainward_client.privileged.results import PrivilegedTargets, TeacherReport
from chainward_client.privileged.table import table_vectors
from chainward_client.privileged.teacher import PrivilegedTeacher, train_teacher, train_teacher_privately
from chainward_client.privileged.text import text_vectors
from chainward_shared.distillation.losses import class_counts
from chainward_shared.errors import ModelError
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.recipes import PRIVILEGED_BATCH, PrivilegedRecipe, TrainingRecipe
from chainward_shared.seeds import derive_seed

logger = logging.getLogger("chainward.client")


def privileged_targets(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    cache: Path | None,
    *,
    work: PrivateWork | None = None,
    image: SeenImages | None = None,
) -> PrivilegedTargets | None:
    """Return what the site's privileged teachers say of `cases`, or None where the site has no such teacher.

    Parameters
    ----------
    data : the site, for its id, classes and how its privileged data are read
    cases : labelled training cases of the site, on which the teachers are trained
    recipe : which modalities, how they are read, and how the teachers are trained
    training : seed, threads and class balance
    cache : the site's state folder; the teachers' answers are kept there and found again. None: trained anew
    work : what private teachers spend through; None: teachers without privacy. Private answers are found again within one
        run, at no cost; another run trains anew, so that what a run is said to spend holds all that its models come from
    image : the images of `cases` through the start, for a recipe whose teachers see them

    Raises
    ------
    DataError
        The site's encoder can't be used.
    ModelError
        The teachers are to see images, and the model starts from no pretrained weights.
    PrivacyError
        The site's policy has no privileged teachers, or the budget or the ledger don't allow one. What a teacher that was
        trained before has spent stays spent, and its answers are kept.
    """
    image = _seen(recipe, image)
    if work is not None:
        return _private_targets(data, cases, recipe, training, cache, work, image)
    key = key_of(data, cases, recipe, training, image=image)
    if cache is not None and (kept := load(path_of(cache, key), key, cases, data)) is not None:
        return kept
    started = time.monotonic()
    parts = [
        _modality(name, vectors, available, data, cases, recipe, training)
        for name, (vectors, available) in (
            (name, read()) for name, read in _readers(data, cases, recipe, image).items()
        )
        if _enough(name, available, data, cases)
    ]
    if not parts:
        return None
    targets = _merged(parts)
    shown = ", ".join(
        f"{name} {report.balanced_accuracy:.3f} on {report.cases} of {len(cases)} cases"
        for name, report in targets.report.items()
    )
    logger.info(
        "%s: privileged teachers trained in %.1f s; balanced accuracy out of fold: %s",
        data.site,
        time.monotonic() - started,
        shown,
    )
    if cache is not None:
        save(targets, path_of(cache, key), key)
    return targets


def _seen(recipe: PrivilegedRecipe, image: SeenImages | None) -> SeenImages | None:
    """Return the images where the recipe's teachers see them."""
    if recipe.image and image is None:
        raise ModelError(
            "privileged.image: teachers see an image through the pretrained weights that a link starts from, found none here; "
            "set chain.start-from, or privileged.image=false"
        )
    return image if recipe.image else None


def _readers(data: SiteData, cases: Cases, recipe: PrivilegedRecipe, image: SeenImages | None) -> dict[str, Read]:
    """Return how each modality is read that the recipe asks for and the site declares to have, beside the image where there
    is one."""
    found: dict[str, Read] = {}
    setup, privileged = data.privileged, cases.privileged
    if recipe.use in ("text", "all") and privileged.texts is not None:
        blank = (*data.classes, *setup.label_words) if recipe.blank_label_words else ()
        found["text"] = partial(
            text_vectors, privileged.texts, recipe.text_features, blank=blank, encoder=setup.encoder
        )
    if recipe.use in ("table", "all") and privileged.table is not None and setup.columns:
        found["table"] = partial(table_vectors, privileged.table, setup.columns)
    if image is not None:
        return {name: partial(beside, image, read) for name, read in found.items()}
    return found


def _private_targets(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    cache: Path | None,
    work: PrivateWork,
    image: SeenImages | None,
) -> PrivilegedTargets | None:
    check_run(work.site.policy, private=True, privileged=True)
    prepared = work.prepared(training, data)
    parts = [
        _private_modality(name, read, data, cases, recipe, prepared, cache, work, image)
        for name, read in _readers(data, cases, recipe, image).items()
    ]
    return _merged(parts) if parts else None


def _private_modality(
    name: str,
    read: Read,
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    prepared: Prepared[TrainingRecipe],
    cache: Path | None,
    work: PrivateWork,
    image: SeenImages | None,
) -> PrivilegedTargets:
    """Find what the private teacher of one modality says, or train it, pay for it, and keep it.

    Each modality is kept by itself, so that what goes wrong in the second does not let the first be paid for twice.
    """
    phase, training = f"teacher-{name}", prepared.recipe
    dp_sgd = work.dp_sgd(training, data, epochs=recipe.epochs, batch_size=PRIVILEGED_BATCH)
    key = key_of_private(name, data, cases, recipe, prepared, dp_sgd, work.run, image)
    path = None if cache is None else path_of(cache, key, private=True)
    if path is not None and _paid(work, phase, dp_sgd):
        kept = load(path, key, cases, data, private=True)
        if kept is not None:
            return kept
    started = time.monotonic()
    inputs, there = (torch.from_numpy(part) for part in read())
    with work.training(
        training,
        data,
        phase=phase,
        epochs=recipe.epochs,
        batch_size=PRIVILEGED_BATCH,
    ) as private:
        teacher = train_teacher_privately(
            *(inputs, there, cases.labels, cases.patients),
            len(data.classes),
            recipe,
            training,
            prepared.counts,
            private,
            *(data.site, "privileged", name, "private"),
        )
    answers = _answers_of(name, teacher, inputs, there, cases.labels, training.threads)
    logger.info(
        "%s: privileged %s teacher trained privately in %.1f s; balanced accuracy on its own training cases: %.3f on %d of "
        "%d cases",
        data.site,
        name,
        time.monotonic() - started,
        *(answers.report[name].balanced_accuracy, answers.report[name].cases, len(cases)),
    )
    if path is not None:
        save(answers, path, key)
    return answers


def _answers_of(
    name: str, teacher: PrivilegedTeacher, inputs: Tensor, there: Tensor, labels: Tensor, threads: int
) -> PrivilegedTargets:
    """Return what one private teacher, trained on all cases, says of those that have its modality."""
    with training_environment(threads, seed=0), torch.no_grad():
        logits = torch.where(there[:, None], teacher(inputs), 0.0)
        embeddings = torch.nn.functional.normalize(teacher.embed(inputs), dim=1) * there[:, None]
    taught = there[:, None].expand_as(logits).contiguous()
    return _of_one(name, logits, taught, embeddings, there, labels, private=True)


def _of_one(
    name: str,
    logits: Tensor,
    taught: Tensor,
    embeddings: Tensor,
    there: Tensor,
    labels: Tensor,
    *,
    private: bool = False,
) -> PrivilegedTargets:
    """Return what the teacher of one modality says of all cases, n; `there`: which have it, bool (n,)."""
    accuracy = _balanced_accuracy(logits[there], taught[there], labels[there])
    return PrivilegedTargets(
        logits=logits,
        taught=taught,
        embeddings=embeddings,
        present=there[:, None].expand_as(embeddings).contiguous(),
        multilabel=labels.ndim == 2,
        report={name: TeacherReport(int(there.sum()), accuracy)},
        private=private,
    )


def _paid(work: PrivateWork, phase: str, dp_sgd: DpSgd) -> bool:
    """Return whether the site's ledger holds such a training of this run, to the end: answers without it are not used."""
    ledger = work.site.ledger
    ledger.reload()
    record = MechanismRecord.of(dp_sgd.mechanism, dp_sgd.clip)
    return any(
        (one.reserved.run, one.reserved.phase, one.counted) == (work.run, phase, record) for one in ledger.spendings()
    )


def _enough(name: str, available: np.ndarray, data: SiteData, cases: Cases) -> bool:
    labels = cases.labels[torch.from_numpy(available)]
    patients = len(np.unique(cases.patients[available]))
    counts = class_counts(labels, len(data.classes))
    varied = bool((counts > 0).sum() > 1) if counts.ndim == 1 else bool((counts > 0).all(dim=1).any())
    if len(labels) >= MIN_CASES and patients > 1 and varied:
        return True
    logger.info(
        "%s: no %s teacher: %d training cases of %d patients have the modality; expected at least %d, of 2 patients and "
        "of 2 classes",
        data.site,
        name,
        len(labels),
        patients,
        MIN_CASES,
    )
    return False


def _modality(
    name: str,
    vectors: np.ndarray,
    available: np.ndarray,
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
) -> PrivilegedTargets:
    """Train the teachers of one modality: one for each fold, for the logits, and one on all, for the embeddings."""
    classes = len(data.classes)
    rows = np.flatnonzero(available)
    inputs, labels = torch.from_numpy(vectors[rows]), cases.labels[torch.from_numpy(rows)]
    purpose = (data.site, "privileged", name)
    logits = torch.zeros(len(cases), classes)
    taught = torch.zeros(len(cases), classes, dtype=torch.bool)
    dealt = folds(labels, cases.patients[rows], derive_seed(training.seed, *purpose, "folds"))
    with training_environment(training.threads, seed=0):
        for index, held_out in enumerate(dealt):
            rest = np.setdiff1d(np.arange(len(rows)), held_out)
            seen = _told_apart(labels[rest], classes)
            teacher = train_teacher(inputs[rest], labels[rest], classes, recipe, training, *purpose, "fold", index)
            with torch.no_grad():
                logits[rows[held_out]] = torch.where(seen, teacher(inputs[held_out]), 0.0)
            taught[rows[held_out]] = seen
        embeddings = torch.zeros(len(cases), recipe.hidden)
        whole = train_teacher(inputs, labels, classes, recipe, training, *purpose, "all")
        with torch.no_grad():
            embeddings[rows] = torch.nn.functional.normalize(whole.embed(inputs), dim=1)
    return _of_one(name, logits, taught, embeddings, torch.from_numpy(available), cases.labels)


def _told_apart(labels: Tensor, classes: int) -> Tensor:
    """Return the classes that a teacher of these labels learns to tell, bool (classes,)."""
    counts = class_counts(labels, classes)
    return counts > 0 if counts.ndim == 1 else (counts > 0).all(dim=1)


def _merged(parts: Sequence[PrivilegedTargets]) -> PrivilegedTargets:
    have = torch.stack([part.available for part in parts])  # (modalities, n)
    taught = torch.stack([part.taught | ~part.available[:, None] for part in parts]).all(dim=0)
    taught &= have.any(dim=0)[:, None]
    logits = torch.stack([part.logits for part in parts]).sum(dim=0) / have.sum(dim=0).clamp(min=1)[:, None]
    return PrivilegedTargets(
        logits=torch.where(taught, logits, 0.0),
        taught=taught,
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        present=torch.cat([part.present for part in parts], dim=1),
        multilabel=parts[0].multilabel,
        report={name: report for part in parts for name, report in part.report.items()},
        private=parts[0].private,
    )


def _balanced_accuracy(logits: Tensor, taught: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import balanced_accuracy_score

    if labels.ndim == 1:
        if not len(labels):
            return math.nan
        guessed = torch.where(taught, logits, -torch.inf).argmax(dim=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(y_pred contains classes|single label).*")
            return float(balanced_accuracy_score(labels.numpy(), guessed.numpy()))
    both = [finding for finding in range(labels.shape[1]) if 0 < labels[:, finding].sum() < len(labels)]
    scores = [balanced_accuracy_score(labels[:, finding] > 0.5, logits[:, finding] > 0) for finding in both]
    return float(np.mean(scores)) if scores else math.nan
