"""Where a site's data comes from: a share of one data file, phantoms, or a hospital's own file."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from chainward_client.data.description import CsvDescription, DataDescription, DicomDescription, load_description
from chainward_client.data.dicom import DicomManifest, read_dicom
from chainward_client.data.manifest import NO_PATIENTS, Manifest, read_manifest, split_by_patient
from chainward_client.data.npz import NpzCases, read_npz
from chainward_client.data.partition import partition_by_label_skew, partition_by_site
from chainward_client.data.phantoms import phantom_site, phantom_site_ids
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedCases, PrivilegedSetup, SiteData
from chainward_client.privileged.checks import privileged_notes
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator

PHANTOM = "phantom"
DEFAULT_NUM_SITES = 6
_Stamp = tuple[int, int]
Table = Manifest | NpzCases


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


def simulated_site(source: str, index: int, *, num_sites: int, label_skew: float, seed: int) -> SiteData:
    """Return the data of one site of a simulation; only that site's images are decoded.

    Parameters
    ----------
    index : position in `simulated_site_ids` of the same settings
    source, num_sites, label_skew : as in `simulated_site_ids`
    seed : decides the partition, the splits where the file has none, and the phantoms

    Raises
    ------
    DataError
        If the data can't be used, or the site has no training cases.
    """
    ids = simulated_site_ids(source, num_sites=num_sites, label_skew=label_skew)
    if not 0 <= index < len(ids):
        raise DataError(f"There is no site {index}: this simulation has {len(ids)} sites, 0 to {len(ids) - 1}")
    if source == PHANTOM:
        phantoms = phantom_site(seed, index)
        return replace(phantoms, notes=phantoms.notes + privileged_notes(phantoms))
    table = _source_table(source)
    if label_skew > 0:
        splits = _splits(table, seed, None)
        parts = partition_by_label_skew(table.labels, table.patients, len(ids), label_skew, seed, splits=splits)
        return _site_data(ids[index], table, splits, parts[index], notes=table.notes)
    sites = partition_by_site(_required_sites(source, table))
    rows = sites[ids[index]]
    notes = table.notes
    shared = set(table.patients[rows]) & {
        patient for site in sites if site != ids[index] for patient in table.patients[sites[site]]
    }
    if shared:
        notes += (f"{_number_of(len(shared), 'patient')} of this site also at another site",)
    return _site_data(ids[index], table, _splits(table, seed, table.sites), rows, notes=notes)


def local_site(data: Path | str | DataDescription, site_id: str, seed: int) -> SiteData:
    """Return the data of a deployed hospital: all rows of its data file.

    Parameters
    ----------
    data : path of the data file, or its parsed content (the `data` block of a `site.yaml`)
    site_id : the hospital's id
    seed : decides the splits where the file has none

    Raises
    ------
    DataError
        If the data can't be used, or there are no training cases.
    """
    table = _read_table(Path(data)) if isinstance(data, Path | str) else _read_described(data)
    splits = _splits(table, seed, np.full(len(table), site_id))
    return _site_data(site_id, table, splits, np.arange(len(table)), notes=table.notes)


def _source_table(source: str) -> Table:
    path = Path(source)
    if not path.is_absolute():
        raise DataError(f"data.source: found '{source}'; expected phantom or the absolute path of a data file")
    return _read_table(path)


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
            f"{len(names)} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); "
            f"set it to 0 or {len(names)}, or partition by label with data.label-skew=0.5"
        )
    return names


def _splits(table: Table, seed: int, sites: np.ndarray | None) -> np.ndarray:
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


def _site_data(site: str, table: Table, splits: np.ndarray, rows: np.ndarray, *, notes: tuple[str, ...]) -> SiteData:
    by_split = [rows[splits[rows] == split] for split in SPLITS]
    if len(by_split[0]) == 0:
        raise DataError(
            f"Site '{site}' has {_number_of(len(rows), 'case')} but none for training; check its split column"
        )
    # Decoded together, so that one message counts all unusable images of the site.
    if isinstance(table, DicomManifest):
        cases, found = table.cases_with_notes(np.concatenate(by_split))
        notes += found
    else:
        cases = table.cases(np.concatenate(by_split))
    ends = np.cumsum([len(part) for part in by_split]).tolist()
    data = {
        split: _between(cases, end - len(part), end) for split, part, end in zip(SPLITS, by_split, ends, strict=True)
    }
    privileged = PrivilegedSetup()
    if isinstance(table, Manifest):
        privileged = _privileged_setup(table.description)
        notes += _lost_regions(table, np.concatenate(by_split), cases)
    site_data = SiteData(
        site,
        table.classes,
        data,
        task=table.description.task,
        privileged=privileged,
        has_patient_ids=NO_PATIENTS not in table.notes,
    )
    return replace(site_data, notes=notes + _findings(site_data) + privileged_notes(site_data))


def _privileged_setup(description: CsvDescription) -> PrivilegedSetup:
    block = description.privileged
    columns = {name: column for name, column in description.columns.tabular.items() if name not in block.exclude}
    return PrivilegedSetup(columns, block.label_words, block.encoder)


def _lost_regions(table: Manifest, rows: np.ndarray, cases: Cases) -> tuple[str, ...]:
    """Return a note on masks and boxes that are given and mark no pixel of their image."""
    masks = cases.privileged.masks
    if masks is None:
        return ()
    empty = (masks == 0).flatten(1).all(dim=1).numpy()
    if table.masks is not None:
        lost = sum(table.masks[row] is not None for row in rows[empty])
        return (f"{_number_of(lost, 'empty mask')}: left out of localisation scores",) if lost else ()
    given = 0 if table.boxes is None else int((~np.isnan(table.boxes[rows[empty]]).all(axis=1)).sum())
    what = "box" if given == 1 else "boxes"
    return (f"{given} {what} outside the cropped image: left out of localisation scores",) if given else ()


def _between(cases: Cases, start: int, end: int) -> Cases:
    """Return the cases from `start` up to `end`; the tensors are views."""
    privileged = cases.privileged
    return Cases(
        cases.images[start:end],
        cases.labels[start:end],
        cases.patients[start:end],
        PrivilegedCases(
            texts=None if privileged.texts is None else privileged.texts[start:end],
            table=None
            if privileged.table is None
            else {name: values[start:end] for name, values in privileged.table.items()},
            masks=None if privileged.masks is None else privileged.masks[start:end],
        ),
    )


def _findings(site: SiteData) -> tuple[str, ...]:
    counts = dict(zip(site.classes, site.class_counts("train"), strict=True))
    what = "class" if site.task == "single" else "finding"
    notes = [f"{what} '{name}': {_number_of(count, 'training case')}" for name, count in counts.items() if count < 2]
    if site.task == "multilabel":
        cases = len(site.splits["train"])
        notes += [f"finding '{name}': all training cases have it" for name, count in counts.items() if count == cases]
    notes += [f"the {split} split is empty" for split in SPLITS if len(site.splits[split]) == 0]
    if len(site.splits["test"]) == 1:
        notes.append("1 test case: scores on it say little")
    return tuple(notes)


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _stamp(path: Path) -> _Stamp:
    """Return what changes when the file does: time of modification and size."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)  # reading it says what is wrong
    return (status.st_mtime_ns, status.st_size)


def _read_table(path: Path) -> Table:
    """Read a data file and its manifest, once per process and version of the two."""
    path = path.absolute()
    description = _cached_description(path, _stamp(path))
    file = description.manifest if isinstance(description, CsvDescription) else description.images
    return _cached_table(path, _stamp(path), _stamp(file))


@lru_cache(maxsize=8)
def _cached_description(path: Path, _: _Stamp) -> DataDescription:
    return load_description(path)


@lru_cache(maxsize=4)
def _cached_table(path: Path, stamp: _Stamp, _: _Stamp) -> Table:
    return _read_described(_cached_description(path, stamp))


def _read_described(description: DataDescription) -> Table:
    if isinstance(description, DicomDescription):
        return read_dicom(description)
    return read_manifest(description) if isinstance(description, CsvDescription) else read_npz(description)
