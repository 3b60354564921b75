"""What makes scores on the data of a simulation too good: copies in two splits, also of different hospitals, and no patients.

A simulation alone can compare its hospitals' pictures. Each writes digests of its own beside its state; the coordinator, which
has no images, compares those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from chainward_client.data.site_data import SiteData, SplitName, copies_in_splits
from chainward_shared.data_notes import NO_PATIENTS, notes_on_all
from chainward_shared.files import write_atomically

PICTURES = "pictures.json"


def data_notes(sites: Mapping[str, SiteData]) -> list[str]:
    """Return what a reader of scores on these sites must know of their data."""
    without = [site for site, data in sites.items() if not data.has_patient_ids]
    return _notes([data.pictures() for data in sites.values()], without)


def keep_pictures(data: SiteData, folder: Path) -> None:
    """Write the digests of a site's pictures into its folder, for `notes_of_simulation`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {split: [picture.hex() for picture in of_split] for split, of_split in data.pictures().items()}
    content = {"pictures": pictures, "has_patient_ids": data.has_patient_ids}
    write_atomically(folder / PICTURES, json.dumps(content).encode())


def notes_of_simulation(folder: Path, sites: Iterable[str]) -> list[str]:
    """Return `data_notes` of sites that have written the digests of their pictures.

    Parameters
    ----------
    folder : the one with a folder for each site
    """
    kept = {site: json.loads((folder / site / PICTURES).read_bytes()) for site in sites}
    pictures = [
        {split: map(bytes.fromhex, of_split) for split, of_split in content["pictures"].items()}
        for content in kept.values()
    ]
    return _notes(pictures, [site for site, content in kept.items() if not content["has_patient_ids"]])


def _notes(sites: Iterable[Mapping[SplitName, Iterable[bytes]]], without_patients: Iterable[str]) -> list[str]:
    at_one, between = copies_in_splits(sites)
    found = []
    if at_one + between:
        what = "picture is" if at_one + between == 1 else "pictures are"
        found.append(
            f"{at_one + between} {what} in two splits, pixel for pixel ({at_one} within one hospital, {between} at two "
            "hospitals): scores on them are too good"
        )
    return found + notes_on_all({site: [NO_PATIENTS] for site in without_patients})
