"""Spreading the cases of one file over the sites of a simulation."""

from __future__ import annotations

import numpy as np

from chainward_client.data.splits import patient_classes, strata
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator

MIN_TRAIN_CASES = 10
_DRAWS = 200


def partition_by_site(sites: np.ndarray) -> dict[str, np.ndarray]:
    """Return the row indices of every site, sites in the order of their names.

    Parameters
    ----------
    sites : str (n,), the site of every row
    """
    return {str(site): np.flatnonzero(sites == site) for site in np.unique(sites)}


def partition_by_label_skew(
    labels: np.ndarray,
    patients: np.ndarray,
    num_sites: int,
    alpha: float,
    seed: int,
    splits: np.ndarray,
) -> list[np.ndarray]:
    """Spread cases over sites whose label distributions differ: the smaller `alpha`, the more.

    The label skew of Hsu, Qi and Brown (2019, arXiv:1909.06335), drawn per class as by Yurochkin et al.
    (2019, arXiv:1905.12022), so that every case is used once: the shares of the sites in a class come from a
    symmetric Dirichlet distribution with concentration `alpha`. Sites therefore differ in size, too. The same
    shares hold in train, val and test. All images of a patient go to one site, and count as the commonest of
    their classes. Multi-label: "class" is the rarest finding of the image, or that it has none (`strata`).

    Parameters
    ----------
    labels : int (n,), or 0 and 1 (n, classes) if multi-label
    patients : (n,)
    num_sites : 1 or more
    alpha : above 0; 0.1 is extreme, 100 nearly even
    seed : the same seed gives the same partition
    splits : str (n,), "train", "val" or "test"

    Returns
    -------
    ascending row indices, one array per site; every site gets at least `MIN_TRAIN_CASES` training cases

    Raises
    ------
    DataError
        If there are too few training cases, or 200 draws left a site with too few.
    """
    in_train = splits == "train"
    if in_train.sum() < num_sites * MIN_TRAIN_CASES:
        raise DataError(
            f"{in_train.sum()} training cases can't give {num_sites} sites {MIN_TRAIN_CASES} each; "
            "use fewer sites (federation.num-sites)"
        )
    labels = strata(labels)
    num_classes = int(labels.max()) + 1
    smallest_of_best = 0
    for draw in range(_DRAWS):
        shares = numpy_generator(seed, "label-skew", draw).dirichlet(np.full(num_sites, alpha), size=num_classes)
        site_of = np.empty(len(labels), dtype=np.int64)
        for name in np.unique(splits):
            rows = np.flatnonzero(splits == name)
            generator = numpy_generator(seed, "label-skew", draw, str(name))
            site_of[rows] = _assign_patients(labels[rows], patients[rows], shares, generator)
        smallest = int(np.bincount(site_of[in_train], minlength=num_sites).min())
        if smallest >= MIN_TRAIN_CASES:
            return [np.flatnonzero(site_of == site) for site in range(num_sites)]
        smallest_of_best = max(smallest_of_best, smallest)
    raise DataError(
        f"data.label-skew={alpha:g} over {num_sites} sites: in {_DRAWS} draws the smallest site had at most "
        f"{smallest_of_best} training cases, expected {MIN_TRAIN_CASES}; raise data.label-skew or lower "
        "federation.num-sites"
    )


def _assign_patients(
    labels: np.ndarray, patients: np.ndarray, shares: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the site of every row: in random order of patients, a site takes its share of each class.

    Parameters
    ----------
    shares : float (classes, sites), rows sum to 1
    """
    ids, patient_of = np.unique(patients, return_inverse=True)
    class_of, size_of = patient_classes(labels, patient_of, len(ids), len(shares))
    site_of = np.zeros(len(ids), dtype=np.int64)
    for class_index, share in enumerate(shares):
        members = generator.permutation(np.flatnonzero(class_of == class_index))
        if len(members) == 0:
            continue
        ends = np.cumsum(size_of[members])
        middles = (ends - size_of[members] / 2) / ends[-1]
        # Rounding may leave the last sum just below 1.
        site_of[members] = np.searchsorted(np.cumsum(share)[:-1], middles)
    return site_of[patient_of]
