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

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
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
from chainward_client.privileged.table import table_vectors
from chainward_client.privileged.teacher import train_teacher, train_teacher_privately
from chainward_client.privileged.text import text_vectors
from chainward_shared.distillation.losses import class_counts
from chainward_shared.errors import WeightsError
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.privacy.plan import PrivatePlan
from chainward_shared.recipes import PRIVILEGED_BATCH, PrivilegedRecipe, TrainingRecipe
from chainward_shared.seeds import derive_seed
from chainward_shared.weights import StateDict, digest, load_file, save_file

logger = logging.getLogger("chainward.client")

KEPT_FILES = 16
_FORMAT = 1
_FOLDER = "privileged"


@dataclass(frozen=True)
class TeacherReport:
    """How one teacher fares. Stays in the site's own log.

    Attributes
    ----------
    cases : training cases that have the modality
    balanced_accuracy : out of fold, under privacy on the training cases themselves; multi-label: the mean over the
        findings. NaN where no case can tell
    """

    cases: int
    balanced_accuracy: float


@dataclass(frozen=True)
class PrivilegedTargets:
    """What the privileged teachers of a site say of each of n cases. Never leaves the site.

    A case with report and table has the mean of the two teachers' logits, and their embeddings side by side, each of
    length 1. A case with one of them has that one, and zeros for the other, which `present` keeps out of every comparison.

    Attributes
    ----------
    logits : float32 (n, classes), out of fold (under privacy of the one teacher); 0 where not taught
    taught : bool (n, classes), the classes that all teachers of this case have seen; under privacy all classes
    embeddings : float32 (n, d), 0 where not present
    present : bool (n, d), the dimensions of the modalities that the case has
    multilabel : whether the classes are questions of their own
    report : of each teacher, "text" and "table"
    private : whether the teachers were trained privately, and paid for on the site's ledger
    """

    logits: Tensor
    taught: Tensor
    embeddings: Tensor
    present: Tensor
    multilabel: bool
    report: Mapping[str, TeacherReport]
    private: bool = False

    @property
    def available(self) -> Tensor:
        """Return which cases have something privileged, bool (n,)."""
        return self.present.any(dim=1)


def privileged_targets(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    cache: Path | None,
    *,
    work: PrivateWork | None = None,
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

    Raises
    ------
    DataError
        The site's encoder can't be used.
    PrivacyError
        The site's policy has no privileged teachers, or the budget or the ledger don't allow one. What a teacher that was
        trained before has spent stays spent, and its answers are kept.
    """
    if work is not None:
        return _private_targets(data, cases, recipe, training, cache, work)
    key = _key(data, cases, recipe, training)
    if cache is not None and (kept := _load(_path(cache, key), key, cases, data)) is not None:
        return kept
    started = time.monotonic()
    parts = {
        name: _modality(name, vectors, available, data, cases, recipe, training)
        for name, (vectors, available) in ((name, read()) for name, read in _readers(data, cases, recipe).items())
        if _enough(name, available, data, cases)
    }
    if not parts:
        return None
    targets = _merged(list(parts.values()), cases.labels.ndim == 2)
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
        _save(targets, _path(cache, key), key)
    return targets


@dataclass(frozen=True)
class _Answers:
    """What one teacher says of all cases; the fields as in `PrivilegedTargets`."""

    name: str
    logits: Tensor
    taught: Tensor
    embeddings: Tensor
    available: Tensor
    report: TeacherReport


_Read = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Returns the vectors of a modality, float32 (n, d), and which cases have it, bool (n,)."""


def _readers(data: SiteData, cases: Cases, recipe: PrivilegedRecipe) -> dict[str, _Read]:
    """Return how each modality is read that the recipe asks for and the site declares to have."""
    found: dict[str, _Read] = {}
    setup, privileged = data.privileged, cases.privileged
    if recipe.use in ("text", "all") and privileged.texts is not None:
        blank = (*data.classes, *setup.label_words) if recipe.blank_label_words else ()
        found["text"] = partial(
            text_vectors, privileged.texts, recipe.text_features, blank=blank, encoder=setup.encoder
        )
    if recipe.use in ("table", "all") and privileged.table is not None and setup.columns:
        found["table"] = partial(table_vectors, privileged.table, setup.columns)
    return found


def _private_targets(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    cache: Path | None,
    work: PrivateWork,
) -> PrivilegedTargets | None:
    check_run(work.site.policy, private=True, privileged=True)
    prepared = work.prepared(training, data)
    parts = [
        _private_modality(name, read, data, cases, recipe, prepared, cache, work)
        for name, read in _readers(data, cases, recipe).items()
    ]
    return _merged(parts, cases.labels.ndim == 2, private=True) if parts else None


def _private_modality(
    name: str,
    read: _Read,
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    prepared: Prepared[TrainingRecipe],
    cache: Path | None,
    work: PrivateWork,
) -> _Answers:
    """Find what the private teacher of one modality says, or train it, pay for it, and keep it.

    Each modality is kept by itself, so that what goes wrong in the second does not let the first be paid for twice.
    """
    phase, training = f"teacher-{name}", prepared.recipe
    planned = work.plan(training, data, epochs=recipe.epochs, batch_size=PRIVILEGED_BATCH)
    key = _private_key(name, data, cases, recipe, prepared, planned, work.run)
    path = None if cache is None else _path(cache, key, private=True)
    if path is not None and _paid(work, phase, planned):
        kept = _load(path, key, cases, data, private=True)
        if kept is not None:
            return _Answers(name, kept.logits, kept.taught, kept.embeddings, kept.available, kept.report[name])
    started = time.monotonic()
    vectors, available = read()
    purpose = (data.site, "privileged", name, "private")
    inputs, there = torch.from_numpy(vectors), torch.from_numpy(available)
    with work.training(
        training,
        data,
        phase=phase,
        epochs=recipe.epochs,
        batch_size=PRIVILEGED_BATCH,
        declared_prior=prepared.declared,
    ) as private:
        teacher = train_teacher_privately(
            inputs,
            there,
            cases.labels,
            cases.patients,
            len(data.classes),
            recipe,
            training,
            prepared.counts,
            private,
            *purpose,
        )
    with training_environment(training.threads, seed=0), torch.no_grad():
        logits = torch.where(there[:, None], teacher(inputs), 0.0)
        embeddings = torch.nn.functional.normalize(teacher.embed(inputs), dim=1) * there[:, None]
    taught = there[:, None].expand_as(logits).contiguous()
    report = TeacherReport(int(there.sum()), _balanced_accuracy(logits[there], taught[there], cases.labels[there]))
    answers = _Answers(name, logits, taught, embeddings, there, report)
    logger.info(
        "%s: privileged %s teacher trained privately in %.1f s; balanced accuracy on its own training cases: %.3f on %d of "
        "%d cases",
        data.site,
        name,
        time.monotonic() - started,
        report.balanced_accuracy,
        report.cases,
        len(cases),
    )
    if path is not None:
        _save(_merged([answers], cases.labels.ndim == 2, private=True), path, key)
    return answers


def _paid(work: PrivateWork, phase: str, planned: PrivatePlan) -> bool:
    """Return whether the site's ledger holds such a training of this run, to the end: answers without it are not used."""
    ledger = work.site.ledger
    ledger.reload()
    record = MechanismRecord.of(planned.mechanism, planned.clip)
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
) -> _Answers:
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
            seen = _seen(labels[rest], classes)
            teacher = train_teacher(inputs[rest], labels[rest], classes, recipe, training, *purpose, "fold", index)
            with torch.no_grad():
                logits[rows[held_out]] = torch.where(seen, teacher(inputs[held_out]), 0.0)
            taught[rows[held_out]] = seen
        embeddings = torch.zeros(len(cases), recipe.hidden)
        whole = train_teacher(inputs, labels, classes, recipe, training, *purpose, "all")
        with torch.no_grad():
            embeddings[rows] = torch.nn.functional.normalize(whole.embed(inputs), dim=1)
    report = TeacherReport(len(rows), _balanced_accuracy(logits[rows], taught[rows], labels))
    return _Answers(name, logits, taught, embeddings, torch.from_numpy(available), report)


def _seen(labels: Tensor, classes: int) -> Tensor:
    """Return the classes that a teacher of these labels learns to tell, bool (classes,)."""
    counts = class_counts(labels, classes)
    return counts > 0 if counts.ndim == 1 else (counts > 0).all(dim=1)


def _merged(parts: Sequence[_Answers], multilabel: bool, *, private: bool = False) -> PrivilegedTargets:
    have = torch.stack([part.available for part in parts])  # (modalities, n)
    taught = torch.stack([part.taught | ~part.available[:, None] for part in parts]).all(dim=0)
    taught &= have.any(dim=0)[:, None]
    logits = torch.stack([part.logits for part in parts]).sum(dim=0) / have.sum(dim=0).clamp(min=1)[:, None]
    return PrivilegedTargets(
        logits=torch.where(taught, logits, 0.0),
        taught=taught,
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        present=torch.cat([part.available[:, None].expand_as(part.embeddings) for part in parts], dim=1).contiguous(),
        multilabel=multilabel,
        report={part.name: part.report for part in parts},
        private=private,
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


def _private_key(
    name: str,
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    prepared: Prepared[TrainingRecipe],
    planned: PrivatePlan,
    run: str,
) -> str:
    """Return the SHA-256 over everything that decides what one private teacher says, but for the noise; and the run."""
    hidden = {"text": {"table": None}, "table": {"texts": None}}[name]
    own = replace(cases, privileged=replace(cases.privileged, **hidden))
    private = {"run": run, "plan": planned.model_dump(), "counts": prepared.counts.tolist(), "of": name}
    return _key(data, own, recipe.model_copy(update={"use": name}), prepared.recipe, private)


def _key(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    private: Mapping[str, object] | None = None,
) -> str:
    """Return the SHA-256 over everything that decides the targets."""
    setup, privileged = data.privileged, cases.privileged
    decides = {
        "format": _FORMAT,
        "versions": {name: _version(name) for name in ("chainward", "torch", "scikit-learn", "numpy", "transformers")},
        "site": data.site,
        "classes": data.classes,
        # the weights in the student's loss decide nothing here
        "recipe": recipe.model_dump(exclude={"logit_weight", "embedding_weight", "temperature"}),
        "training": [training.seed, training.threads, training.class_balance, training.prior_strength],
        "labels": [list(cases.labels.shape), cases.labels.tolist()],
        "patients": cases.patients.tolist(),
        "texts": privileged.texts,
        "table": {name: privileged.table[name] for name in setup.columns} if privileged.table is not None else None,
        "columns": {name: declared.model_dump() for name, declared in setup.columns.items()},
        "label words": setup.label_words,
        "encoder": None if setup.encoder is None else _stamps(setup.encoder),
    }
    if private is not None:
        decides["private"] = private
    return hashlib.sha256(json.dumps(decides, ensure_ascii=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _path(cache: Path, key: str, *, private: bool = False) -> Path:
    return cache / _FOLDER / f"{_prefix(private)}{key[:32]}.safetensors"


def _prefix(private: bool) -> str:
    """Private answers have their own, so that those of other trainings, which cost nothing, don't push them out."""
    return "private-targets-" if private else "targets-"


def _tensors(targets: PrivilegedTargets) -> StateDict:
    return {name: getattr(targets, name) for name in ("logits", "taught", "embeddings", "present")}


def _save(targets: PrivilegedTargets, path: Path, key: str) -> None:
    report = {name: [entry.cases, entry.balanced_accuracy] for name, entry in targets.report.items()}
    metadata = {"key": key, "digest": digest(_tensors(targets)), "report": json.dumps(report)}
    again = " and charged" if targets.private else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(targets), path, metadata)
        kept = sorted(
            path.parent.glob(f"{_prefix(targets.private)}*.safetensors"), key=lambda file: file.stat().st_mtime_ns
        )
        for old in kept[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(
            "%s: can't be written (%s); privileged teachers are trained%s again", path, error.strerror, again
        )


def _load(path: Path, key: str, cases: Cases, data: SiteData, *, private: bool = False) -> PrivilegedTargets | None:
    """Return the targets in a file, or None if there is none that can be used."""
    if not path.exists():
        return None
    try:
        tensors, metadata = load_file(path)
        if metadata.get("key") != key or metadata.get("digest") != digest(tensors):
            raise WeightsError(f"{path}: not what was written")
        report = {name: TeacherReport(*entry) for name, entry in json.loads(metadata["report"]).items()}
    except (WeightsError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s: damaged (%s); privileged teachers are trained again", path, error)
        return None
    logger.info("%s: privileged teachers found in %s", data.site, path)
    return PrivilegedTargets(**tensors, multilabel=cases.labels.ndim == 2, report=report, private=private)
