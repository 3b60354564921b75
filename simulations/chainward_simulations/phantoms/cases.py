"""Generated chest radiographs of a simulated consortium: no download, no patient.

Every hospital has its own scanner, case mix and size (`hospitals`). The image, report and table row of a
case depend only on the seed, the site and the index of the case: more cases leave the earlier ones unchanged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from pydantic import TypeAdapter

from chainward_client.data.columns import TabularColumn
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedCases, PrivilegedSetup, SiteData, SplitName
from chainward_shared.seeds import numpy_generator
from chainward_simulations.phantoms.anatomy import (
    ChestAnatomy,
    Finding,
    Lesion,
    draw_anatomy,
    draw_lesion,
    render_chest,
)
from chainward_simulations.phantoms.hospitals import MAX_SITES, expose, hospital
from chainward_simulations.phantoms.reports import write_report
from chainward_simulations.phantoms.table import TABLE_COLUMNS, draw_patient_details, draw_table_row

PHANTOM_CLASSES: tuple[Finding, ...] = get_args(Finding)

# of the patients: 10/16 train, 2/16 val, 4/16 test
_SPLIT_BOUNDS = (0.625, 0.75, 1.0)
_IMAGES_PER_PATIENT = (0.75, 0.92, 1.0)  # cumulative shares of one, two and three images


@dataclass(frozen=True)
class PhantomCase:
    """Which image this is, of which patient of a site.

    Attributes
    ----------
    index : position among all cases of the site
    patient : 0-based
    finding : the label
    split : the same for all images of a patient
    """

    index: int
    patient: int
    finding: Finding
    split: SplitName


def phantom_site_ids(num_sites: int) -> tuple[str, ...]:
    """Return the ids of the first `num_sites` hospitals, ``("site-1", "site-2", ...)``.

    Raises
    ------
    ValueError : `num_sites` is not within 1 to 64
    """
    if not 1 <= num_sites <= MAX_SITES:
        raise ValueError(f"num_sites is {num_sites}; phantoms exist for 1 to {MAX_SITES} sites")
    return tuple(f"site-{number}" for number in range(1, num_sites + 1))


def phantom_cases(seed: int, index: int, count: int) -> list[PhantomCase]:
    """List the first `count` cases of the 0-based site `index`, grouped by patient.

    Class and split of the patients follow an R2 sequence (Roberts 2018, the golden ratio in 2-D) from
    a random start: even a small hospital has nearly the shares that it should, in each split.
    """
    site, place = f"site-{index + 1}", hospital(index)
    class_bounds = np.cumsum(place.mix)
    start = numpy_generator(seed, site, "phantom-mix").random(2)
    cases: list[PhantomCase] = []
    patient = 0
    while len(cases) < count:
        along_classes, along_splits = (start + patient * np.array([0.7548776662466927, 0.5698402909980532])) % 1
        finding = PHANTOM_CLASSES[int(np.searchsorted(class_bounds[:-1], along_classes, side="right"))]
        split = SPLITS[int(np.searchsorted(_SPLIT_BOUNDS[:-1], along_splits, side="right"))]
        images = numpy_generator(seed, site, "phantom-visits", patient).random()
        visits = 1 + int(np.searchsorted(_IMAGES_PER_PATIENT[:-1], images, side="right"))
        for _ in range(visits):
            cases.append(PhantomCase(len(cases), patient, finding, split))
        patient += 1
    return cases[:count]


def phantom_site(
    seed: int,
    index: int,
    image_size: int = 64,
    splits: Collection[str] = SPLITS,
    most: int | None = None,
) -> SiteData:
    """Return the phantoms of one hospital, the same whatever the number of sites.

    Parameters
    ----------
    seed : seed of the whole data set
    index : 0-based position of the site, up to 63
    image_size : height and width in pixels, 32 to 256
    splits : those whose images are made; the others have none
    most : images that are made of each split at most, the first ones; None, the default: all

    Returns
    -------
    SiteData with images uint8 (n, 1, image_size, image_size), reports, table and masks in every split
    """
    place = hospital(index)
    cases = phantom_cases(seed, index, place.cases)
    present = {case.finding for case in cases}
    return SiteData(
        site=f"site-{index + 1}",
        classes=PHANTOM_CLASSES,
        splits={
            split: _collect(seed, index, [case for case in cases if case.split == split in splits][:most], image_size)
            for split in SPLITS
        },
        synthetic=True,
        notes=tuple(f"no cases of {finding}" for finding in PHANTOM_CLASSES if finding not in present),
        privileged=PrivilegedSetup(columns=TypeAdapter(dict[str, TabularColumn]).validate_python(TABLE_COLUMNS)),
    )


def render_phantom(
    seed: int, index: int, case: PhantomCase, image_size: int = 64, healthy: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return image uint8 (H, W) and region of interest uint8 (H, W) of one case.

    `healthy` leaves the finding out and changes nothing else: same anatomy, position, noise and scanner.
    """
    site, scanner = f"site-{index + 1}", hospital(index).scanner
    anatomy, lesion, _ = _patient(seed, site, case)
    if healthy:
        lesion = draw_lesion(np.random.default_rng(0), "normal", anatomy)
    rng = numpy_generator(seed, site, "phantom-image", case.index)
    roll = np.deg2rad(rng.normal(0, 5.0))
    zoom = scanner.field_of_view * rng.uniform(0.92, 1.08)
    shift_x, shift_y = rng.normal((scanner.shift_x, scanner.shift_y), 0.065)
    across, down = _pixel_grid(image_size)
    across, down = zoom * (across - np.float32(shift_x)), zoom * (down - np.float32(shift_y))
    cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
    density, region = render_chest(anatomy, lesion, cos * across + sin * down, cos * down - sin * across, rng)
    return expose(scanner, density, rng), region.astype(np.uint8)


def _patient(seed: int, site: str, case: PhantomCase) -> tuple[ChestAnatomy, Lesion, dict[str, float | str | None]]:
    """Draw what stays the same over all visits of a patient."""
    rng = numpy_generator(seed, site, "phantom-patient", case.patient)
    details = draw_patient_details(rng, case.finding)
    anatomy = draw_anatomy(rng, female=details["sex"] == "female")
    return anatomy, draw_lesion(rng, case.finding, anatomy), details


def _collect(seed: int, index: int, cases: list[PhantomCase], image_size: int) -> Cases:
    site = f"site-{index + 1}"
    images = np.empty((len(cases), image_size, image_size), np.uint8)
    masks = np.empty_like(images)
    texts: list[str | None] = []
    rows: list[dict[str, float | str | None]] = []
    for position, case in enumerate(cases):
        images[position], masks[position] = render_phantom(seed, index, case, image_size)
        _, lesion, details = _patient(seed, site, case)
        texts.append(write_report(numpy_generator(seed, site, "phantom-report", case.index), lesion, PHANTOM_CLASSES))
        rows.append(draw_table_row(numpy_generator(seed, site, "phantom-table", case.index), case.finding, details))
    return Cases(
        images=torch.from_numpy(images)[:, None],
        labels=torch.tensor([PHANTOM_CLASSES.index(case.finding) for case in cases], dtype=torch.int64),
        patients=np.array([f"{site}-patient-{case.patient + 1:03d}" for case in cases], dtype=str),
        privileged=PrivilegedCases(
            texts=tuple(texts),
            table={column: tuple(row[column] for row in rows) for column in TABLE_COLUMNS},
            masks=torch.from_numpy(masks),
        ),
    )


@lru_cache(maxsize=4)
def _pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each pixel centre, float32 (size, size), -1 to 1."""
    centres = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    across, down = np.meshgrid(centres, centres)
    return across, down
