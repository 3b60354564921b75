"""What a process prints while it works comes once."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from chainward_shared.console import speak_plainly

PROGRAM = """
import logging
from chainward_shared.console import show_progress
show_progress()
import opacus.utils.module_utils
logging.getLogger("chainward").info("one line")
show_progress()
logging.getLogger("chainward").info("another line")
"""


@pytest.mark.slow
def test_every_line_is_printed_once_whatever_a_library_does_to_the_logging():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
    lines = [line[8:].strip() for line in done.stdout.splitlines()]
    assert lines == ["one line", "another line"]
    assert "line" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_an_output_lacks_are_shown_by_others(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    speak_plainly()
    text = "Müller → ≥ 5 … ▁█ 患者"
    print(text, flush=True)
    shown = raw.getvalue().decode(encoding).rstrip()
    assert (
        shown
        == {
            "ascii": "Muller -> >= 5 ... .@ ??",
            "cp1252": "Müller -> >= 5 … .@ ??",
            "utf-8": text,
        }[encoding]
    )
