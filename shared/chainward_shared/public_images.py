"""Images that are nobody's: textures and soft shapes out of random numbers, the same for everyone.

A model's embeddings of them show along which directions its embeddings vary at all (Baradad et al. 2021, arXiv:2106.05963, train
on such images). They cost no privacy.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

COUNT = 512
_TEXTURES = 48
_MOST_SHAPES = 24


@lru_cache(maxsize=2)
def public_images(channels: int, size: int, count: int = COUNT) -> Tensor:
    """Return images, uint8 (count, channels, size, size): not to be changed, they are kept."""
    return torch.stack(list(_drawn(channels, size, count)))


def _drawn(channels: int, size: int, count: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(20_260)
    textures = [_texture(rng, channels, size) for _ in range(_TEXTURES)]
    rows, columns = np.mgrid[0:size, 0:size] / size

    def texture() -> np.ndarray:
        moved = np.roll(textures[rng.integers(len(textures))], tuple(rng.integers(0, size, 2)), (1, 2))
        return moved if rng.random() < 0.5 else moved[:, :, ::-1]

    def colour() -> np.ndarray:
        return rng.uniform(0, 1, channels)[:, None, None]

    for _ in range(count):
        image = colour() + rng.uniform(0.02, 0.25) * texture()
        for _ in range(rng.integers(0, _MOST_SHAPES)):
            inside = _shape(rng, rows, columns) * rng.uniform(0.3, 1)
            image = image * (1 - inside) + (colour() + rng.uniform(0, 0.15) * texture()) * inside
        yield torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8))


def _texture(rng: np.random.Generator, channels: int, size: int) -> np.ndarray:
    """Return noise whose spectrum falls as that of natural images, of which the channels have much in common."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1 / size
    fall = frequency ** rng.uniform(0.5, 2.0)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((channels, size, size))) / fall).real
    noise /= noise.std(axis=(1, 2), keepdims=True)
    mixed = np.tensordot(
        rng.standard_normal((channels, channels)) * rng.uniform(0.2, 1) + rng.uniform(0, 0.6), noise, 1
    )
    found: np.ndarray = mixed / max(float(mixed.std()), 1e-9)
    return found


def _shape(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a soft ellipse, 1 inside and 0 outside."""
    x, y = rng.uniform(0, 1, 2)
    radius, flat, turn = 0.03 * 10 ** rng.uniform(0, 1.1), rng.uniform(0.5, 1), rng.uniform(0, np.pi)
    along = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
    across = (rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)
    softness = 10 ** rng.uniform(-2, -0.3)
    distance = (np.hypot(along, across / flat) / radius - 1) / softness
    found: np.ndarray = 1 / (1 + np.exp(distance.clip(-30, 30)))
    return found
