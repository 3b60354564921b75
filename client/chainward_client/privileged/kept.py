"""What privileged teachers said, kept in the site's state folder under a key of all that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.kept_files import installed
from chainward_client.private_site import Prepared
from chainward_client.privileged.encoder import encoder_digest
from chainward_client.privileged.image import SeenImages
from chainward_client.privileged.results import PrivilegedTargets, TeacherReport
from chainward_shared.errors import WeightsError
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.recipes import PrivilegedRecipe, TrainingRecipe
from chainward_shared.weights import StateDict, digest, load_file, save_file

logger = logging.getLogger("chainward.client")

KEPT_FILES = 16


_FORMAT = 1


_FOLDER = "privileged"


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


def path_of(cache: Path, key: str, *, private: bool = False) -> Path:
    """Return the file in which the targets of this key are kept."""
    return cache / _FOLDER / f"{_prefix(private)}{key[:32]}.safetensors"


def _prefix(private: bool) -> str:
    """Private answers have their own, so that those of other trainings, which cost nothing, don't push them out."""
    return "private-targets-" if private else "targets-"


def _tensors(targets: PrivilegedTargets) -> StateDict:
    return {name: getattr(targets, name) for name in ("logits", "taught", "embeddings", "present")}


def save(targets: PrivilegedTargets, path: Path, key: str) -> None:
    """Keep the targets, and forget the oldest files beyond `KEPT_FILES`; a full disk is a warning."""
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


def load(path: Path, key: str, cases: Cases, data: SiteData, *, private: bool = False) -> PrivilegedTargets | None:
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
