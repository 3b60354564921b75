"""A manifest whose images are DICOM files: which file a row means, whose it is, and its decoded cases.

PatientID groups cases where the manifest has no patient column. It is digested when it is read, and the groups are then
numbered in the order of the rows: the id itself is in no array, message, note or file. Messages name rows, not files:
exports often call a file by its SOPInstanceUID or by the patient.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from chainward_client.data.description import DicomBlock, DicomDescription
from chainward_client.data.dicom_file import is_dicom, parse, require_pydicom
from chainward_client.data.dicom_geometry import Geometry
from chainward_client.data.dicom_headers import Facts, digest, facts, notes, person_name, shared_persons
from chainward_client.data.dicom_picture import deep_values, mask_image, picture
from chainward_client.data.dicom_workers import close_decoders
from chainward_client.data.image_store import ImageStore, opened
from chainward_client.data.images import open_image
from chainward_client.data.manifest import Manifest, read_manifest
from chainward_client.data.placement import fit_image
from chainward_client.data.regions import box_masks, load_masks
from chainward_client.data.scale import Scale, measure
from chainward_client.data.site_data import Cases
from chainward_client.data.unusable import ImageProblem, attempt_all, counted
from chainward_shared.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

EXTENSIONS = (".dcm", ".dicom", ".dic", ".ima")
"""Endings of DICOM files that the manifest may leave out; many have none."""

_UID = re.compile(r"[0-9][0-9.]{0,63}")


@dataclass(frozen=True)
class DicomManifest(Manifest):
    """A checked manifest of DICOM files.

    Attributes
    ----------
    block : how the pictures come out of the files
    members : the path of each row's file inside the folder or zip, or why there is none
    """

    block: DicomBlock
    members: tuple[str | ImageProblem, ...]

    def cases(self, indices: np.ndarray) -> Cases:
        """Decode the rows at `indices`, in that order.

        Raises
        ------
        DataError
            If one of their images, masks or boxes can't be used.
        """
        return self.cases_with_notes(indices)[0]

    def cases_with_notes(self, indices: np.ndarray) -> tuple[Cases, tuple[str, ...]]:
        """Decode the rows at `indices`, and return also what a person should know about their files.

        The notes hold keywords and counts: no value of a header, no name of a file.

        Raises
        ------
        DataError
            As `cases`.
        """
        cases, found = self.cases_with_facts(indices)
        return cases, self.notes_on(found, cases.patients)

    def cases_with_facts(self, indices: np.ndarray) -> tuple[Cases, list[Facts]]:
        """Decode the rows at `indices`, and return also what is counted of each file.

        Raises
        ------
        DataError
            As `cases`.
        """
        require_pydicom()
        shape = self.description.image
        decoded = self._decoded(indices)
        images = np.empty((len(indices), shape.channels, shape.size, shape.size), dtype=np.uint8)
        for position, (array, _) in enumerate(decoded):
            images[position] = array
        found = [file for _, file in decoded]
        masks = self._masks(indices, [file.origin.geometry for file in found])
        return self.with_labels(indices, torch.from_numpy(images), masks), found

    def notes_on(self, found: Sequence[Facts], patients: np.ndarray) -> tuple[str, ...]:
        """Return what a person should know about files, one for each of `patients` (n,): keywords and counts."""
        lines = notes(found, view=self.block.view, own_window=self.block.window is not None)
        if self.description.columns.patient is not None:
            shared = shared_persons(found, patients.tolist())
            if shared:
                lines += (
                    f"{shared} patients of column '{self.description.columns.patient}' share their PatientID with another of "
                    "them: one person may be on both sides of a split",
                )
        return lines

    def _measured_scale(self) -> Scale:
        with opened(self.description.image_location, EXTENSIONS) as store:
            return measure(len(self), lambda index: self._measured_values(store, index))

    def _measured_values(self, store: ImageStore, index: int) -> np.ndarray | None:
        try:
            return deep_values(parse(_bytes(store, self.members[index])), self.block)
        except ImageProblem:  # decoding the image for training says so
            return None

    def _decoded(self, indices: np.ndarray) -> list[tuple[np.ndarray, Facts]]:
        shape, rows = self.description.image, self.rows[indices]
        with opened(self.description.image_location, EXTENSIONS) as store, _quiet():

            def attempt(position: int) -> tuple[np.ndarray, Facts]:
                dataset = parse(_bytes(store, self.members[indices[position]]))
                shown = picture(dataset, self.block, self.scale)
                image = shown.image.convert("L" if shape.channels == 1 else "RGB")
                array = np.asarray(fit_image(image, shape.size, shape.fit, resample=Image.Resampling.BICUBIC))
                return array if array.ndim == 2 else array.transpose(2, 0, 1), facts(dataset, shown.origin)

            return attempt_all(
                "image",
                self.description.image_location,
                rows.tolist(),
                attempt,
                lambda position, problem, _: f"row {rows[position]}: {problem}",
            )

    def _masks(self, indices: np.ndarray, geometries: Sequence[Geometry]) -> torch.Tensor | None:
        """Return the masks of the rows, or those of their boxes, turned as their images were; both are of stored pixels."""
        shape, rows = self.description.image, self.rows[indices].tolist()
        stored = [geometry.stored for geometry in geometries]
        if self.masks is not None:
            with _quiet():
                return load_masks(
                    self.description.mask_location,
                    [self.masks[index] for index in indices],
                    rows,
                    stored,
                    shape,
                    extensions=EXTENSIONS,
                    opened=_open_mask,
                    turned=lambda mask, position: geometries[position].apply(mask, Image.Resampling.NEAREST),
                    quoted=False,
                )
        if self.boxes is None:
            return None
        boxes = self.boxes[indices]
        try:
            box_masks(boxes, rows, stored, shape)  # so that a message shows the box as it is in the manifest
            turned = [geometry.box(box) for geometry, box in zip(geometries, boxes, strict=True)]
            return box_masks(np.array(turned), rows, [geometry.size for geometry in geometries], shape)
        except DataError as error:
            raise DataError(f"{self.description.manifest.name}: {error}") from None


def read_dicom(description: DicomDescription) -> DicomManifest:
    """Read and check the whole manifest; find its files, and where it has no patient column, whose they are.

    Raises
    ------
    DataError
        One line that counts every kind of problem found and names the first row of each, or says that pydicom is missing.
    """
    require_pydicom()
    manifest = read_manifest(description, quoted=False)
    with opened(description.image_location, EXTENSIONS) as store, _quiet():
        members = _located(store, manifest)
        patients = manifest.patients
        if description.columns.patient is None:
            patients, members = _patients(store, manifest, members)
            _check_splits(manifest, patients)
    found = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
    if description.columns.patient is None:
        found |= {"patients": patients, "notes": ("no patient column: PatientID says which files are of one patient",)}
    return DicomManifest(**found, block=description.block, members=tuple(members))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings to ourselves, because they quote values of headers; end the decoders' processes at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            close_decoders()


def _open_mask(data: bytes) -> Image.Image:
    return mask_image(data) if is_dicom(data) else open_image(data)


def _bytes(store: ImageStore, member: str | ImageProblem) -> bytes:
    if isinstance(member, ImageProblem):
        raise member
    try:
        return store.read(member)
    except Exception as error:  # a bad checksum, an encrypted member, no permission; the text may name the file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ImageProblem("unreadable {}", reason) from None


def _header(store: ImageStore, member: str, keyword: str) -> Dataset:
    """Return the one element of a file that is asked for, without its pixels."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    data = io.BytesIO(_bytes(store, member)) if store.location.is_file() else store.location / member
    try:
        return dcmread(data, stop_before_pixels=True, specific_tags=[keyword])
    except MemoryError:
        raise
    except InvalidDicomError:
        raise ImageProblem("unreadable {}", "not a DICOM file (no DICM at byte 128)") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"damaged ({type(error).__name__} while its elements were read)"
        raise ImageProblem("unreadable {}", reason) from None


def _located(store: ImageStore, manifest: Manifest) -> list[str | ImageProblem]:
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


def _patients(
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


def _check_splits(manifest: Manifest, patients: np.ndarray) -> None:
    """A patient in train and in test makes the test worthless."""
    if manifest.splits is None:
        return
    first_row: dict[str, dict[str, int]] = {}
    for patient, split, row in zip(patients.tolist(), manifest.splits.tolist(), manifest.rows.tolist(), strict=True):
        first_row.setdefault(patient, {}).setdefault(split, row)
    torn = [
        f"{' and '.join(f'{split} (row {row})' for split, row in rows.items())}; put all rows of a patient into one split"
        for rows in first_row.values()
        if len(rows) > 1
    ]
    if torn:
        problem = counted("patient in more than one split", "patients in more than one split", torn)
        raise DataError(f"{manifest.description.manifest.name}: PatientID of the files: {problem}")
