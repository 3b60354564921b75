"""How far a run is, and when it is expected to end."""

from __future__ import annotations

import time
from datetime import datetime, timedelta


class Progress:
    """Counts work in image-steps and extrapolates.

    Parameters
    ----------
    total : work of the whole run, in any unit; what a resumed run had done before must not be in it
    """

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self.started = time.monotonic()

    def add(self, work: float) -> None:
        """Note that `work` units are done."""
        self.done += work

    def expected_end(self) -> str:
        """Return e.g. ``"expected end 14:07:30, in 2 min"``, in local time."""
        if self.done <= 0:
            return "expected end unknown"
        left = (time.monotonic() - self.started) * max(0.0, self.total - self.done) / self.done
        end = datetime.now().astimezone() + timedelta(seconds=left)
        words = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        return f"expected end {end:%H:%M:%S}, in {words}"
