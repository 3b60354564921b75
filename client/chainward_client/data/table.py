"""The checked rows of a data file, whatever its format; images are decoded only for the rows asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from chainward_client.data.scale import Scale, ScaleOfSet
from chainward_client.data.site_data import Cases, PrivilegedCases

if TYPE_CHECKING:
    from chainward_client.data.description import DataDescription
    from chainward_client.data.dicom_headers import Facts

Pictures = tuple[torch.Tensor, torch.Tensor | None, "list[Facts]"]
"""Images, uint8 (n, channels, size, size), masks, uint8 (n, size, size) or None, and what is counted of DICOM files."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A checked table; entry i of every field belongs to its i-th row. A format adds where the images of a row are.

    Attributes
    ----------
    description : where the images are and what they are brought to
    classes : class names, in the order of the label indices
    labels : int64 (n,); multi-label: float32 (n, classes), 1 for each finding, else 0
    patients : str (n,)
    splits : str (n,), or None: to be divided by patient
    sites : str (n,), or None without a site column
    texts, table : as in `PrivilegedCases`
    masks : file names of the masks, None where missing; or None
    boxes : float (n, 4), NaN where missing; or None
    notes : things a person should know; without ids of patients, because notes may leave the site
    """

    description: DataDescription
    classes: tuple[str, ...]
    labels: np.ndarray
    patients: np.ndarray
    splits: np.ndarray | None = None
    sites: np.ndarray | None = None
    texts: tuple[str | None, ...] | None = None
    table: Mapping[str, tuple[float | str | None, ...]] | None = None
    masks: tuple[str | None, ...] | None = None
    boxes: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def scale(self) -> ScaleOfSet:
        """Return the scale of the images of more than 8 bits: of all rows, whichever of them are asked for."""
        return ScaleOfSet(self.description.image.scale, self._measured_scale)

    def _measured_scale(self) -> Scale:
        raise NotImplementedError

    def _decoded(self, indices: np.ndarray) -> Pictures:
        raise NotImplementedError

    def cases(self, indices: np.ndarray) -> Cases:
        """Decode the rows at `indices`, in that order.

        Raises
        ------
        DataError
            If one of their images, masks or boxes can't be used.
        """
        return self.cases_with_facts(indices)[0]

    def cases_with_facts(self, indices: np.ndarray) -> tuple[Cases, list[Facts]]:
        """As `cases`; return also what is counted of each DICOM file."""
        images, masks, facts = self._decoded(indices)
        return self.with_labels(indices, images, masks), facts

    def with_labels(self, indices: np.ndarray, images: torch.Tensor, masks: torch.Tensor | None) -> Cases:
        """Return the cases of decoded images and masks."""
        privileged = replace(PrivilegedCases(self.texts, self.table).take(indices.tolist()), masks=masks)
        return Cases(images, torch.from_numpy(self.labels[indices]), self.patients[indices], privileged)

    def notes_on(self, facts: Sequence[Facts], patients: np.ndarray) -> tuple[str, ...]:
        """Return what a person should know of DICOM files, one for each of `patients` (n,): keywords and counts."""
        return ()
