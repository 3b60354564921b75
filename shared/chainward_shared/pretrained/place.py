"""Where a user's weights store is; apart from the store, so that a command can name the folder without PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

PLACE = "CHAINWARD_WEIGHTS"
"""Environment variable that names another folder than the usual one."""


def usual_place() -> Path:
    """Return the folder of this user's store: the one that `PLACE` names, or ``~/.chainward/weights``."""
    return Path(os.environ.get(PLACE) or "~/.chainward/weights").expanduser()
