"""The hospital's cases, as training would see them: counts, oddities of images, patients, reports and table.

What reading refuses or notes comes from `chainward_client.data`; this adds what only a look at the files, or a comparison of
the splits, shows. The lines stay at the site: they may name files.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from chainward_client.data.decoded_store import DecodedStore, expected_bytes
from chainward_client.data.description import ImageShape
from chainward_client.data.image_store import ImageStore
from chainward_client.data.manifest import Manifest
from chainward_client.data.site_data import SPLITS, SiteData
from chainward_client.data.sources import local_site, number_of, read_table
from chainward_client.data.unusable import ImageProblem, UnusableFiles
from chainward_client.doctor.machine import size
from chainward_client.doctor.report import Check, ok, problem, skipped, warning
from chainward_client.privileged.checks import with_privileged_notes
from chainward_client.privileged.encoder import encoder_digest
from chainward_client.site_key import site_key_to_look_with
from chainward_shared.data_notes import COPIES, NO_PATIENTS
from chainward_shared.errors import DataError, StoreError
from chainward_shared.words import listed

_TURNED = 0x0112  # EXIF orientation
_LONG = 3.0
_SMALL = 4


@dataclass(frozen=True)
class Header:
    """What a picture's header says, as it is stored: width and height in pixels, colour mode, whether EXIF turns it."""

    name: str
    width: int
    height: int
    mode: str
    turned: bool


def open_data(path: Path, site: str, state: Path) -> tuple[SiteData | None, list[Check]]:
    """Return the site's cases, and what is to be said of them; None where they can't be used.

    Parameters
    ----------
    path : the data file
    site : id of the site
    state : its state folder, where the secret lies that divides the cases if the data file doesn't
    """
    try:
        key = site_key_to_look_with(state)
    except StoreError as error:
        return None, [problem("site key", str(error), "docs/operations.md says what belongs in a backup")]
    try:
        store = DecodedStore(state, site, key)
        kept = store.find(path)
        data = with_privileged_notes(local_site(path, site, key) if kept is None else kept)
    except DataError as error:
        return None, [unusable_data(path, error)]
    return data, [*checks_of(path, data), check_store(store, data, found=kept is not None)]


def check_store(store: DecodedStore, data: SiteData, *, found: bool) -> Check:
    """Say how large the store of decoded images is, and will be."""
    will_be = size(expected_bytes(data))
    if found:
        return ok("images: decoded", f"kept in {store.folder}: {size(store.bytes)}; nothing has changed since")
    there = f"{size(store.bytes)} there, and something has changed since" if store.bytes else "not there yet"
    return ok("images: decoded", f"{there}; the first message makes them: about {will_be} in {store.folder}")


def unusable_data(path: Path, error: DataError) -> Check:
    """Return the check of data that can't be used; with all files that are the reason, where files are."""
    if isinstance(error, UnusableFiles):
        files = tuple(file.shown for file in error.files)
        advice = "correct or remove them, or set unusable: leave-out; --json lists all. docs/messages.md explains the reasons"
        return replace(problem("data", str(error), advice), items=files)
    return problem("data", str(error), f"correct {path.name} or what it names; docs/data.md explains the keys")


def checks_of(path: Path, data: SiteData) -> list[Check]:
    """Return what is to be said of a site's cases; `path` is their data file."""
    return [
        *check_counts(data),
        *check_images(path, data),
        check_patients(data),
        *check_privileged(data),
        *_notes(data),
    ]


def check_counts(data: SiteData) -> Iterator[Check]:
    """Count cases per class and split."""
    for split in SPLITS:
        cases = data.splits[split]
        counts = ", ".join(
            f"{name} {count}" for name, count in zip(data.classes, data.class_counts(split), strict=True)
        )
        patients = f" of {number_of(len(np.unique(cases.patients)), 'patient')}" if data.has_patient_ids else ""
        if len(cases):
            yield ok(f"cases: {split}", f"{number_of(len(cases), 'image')}{patients}: {counts}")
        else:
            yield warning(f"cases: {split}", "none", "without them the site can't score models on its own images")


# --- images ---


def check_images(path: Path, data: SiteData) -> Iterator[Check]:
    """Look for pictures that are unlike the others: turned, small, long, of another size or colour, or all of one value."""
    total = sum(len(cases) for cases in data.splits.values())
    side = next(iter(data.splits.values())).images.shape[-1]
    yield ok("images", f"all {total} can be read; training sees them at {side} px")
    table = read_table(path)
    if type(table) is Manifest:  # of pictures that Pillow opens
        yield from odd_headers(read_headers(table), table.description.image)
    yield from check_scale(data)
    blank = sum(_blank(data, split) for split in SPLITS)
    if blank:
        yield warning("images: blank", f"{blank} of {total} have the same value in every pixel", "are the files whole?")


def check_scale(data: SiteData) -> Iterator[Check]:
    """Show which values of more than 8 bits become black and white, and how the others lie between them."""
    if (scale := data.scale) is not None:
        found = f"black {scale.low:g}, white {scale.high:g}, measured on {scale.images} images: {scale.histogram()}"
        advice = f"declare it, so that all hospitals have the same: image.scale: [{scale.low:g}, {scale.high:g}]"
        yield warning("images: grey scale", found, advice)


def _blank(data: SiteData, split: str) -> int:
    images = data.splits[split].images.flatten(1)  # type: ignore[index]
    return int((images.amax(dim=1) == images.amin(dim=1)).sum()) if len(images) else 0


def read_headers(table: Manifest) -> list[Header]:
    """Return the header of every picture that the manifest names; the pictures are not decoded."""
    found = []
    with ImageStore(table.description.image_location) as store:
        for name in table.images.tolist():
            try:
                member = store.find(name)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a header that is damaged where nobody looks
                    image = Image.open(io.BytesIO(store.read(member)))
                    turned = image.getexif().get(_TURNED, 1) not in (0, 1)
            except (ImageProblem, OSError, ValueError, SyntaxError):
                continue  # reading all of it has said so already
            found.append(Header(member, *image.size, image.mode, turned))
    return found


def odd_headers(headers: Sequence[Header], shape: ImageShape) -> list[Check]:
    """Return a check for every way in which some pictures are unlike the others; one that says the sizes where none are."""
    checks = []
    for what, odd, says, advice in (*_odd_orientations(headers), *_odd_sizes(headers, shape)):
        if odd:
            named = listed([one.name for one in odd], 3)
            checks.append(warning(f"images: {what}", f"{len(odd)} of {len(headers)} {says}: {named}", advice))
    kinds = Counter(
        "grey" if one.mode in ("1", "L", "LA", "I") or one.mode.startswith("I;16") else "colour" for one in headers
    )
    if len(kinds) > 1 and shape.channels == 3:
        rare = min(kinds, key=lambda kind: kinds[kind])
        says = f"{kinds[rare]} of {len(headers)} are {rare}, the others not"
        checks.append(
            warning("images: colour", says, "another device? a model may learn the device in place of the disease")
        )
    if not checks and headers:
        sizes = dict.fromkeys((one.width, one.height) for one in headers)
        low, high = (pick(sizes, key=lambda one: one[0] * one[1]) for pick in (min, max))
        span = f"{low[0]}x{low[1]}" if low == high else f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"
        checks.append(ok("images: files", f"{span} px, none turned, none odd"))
    return checks


_Oddity = tuple[str, list[Header], str, str]
"""What is odd, the pictures in which it is, what is said of them, and what to do."""


def _odd_orientations(headers: Sequence[Header]) -> Iterator[_Oddity]:
    turned = [one for one in headers if one.turned]
    yield (
        *("orientation", turned, "are turned by their EXIF orientation"),
        "they are read upright; look at some: tools that drop EXIF may have left others lying",
    )
    lying = [one for one in headers if one.width > one.height]
    standing = [one for one in headers if one.width < one.height]
    fewer = min(lying, standing, key=len)
    if len(fewer) <= 0.2 * (len(lying) + len(standing)):
        how = "lie where the others stand" if fewer is lying else "stand where the others lie"
        yield "orientation", fewer, how, "look at some: are they turned by a quarter?"


def _odd_sizes(headers: Sequence[Header], shape: ImageShape) -> Iterator[_Oddity]:
    long = [one for one in headers if max(one.width, one.height) > _LONG * min(one.width, one.height)]
    yield (
        *("shape", long, f"are more than {_LONG:g} times as long as wide"),
        "panels, strips or screenshots? image.fit says how they become square",
    )
    large = [one for one in headers if max(one.width, one.height) >= shape.size]
    yield (
        "size",
        [one for one in headers if max(one.width, one.height) < shape.size],
        f"are smaller than the {shape.size} px that training sees",
        "they are enlarged; lower image.size, or export the originals",
    )
    middle = float(np.median([one.width * one.height for one in headers])) if headers else 0.0
    small = [one for one in large if one.width * one.height * _SMALL < middle]
    yield "size", small, f"have less than a {_SMALL}th of the others' pixels", "thumbnails among originals?"


# --- patients, privileged data, notes ---


def check_patients(data: SiteData) -> Check:
    """Check that no patient is on both sides of a split."""
    if data.has_patient_ids:
        return ok("patients", "none is in two splits")
    return warning(
        "patients",
        "the data don't say which images are of one patient: one may be on both sides of a split, and privacy can only protect "
        "single images",
        "name the column in columns.patient",
    )


def check_privileged(data: SiteData) -> Iterator[Check]:
    """Say what reports and table there are for privileged teachers."""
    cases = data.splits["train"]
    texts, table = cases.privileged.texts, cases.privileged.table
    parts = []
    if texts is not None:
        parts.append(f"reports of {sum(bool(text) for text in texts)} of {len(texts)} training cases")
    if table is not None and data.privileged.columns:
        parts.append(f"table columns {listed(list(data.privileged.columns))}")
    if not parts:
        yield skipped("privileged columns", "none is declared; the site takes part without privileged teachers")
        return
    yield ok("privileged columns", f"{'; '.join(parts)}. They never leave")
    if data.privileged.encoder is not None:
        yield _check_encoder(data.privileged.encoder)


def _check_encoder(folder: Path) -> Check:
    try:
        return ok("language encoder", f"{folder}, SHA-256 {encoder_digest(folder)}")
    except DataError as error:
        return problem(
            "language encoder", str(error), "correct privileged.encoder in the data file; docs/data.md explains it"
        )


def _notes(data: SiteData) -> list[Check]:
    shown_above = {NO_PATIENTS, *([data.scale.note] if data.scale is not None else [])}
    return [_of_note(data, note) for note in data.notes if note not in shown_above]


def _of_note(data: SiteData, note: str) -> Check:
    if note.endswith(COPIES):
        return warning("patients: copies", note, "remove the copies, or give them the same patient")
    if data.left_out and note.endswith("(unusable: leave-out)"):
        shown = f"{note}; first: {'; '.join(data.left_out[:3])}"
        return replace(warning("images: left out", shown, "--json lists all"), items=data.left_out)
    if note.startswith(("privileged column", "reports:")):
        return warning("privileged columns", note)
    return warning("data: note", note)
