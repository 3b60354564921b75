"""Who trains, validates, tests and keeps a label at a hospital: its secret and the patient alone say so."""

from __future__ import annotations

import hmac
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import make

from chainward_client.data.site_data import SPLITS, SiteData
from chainward_client.data.sources import local_site
from chainward_client.data.splits import keyed_fractions, labelled_by_key, split_by_key
from chainward_client.training.link import labelled_rows
from chainward_shared.config import RunConfig

KEY = b"k" * 32
PATIENTS = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=60)


def dealt(patients: list[str], key: bytes = KEY) -> dict[str, tuple[str, bool]]:
    """Return of every patient the split, and whether a third of the labels has the patient's among it."""
    ids = np.array(patients, dtype=object)
    splits, kept = split_by_key(ids, key), set(labelled_by_key(ids, 1 / 3, key).tolist())
    return {patient: (str(splits[row]), row in kept) for row, patient in enumerate(patients)}


@settings(deadline=None, max_examples=200)
@given(patients=PATIENTS, other=st.text(min_size=1, max_size=12), data=st.data())
def test_one_patient_more_or_less_moves_nobody_else(patients, other, data):
    before = dealt(patients)
    leaving = data.draw(st.sampled_from(patients))
    assert dealt([p for p in patients if p != leaving]) == {p: at for p, at in before.items() if p != leaving}
    assert {p: at for p, at in dealt([*patients, other]).items() if p in before} == before
    assert dealt(data.draw(st.permutations(patients))) == before


@settings(deadline=None, max_examples=50)
@given(patients=PATIENTS)
def test_all_images_of_a_patient_go_together(patients):
    ids = np.array(patients * 3, dtype=object)
    splits, kept = split_by_key(ids, KEY), set(labelled_by_key(ids, 0.5, KEY).tolist())
    for patient in patients:
        rows = [row for row, other in enumerate(ids) if other == patient]
        assert len(set(splits[rows])) == 1
        assert len({int(row) in kept for row in rows}) == 1


def site_of(folder: Path, patients: list[int], labels: str = "ill") -> SiteData:
    folder.mkdir()
    rows = [f"{labels if n % 2 else 'healthy'},p{n},," for n in patients]
    return local_site(make(folder, rows, split=None, site=None), "north", KEY)


def members(site: SiteData) -> dict[str, str]:
    return {patient: split for split in SPLITS for patient in site.splits[split].patients.tolist()}


def test_a_hospital_without_one_patient_has_the_same_splits_otherwise(tmp_path):
    everybody = members(site_of(tmp_path / "all", list(range(60))))
    assert set(everybody.values()) == set(SPLITS)
    for gone in (0, 17, 59):
        rest = members(site_of(tmp_path / f"without-{gone}", [n for n in range(60) if n != gone]))
        assert rest == {patient: split for patient, split in everybody.items() if patient != f"p{gone}"}
    assert members(site_of(tmp_path / "relabelled", list(range(60)), labels="healthy")) == everybody
    assert members(site_of(tmp_path / "backwards", list(range(59, -1, -1)))) == everybody


def test_an_image_less_in_an_npz_file_changes_no_other_image_s_label(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (40, 16, 16), dtype=np.uint8)

    def kept(rows: list[int], folder: str) -> set[bytes]:
        (tmp_path / folder).mkdir()
        arrays = {"train_images": pictures[rows], "train_labels": np.array(rows) % 2}
        for split in ("val", "test"):
            arrays |= {f"{split}_images": pictures[:4], f"{split}_labels": np.arange(4) % 2}
        np.savez(tmp_path / folder / "x.npz", **arrays)
        (tmp_path / folder / "data.yaml").write_text("format: npz\nimages: x.npz\nimage: {size: 16, channels: 1}\n")
        train = local_site(tmp_path / folder / "data.yaml", "north", KEY).splits["train"]
        return {train.images[row].numpy().tobytes() for row in labelled_by_key(train.patients, 0.5, KEY)}

    everybody = kept(list(range(40)), "all")
    assert 0 < len(everybody) < 40
    gone = pictures[3].tobytes()
    assert kept([row for row in range(40) if row != 3], "without") == everybody - {gone}
    assert kept(list(range(39, -1, -1)), "backwards") == everybody


@pytest.mark.parametrize("private", [False, True])
def test_who_keeps_a_label_at_a_hospital_is_nothing_that_a_coordinator_sends(tmp_path, private):
    site = site_of(tmp_path / "site", list(range(60)))
    recipes = [RunConfig.from_flat({"chain.label-fraction": 0.4, "seed": seed}).link_recipe() for seed in (0, 1, 2**40)]
    first, *others = (labelled_rows(site, recipe, private=private).tolist() for recipe in recipes)
    assert 0 < len(first) < len(site.splits["train"])
    assert all(kept == first for kept in others)
    other_key = local_site(tmp_path / "site" / "data.yaml", "north", b"another" * 5)
    assert members(other_key) != members(site)


def test_the_numbers_are_those_of_hmac_sha256():
    (found,) = keyed_fractions(np.array(["Müller-7"]), KEY, "split")
    expected = int.from_bytes(hmac.digest(KEY, "split\0Müller-7".encode(), "sha256")[:8], "big") / 2**64
    assert found == pytest.approx(expected, abs=1e-15)


def test_the_shares_are_met_on_average_and_purposes_have_nothing_to_do_with_each_other():
    ids = np.array([f"p{n}" for n in range(20_000)])
    splits = split_by_key(ids, KEY)
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert np.mean(splits == split) == pytest.approx(share, abs=0.012)
    kept = np.isin(np.arange(len(ids)), labelled_by_key(ids, 0.3, KEY))
    for split in SPLITS:
        assert kept[splits == split].mean() == pytest.approx(0.3, abs=0.04)


def test_of_one_key_a_smaller_fraction_is_a_subset_of_a_larger_one():
    ids = np.array([f"p{n}" for n in range(300)])
    kept = [set(labelled_by_key(ids, fraction, KEY).tolist()) for fraction in (0.0, 0.1, 0.5, 1.0)]
    assert kept[0] == set()
    assert kept[1] < kept[2] < kept[3] == set(range(300))
