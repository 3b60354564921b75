"""Which device and arithmetic a training uses."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from chainward_shared.settings import Precision


def best_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return what `precision` means on this hardware: "auto" takes bf16 where the hardware computes it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _processor_computes_bf16() else "fp32"


def _processor_computes_bf16() -> bool:
    """Return whether the processor has instructions for bf16.

    oneDNN calls bf16 supported on any x86 processor with AVX-512, and emulates it where these are missing: a step then takes
    two to three times as long as in fp32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
