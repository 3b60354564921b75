"""The configuration of a whole run that takes seconds, and parts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAIN_ONLY = {"student.rounds": 0, "chain.compare-alone": False, "chain.epochs": 1}
"""One epoch, no students, no hospital on its own."""


def whole_run(data: Path, runs: Path) -> dict[str, Any]:
    """Return the configuration of a run on `data` into `runs`."""
    return {
        "data.source": str(data),
        "output.dir": str(runs),
        "chain.backbone": "test_convnext",
        "chain.epochs": 2,
        "chain.batch-size": 16,
        "student.rounds": 2,
        "student.epochs": 1,
        "student.batch-size": 16,
        "federation.deadline": 5.0,
        "federation.hop-deadline": 30.0,
        "federation.precision": "fp32",
        "federation.threads": 1,
    }
