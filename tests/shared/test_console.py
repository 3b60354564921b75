"""What a process prints while it works comes once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging
from chainward_shared.console import show_progress
show_progress()
import opacus.utils.module_utils
logging.getLogger("chainward").info("one line")
show_progress()
logging.getLogger("chainward").info("another line")
"""


def test_every_line_is_printed_once_whatever_a_library_does_to_the_logging():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
    lines = [line[8:].strip() for line in done.stdout.splitlines()]
    assert lines == ["one line", "another line"]
    assert "line" not in done.stderr
