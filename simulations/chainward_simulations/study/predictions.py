"""What an arm says of the pooled test images, and where it looks: kept in the study folder for paired comparisons.

They are of the person who owns the images, and stay in that folder; a patient is a hash there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chainward_client.data.site_data import Cases, SiteData, SplitName
from chainward_client.evaluation import class_probabilities, localisation_values
from chainward_client.training.features import Features
from chainward_shared.errors import StudyError, WeightsError
from chainward_shared.evaluation.classification import evaluate
from chainward_shared.evaluation.localisation import METRICS as LOCALISATION
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, build_model
from chainward_shared.weights import StateDict, load_file, save_file
from chainward_simulations.study.without_training import PictureModel

_ARRAYS = ("probabilities", "labels", "site", "group", "localisation")


@dataclass(frozen=True)
class Predictions:
    """What the models of an arm say of the same images.

    Attributes
    ----------
    models : name of each model
    sites : name of each site
    probabilities : float64 (models, n, classes)
    labels : int64 (n,), or 0 and 1 (n, classes) of a multi-label task
    site : int64 (n,), index into `sites`
    group : int64 (n,), a hash of the patient; the unit that is resampled
    localisation : float64 (models, metrics, n), in the order of `LOCALISATION`; NaN where an image has no region to find
    """

    models: tuple[str, ...]
    sites: tuple[str, ...]
    probabilities: np.ndarray
    labels: np.ndarray
    site: np.ndarray
    group: np.ndarray
    localisation: np.ndarray

    @property
    def has_regions(self) -> bool:
        """Whether any image has a region that a model could find."""
        return bool(np.isfinite(self.localisation).any())

    def localised(self) -> dict[str, float] | None:
        """Return the mean of each localisation metric over images and models; None without regions."""
        if not self.has_regions:
            return None
        means = np.nanmean(self.localisation, axis=(0, 2))
        count = int(np.isfinite(self.localisation[0, 0]).sum())
        return {"n": count, **dict(zip(LOCALISATION, means.tolist(), strict=True))}

    @property
    def best(self) -> int:
        """Index of the model with the highest balanced accuracy on all images."""
        scores = [one.balanced_accuracy or 0.0 for one in self.pooled()]
        return scores.index(max(scores))

    def only(self, index: int) -> Predictions:
        """Return what one of the models says."""
        return replace(
            self,
            models=(self.models[index],),
            probabilities=self.probabilities[[index]],
            localisation=self.localisation[[index]],
        )

    def rarest(self) -> tuple[int, int]:
        """Return the class that the fewest images are of (multi-label: have), and how many."""
        classes = self.probabilities.shape[2]
        multilabel = self.labels.ndim == 2
        counts = self.labels.sum(axis=0) if multilabel else np.bincount(self.labels.astype(int), minlength=classes)
        return int(counts.argmin()), int(counts.min())

    def pooled(self) -> list[Scores]:
        """Return each model's scores over all images."""
        return [evaluate(probabilities, self.labels) for probabilities in self.probabilities]

    def of_site(self, index: int) -> list[Scores]:
        """Return each model's scores over one site's images."""
        rows = self.site == index
        return [evaluate(probabilities[rows], self.labels[rows]) for probabilities in self.probabilities]


def predict_all(
    models: Mapping[str, StateDict | PictureModel],
    architecture: Architecture | None,
    sites: Mapping[str, SiteData],
    split: SplitName,
    threads: int,
    *,
    regions: bool,
    features: Features | None = None,
) -> Predictions:
    """Return what the models say of the images of one split of all sites, sites in their order.

    Parameters
    ----------
    architecture : of the models that are networks
    regions : also score where networks look, in the images that have a region of interest
    features : where the output of a frozen trunk is kept
    """
    network = None if architecture is None else build_model(architecture, seed=0)
    cases, classes = [data.splits[split] for data in sites.values()], len(next(iter(sites.values())).classes)
    probabilities, localisation = [], np.full((len(models), len(LOCALISATION), sum(map(len, cases))), np.nan)
    for row, model in enumerate(models.values()):
        if isinstance(model, PictureModel):
            probabilities.append(np.concatenate([model.probabilities(part) for part in cases]))
            continue
        assert architecture is not None and network is not None
        network.load_state_dict(model)
        size = architecture.image_size
        found = [
            class_probabilities(network, part, classes, threads, image_size=size, features=features) for part in cases
        ]
        probabilities.append(np.concatenate(found))
        if regions:
            localisation[row] = np.concatenate([_localisation(network, part, threads, size) for part in cases], axis=1)
    return Predictions(
        models=tuple(models),
        sites=tuple(sites),
        probabilities=np.stack(probabilities),
        labels=np.concatenate([part.labels.numpy() for part in cases]),
        site=np.repeat(np.arange(len(cases)), [len(part) for part in cases]),
        group=_groups(np.concatenate([part.patients for part in cases])),
        localisation=localisation,
    )


def _localisation(model: nn.Module, cases: Cases, threads: int, size: int) -> np.ndarray:
    """Return the localisation metrics of the cases, (metrics, n), NaN where there is no region."""
    values = np.full((len(LOCALISATION), len(cases)), np.nan)
    found = localisation_values(model, cases, threads, image_size=size)
    if found is not None:
        values[:, found.rows] = [getattr(found, metric) for metric in LOCALISATION]
    return values


def _groups(patients: np.ndarray) -> np.ndarray:
    names, index = np.unique(patients, return_inverse=True)
    hashes = [hashlib.sha256(str(name).encode()).digest()[:8] for name in names]
    codes = np.array([int.from_bytes(digest, "big") >> 1 for digest in hashes], dtype=np.int64)
    return codes[index] if len(names) else np.empty(0, dtype=np.int64)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write the predictions to a safetensors file, whole or not at all.

    Raises
    ------
    OSError
        The disk is full or can't be written.
    """
    names: dict[str, Sequence[str]] = {"models": predictions.models, "sites": predictions.sites}
    arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(predictions, name))) for name in _ARRAYS}
    save_file(arrays, path, {name: json.dumps(list(value)) for name, value in names.items()})


def load_predictions(path: Path) -> Predictions:
    """Return the predictions in a file.

    Raises
    ------
    StudyError
        The file is missing or damaged.
    """
    try:
        arrays, metadata = load_file(path)
        models, sites = (tuple(json.loads(metadata[name])) for name in ("models", "sites"))
        probabilities, labels, site, group, localisation = (arrays[name].numpy() for name in _ARRAYS)
        found = Predictions(models, sites, probabilities, labels, site, group, localisation)
    except (WeightsError, KeyError, ValueError) as error:
        raise StudyError(f"{path}: not a readable file of predictions ({error}); run the study with --fresh") from error
    n = found.probabilities.shape[1] if found.probabilities.ndim == 3 else -1
    if any(len(getattr(found, name)) != n for name in ("labels", "site", "group")) or found.localisation.shape[-1] != n:
        raise StudyError(f"{path}: its arrays are not of one length; run the study with --fresh")
    return found
