"""What privileged teachers say of the cases of a site; kept in its state folder under a key of all that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.kept_files import installed
from chainward_client.private_site import Prepared
from chainward_client.privileged.encoder import encoder_digest
from chainward_shared.errors import WeightsError
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.recipes import PrivilegedRecipe, TrainingRecipe
from chainward_shared.weights import StateDict, digest, load_file, save_file

logger = logging.getLogger("chainward.client")

KEPT_FILES = 16
_FORMAT = 1


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


class SeenImages(Protocol):
    """The images of the cases, as teachers see them: `chainward_client.training.passes.StartImages`."""

    @property
    def key(self) -> list[str]:
        """What decides the vectors."""

    def vectors(self) -> np.ndarray:
        """Return a vector of each image, of this image alone: float32 (n, d)."""


def key_of_private(
    name: str,
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    prepared: Prepared[TrainingRecipe],
    dp_sgd: DpSgd,
    run: str,
    image: SeenImages | None = None,
) -> str:
    """Return the SHA-256 over everything that decides what one private teacher says, but for the noise; and the run."""
    hidden = {"text": {"table": None}, "table": {"texts": None}}[name]
    own = replace(cases, privileged=replace(cases.privileged, **hidden))
    private = {"run": run, "plan": dp_sgd.model_dump(), "counts": prepared.counts.tolist(), "of": name}
    return key_of(data, own, recipe.model_copy(update={"use": name}), prepared.recipe, private, image)


def key_of(
    data: SiteData,
    cases: Cases,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    private: Mapping[str, object] | None = None,
    image: SeenImages | None = None,
) -> str:
    """Return the SHA-256 over everything that decides the targets."""
    setup, privileged = data.privileged, cases.privileged
    decides = {
        "format": _FORMAT,
        "versions": {name: installed(name) for name in ("chainward", "torch", "scikit-learn", "numpy", "transformers")},
        "site": data.site,
        "classes": data.classes,
        # the weights in the student's loss decide nothing here
        "recipe": recipe.model_dump(exclude={"logit_weight", "embedding_weight", "temperature", "image"}),
        "training": [training.seed, training.threads, training.class_balance, training.prior_strength],
        "labels": [list(cases.labels.shape), cases.labels.tolist()],
        "patients": cases.patients.tolist(),
        "texts": privileged.texts,
        "table": {name: privileged.table[name] for name in setup.columns} if privileged.table is not None else None,
        "columns": {name: declared.model_dump() for name, declared in setup.columns.items()},
        "label words": setup.label_words,
        "encoder": None if setup.encoder is None else encoder_digest(setup.encoder),
    }
    if private is not None:
        decides["private"] = private
    if image is not None:
        decides["image"] = image.key
    return hashlib.sha256(json.dumps(decides, ensure_ascii=True).encode()).hexdigest()


def _path(cache: Path, key: str, private: bool) -> Path:
    """Private answers have names of their own, so that those of other trainings, which cost nothing, don't push them out."""
    return cache / "privileged" / f"{'private-targets' if private else 'targets'}-{key[:32]}.safetensors"


def _tensors(targets: PrivilegedTargets) -> StateDict:
    return {name: getattr(targets, name) for name in ("logits", "taught", "embeddings", "present")}


def save(targets: PrivilegedTargets, cache: Path | None, key: str) -> None:
    """Keep the targets in a state folder, and forget the oldest beyond `KEPT_FILES`; a full disk is a warning. None: don't."""
    if cache is None:
        return
    path = _path(cache, key, targets.private)
    report = {name: [entry.cases, entry.balanced_accuracy] for name, entry in targets.report.items()}
    metadata = {"key": key, "digest": digest(_tensors(targets)), "report": json.dumps(report)}
    again = " and charged" if targets.private else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(targets), path, metadata)
        kept = path.parent.glob(_path(cache, "*", targets.private).name)
        for old in sorted(kept, key=lambda file: file.stat().st_mtime_ns)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(
            "%s: can't be written (%s); privileged teachers are trained%s again", path, error.strerror, again
        )


def load(
    cache: Path | None, key: str, cases: Cases, data: SiteData, *, private: bool = False
) -> PrivilegedTargets | None:
    """Return the targets that `save` kept, or None if there are none that can be used."""
    if cache is None or not (path := _path(cache, key, private)).exists():
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
