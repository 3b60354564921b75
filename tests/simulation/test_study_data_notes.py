"""Studies and runs say what makes their scores too good: copies of a picture in two splits, and data without patients."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from chainward_client.data.site_data import Cases, SiteData, SplitName
from chainward_server.app import coordinate
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.data_notes import COPIES, NO_PATIENTS, copies_in_two_splits, notes_on_all
from chainward_simulations.data_notes import PICTURES, data_notes, keep_pictures, notes_of_simulation
from chainward_simulations.study.results import StudyResult
from chainward_simulations.study.table import notes


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
    assert note.startswith("2 pictures are in two splits, pixel for pixel (0 within one hospital, 2 at two hospitals)")
    assert data_notes({"north": north}) == []


def test_a_picture_in_two_splits_of_one_hospital_counts_there_wherever_else_it_is() -> None:
    north = site("north", {"train": [1, 2], "val": [4], "test": [1]})
    south = site("south", {"train": [6, 7], "val": [8], "test": [2, 1]})
    (note,) = data_notes({"north": north, "south": south})
    assert note.startswith("2 pictures are in two splits, pixel for pixel (1 within one hospital, 1 at two hospitals)")


def test_a_picture_at_two_hospitals_in_the_same_split_does_no_harm_to_scores() -> None:
    north = site("north", {"train": [1, 2], "val": [4], "test": [5]})
    assert data_notes({"north": north, "south": site("south", {"train": [1], "val": [8], "test": [5]})}) == []


def test_a_simulation_says_the_same_of_digests_that_its_sites_wrote(tmp_path) -> None:
    sites = {
        "north": site("north", {"train": [1, 2, 3], "val": [4], "test": [5]}, patients=False),
        "south": site("south", {"train": [6, 7], "val": [8], "test": [3, 1]}),
    }
    for name, data in sites.items():
        keep_pictures(data, tmp_path / name)
    assert notes_of_simulation(tmp_path, sites) == data_notes(sites)
    assert len(data_notes(sites)) == 2
    assert not any(str(picture) in (tmp_path / "north" / PICTURES).read_text() for picture in ("train-1", "test-3"))


def test_hospitals_without_patients_are_named() -> None:
    sites = {
        name: site(name, {"train": [i], "val": [i + 10], "test": [i + 20]}, patients=i > 1)
        for i, name in enumerate("abc")
    }
    assert data_notes(sites) == ["no patients at a and b: images of one patient may be on both sides of a split"]


def test_the_table_of_a_study_repeats_what_its_arms_noted() -> None:
    from types import SimpleNamespace

    arm = SimpleNamespace(localisation=None)
    result = StudyResult((arm,), None, (), ("2 pictures are in two splits",))  # type: ignore[arg-type]
    assert "the data: 2 pictures are in two splits" in notes(result)


@pytest.mark.slow
def test_a_simulated_run_says_it_in_its_log_its_figures_and_its_report(
    settings, loopback, small_consortium, caplog, tmp_path
):
    folder = tmp_path / "copied"
    shutil.copytree(small_consortium.parent, folder)
    shutil.copy(folder / "images" / "ash-train-0-0.png", folder / "images" / "birch-test-1-0.png")
    shutil.copy(folder / "images" / "cedar-train-0-0.png", folder / "images" / "cedar-test-1-0.png")
    chain = {
        "data.source": str(folder / "data.yaml"),
        "student.rounds": 0,
        "chain.compare-alone": False,
        "chain.epochs": 1,
    }
    run = RunFolder.create(RunConfig.from_flat(settings | chain))
    results = coordinate(loopback(2), run, notes_of_simulation)
    (note,) = results.data.notes
    assert note.startswith("2 pictures are in two splits, pixel for pixel (1 within one hospital, 1 at two hospitals)")
    assert f"the data: {note}" in caplog.messages
    assert f"The data: {note}." in (run.path / "report.html").read_text(encoding="utf-8")
    assert any(line.startswith("cedar: 1 picture in two splits") for line in caplog.messages)


def test_the_coordinator_of_hospitals_repeats_what_they_say_of_their_own_data():
    said = {
        "oak": [NO_PATIENTS, copies_in_two_splits(3)],
        "elm": [copies_in_two_splits(1), "the val split is empty"],
        "ash": [],
    }
    assert notes_on_all(said) == [
        f"4 pictures{COPIES}: oak (3) and elm (1)",
        "no patients at oak: images of one patient may be on both sides of a split",
    ]
    assert notes_on_all({"ash": []}) == []
