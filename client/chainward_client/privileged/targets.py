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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from chainward_client.privileged.results import (
    PrivilegedTargets,
    SeenImages,
    TeacherReport,
    key_of,
    key_of_private,
    load,
    save,
)
from chainward_client.privileged.teacher import train_teacher, train_teacher_privately
from chainward_client.privileged.vectors import table_vectors, text_vectors
from chainward_shared.distillation.losses import class_counts
from chainward_shared.errors import ModelError
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.recipes import PRIVILEGED_BATCH, PrivilegedRecipe, TrainingRecipe
from chainward_shared.seeds import derive_seed

logger = logging.getLogger("chainward.client")

Vectors = tuple[np.ndarray, np.ndarray]
"""The vectors of a modality, float32 (n, d), and which cases have it, bool (n,)."""


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
    if recipe.image and image is None:
        raise ModelError(
            "privileged.image: teachers see an image through the pretrained weights that a link starts from, found none here; "
            "set chain.start-from, or privileged.image=false"
        )
    teachers = _Teachers(data, cases, recipe, training, cache, image if recipe.image else None)
    return teachers.without_privacy() if work is None else teachers.with_privacy(work)


@dataclass(frozen=True)
class _Teachers:
    """The teachers of a site; the fields are those of `privileged_targets`."""

    data: SiteData
    cases: Cases
    recipe: PrivilegedRecipe
    training: TrainingRecipe
    cache: Path | None
    image: SeenImages | None

    def without_privacy(self) -> PrivilegedTargets | None:
        key = key_of(self.data, self.cases, self.recipe, self.training, image=self.image)
        if (kept := load(self.cache, key, self.cases, self.data)) is not None:
            return kept
        started = time.monotonic()
        read = {name: read() for name, read in self._readers().items()}
        parts = [self._modality(name, *found) for name, found in read.items() if self._enough(name, found[1])]
        if not parts:
            return None
        targets = _merged(parts)
        shown = ", ".join(
            f"{name} {report.balanced_accuracy:.3f} on {report.cases} of {len(self.cases)} cases"
            for name, report in targets.report.items()
        )
        logger.info(
            "%s: privileged teachers trained in %.1f s; balanced accuracy out of fold: %s",
            self.data.site,
            time.monotonic() - started,
            shown,
        )
        save(targets, self.cache, key)
        return targets

    def with_privacy(self, work: PrivateWork) -> PrivilegedTargets | None:
        check_run(work.site.policy, private=True, privileged=True)
        prepared = work.prepared(self.training, self.data)
        parts = [self._private_modality(name, read, prepared, work) for name, read in self._readers().items()]
        return _merged(parts) if parts else None

    def _readers(self) -> dict[str, Callable[[], Vectors]]:
        """Return how each modality is read that the recipe asks for and the site declares to have."""
        found: dict[str, Callable[[], Vectors]] = {}
        recipe, setup, privileged = self.recipe, self.data.privileged, self.cases.privileged
        if recipe.use in ("text", "all") and privileged.texts is not None:
            blank = (*self.data.classes, *setup.label_words) if recipe.blank_label_words else ()
            found["text"] = partial(
                text_vectors, privileged.texts, recipe.text_features, blank=blank, encoder=setup.encoder
            )
        if recipe.use in ("table", "all") and privileged.table is not None and setup.columns:
            found["table"] = partial(table_vectors, privileged.table, setup.columns)
        return {name: partial(self._beside_image, read) for name, read in found.items()}

    def _beside_image(self, read: Callable[[], Vectors]) -> Vectors:
        """Return what `read` returns, with the vectors of the images before its own where teachers see them."""
        vectors, available = read()
        return vectors if self.image is None else np.concatenate([self.image.vectors(), vectors], axis=1), available

    def _enough(self, name: str, available: np.ndarray) -> bool:
        labels = self.cases.labels[torch.from_numpy(available)]
        patients = len(np.unique(self.cases.patients[available]))
        varied = int(_told_apart(labels, len(self.data.classes)).sum()) >= (2 if labels.ndim == 1 else 1)
        if len(labels) >= MIN_CASES and patients > 1 and varied:
            return True
        logger.info(
            "%s: no %s teacher: %d training cases of %d patients have the modality; expected at least %d, of 2 patients and "
            "of 2 classes",
            self.data.site,
            name,
            len(labels),
            patients,
            MIN_CASES,
        )
        return False

    def _modality(self, name: str, vectors: np.ndarray, available: np.ndarray) -> PrivilegedTargets:
        """Train the teachers of one modality: one for each fold, for the logits, and one on all, for the embeddings."""
        cases, classes, training = self.cases, len(self.data.classes), self.training
        rows = np.flatnonzero(available)
        inputs, labels = torch.from_numpy(vectors[rows]), cases.labels[torch.from_numpy(rows)]
        purpose = (self.data.site, "privileged", name)
        logits = torch.zeros(len(cases), classes)
        taught = torch.zeros(len(cases), classes, dtype=torch.bool)
        dealt = folds(labels, cases.patients[rows], derive_seed(training.seed, *purpose, "folds"))
        with training_environment(training.threads, seed=0):
            for index, held_out in enumerate(dealt):
                rest = np.setdiff1d(np.arange(len(rows)), held_out)
                seen = _told_apart(labels[rest], classes)
                fold = (*purpose, "fold", index)
                teacher = train_teacher(inputs[rest], labels[rest], classes, self.recipe, training, *fold)
                with torch.no_grad():
                    logits[rows[held_out]] = torch.where(seen, teacher(inputs[held_out]), 0.0)
                taught[rows[held_out]] = seen
            embeddings = torch.zeros(len(cases), self.recipe.hidden)
            whole = train_teacher(inputs, labels, classes, self.recipe, training, *purpose, "all")
            with torch.no_grad():
                embeddings[rows] = torch.nn.functional.normalize(whole.embed(inputs), dim=1)
        return _of_one(name, logits, taught, embeddings, torch.from_numpy(available), cases.labels)

    def _private_modality(
        self, name: str, read: Callable[[], Vectors], prepared: Prepared[TrainingRecipe], work: PrivateWork
    ) -> PrivilegedTargets:
        """Find what the private teacher of one modality says, or train it, pay for it, and keep it.

        Each modality is kept by itself, so that what goes wrong in the second does not let the first be paid for twice.
        """
        data, cases, training = self.data, self.cases, prepared.recipe
        phase, epochs = f"teacher-{name}", self.recipe.epochs
        dp_sgd = work.dp_sgd(training, data, epochs=epochs, batch_size=PRIVILEGED_BATCH)
        key = key_of_private(name, data, cases, self.recipe, prepared, dp_sgd, work.run, self.image)
        if _paid(work, phase, dp_sgd) and (kept := load(self.cache, key, cases, data, private=True)) is not None:
            return kept
        started = time.monotonic()
        inputs, there = (torch.from_numpy(part) for part in read())
        with work.training(training, data, phase=phase, epochs=epochs, batch_size=PRIVILEGED_BATCH) as private:
            teacher = train_teacher_privately(
                *(inputs, there, cases.labels, cases.patients),
                len(data.classes),
                self.recipe,
                training,
                prepared.counts,
                private,
                *(data.site, "privileged", name, "private"),
            )
        with training_environment(training.threads, seed=0), torch.no_grad():
            logits = torch.where(there[:, None], teacher(inputs), 0.0)
            embeddings = torch.nn.functional.normalize(teacher.embed(inputs), dim=1) * there[:, None]
        taught = there[:, None].expand_as(logits).contiguous()
        answers = _of_one(name, logits, taught, embeddings, there, cases.labels, private=True)
        logger.info(
            "%s: privileged %s teacher trained privately in %.1f s; balanced accuracy on its own training cases: %.3f on %d of "
            "%d cases",
            data.site,
            name,
            time.monotonic() - started,
            *(answers.report[name].balanced_accuracy, answers.report[name].cases, len(cases)),
        )
        save(answers, self.cache, key)
        return answers


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
