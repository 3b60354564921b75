"""Schedules of temperature and of the moving average."""

from __future__ import annotations

import math


def annealed_temperature(epoch: int, start: float, decay: float) -> float:
    """Return ``max(1, start * decay^epoch)``, the temperature of `epoch` (0-based)."""
    return max(1.0, start * decay**epoch)


def ema_decay(step: int, total_steps: int, start: float) -> float:
    """Return the decay at `step` (0-based) of `total_steps`: a half cosine from `start` to 1 (Grill et al. 2020, sec. 3)."""
    progress = step / max(1, total_steps)
    return 1.0 - (1.0 - start) * (math.cos(math.pi * progress) + 1.0) / 2.0
