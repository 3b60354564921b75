"""What tests of deployments share; `tests/support/flower_deployment.py` does the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flower_deployment import PATIENCE, Deployment, deployed


@pytest.fixture
def deployment(tmp_path: Path, small_consortium: Path) -> Iterator[Deployment]:
    """A consortium of which nothing runs yet."""
    with deployed(tmp_path / "deployment", small_consortium) as found:
        yield found


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A whole run that trains as little as possible."""
    return {
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.batch-size": 16,
        "chain.compare-alone": False,
        "student.rounds": 1,
        "student.epochs": 1,
        "student.finetune-rounds": 0,
        "student.batch-size": 16,
        "federation.deadline": PATIENCE,
        "federation.hop-deadline": PATIENCE,
        "federation.precision": "fp32",
        "federation.threads": 1,
    }
