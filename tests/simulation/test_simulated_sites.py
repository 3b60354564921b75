"""The data of simulated sites: phantoms, or their share of a data file."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_tables import all_pixels, make, two_sites

from chainward_client.data import images, manifest
from chainward_client.data.formats import csv as csv_format
from chainward_client.data.site_data import SPLITS
from chainward_client.data.sources import local_site
from chainward_shared.errors import DataError
from chainward_simulations.simulated_sites import SHOWN_TESTS, simulated_site, simulated_site_ids

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "docs" / "examples"
MEASURING_DATA = REPOSITORY.parent / "shared" / "data"
HAM10000 = MEASURING_DATA / "ham10000"
PNEUMONIA = MEASURING_DATA / "pneumoniamnist" / "pneumoniamnist_rebuilt.npz"
needs_ham10000 = pytest.mark.skipif(
    not HAM10000.is_dir(),
    reason=f"needs the HAM10000 images in {HAM10000}, which are not part of the project",
)
needs_pneumonia = pytest.mark.skipif(
    not PNEUMONIA.is_file(), reason=f"needs PneumoniaMNIST at {PNEUMONIA}, which is not part of the project"
)


def refusal(source: str, *, num_sites: int = 0, label_skew: float = 0.0, index: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        simulated_site(source, index, num_sites=num_sites, label_skew=label_skew, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# phantoms


def test_phantoms_are_six_sites_unless_another_number_is_given() -> None:
    assert len(simulated_site_ids("phantom", num_sites=0, label_skew=0)) == 6
    assert len(simulated_site_ids("phantom", num_sites=3, label_skew=0)) == 3
    with pytest.raises(DataError, match=r"federation\.num-sites"):
        simulated_site_ids("phantom", num_sites=1000, label_skew=0)


@pytest.mark.slow
def test_a_phantom_site_is_synthetic_and_carries_its_id() -> None:
    site = simulated_site("phantom", 1, num_sites=2, label_skew=0, seed=0)
    assert site.synthetic
    assert site.site == simulated_site_ids("phantom", num_sites=2, label_skew=0)[1]


# natural sites


@pytest.mark.slow
def test_a_site_opened_for_its_tests_alone_has_the_first_of_them_and_makes_no_other_phantoms() -> None:
    whole = simulated_site("phantom", 1, num_sites=2, label_skew=0, seed=3).splits["test"].take(range(SHOWN_TESTS))
    site = simulated_site("phantom", 1, num_sites=2, label_skew=0, seed=3, tests_only=True)
    tests = site.splits["test"]
    assert torch.equal(tests.images, whole.images)
    assert torch.equal(tests.labels, whole.labels)
    assert tests.privileged.table == whole.privileged.table
    assert [len(site.splits[split]) for split in ("train", "val")] == [0, 0]


def test_natural_sites_are_those_of_the_column_with_their_own_rows(tmp_path: Path) -> None:
    source = two_sites(tmp_path)
    assert simulated_site_ids(source, num_sites=0, label_skew=0) == ("north", "south")
    assert simulated_site_ids(source, num_sites=2, label_skew=0) == ("north", "south")
    north, south = (simulated_site(source, index, num_sites=0, label_skew=0, seed=0) for index in (0, 1))
    assert (north.site, south.site) == ("north", "south")
    assert all_pixels(south) == {0, 2, 4, 6, 8, 10}
    assert all_pixels(north) == {12, 14, 16, 18, 20, 22}
    assert [len(north.splits[split]) for split in SPLITS] == [4, 1, 1]
    assert north.splits["val"].images[0, 0, 0, 0] == 20
    assert north.splits["val"].patients.tolist() == ["p10"]
    assert not north.synthetic


def test_only_the_asked_sites_images_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_image = Mock(wraps=images.open_image)
    monkeypatch.setattr(images, "open_image", open_image)
    simulated_site(two_sites(tmp_path), 0, num_sites=0, label_skew=0, seed=0)
    assert open_image.call_count == 6


def test_all_unusable_images_of_a_site_are_counted_over_its_splits(tmp_path: Path) -> None:
    source = two_sites(tmp_path)
    for name in ("i0.png", "i4.png", "i5.png"):
        (tmp_path / name).write_bytes(b"")
    assert "3 unreadable images; first: row 2, 'i0'" in refusal(source, index=1)
    simulated_site(source, 0, num_sites=0, label_skew=0, seed=0)  # the other site is not concerned


def test_a_number_of_sites_that_the_column_does_not_have_is_refused(tmp_path: Path) -> None:
    message = refusal(two_sites(tmp_path), num_sites=3)
    assert "federation.num-sites: found 3, but the site column of data.yaml names 2 (north and south)" in message


def test_no_site_column_and_no_label_skew_is_refused_with_advice(tmp_path: Path) -> None:
    assert "data.label-skew=0.5 federation.num-sites=6" in refusal(two_sites(tmp_path, site=None))


def test_a_site_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "There is no site 2: this simulation has 2 sites, 0 to 1" in refusal(two_sites(tmp_path), index=2)


def test_a_relative_source_is_refused() -> None:
    assert "expected phantom or the absolute path" in refusal("data.yaml")


def test_a_patient_of_two_sites_is_a_note_that_names_nobody(tmp_path: Path) -> None:
    rows = ["ill,secret,train,a", "ill,q,train,a", "ill,secret,train,b", "healthy,r,train,b", "ill,s,test,c"]
    source = make(tmp_path, [*rows, "ill,t,train,c"])
    notes = [simulated_site(source, index, num_sites=0, label_skew=0, seed=0).notes for index in range(3)]
    for note in (notes[0], notes[1]):
        assert "1 patient of this site also at another site" in note
    assert not any("another site" in note for note in notes[2])
    assert "secret" not in str(notes)


def test_a_patient_in_two_splits_is_an_error_even_across_sites(tmp_path: Path) -> None:
    source = make(tmp_path, ["ill,p,train,a", "ill,p,test,b", "healthy,q,train,b"])
    assert "1 patient in more than one split; first: 'p' in train (row 2) and test (row 3)" in refusal(source)


# splits that the file does not give


def many(folder: Path, **columns: str | None) -> str:
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},,{('a', 'b', 'c')[n * n % 3]}" for n in range(60)]
    return make(folder, rows, **columns)


def test_without_a_split_column_every_natural_site_gets_all_three(tmp_path: Path) -> None:
    source = many(tmp_path, split=None)
    for index in range(len(simulated_site_ids(source, num_sites=0, label_skew=0))):
        site = simulated_site(source, index, num_sites=0, label_skew=0, seed=0)
        assert all(len(site.splits[split]) > 0 for split in SPLITS)


def test_a_patient_of_two_sites_stays_on_one_side_of_a_seeded_split(tmp_path: Path) -> None:
    rows = [f"{('healthy', 'ill')[n % 2]},p{n // 4 * 2 + n % 2},,{'ab'[n // 2 % 2]}" for n in range(80)]
    source = make(tmp_path, rows, split=None)
    sites = [simulated_site(source, index, num_sites=0, label_skew=0, seed=0) for index in (0, 1)]
    for split in SPLITS:
        here, there = (set(site.splits[split].patients) for site in sites)
        assert here == there


# label skew


def test_label_skew_spreads_all_cases_over_numbered_sites(tmp_path: Path) -> None:
    source = make(tmp_path, [f"{('healthy', 'ill')[n % 2]},p{n},train,x" for n in range(100)])
    assert simulated_site_ids(source, num_sites=0, label_skew=0.5) == tuple(f"site-{n}" for n in range(1, 7))
    assert simulated_site_ids(source, num_sites=3, label_skew=2.0) == ("site-1", "site-2", "site-3")
    sites = [simulated_site(source, index, num_sites=3, label_skew=2.0, seed=0) for index in range(3)]
    assert sorted(value for site in sites for value in all_pixels(site)) == [2 * n for n in range(100)]
    again = simulated_site(source, 1, num_sites=3, label_skew=2.0, seed=0)
    assert torch.equal(again.splits["train"].images, sites[1].splits["train"].images)


def test_a_site_without_training_cases_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path, ["ill,p,train,a", "ill,q,test,b", "ill,r,test,b"])
    assert "Site 'b' has 2 cases but none for training" in refusal(source, index=1)


# caching


def test_a_manifest_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_manifest = Mock(wraps=manifest.read_manifest)
    monkeypatch.setattr(csv_format, "read_manifest", read_manifest)
    source = two_sites(tmp_path)
    for index in (0, 1, 0):
        simulated_site(source, index, num_sites=0, label_skew=0, seed=index)
    assert read_manifest.call_count == 1
    cases = tmp_path / "cases.csv"
    cases.write_text(cases.read_text().replace("south", "souse"))  # of the same size
    os.utime(cases, ns=(1, 1))
    assert simulated_site_ids(source, num_sites=0, label_skew=0) == ("north", "souse")
    assert read_manifest.call_count == 2


# real data


@pytest.mark.slow
@needs_ham10000
def test_the_four_centres_of_ham10000_are_four_sites(tmp_path: Path) -> None:
    text = (EXAMPLES / "ham10000.yaml").read_text(encoding="utf-8")
    for name in ("metadata.csv", "images_200x150.zip"):
        assert f": {name} " in text
        text = text.replace(f": {name} ", f": {HAM10000 / name} ", 1)
    path = tmp_path / "ham10000.yaml"
    path.write_text(text, encoding="utf-8")
    ids = simulated_site_ids(str(path), num_sites=0, label_skew=0)
    assert ids == ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")
    sites = {
        name: simulated_site(str(path), index, num_sites=0, label_skew=0, seed=0) for index, name in enumerate(ids)
    }
    sizes = {name: sum(len(cases) for cases in site.splits.values()) for name, site in sites.items()}
    assert sizes == {"rosendahl": 2259, "vidir_modern": 3363, "vidir_molemax": 3954, "vienna_dias": 439}
    assert [sum(len(site.splits[split]) for site in sites.values()) for split in SPLITS] == [6998, 973, 2044]
    molemax = sites["vidir_molemax"]
    assert molemax.class_counts("train") == [0, 1, 86, 13, 17, 2603, 38]
    assert "class 'akiec': 0 training cases" in molemax.notes
    assert "class 'bcc': 1 training case" in molemax.notes
    assert "9 patients of this site also at another site" in molemax.notes
    cases = molemax.splits["test"]
    assert cases.images.shape == (823, 3, 64, 64)
    assert cases.privileged.table is not None
    assert set(cases.privileged.table) == {"age", "sex", "localization"}
    assert cases.privileged.masks is not None
    # Lesions are darker than the skin around them: boxes that lay elsewhere would show it here.
    inside = cases.privileged.masks.bool()
    grey = cases.images.float().mean(dim=1)
    darker = [
        bool(grey[index][inside[index]].mean() < grey[index][~inside[index]].mean())
        for index in range(len(cases))
        if not inside[index].all()
    ]
    assert np.mean(darker) > 0.9


@pytest.mark.slow
@needs_pneumonia
def test_pneumoniamnist_is_spread_by_label_skew(tmp_path: Path) -> None:
    text = (EXAMPLES / "pneumoniamnist.yaml").read_text(encoding="utf-8")
    path = tmp_path / "pneumoniamnist.yaml"
    path.write_text(text.replace("images: pneumoniamnist.npz", f"images: {PNEUMONIA}"), encoding="utf-8")
    assert "data.label-skew=0.5 federation.num-sites=6" in refusal(str(path))
    sites = [simulated_site(str(path), index, num_sites=6, label_skew=0.5, seed=0) for index in range(6)]
    assert [sum(len(site.splits[split]) for site in sites) for split in SPLITS] == [4708, 524, 624]
    assert sites[0].classes == ("normal", "pneumonia")
    assert np.sum([site.class_counts("train") for site in sites], axis=0).tolist() == [1214, 3494]
    assert sites[0].splits["train"].images.shape[1:] == (1, 32, 32)
    path.write_text(path.read_text(encoding="utf-8").replace("size: 32", "size: 28"), encoding="utf-8")
    whole = local_site(path, "kermany", b"key")
    with np.load(PNEUMONIA) as stored:
        assert np.array_equal(whole.splits["test"].images[:, 0].numpy(), stored["test_images"])
        assert np.array_equal(whole.splits["test"].labels.numpy(), stored["test_labels"][:, 0])
