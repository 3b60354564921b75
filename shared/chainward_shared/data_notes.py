"""What makes scores on images too good: copies in two splits, and data without patients. Sites say it, runs repeat it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from chainward_shared.words import listed

NO_PATIENTS = "no patient column: every image counts as a patient of its own"
COPIES = " in two splits, pixel for pixel, under two names or patients: scores on them are too good"

_COUNTED = re.compile(rf"(\d+) pictures?{re.escape(COPIES)}")


def copies_in_two_splits(count: int) -> str:
    """Return a site's note on pictures that are in two of its splits."""
    return f"{count} picture{'' if count == 1 else 's'}{COPIES}"


def copies_at(notes: Sequence[str]) -> int:
    """Return how many pictures a site's notes call copies in two splits."""
    return sum(int(found[1]) for note in notes if (found := _COUNTED.fullmatch(note)))


def notes_on_all(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what the notes of all sites say of scores, a line for each kind; `notes`: by site."""
    found = []
    counts = {site: count for site, of_site in notes.items() if (count := copies_at(of_site))}
    if counts:
        where = listed([f"{site} ({count})" for site, count in counts.items()], 6)
        found.append(f"{sum(counts.values())} pictures{COPIES}: {where}")
    without = [site for site, of_site in notes.items() if NO_PATIENTS in of_site]
    if without:
        found.append(f"no patients at {listed(without, 6)}: images of one patient may be on both sides of a split")
    return found
