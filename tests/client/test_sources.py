"""A site's data out of a hospital's own data file."""

from __future__ import annotations

from pathlib import Path

import torch
from small_tables import all_pixels, make, two_sites

from chainward_client.data.description import load_description
from chainward_client.data.sources import local_site

# a hospital's own file


def test_a_local_site_is_the_whole_file_under_its_own_id(tmp_path: Path) -> None:
    source = two_sites(tmp_path)
    site = local_site(source, "st-mary", b"key")
    assert site.site == "st-mary"
    assert len(all_pixels(site)) == 12
    from_block = local_site(load_description(source), "st-mary", b"key")
    assert torch.equal(site.splits["train"].images, from_block.splits["train"].images)


# notes


def test_notes_name_what_is_scarce(tmp_path: Path) -> None:
    rows = ["healthy,p0,train,", "healthy,p1,train,", "healthy,p2,test,"]
    notes = local_site(make(tmp_path, rows, site=None), "north", b"key").notes
    assert notes == (
        "class 'ill': 0 training cases",
        "the val split is empty",
        "1 test case: scores on it say little",
    )


def test_notes_name_a_class_with_one_training_case_and_missing_patients(tmp_path: Path) -> None:
    rows = ["healthy,,train,", "healthy,,train,", "ill,,train,", "ill,,val,", "ill,,test,", "ill,,test,"]
    notes = local_site(make(tmp_path, rows, site=None, patient=None), "north", b"key").notes
    assert notes == (
        "no patient column: every image counts as a patient of its own",
        "class 'ill': 1 training case",
    )


def test_a_site_without_scarcity_has_no_notes(tmp_path: Path) -> None:
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},{split},x" for n, split in enumerate(["train", "val", "test"] * 6)]
    assert local_site(make(tmp_path, rows), "north", b"key").notes == ()


# caching


def test_a_changed_data_file_is_read_anew(tmp_path: Path) -> None:
    source = two_sites(tmp_path)
    assert local_site(source, "north", b"key").splits["train"].images.shape[2] == 8
    path = Path(source)
    path.write_text(path.read_text().replace("size: 8", "size: 16"))
    assert local_site(source, "north", b"key").splits["train"].images.shape[2] == 16
