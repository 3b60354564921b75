"""What a copy of the prepared process writes down of itself. A copy has to find it by name, so it is not in a test's file."""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from flwr.supercore.superexec.executor import ExecutionSpec

from chainward_client.entropy import Entropy
from chainward_client.superexec import fresh

NEEDED = ("torch", "timm", "torchvision", "sklearn", "torch._dynamo", "chainward_client.app")


def described(spec: ExecutionSpec) -> None:
    """Stands for the work: write down, where the token says, what kind of process this is."""
    fresh()
    about = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": threading.active_count(),
        "imported": [name for name in NEEDED if name in sys.modules],
        "gpu": torch.cuda.is_initialized(),
        "random": [
            random.random(),
            float(np.random.random()),  # noqa: NPY002
            float(torch.rand(1)),
            secrets.randbits(60),
            Entropy().integer(),
        ],
        "sum": float(torch.ones(512, 512).mm(torch.ones(512, 512)).sum()),
    }
    path = Path(spec.token)
    path.with_suffix(".part").write_text(json.dumps(about))
    path.with_suffix(".part").rename(path)
