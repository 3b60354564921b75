"""How far a piece of work is, and when it is expected to end: for a study and a training."""

from __future__ import annotations

import time
from datetime import datetime, timedelta


class Progress:
    """Counts work done, and extrapolates from the pace so far.

    Parameters
    ----------
    total : all of the work, in any unit; what was done before `started` must not be in it
    """

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self.started = time.monotonic()

    def add(self, work: float) -> None:
        """Note that `work` more units are done, `total` at most."""
        self.done = min(self.total, self.done + work)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end, at the pace so far; None before anything is done."""
        if self.done <= 0:
            return None
        return (time.monotonic() - self.started) * (self.total - self.done) / self.done

    def expected_end(self) -> str:
        """Return e.g. ``"expected end 14:07:30, in 2 min"``, in local time."""
        return end_in_words(self.seconds_left)


def end_in_words(left: float | None) -> str:
    """Return e.g. ``"expected end 14:07:30, in 2 min"``, in local time, for the seconds that are left."""
    if left is None:
        return "expected end unknown"
    end = datetime.now().astimezone() + timedelta(seconds=left)
    return f"expected end {end:%H:%M:%S}, in {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'}"
