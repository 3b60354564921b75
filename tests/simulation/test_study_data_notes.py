"""A study says what makes its scores too good: copies of a picture in two splits, and data without patients."""

from __future__ import annotations

import numpy as np
import torch

from chainward_client.data.site_data import Cases, SiteData, SplitName
from chainward_simulations.study.results import StudyResult
from chainward_simulations.study.table import notes
from chainward_simulations.study.training import data_notes


def site(name: str, values: dict[SplitName, list[int]], *, patients: bool = True) -> SiteData:
    def cases(split: SplitName) -> Cases:
        images = torch.tensor(values[split], dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return Cases(
            images, torch.zeros(len(images), dtype=torch.int64), np.array([f"{split}-{v}" for v in values[split]])
        )

    return SiteData(name, ("a", "b"), {split: cases(split) for split in values}, has_patient_ids=patients)


def test_a_picture_at_one_hospital_for_training_and_at_another_for_testing_is_counted() -> None:
    north = site("north", {"train": [1, 2, 3], "val": [4], "test": [5]})
    south = site("south", {"train": [6, 7], "val": [8], "test": [3, 1]})
    (note,) = data_notes({"north": north, "south": south})
    assert note.startswith("2 pictures are in two splits, pixel for pixel, of one hospital or of two")
    assert data_notes({"north": north}) == ()


def test_hospitals_without_patients_are_named() -> None:
    sites = {
        name: site(name, {"train": [i], "val": [i + 10], "test": [i + 20]}, patients=i > 1)
        for i, name in enumerate("abc")
    }
    assert data_notes(sites) == ("no patients at a and b: images of one patient may be on both sides of a split",)


def test_the_table_of_a_study_repeats_what_its_arms_noted() -> None:
    from types import SimpleNamespace

    arm = SimpleNamespace(localisation=None)
    result = StudyResult((arm,), None, (), ("2 pictures are in two splits",))  # type: ignore[arg-type]
    assert "the data: 2 pictures are in two splits" in notes(result)
