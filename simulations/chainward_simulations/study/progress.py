"""How far a study is and when it is expected to end, on stderr."""

from __future__ import annotations

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from chainward_shared.console import PlainConsole
from chainward_shared.progress import Progress
from chainward_simulations.study.records import ArmRecord
from chainward_simulations.study.workers import Event, Step, Tried


class StudyProgress:
    """A bar on a terminal; elsewhere a line for each finished arm.

    Parameters
    ----------
    count : arms to train, each seed counted; or trials
    images : all work, as `Unit.images` counts it
    """

    def __init__(self, console: PlainConsole, count: int, images: float, *, what: str = "arms") -> None:
        self.console, self.count, self.what = console, count, what
        self.finished, self.work = 0, Progress(images)
        self.bar = Bar(
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
            self.work.add(event.images)
            text = f"{self.finished} of {self.count} {self.what}; {event.arm} seed {event.seed}: {event.what}"
            self.bar.update(self.task, completed=self.work.done, description=text, end=self.work.expected_end())
            return
        self.finished += 1
        if isinstance(event, ArmRecord):
            words = (
                f"{event.arm} seed {event.seed}: balanced accuracy {_shown(event.pooled.balanced_accuracy)}, "
                f"macro AUC {_shown(event.pooled.macro_auc)}, {event.seconds:.0f} s of training"
            )
        elif isinstance(event, Tried):
            why = f" ({event.reason})" if event.reason else ""
            words = f"trial {event.number + 1}: {_shown(event.value)} on the validation images{why}"
        else:
            words = f"{event.arm} seed {event.seed} failed: {event.reason}"
            if event.details:
                self.console.say(event.details)
        left = "" if self.finished == self.count else f"; {self.work.expected_end()}"
        self.console.say(f"{self.finished} of {self.count}: {words}{left}")


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
