"""How a site's cases are divided: into train, val and test, into folds, and into those that keep their labels."""

from __future__ import annotations

import hashlib
import hmac
import warnings

import numpy as np
from torch import Tensor

from chainward_client.data.site_data import SPLITS
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator

_SPLIT_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}

FOLDS = 5


def strata(labels: np.ndarray) -> np.ndarray:
    """Return the stratum of every case, int64 (n,).

    Single-label, labels (n,): the class. Multi-label, labels (n, classes) of 0 and 1: the rarest of its findings among
    these cases (the lower index on a tie), so that a rare finding is divided evenly whatever else is in the image;
    cases without a finding form the stratum `classes`, one past the last finding.
    """
    if labels.ndim == 1:
        return labels
    present = labels > 0.5
    classes = labels.shape[1]
    by_rarity = np.argsort(present.sum(axis=0), kind="stable")
    found: np.ndarray = by_rarity[present[:, by_rarity].argmax(axis=1)]
    found[~present.any(axis=1)] = classes
    return found


def keyed_fractions(patients: np.ndarray, key: bytes, purpose: str) -> np.ndarray:
    """Return a number in [0, 1) for the patient of every row, float64 (n,): HMAC-SHA-256 of the patient's id.

    It depends on the patient, the key and the purpose, and on nothing else: not on other patients, their number or order,
    nor on labels. Without the key nobody can compute it, or find a patient whose number is small.

    Parameters
    ----------
    patients : (n,)
    key : a hospital's secret (`site_key`)
    purpose : numbers for another purpose have nothing to do with these
    """
    numbers: dict[str, float] = {}
    for patient in map(str, patients):
        if patient not in numbers:
            message = f"{purpose}\0{patient}".encode(errors="surrogatepass")
            digest = hmac.new(key, message, hashlib.sha256).digest()
            numbers[patient] = (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
    return np.array([numbers[str(patient)] for patient in patients], dtype=np.float64)


def split_by_key(patients: np.ndarray, key: bytes) -> np.ndarray:
    """Split cases into train, val and test, each patient with probability 0.7, 0.1 and 0.2 by `keyed_fractions`.

    What happens to one patient does not depend on any other, so neighbouring hospitals have neighbouring training sets.
    The price: shares are met on average only, and a small hospital may have no val or test case at all.

    Returns
    -------
    str (n,)
    """
    ends = np.cumsum(list(_SPLIT_FRACTIONS.values()))[:-1]
    return np.array(SPLITS)[np.searchsorted(ends, keyed_fractions(patients, key, "split"), side="right")]


def labelled_by_key(patients: np.ndarray, fraction: float, key: bytes) -> np.ndarray:
    """Return the rows whose labels are kept, ascending: about `fraction` of the patients by `keyed_fractions`.

    Of one key, a smaller fraction is a subset of a larger one. `fraction`: 0 to 1.
    """
    return np.flatnonzero(keyed_fractions(patients, key, "labels") < fraction)


def split_by_patient(
    labels: np.ndarray, patients: np.ndarray, num_classes: int, generator: np.random.Generator
) -> np.ndarray:
    """Split cases 70/10/20 into train, val and test; no patient is on two sides.

    Stratified by class as well as whole patients permit: each patient goes where the images of its class (the
    commonest among the patient's) are furthest below their share. With three patients or more no split is
    empty; with two there is no val, with one only train. Multi-label: "class" is the rarest finding of the image, or
    that it has none (`strata`).

    Parameters
    ----------
    labels : int (n,), below `num_classes`, or 0 and 1 (n, num_classes) if multi-label
    patients : (n,)
    generator : the order in which patients are placed

    Returns
    -------
    str (n,)
    """
    if labels.ndim == 2:
        labels, num_classes = strata(labels), num_classes + 1  # one past the last finding: none
    ids, patient_of = np.unique(patients, return_inverse=True)
    class_of, size_of = patient_classes(labels, patient_of, len(ids), num_classes)
    fractions = np.array([_SPLIT_FRACTIONS[split] for split in SPLITS])
    split_of = np.empty(len(ids), dtype=np.int64)
    by_rarity = np.argsort(np.bincount(class_of, size_of, minlength=num_classes), kind="stable")
    for class_index in by_rarity:
        members = np.flatnonzero(class_of == class_index)
        lacking = fractions * size_of[members].sum()
        for patient in generator.permutation(members):
            split_of[patient] = np.argmax(lacking)
            lacking[split_of[patient]] -= size_of[patient]
    _fill_empty_splits(split_of, class_of, size_of)
    return np.array(SPLITS)[split_of[patient_of]]


def _fill_empty_splits(split_of: np.ndarray, class_of: np.ndarray, size_of: np.ndarray) -> None:
    """Give every empty split one patient: small, of a common class, from the split with the most patients."""
    frequency = np.bincount(class_of)
    for split in (SPLITS.index(name) for name in ("train", "test", "val")):
        count = np.bincount(split_of, minlength=len(SPLITS))
        if count[split] == 0 and count.max() > 1:
            givers = np.flatnonzero(split_of == count.argmax())
            best = min(givers, key=lambda patient: (-frequency[class_of[patient]], size_of[patient], patient))
            split_of[best] = split


def patient_classes(
    labels: np.ndarray, patient_of: np.ndarray, num_patients: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the commonest class (the lower index on a tie) and the number of images of every patient.

    Parameters
    ----------
    labels, patient_of : int (n,), class and patient index of every image

    Returns
    -------
    classes, sizes : int64 (num_patients,)
    """
    counts = np.zeros((num_patients, num_classes), dtype=np.int64)
    np.add.at(counts, (patient_of, labels), 1)
    return counts.argmax(axis=1), counts.sum(axis=1)


def keep_label_fraction(labels: np.ndarray, fraction: float, seed: int, site: str) -> np.ndarray:
    """Return which cases keep their labels: a random `fraction` of every class, at least one case of each.

    Of one seed and site, a smaller fraction is a subset of a larger one. Multi-label: a fraction of the images of every
    rarest finding and of those without one (`strata`), and at least one image with each finding.

    Parameters
    ----------
    labels : int (n,), or 0 and 1 (n, classes) if multi-label
    fraction : above 0, up to 1 (all)
    seed, site : name the random choice

    Returns
    -------
    ascending indices into `labels`

    Raises
    ------
    DataError
        If `fraction` is not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"chain.label-fraction: found {fraction:g}; expected a number above 0, up to 1")
    kept = []
    stratum_of = strata(labels)
    for stratum in np.unique(stratum_of):
        generator = numpy_generator(seed, "label-fraction", site, int(stratum))
        of_class = generator.permutation(np.flatnonzero(stratum_of == stratum))
        kept.append(of_class[: max(1, round(fraction * len(of_class)))])
    for finding in range(labels.shape[1]) if labels.ndim == 2 else ():
        having = np.flatnonzero(labels[:, finding] > 0.5)
        if len(having) and not (stratum_of == finding).any():  # all of them have a rarer one, too
            generator = numpy_generator(seed, "label-fraction", site, "finding", finding)
            kept.append(generator.permutation(having)[:1])
    return np.unique(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def folds(labels: Tensor, patients: np.ndarray, seed: int) -> list[np.ndarray]:
    """Deal cases into at most `FOLDS` folds by patient, the classes spread evenly; return the rows of each.

    Fewer folds where there are fewer patients, or where no class has as many cases; a single one where that leaves less
    than two.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    of = strata(labels.numpy())
    count = min(FOLDS, len(np.unique(patients)), int(np.bincount(of).max()))
    if count < 2:
        return [np.arange(len(labels))]
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        dealt = [held_out for _, held_out in splitter.split(np.zeros(len(of)), of, patients)]
    return [rows for rows in dealt if len(rows)]
