"""The hospitals that phantoms come from: each with its own scanner, case mix and size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from chainward_shared.seeds import numpy_generator

MAX_SITES = 64

# 3 x 5 pixel letters, one row of bits per line
MARKER_LETTERS = {
    "L": ("100", "100", "100", "100", "111"),
    "R": ("110", "101", "110", "101", "101"),
    "P": ("110", "101", "110", "100", "100"),
    "A": ("010", "101", "111", "101", "101"),
    "T": ("111", "010", "010", "010", "010"),
    "H": ("101", "101", "111", "101", "101"),
}


@dataclass(frozen=True)
class Scanner:
    """How one hospital's machine turns a chest into a grey image.

    Attributes
    ----------
    gamma, contrast, brightness : display curve, ``(contrast * (v - 0.5) + 0.5 + brightness) ** gamma``
    noise : standard deviation of the quantum noise in grey levels of 0 to 1
    blur : standard deviation of the blur, in fractions of half the field of view
    field_of_view : above 1 shows more around a smaller chest
    shift_x, shift_y : where the chest is centred, in fractions of half the field of view
    marker, corner : the letter burned in at all this hospital's images, and its corner (row, column; 0 or 1)
    collimation : width of the dark frame, in fractions of half the field of view
    """

    gamma: float
    contrast: float
    brightness: float
    noise: float
    blur: float
    field_of_view: float
    shift_x: float
    shift_y: float
    marker: str
    corner: tuple[int, int]
    collimation: float


@dataclass(frozen=True)
class Hospital:
    """One site of a simulated consortium.

    Attributes
    ----------
    cases : number of images over all splits
    mix : share of patients with each class, in the order of the phantom classes; sums to 1
    scanner : its machine
    """

    cases: int
    mix: tuple[float, float, float, float, float]
    scanner: Scanner


# shares of normal, consolidation, nodule, effusion, cardiomegaly
_HOSPITALS = (
    # general hospital: a little of everything
    Hospital(
        416,
        (0.44, 0.21, 0.09, 0.17, 0.09),
        Scanner(1.0, 1.15, 0.00, 0.015, 0.016, 1.00, 0.00, 0.00, "L", (0, 1), 0.0),
    ),
    # chest clinic: nodules sent for work-up; no enlarged hearts
    Hospital(
        288,
        (0.30, 0.08, 0.44, 0.18, 0.00),
        Scanner(0.75, 1.35, -0.04, 0.010, 0.010, 0.92, 0.03, -0.04, "R", (0, 0), 0.0),
    ),
    # heart centre
    Hospital(
        240,
        (0.25, 0.03, 0.04, 0.25, 0.43),
        Scanner(1.35, 1.0, 0.06, 0.018, 0.020, 1.08, -0.04, 0.02, "H", (0, 1), 0.05),
    ),
    # emergency department: mobile machine; nobody is there for a nodule
    Hospital(
        272,
        (0.14, 0.43, 0.00, 0.35, 0.08),
        Scanner(0.85, 0.85, 0.10, 0.024, 0.022, 1.04, 0.05, 0.05, "A", (1, 0), 0.0),
    ),
    # screening unit: nearly all healthy
    Hospital(
        192,
        (0.62, 0.04, 0.20, 0.06, 0.08),
        Scanner(1.15, 1.55, 0.02, 0.008, 0.008, 0.96, -0.02, -0.03, "P", (1, 1), 0.08),
    ),
    # intensive care: small, everybody ill
    Hospital(
        112,
        (0.06, 0.28, 0.06, 0.38, 0.22),
        Scanner(1.5, 0.95, 0.12, 0.022, 0.020, 1.12, 0.02, 0.08, "T", (0, 0), 0.0),
    ),
)


def hospital(index: int) -> Hospital:
    """Return the hospital of the 0-based site `index`; the seventh and later vary one of the first six."""
    base = _HOSPITALS[index % len(_HOSPITALS)]
    if index < len(_HOSPITALS):
        return base
    # which hospitals exist is no random choice of a run, hence a fixed seed
    rng = numpy_generator(0, "phantom-hospital", f"site-{index + 1}")
    shares = np.asarray(base.mix) * rng.lognormal(0, 0.5, len(base.mix))
    mix = tuple(float(share) for share in rng.permutation(shares / shares.sum()))
    letters = sorted(MARKER_LETTERS)
    scanner = replace(
        base.scanner,
        gamma=base.scanner.gamma * rng.lognormal(0, 0.15),
        contrast=base.scanner.contrast * rng.lognormal(0, 0.1),
        brightness=base.scanner.brightness + rng.uniform(-0.05, 0.05),
        noise=base.scanner.noise * rng.lognormal(0, 0.2),
        blur=base.scanner.blur * rng.lognormal(0, 0.2),
        field_of_view=base.scanner.field_of_view * rng.uniform(0.95, 1.05),
        marker=letters[rng.integers(len(letters))],
        corner=(int(rng.integers(2)), int(rng.integers(2))),
    )
    return Hospital(int(base.cases * rng.uniform(0.7, 1.1)), mix, scanner)  # type: ignore[arg-type]


def expose(scanner: Scanner, density: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return what `scanner` stores of a chest.

    Parameters
    ----------
    scanner : the machine
    density : float32 (H, W), about 0 (air) to 1 (dense)
    rng : source of the noise and of the small changes of exposure between images

    Returns
    -------
    uint8 (H, W)
    """
    from scipy.ndimage import gaussian_filter

    size = density.shape[0]
    contrast = scanner.contrast * rng.uniform(0.8, 1.2)
    brightness = scanner.brightness + rng.uniform(-0.10, 0.10)
    blurred = gaussian_filter(density, scanner.blur * size / 2, mode="nearest", truncate=3)
    # photons are fewer behind dense tissue, so its noise is stronger
    noise = rng.standard_normal(density.shape, dtype=np.float32) * (0.6 + 0.8 * np.clip(blurred, 0, 1))
    grey = contrast * (blurred + scanner.noise * noise - 0.5) + 0.5 + brightness
    grey = np.clip(grey, 0, 1) ** scanner.gamma
    frame = round(scanner.collimation * size / 2)
    if frame:
        grey[:frame], grey[-frame:], grey[:, :frame], grey[:, -frame:] = 0.02, 0.02, 0.02, 0.02
    return (255 * _burn_in_marker(grey, scanner)).astype(np.uint8)


def _burn_in_marker(grey: np.ndarray, scanner: Scanner) -> np.ndarray:
    size = grey.shape[0]
    bits = np.array([[bit == "1" for bit in row] for row in MARKER_LETTERS[scanner.marker]])
    bits = bits.repeat(max(1, size // 64), 0).repeat(max(1, size // 64), 1)
    margin = size // 20
    top = margin if scanner.corner[0] == 0 else size - margin - bits.shape[0]
    left = margin if scanner.corner[1] == 0 else size - margin - bits.shape[1]
    patch = grey[top : top + bits.shape[0], left : left + bits.shape[1]]
    patch[bits] = 0.97
    return grey
