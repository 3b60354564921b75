"""A manifest whose images are DICOM files: which file a row means, whose it is, and its decoded cases.

PatientID groups cases where the manifest has no patient column. It is digested when it is read, and the groups are then
numbered in the order of the rows: the id itself is in no array, message, note or file. Messages name rows, not files:
exports often call a file by its SOPInstanceUID or by the patient.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator

from chainward_client.data.columns import NOTHING_MEANS_DEFAULTS
from chainward_client.data.description import ManifestDescription
from chainward_client.data.dicom_file import is_dicom, no_values_told, parse, require_pydicom
from chainward_client.data.dicom_geometry import Geometry
from chainward_client.data.dicom_headers import Facts, digest, facts, notes, person_name, shared_persons, text_of
from chainward_client.data.dicom_picture import deep_values, mask_image, picture
from chainward_client.data.dicom_settings import DicomBlock, OwnWindow
from chainward_client.data.dicom_workers import close_decoders
from chainward_client.data.formats import data_format
from chainward_client.data.image_store import ImageStore, opened
from chainward_client.data.images import fitted, open_image, stacked
from chainward_client.data.manifest import Manifest, read_manifest
from chainward_client.data.manifest_columns import torn_patients
from chainward_client.data.table import Pictures
from chainward_client.data.unusable import NOT_FOUND, ImageProblem, attempt_all, counted
from chainward_shared.errors import DataError
from chainward_shared.preparation import Preparation

if TYPE_CHECKING:
    from pydicom import Dataset

_UID = re.compile(r"[0-9][0-9.]{0,63}")

EXTENSIONS = (".dcm", ".dicom", ".dic", ".ima")
"""Endings of DICOM files that the manifest may leave out; many have none."""


class DicomDescription(ManifestDescription):
    """DICOM files in a folder or zip, and a CSV manifest with one row per image.

    As `ManifestDescription`, with these differences.

    Attributes
    ----------
    columns : `image` holds file names or SOPInstanceUIDs; without `patient`, the files' PatientID says whose they are
    dicom : how the pictures come out of the files
    """

    format: Literal["dicom"]
    dicom: Annotated[DicomBlock, NOTHING_MEANS_DEFAULTS] = DicomBlock()

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.image.scale is not None and (self.dicom.window is not None or self.dicom.view != 1):
            given = "dicom.window" if self.dicom.window is not None else "dicom.view"
            raise ValueError(f"both 'image.scale' and '{given}' say which values are black and white; keep one of them")
        return self

    @property
    def preparation(self) -> Preparation:
        """Return how its images become what a model sees, as the site's card says it."""
        window = self.block.window
        return Preparation(
            fit=self.image.fit,
            scale=None if window is None else (window.center - window.width / 2, window.center + window.width / 2),
            **self.block.model_dump(exclude={"window"}),
        )

    @property
    def block(self) -> DicomBlock:
        """Return how pictures come out of the files; `image.scale` is one window for all, like `dicom.window`."""
        if self.image.scale is None:
            return self.dicom
        low, high = self.image.scale
        return self.dicom.model_copy(update={"window": OwnWindow(center=(low + high) / 2, width=high - low)})

    @property
    def pixel_settings(self) -> Any:
        """Return `block`."""
        return self.block.model_dump(mode="json")


@dataclass(frozen=True, kw_only=True)
class DicomManifest(Manifest):
    """A checked manifest of DICOM files.

    Attributes
    ----------
    members : the path of each row's file inside the folder or zip, or why there is none
    """

    extensions = EXTENSIONS

    description: DicomDescription
    members: tuple[str | ImageProblem, ...]

    def member(self, store: ImageStore, index: int) -> str:
        """As `Manifest.member`."""
        member = self.members[index]
        if isinstance(member, ImageProblem):
            raise member
        return member

    def _deep_values(self, store: ImageStore, index: int) -> np.ndarray | None:
        try:
            return deep_values(parse(store.read(self.member(store, index), quoted=False)), self.description.block)
        except ImageProblem:  # decoding the image for training says so
            return None

    def _decoded(self, indices: np.ndarray) -> Pictures:
        require_pydicom()
        location, shape, block = self.description.image_location, self.description.image, self.description.block
        with opened(location, EXTENSIONS) as store, _quiet():

            def attempt(position: int) -> tuple[np.ndarray, Facts]:
                dataset = parse(store.read(self.member(store, indices[position]), quoted=False))
                shown = picture(dataset, block, self.scale)
                return fitted(shown.image, shape), facts(dataset, shown.origin)

            decoded = attempt_all("image", location, self.rows[indices].tolist(), attempt)
            found = [file for _, file in decoded]
            masks = self._turned_masks(indices, [file.origin.geometry for file in found])
        return stacked([array for array, _ in decoded], shape), masks, found

    def _turned_masks(self, indices: np.ndarray, geometries: Sequence[Geometry]) -> torch.Tensor | None:
        """Return the masks of the rows, or those of their boxes, turned as their images were; both are of stored pixels."""
        masks = self._masks(
            indices,
            [geometry.stored for geometry in geometries],
            extensions=EXTENSIONS,
            opened=_open_mask,
            turned=lambda mask, position: geometries[position].apply(mask, Image.Resampling.NEAREST),
            quoted=False,
        )
        if self.masks is not None or self.boxes is None:
            return masks
        # A box that is wrong has been refused as it is in the manifest.
        turned = [geometry.box(box) for geometry, box in zip(geometries, self.boxes[indices], strict=True)]
        return self._box_masks(np.array(turned), indices, [geometry.size for geometry in geometries])

    def notes_on(self, facts: Sequence[Facts], patients: np.ndarray) -> tuple[str, ...]:
        """As `Table.notes_on`."""
        block = self.description.block
        lines = notes(facts, view=block.view, own_window=block.window is not None)
        column = self.description.columns.patient
        if column is not None and (shared := shared_persons(facts, patients.tolist())):
            lines += (
                f"{shared} patients of column '{column}' share their PatientID with another of them: one person may be on both "
                "sides of a split",
            )
        return lines


@data_format("dicom", DicomDescription, keeps_decoded=True)
def read_dicom(description: DicomDescription) -> DicomManifest:
    """Read and check the whole manifest; find its files, and where it has no patient column, whose they are.

    Raises
    ------
    DataError
        One line that counts every kind of problem found and names the first row of each, or says that pydicom is missing.
    """
    require_pydicom()
    manifest = read_manifest(description, quoted=False)
    found = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
    with opened(description.image_location, EXTENSIONS) as store, _quiet():
        members = _located(store, manifest)
        if description.columns.patient is None:
            patients = _patients(store, manifest, members)
            found |= {
                "patients": patients,
                "notes": ("no patient column: PatientID says which files are of one patient",),
            }
            if torn := torn_patients(patients, manifest.splits, manifest.rows, quoted=False):
                raise DataError(f"{manifest.description.manifest.name}: PatientID of the files: {torn}")
    return DicomManifest(**found, members=tuple(members))


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


# which file a row means, and whose it is


def _header(store: ImageStore, member: str, keyword: str) -> Dataset:
    """Return the one element of a file that is asked for; its pixels are not read."""
    from pydicom import dcmread

    file = io.BytesIO(store.read(member, quoted=False)) if store.location.is_file() else store.location / member
    with no_values_told():
        return dcmread(file, stop_before_pixels=True, specific_tags=[keyword])


def _located(store: ImageStore, manifest: Manifest) -> list[str | ImageProblem]:
    """Return the file of every row: by its name, else by its SOPInstanceUID.

    Raises
    ------
    DataError
        If two rows mean one file.
    """
    by_instance = cache(partial(_by_instance, store))
    members = [_found(store, name, by_instance) for name in manifest.images.tolist()]
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


def _found(
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
            return digest(text_of(_header(store, members[position], "SOPInstanceUID"), "SOPInstanceUID"))
        except ImageProblem:
            return None

    members = store.members
    found: dict[str | None, list[str]] = {}
    instances = attempt_all("image", store.location, range(len(members)), attempt)
    for member, instance in zip(members, instances, strict=True):
        if instance is not None:
            found.setdefault(instance, []).append(member)
    return found


def _patients(store: ImageStore, manifest: Manifest, members: list[str | ImageProblem]) -> np.ndarray:
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
