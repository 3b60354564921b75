"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from chainward_shared import __version__
from chainward_simulations.benchmark.training import auto_precision


def describe_machine() -> dict[str, str]:
    """Return processor, accelerator, arithmetic and versions."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "precision auto": auto_precision(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "chainward": __version__,
        **{name: version(name) for name in ("torch", "timm", "flwr")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
