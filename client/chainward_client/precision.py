"""Which device and arithmetic a training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from chainward_shared.settings import Precision

Arithmetic = Literal["fp32", "bf16"]


def best_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Arithmetic:
    """Return what `precision` means on this hardware: "auto" takes bf16 where the hardware computes it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if supported else "fp32"


@contextmanager
def training_environment(threads: int, seed: int) -> Iterator[None]:
    """Set the number of CPU threads and seed PyTorch's own generator (dropout, say); put both back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
