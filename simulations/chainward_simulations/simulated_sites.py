"""The sites of a simulation and their data: phantoms, or each a share of one data file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import number_of, read_table, site_data
from chainward_client.data.splits import split_by_patient
from chainward_client.data.table import Table
from chainward_client.privileged.checks import with_privileged_notes
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator
from chainward_shared.words import listed
from chainward_simulations.partition import partition_by_label_skew, partition_by_site
from chainward_simulations.phantoms.cases import phantom_site, phantom_site_ids

PHANTOM = "phantom"
DEFAULT_NUM_SITES = 6
SHOWN_TESTS = 16
"""Test phantoms of each site out of which a report's examples are drawn: making them takes longer than all else of a report."""


def simulated_site_ids(source: str, *, num_sites: int, label_skew: float) -> tuple[str, ...]:
    """Return the ids of the sites of a simulation, in the order of their indices.

    Parameters
    ----------
    source : "phantom", or the absolute path of a data file
    num_sites : number of sites; 0: as many as the site column names, 6 for phantoms and with label skew
    label_skew : Dirichlet concentration; 0: the natural partition by the site column. No role for phantoms

    Raises
    ------
    DataError
        If the data can't be used, or can't be partitioned so.
    """
    if source == PHANTOM:
        try:
            return phantom_site_ids(num_sites or DEFAULT_NUM_SITES)
        except ValueError as error:
            raise DataError(f"federation.num-sites: {error}") from None
    if label_skew > 0:
        _source_table(source)
        return tuple(f"site-{index + 1}" for index in range(num_sites or DEFAULT_NUM_SITES))
    return tuple(_natural_sites(source, _source_table(source), num_sites))


def simulated_site(
    source: str, index: int, *, num_sites: int, label_skew: float, seed: int, tests_only: bool = False
) -> SiteData:
    """Return the data of one site of a simulation; only that site's images are decoded.

    Parameters
    ----------
    index : position in `simulated_site_ids` of the same settings
    source, num_sites, label_skew : as in `simulated_site_ids`
    seed : decides the partition, the splits where the file has none, and the phantoms
    tests_only : for who shows a few test images: of phantoms no others are made than the first `SHOWN_TESTS` of them, and
        reports and tables are not examined

    Raises
    ------
    DataError
        If the data can't be used, or the site has no training cases.
    """
    ids = simulated_site_ids(source, num_sites=num_sites, label_skew=label_skew)
    if not 0 <= index < len(ids):
        raise DataError(f"There is no site {index}: this simulation has {len(ids)} sites, 0 to {len(ids) - 1}")
    if source == PHANTOM:
        return phantom_site(seed, index, splits=("test",), most=SHOWN_TESTS) if tests_only else _phantoms(seed, index)
    data = _site_of_file(source, index, ids, label_skew, seed)
    return data if tests_only else with_privileged_notes(data)


@lru_cache(maxsize=8)
def _phantoms(seed: int, index: int) -> SiteData:
    """Return the phantoms of a site; a process draws them once, whoever asks: a second for each site, which nothing changes."""
    return with_privileged_notes(phantom_site(seed, index))


def _site_of_file(source: str, index: int, ids: tuple[str, ...], label_skew: float, seed: int) -> SiteData:
    table = _source_table(source)
    if label_skew > 0:
        splits = simulated_splits(table, seed, None)
        parts = partition_by_label_skew(table.labels, table.patients, len(ids), label_skew, seed, splits)
        return site_data(ids[index], table, splits, parts[index], notes=table.notes)
    sites = partition_by_site(_required_sites(source, table))
    rows = sites[ids[index]]
    notes = table.notes
    shared = set(table.patients[rows]) & {
        patient for site in sites if site != ids[index] for patient in table.patients[sites[site]]
    }
    if shared:
        notes += (f"{number_of(len(shared), 'patient')} of this site also at another site",)
    return site_data(ids[index], table, simulated_splits(table, seed, table.sites), rows, notes=notes)


def _source_table(source: str) -> Table:
    path = Path(source)
    if not path.is_absolute():
        raise DataError(f"data.source: found '{source}'; expected phantom or the absolute path of a data file")
    return read_table(path)


def _required_sites(source: str, table: Table) -> np.ndarray:
    if table.sites is None:
        raise DataError(
            f"{Path(source).name} has no site column (columns.site) to simulate sites from; "
            "set data.label-skew=0.5 federation.num-sites=6 to partition by label, or name the column"
        )
    return table.sites


def _natural_sites(source: str, table: Table, num_sites: int) -> list[str]:
    names = list(partition_by_site(_required_sites(source, table)))
    if num_sites not in (0, len(names)):
        raise DataError(
            f"federation.num-sites: found {num_sites}, but the site column of {Path(source).name} names "
            f"{len(names)} ({listed(names, 8)}); "
            f"set it to 0 or {len(names)}, or partition by label with data.label-skew=0.5"
        )
    return names


def simulated_splits(table: Table, seed: int, sites: np.ndarray | None) -> np.ndarray:
    """Return the file's own splits, or else seeded ones that give each of `sites` its train, val and test.

    A site's draw is named by its id, so that a hospital alone and in a simulation splits the same rows alike.
    """
    if table.splits is not None:
        return table.splits
    num_classes = len(table.classes)
    if sites is None:
        return split_by_patient(table.labels, table.patients, num_classes, numpy_generator(seed, "splits"))
    # A patient of two sites is split where first seen, and stays on that side at the other.
    home: dict[str, str] = {}
    for patient, site in zip(table.patients.tolist(), sites.tolist(), strict=True):
        home.setdefault(patient, site)
    home_of = np.array([home[patient] for patient in table.patients.tolist()])
    splits = np.empty(len(table), dtype="<U5")
    for site, rows in partition_by_site(home_of).items():
        generator = numpy_generator(seed, "splits", site)
        splits[rows] = split_by_patient(table.labels[rows], table.patients[rows], num_classes, generator)
    return splits
