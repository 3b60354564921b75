"""A site's data out of its data file, whatever the format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from chainward_client.data.description import DataDescription, ManifestDescription, load_description
from chainward_client.data.formats import format_of
from chainward_client.data.formats.npz import NpzCases
from chainward_client.data.image_store import stamp
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedSetup, SiteData
from chainward_client.data.splits import split_by_key
from chainward_client.data.table import Table
from chainward_client.data.unusable import UnusableFile, without_unusable
from chainward_shared.data_notes import NO_PATIENTS, copies_in_two_splits
from chainward_shared.errors import DataError

_Stamp = tuple[int, int]

Decoded = tuple[tuple[Cases, tuple[str, ...]], np.ndarray, tuple[UnusableFile, ...]]
"""Cases with notes on their files, the rows of the table that they are, and the files that were left out."""


def decoded_in_memory(table: Table, rows: np.ndarray) -> Decoded:
    """Decode the images of some rows of a table.

    Raises
    ------
    DataError
        An image can't be used.
    """

    def decode(indices: np.ndarray) -> tuple[Cases, tuple[str, ...]]:
        cases, facts = table.cases_with_facts(indices)
        return cases, table.notes_on(facts, cases.patients)

    if leaves_out(table):
        return without_unusable(decode, rows)
    return decode(rows), rows, ()


def leaves_out(table: Table) -> bool:
    """Return whether the files that can't be used are left out."""
    return isinstance(table.description, ManifestDescription) and table.description.unusable == "leave-out"


def local_site(
    data: Path | str | DataDescription,
    site_id: str,
    key: bytes,
    decode: Callable[[Table, np.ndarray], Decoded] = decoded_in_memory,
) -> SiteData:
    """Return the data of a deployed hospital: all rows of its data file.

    Parameters
    ----------
    data : path of the data file, or its parsed content (the `data` block of a `site.yaml`)
    site_id : the hospital's id
    key : the hospital's secret, which decides the splits where the file has none, and which patients keep their labels
    decode : decodes rows of the table

    Raises
    ------
    DataError
        If the data can't be used, or there are no training cases.
    """
    table = read_table(Path(data)) if isinstance(data, Path | str) else format_of(data).read(data)
    splits = split_by_key(table.patients, key) if table.splits is None else table.splits
    opened = site_data(site_id, table, splits, np.arange(len(table)), notes=table.notes, decode=decode)
    if isinstance(table, NpzCases):  # the layout has only places in an array, which shift with every image that goes
        opened = replace(opened, splits={name: named_by_content(cases) for name, cases in opened.splits.items()})
    return replace(opened, key=key)


def named_by_content(cases: Cases) -> Cases:
    """Return the cases, each image a patient of its own that is named by a digest of its pixels and label."""
    names = [
        hashlib.blake2b(image.numpy().tobytes() + label.numpy().tobytes(), digest_size=8).hexdigest()
        for image, label in zip(cases.images, cases.labels, strict=True)
    ]
    return replace(cases, patients=np.array(names, dtype=str))


def site_data(
    site: str,
    table: Table,
    splits: np.ndarray,
    rows: np.ndarray,
    *,
    notes: tuple[str, ...],
    decode: Callable[[Table, np.ndarray], Decoded] = decoded_in_memory,
) -> SiteData:
    """Return the data of a site that has some rows of a table; only their images are decoded.

    Parameters
    ----------
    splits : str (n,), "train", "val" or "test" for every row of the table
    rows : the site's
    notes : lines to begin with
    decode : decodes rows of the table

    Raises
    ------
    DataError
        An image can't be used, or no row is for training.
    """
    # Decoded together, so that one message counts all unusable images of the site.
    wanted = np.concatenate([rows[splits[rows] == split] for split in SPLITS])
    if not np.any(splits[wanted] == "train"):
        raise DataError(
            f"Site '{site}' has {number_of(len(rows), 'case')} but none for training; "
            + ("too few to be divided" if table.splits is None else "check its split column")
        )
    (cases, found), kept, left_out = decode(table, wanted)
    notes += found
    if left_out:
        notes += (f"{len(left_out)} of {len(wanted)} images left out: their files can't be used (unusable: leave-out)",)
    sizes = [np.count_nonzero(splits[kept] == split) for split in SPLITS]
    if not sizes[0]:
        raise DataError(f"Site '{site}' has no case for training once {len(left_out)} unusable files are left out")
    if table.scale.measured is not None:
        notes += (table.scale.measured.note,)
    ends = np.cumsum(sizes).tolist()
    data = {split: cases.take(slice(end - size, end)) for split, size, end in zip(SPLITS, sizes, ends, strict=True)}
    notes += _lost_regions(table, kept, cases)
    opened = SiteData(
        site,
        table.classes,
        data,
        task=table.description.task,
        privileged=privileged_setup(table.description),
        has_patient_ids=NO_PATIENTS not in table.notes,
        left_out=tuple(file.shown for file in left_out),
        scale=table.scale.measured,
        preparation=table.description.preparation,
    )
    return replace(opened, notes=notes + _findings(opened))


def privileged_setup(description: DataDescription) -> PrivilegedSetup:
    """Return how the privileged teachers of a site with this data file read its reports and table."""
    if not isinstance(description, ManifestDescription):
        return PrivilegedSetup()
    block = description.privileged
    columns = {name: column for name, column in description.columns.tabular.items() if name not in block.exclude}
    return PrivilegedSetup(columns, block.label_words, block.encoder)


def _lost_regions(table: Table, rows: np.ndarray, cases: Cases) -> tuple[str, ...]:
    """Return a note on masks and boxes that are given and mark no pixel of their image."""
    masks = cases.privileged.masks
    if masks is None:
        return ()
    empty = (masks == 0).flatten(1).all(dim=1).numpy()
    if table.masks is not None:
        lost = sum(table.masks[row] is not None for row in rows[empty])
        return (f"{number_of(lost, 'empty mask')}: left out of localisation scores",) if lost else ()
    given = 0 if table.boxes is None else int((~np.isnan(table.boxes[rows[empty]]).all(axis=1)).sum())
    what = "box" if given == 1 else "boxes"
    return (f"{given} {what} outside the cropped image: left out of localisation scores",) if given else ()


def _findings(site: SiteData) -> tuple[str, ...]:
    counts = dict(zip(site.classes, site.class_counts("train"), strict=True))
    what = "class" if site.task == "single" else "finding"
    notes = [f"{what} '{name}': {number_of(count, 'training case')}" for name, count in counts.items() if count < 2]
    if site.task == "multilabel":
        cases = len(site.splits["train"])
        notes += [f"finding '{name}': all training cases have it" for name, count in counts.items() if count == cases]
    notes += [f"the {split} split is empty" for split in SPLITS if len(site.splits[split]) == 0]
    if copies := site.copies():
        notes.append(copies_in_two_splits(copies))
    if len(site.splits["test"]) == 1:
        notes.append("1 test case: scores on it say little")
    return tuple(notes)


def number_of(count: int, what: str) -> str:
    """Return ``"1 case"`` or ``"2 cases"``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _stamp(path: Path) -> _Stamp:
    """Return what changes when the file does: size and time of modification; of a folder those of all folders in it."""
    try:
        if path.is_dir():
            below = [Path(folder).stat() for folder, _, _ in os.walk(path)]
            return len(below), max(status.st_mtime_ns for status in below)
        return stamp(path)
    except OSError:
        return 0, 0  # reading it says what is wrong


def read_table(path: Path) -> Table:
    """Read a data file and its manifest, once per process and version of the two."""
    path = path.absolute()
    description = _cached_description(path, _stamp(path))
    return _cached_table(path, _stamp(path), _stamp(description.table_file))


@lru_cache(maxsize=8)
def _cached_description(path: Path, _: _Stamp) -> DataDescription:
    return load_description(path)


@lru_cache(maxsize=4)
def _cached_table(path: Path, of_file: _Stamp, _: _Stamp) -> Table:
    description = _cached_description(path, of_file)
    return format_of(description).read(description)
