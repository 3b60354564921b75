"""How far a study is and when it is expected to end, on stderr."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from chainward_simulations.study.workers import Event, Finished, Step, Tried


class StudyProgress:
    """A bar on a terminal; elsewhere a line for each finished arm.

    Parameters
    ----------
    count : arms to train, each seed counted; or trials
    images : all work, as `Unit.images` counts it
    """

    def __init__(self, console: Console, count: int, images: float, *, what: str = "arms") -> None:
        self.console, self.count, self.images, self.what = console, count, images, what
        self.finished, self.trained = 0, 0.0
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[end]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=images, end="")

    def __enter__(self) -> StudyProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_event(self, event: Event) -> None:
        """Show what happened."""
        if isinstance(event, Step):
            self.trained = min(self.images, self.trained + event.images)
            text = f"{self.finished} of {self.count} {self.what}; {event.arm} seed {event.seed}: {event.what}"
            self.bar.update(self.task, completed=self.trained, description=text, end=self.expected_end())
            return
        self.finished += 1
        if isinstance(event, Finished):
            record = event.record
            words = (
                f"{record.arm} seed {record.seed}: balanced accuracy {_shown(record.pooled.balanced_accuracy)}, "
                f"macro AUC {_shown(record.pooled.macro_auc)}, {record.seconds:.0f} s of training"
            )
        elif isinstance(event, Tried):
            why = f" ({event.reason})" if event.reason else ""
            words = f"trial {event.number + 1}: {_shown(event.value)} on the validation images{why}"
        else:
            words = f"{event.arm} seed {event.seed} failed: {event.reason}"
            if event.details:
                self.console.print(event.details, markup=False, highlight=False, soft_wrap=True)
        left = "" if self.finished == self.count else f"; {self.expected_end()}"
        self.console.print(
            f"{self.finished} of {self.count}: {words}{left}", markup=False, highlight=False, soft_wrap=True
        )

    def expected_end(self) -> str:
        """Return e.g. ``"expected end 14:07:30, in 2 min"``, in local time."""
        if self.trained <= 0:
            return "expected end unknown"
        left = (time.monotonic() - self.started) * (self.images - self.trained) / self.trained
        end = datetime.now().astimezone() + timedelta(seconds=left)
        return f"expected end {end:%H:%M:%S}, in {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
