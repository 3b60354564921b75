"""What our processes print: progress as log lines with the time of day, tables and findings on a terminal.

Whatever text ends there, it is shown, not obeyed: see `chainward_shared.outside`.
"""

from __future__ import annotations

import codecs
import io
import logging
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from chainward_shared.errors import ChainwardError
from chainward_shared.outside import visible, visible_lines
from chainward_shared.whole_tables import as_columns, fitted, of_text

EDGELESS = 10_000
"""Width of an output that is no terminal: a file or a pipe has no edge to wrap or cut at."""


class PlainConsole(Console):
    """A terminal on which no text acts: no markup in it, no highlighting of it, no control character gets through.

    Nor is a table cut, however narrow the terminal; what goes to a file or a pipe has a line for each row. See
    `chainward_shared.whole_tables`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, **settings})

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines; a file or a pipe is not as narrow as the terminal that the command was typed on."""
        if self._width is None and not self.is_terminal:
            return ConsoleDimensions(EDGELESS, super().size.height)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as Rich does, and leave lines that are longer than the terminal to the terminal, which cuts nothing."""
        super().print(*objects, **{"crop": False, **settings})

    def say(self, text: str | Text, style: str | None = None) -> None:
        """Print a line as it is, however long: who reads it wraps it."""
        self.print(text, style=style, soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the pieces of which a renderable consists, as Rich does, the text of each made visible; a table whole."""
        if isinstance(renderable, Table) and of_text(renderable):
            found = options or self.options
            renderable = fitted(renderable, self, found) if self.is_terminal else as_columns(renderable)
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text="\n".join(map(visible, segment.text.split("\n"))))


def run_command(app: Callable[[], object], name: str) -> None:
    """Run a command of a terminal; an error that a person can act on is one line and exit code 2."""
    speak_plainly()
    try:
        app()
    except ChainwardError as error:
        PlainConsole(stderr=True).say(f"{name}: {error}", style="red")
        raise SystemExit(2) from None


class VisibleRecord(logging.LogRecord):
    """A log record whose message, and traceback, say what they hold without acting on a terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = visible_lines(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        return visible_lines(super().getMessage())


def guard_logs() -> None:
    """Make every log record of this process a `VisibleRecord`, whoever writes it (Flower, Ray) and wherever it ends."""
    logging.setLogRecordFactory(VisibleRecord)


_ANSWERS_TO = "chainward-plain"
_PLAIN = str.maketrans(
    {
        **dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True)),
        **dict.fromkeys("–—‐−", "-"),
        **dict.fromkeys("·•", "*"),
        "±": "+-",
        "✓": "+",
        "✗": "x",
        "…": "...",
        "→": "->",
        "←": "<-",
        "≤": "<=",
        "≥": ">=",
        "×": "x",
        "ε": "epsilon",
        "δ": "delta",
        "“": '"',
        "”": '"',
        "„": '"',
        "‘": "'",
        "’": "'",
        "ß": "ss",
    }
)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for letters that an output has no code for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = unicodedata.normalize("NFKD", error.object[error.start : error.end].translate(_PLAIN))
    shown = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() else "?" for letter in shown), error.end


def speak_plainly() -> None:
    """Let standard output and error show what their encoding has no letter for by others, where they would end the program.

    A terminal that is not UTF-8, a pipe under the C locale: a name with an accent, a histogram or an arrow is no reason to die.
    """
    codecs.register_error(_ANSWERS_TO, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ANSWERS_TO)


class _CurrentStdout(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stdout` is now: Flower replaces it to stream a run's output to the user."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is always the current one."""


def show_progress() -> None:
    """Print what the "chainward" loggers say from INFO on; calling it again changes nothing."""
    guard_logs()
    speak_plainly()
    logger = logging.getLogger("chainward")
    if not any(isinstance(handler, _CurrentStdout) for handler in logger.handlers):
        handler = _CurrentStdout()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        # Opacus calls logging.basicConfig where it is imported, and every line would come twice; with a handler it does nothing
        logging.getLogger().addHandler(logging.NullHandler())
