"""Which DICOM file a row of a manifest means, and whose it is."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from chainward_client.data.dicom_headers import digest, person_name
from chainward_client.data.image_store import ImageStore
from chainward_client.data.manifest import Manifest
from chainward_client.data.unusable import ImageProblem, attempt_all, counted, unreadable
from chainward_shared.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

_UID = re.compile(r"[0-9][0-9.]{0,63}")


def file_bytes(store: ImageStore, member: str | ImageProblem) -> bytes:
    """Return the content of a file.

    Raises
    ------
    ImageProblem
        There is none, or it can't be read; the file is not named.
    """
    if isinstance(member, ImageProblem):
        raise member
    try:
        return store.read(member)
    except Exception as error:  # a bad checksum, an encrypted member, no permission; the text may name the file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise unreadable(reason) from None


def _header(store: ImageStore, member: str, keyword: str) -> Dataset:
    """Return the one element of a file that is asked for, without its pixels."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    data = io.BytesIO(file_bytes(store, member)) if store.location.is_file() else store.location / member
    try:
        return dcmread(data, stop_before_pixels=True, specific_tags=[keyword])
    except MemoryError:
        raise
    except InvalidDicomError:
        raise unreadable("not a DICOM file (no DICM at byte 128)") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"damaged ({type(error).__name__} while its elements were read)"
        raise unreadable(reason) from None


def located(store: ImageStore, manifest: Manifest) -> list[str | ImageProblem]:
    """Return the file of every row: by its name, else by its SOPInstanceUID.

    Raises
    ------
    DataError
        If two rows mean one file.
    """
    names = manifest.images.tolist()
    members: list[str | ImageProblem] = []
    for name in names:
        try:
            members.append(store.find(name))
        except ImageProblem as problem:
            ambiguous = "several files have this name; name it with its folder"
            by_uid = _UID.fullmatch(name) is not None
            missing = f"no file has this name{' or SOPInstanceUID' if by_uid else ''}"
            members.append(ImageProblem(problem.kind, missing if problem.kind == "{} not found" else ambiguous))
    lost = [
        position
        for position, (name, member) in enumerate(zip(names, members, strict=True))
        if isinstance(member, ImageProblem) and member.kind == "{} not found" and _UID.fullmatch(name)
    ]
    if lost:
        files_of = _by_instance(store)
        for position in lost:
            files = files_of.get(digest(names[position]), [])
            if len(files) > 1:
                reason = f"{len(files)} files have this SOPInstanceUID; name the file"
                members[position] = ImageProblem("{} with an ambiguous name", reason)
            elif files:
                members[position] = files[0]
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


def _by_instance(store: ImageStore) -> dict[bytes | None, list[str]]:
    """Return the files of every SOPInstanceUID by its digest; files that are no DICOM are passed over."""

    def attempt(position: int) -> bytes | None:
        try:
            value = _header(store, members[position], "SOPInstanceUID").get("SOPInstanceUID")
            return digest("" if value is None else str(value).strip(" \0"))
        except MemoryError:
            raise
        except Exception:
            return None

    members = store.members
    found: dict[bytes | None, list[str]] = {}
    instances = attempt_all("image", store.location, range(len(members)), attempt, lambda *_: "")
    for member, instance in zip(members, instances, strict=True):
        if instance is not None:
            found.setdefault(instance, []).append(member)
    return found


def patients_of(
    store: ImageStore, manifest: Manifest, members: list[str | ImageProblem]
) -> tuple[np.ndarray, list[str | ImageProblem]]:
    """Return the patients of all rows, each named by a digest of its PatientID alone, and the files.

    The name does not depend on other patients, their number or order, so that splits by a hospital's secret don't either.

    Where the data file leaves out what can't be used, a file without a patient is one of those, and a patient of its own.

    Raises
    ------
    DataError
        If a file can't be read or has no PatientID, or all have the same.
    """
    rows = manifest.rows.tolist()

    def tried(position: int) -> tuple[str | ImageProblem]:
        try:
            return (attempt(position),)
        except ImageProblem as problem:
            if manifest.description.unusable == "leave-out":
                return (problem,)
            raise

    def attempt(position: int) -> str:
        member = members[position]
        if isinstance(member, ImageProblem):
            raise member
        found = person_name(_header(store, member, "PatientID"))
        if found is None:
            raise ImageProblem(
                "{} without PatientID",
                "name a patient column in columns.patient: without, one patient may be on both sides of a split",
            )
        return found

    persons = [
        found
        for (found,) in attempt_all(
            "image", store.location, rows, tried, lambda position, problem, _: f"row {rows[position]}: {problem}"
        )
    ]
    known = [found for found in persons if not isinstance(found, ImageProblem)]
    if len(set(known)) == 1 and len(known) > 1:
        raise DataError(
            f"{store.location.name}: all {len(known)} files have the same PatientID, so they can't be split by patient; name a "
            "patient column in columns.patient"
        )
    patients = [
        f"unusable-{position}" if isinstance(found, ImageProblem) else found for position, found in enumerate(persons)
    ]
    files = [
        found if isinstance(found, ImageProblem) else member for found, member in zip(persons, members, strict=True)
    ]
    return np.array(patients), files
