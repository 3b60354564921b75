"""Which DICOM file a row of a manifest means, and whose it is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from chainward_client.data.dicom_file import one_element
from chainward_client.data.dicom_headers import digest, person_name
from chainward_client.data.image_store import ImageStore
from chainward_client.data.manifest import Manifest
from chainward_client.data.unusable import NOT_FOUND, ImageProblem, attempt_all, counted
from chainward_shared.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

_UID = re.compile(r"[0-9][0-9.]{0,63}")


def _header(store: ImageStore, member: str, keyword: str) -> Dataset:
    in_zip = store.location.is_file()
    return one_element(io.BytesIO(store.read(member, quoted=False)) if in_zip else store.location / member, keyword)


def located(store: ImageStore, manifest: Manifest) -> list[str | ImageProblem]:
    """Return the file of every row: by its name, else by its SOPInstanceUID.

    Raises
    ------
    DataError
        If two rows mean one file.
    """
    by_instance = cache(partial(_by_instance, store))
    members = [_located(store, name, by_instance) for name in manifest.images.tolist()]
    rows_of: dict[str, list[int]] = {}
    for row, member in zip(manifest.rows.tolist(), members, strict=True):
        if isinstance(member, str):
            rows_of.setdefault(member, []).append(row)
    repeated = [f"rows {', '.join(map(str, rows))}" for rows in rows_of.values() if len(rows) > 1]
    if repeated:
        column = manifest.description.columns.image
        found = counted("image in more than one row", "images in more than one row", repeated)
        raise DataError(f"{manifest.description.manifest.name}: column '{column}': {found}")
    return members


def _located(
    store: ImageStore, name: str, by_instance: Callable[[], Mapping[str | None, list[str]]]
) -> str | ImageProblem:
    try:
        return store.find(name)
    except ImageProblem as problem:
        if problem.kind != NOT_FOUND:
            return ImageProblem(problem.kind, "several files have this name; name it with its folder")
    if not _UID.fullmatch(name):
        return ImageProblem(NOT_FOUND, "no file has this name")
    files = by_instance().get(digest(name), [])
    if not files:
        return ImageProblem(NOT_FOUND, "no file has this name or SOPInstanceUID")
    if len(files) > 1:
        reason = f"{len(files)} files have this SOPInstanceUID; name the file"
        return ImageProblem("{} with an ambiguous name", reason)
    return files[0]


def _by_instance(store: ImageStore) -> dict[str | None, list[str]]:
    """Return the files of every SOPInstanceUID by its digest; files that are no DICOM are passed over."""

    def attempt(position: int) -> str | None:
        try:
            value = _header(store, members[position], "SOPInstanceUID").get("SOPInstanceUID")
            return digest("" if value is None else str(value).strip(" \0"))
        except MemoryError:
            raise
        except Exception:
            return None

    members = store.members
    found: dict[str | None, list[str]] = {}
    instances = attempt_all("image", store.location, range(len(members)), attempt)
    for member, instance in zip(members, instances, strict=True):
        if instance is not None:
            found.setdefault(instance, []).append(member)
    return found


def patients_of(store: ImageStore, manifest: Manifest, members: list[str | ImageProblem]) -> np.ndarray:
    """Return the patients of all rows, each named by a digest of its PatientID alone.

    The name does not depend on other patients, their number or order, so that splits by a hospital's secret don't either.

    Where the data file leaves out what can't be used, a file without a patient is one of those (its problem takes its place in
    `members`), and a patient of its own.

    Raises
    ------
    DataError
        If a file can't be read or has no PatientID, or all have the same.
    """

    def person(member: str | ImageProblem) -> str:
        if isinstance(member, ImageProblem):
            raise member
        found = person_name(_header(store, member, "PatientID"))
        if found is None:
            raise ImageProblem(
                "{} without PatientID",
                "name a patient column in columns.patient: without, one patient may be on both sides of a split",
            )
        return found

    def attempt(position: int) -> str:
        try:
            return person(members[position])
        except ImageProblem as problem:
            if manifest.description.unusable != "leave-out":
                raise
            members[position] = problem
            return f"unusable-{position}"

    persons = attempt_all("image", store.location, manifest.rows.tolist(), attempt)
    known = [found for found, member in zip(persons, members, strict=True) if isinstance(member, str)]
    if len(set(known)) == 1 and len(known) > 1:
        raise DataError(
            f"{store.location.name}: all {len(known)} files have the same PatientID, so they can't be split by patient; name a "
            "patient column in columns.patient"
        )
    return np.array(persons)
