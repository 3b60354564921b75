"""The chest of a phantom: anatomy, one finding, and the radiograph that both would give.

Lengths are fractions of half the field of view: x runs from -1 (the patient's right, image left) to 1, y from
-1 (top) to 1. Everything is drawn from formulas in these coordinates, so a phantom looks alike at every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

Finding = Literal["normal", "consolidation", "nodule", "effusion", "cardiomegaly"]
Side = Literal["right", "left"]
Zone = Literal["upper", "mid", "lower"]

EDGE = 0.02  # softness of an anatomical border


@dataclass(frozen=True)
class ChestAnatomy:
    """What differs between healthy chests; lengths in fractions of half the field of view. Annotated is between what
    `draw_anatomy` draws it.

    Attributes
    ----------
    half_width : from the midline to the inner chest wall
    apex, base : y of the lung apices and of the costophrenic angles
    dome : height of each diaphragm dome; `right_elevation` is how much higher the right one stands
    cardiothoracic_ratio : heart width over inner thorax width, 0.5 is the usual upper limit of normal
    heart_height, heart_tilt : heart height over its width; tilt of its long axis in radians
    mediastinum : half width of the mediastinum
    rotation : sideways shift of the mediastinum when the patient stands rotated
    rib_spacing, rib_phase, rib_slope, rib_contrast : course and brightness of the ribs
    soft_tissue, aeration : brightness of the body wall; how dark the lungs are against it
    breast : density of the breast shadows, 0 for none; the limits are those of women
    clavicle : y of the medial clavicle ends
    gastric_bubble : radius of the air below the left diaphragm, 0 for none, as for what is drawn below it
    vessels : contrast of the vessels that radiate from the hila
    """

    half_width: Annotated[float, (0.62, 0.80)]
    apex: Annotated[float, (-0.84, -0.70)]
    base: Annotated[float, (0.42, 0.66)]
    dome: Annotated[float, (0.12, 0.24)]
    right_elevation: Annotated[float, (0.0, 0.10)]
    cardiothoracic_ratio: Annotated[float, (0.38, 0.49)]
    heart_height: Annotated[float, (0.85, 1.10)]
    heart_tilt: Annotated[float, (0.25, 0.75)]
    mediastinum: Annotated[float, (0.11, 0.17)]
    rotation: Annotated[float, (-0.09, 0.09)]
    rib_spacing: Annotated[float, (0.17, 0.22)]
    rib_phase: Annotated[float, (0.0, 1.0)]
    rib_slope: Annotated[float, (0.25, 0.55)]
    rib_contrast: Annotated[float, (0.04, 0.08)]
    soft_tissue: Annotated[float, (0.46, 0.58)]
    aeration: Annotated[float, (0.28, 0.40)]
    breast: Annotated[float, (0.02, 0.10)]
    clavicle: Annotated[float, (-0.66, -0.54)]
    gastric_bubble: Annotated[float, (-0.08, 0.13)]
    vessels: Annotated[float, (0.05, 0.12)]

    def lateral_border(self, y: ArrayLike) -> np.ndarray:
        """Distance of the chest wall from the midline at height `y`."""
        middle = 0.05
        y = np.asarray(y)
        toward_apex = np.clip((middle - y) / (middle - self.apex), 0, 1)
        below = np.clip(y - middle, 0, None)
        return np.asarray(self.half_width * np.sqrt(1 - toward_apex**2.8) + 0.03 * below)

    def diaphragm(self, x: ArrayLike) -> np.ndarray:
        """Height y of the diaphragm at `x`."""
        x = np.asarray(x)
        from_dome = (np.abs(x) / self.half_width - 0.42) / 0.58
        elevation = np.where(x < 0, self.right_elevation, 0.0)
        return np.asarray(self.base - self.dome * (1 - from_dome**2) - elevation)

    def heart_ellipse(self) -> tuple[float, float, float, float]:
        """Return centre x, centre y, half width and half height of the heart."""
        half_width = self.cardiothoracic_ratio * self.half_width
        half_height = half_width * self.heart_height
        x = self.rotation + 0.3 * half_width
        return x, self.base - 0.55 * self.dome - 0.62 * half_height, half_width, half_height


@dataclass(frozen=True)
class Lesion:
    """One finding of a chest; `finding` is "normal" where there is none.

    Attributes
    ----------
    finding : what a radiologist would call it
    side : side of the lesion, or of the larger of two effusions
    x, y : centre of a nodule or consolidation
    size : radius of a nodule or consolidation; height of an effusion above the costophrenic angle
    opacity : share of the air that the lesion displaces, 0 to 1
    cardiothoracic_ratio : of an enlarged heart; unused by the other findings
    blobs : (k, 3) x, y, radius of the patches of a consolidation, relative to its centre and size
    bilateral : share of `size` that an effusion reaches on the other side
    """

    finding: Finding
    side: Side
    x: float
    y: float
    size: float
    opacity: float
    cardiothoracic_ratio: float
    blobs: np.ndarray
    bilateral: float

    @property
    def zone(self) -> Zone:
        """Third of the lung that the lesion lies in."""
        return "upper" if self.y < -0.3 else "mid" if self.y < 0.05 else "lower"


def draw_anatomy(rng: np.random.Generator, female: bool) -> ChestAnatomy:
    """Draw the healthy anatomy of one patient."""
    drawn = {}
    for name, kind in get_type_hints(ChestAnatomy, include_extras=True).items():
        low, high = (0.0, 0.02) if name == "breast" and not female else kind.__metadata__[0]
        drawn[name] = rng.uniform(low, high)
    return ChestAnatomy(**{**drawn, "gastric_bubble": max(0.0, drawn["gastric_bubble"])})


def draw_lesion(rng: np.random.Generator, finding: Finding, anatomy: ChestAnatomy) -> Lesion:
    """Draw a finding that fits into `anatomy`: nodules and consolidations lie in aerated lung."""
    side: Side = "left" if rng.random() < 0.5 else "right"
    sign = 1 if side == "left" else -1
    depth, breadth = rng.uniform(0.12, 0.9), rng.uniform(0.2, 0.85)
    size, opacity = {
        "nodule": (rng.uniform(0.09, 0.15), rng.uniform(0.75, 1.0)),
        "consolidation": (rng.uniform(0.22, 0.36), rng.uniform(0.65, 0.95)),
        "effusion": (rng.uniform(0.25, 0.55), rng.uniform(0.80, 0.97)),
    }.get(finding, (0.0, 0.0))

    # the inner border of aerated lung is the heart where there is one, else the mediastinum
    heart_x, heart_y, heart_width, heart_height = anatomy.heart_ellipse()
    floor = float(anatomy.diaphragm(sign * 0.45 * anatomy.half_width))
    y = anatomy.apex + depth * (floor - anatomy.apex)
    chord = heart_width * np.sqrt(max(0.0, 1 - ((y - heart_y) / heart_height) ** 2))
    inner = max(anatomy.mediastinum + sign * anatomy.rotation, sign * heart_x + chord if chord > 0 else 0.0)
    x = sign * (inner + breadth * max(float(anatomy.lateral_border(y)) - inner, 0.05))
    return Lesion(
        finding=finding,
        side=side,
        x=float(x),
        y=float(y),
        size=size,
        opacity=opacity,
        cardiothoracic_ratio=rng.uniform(0.56, 0.68),
        blobs=np.column_stack([rng.uniform(-0.7, 0.7, (4, 2)), rng.uniform(0.35, 0.75, 4)]).astype(np.float32),
        bilateral=max(0.0, rng.uniform(-1.0, 0.8)),
    )


def render_chest(
    anatomy: ChestAnatomy, lesion: Lesion, x: np.ndarray, y: np.ndarray, texture: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the radiograph before it passes a scanner, and the region of interest.

    Parameters
    ----------
    anatomy, lesion : the patient
    x, y : float32 (H, W), position of each pixel in the patient's coordinates
    texture : source of the vessels and of the mottle of lung and consolidation

    Returns
    -------
    density : float32 (H, W), about 0 (air) to 1 (dense)
    region : bool (H, W), the lesion; both lung fields of a normal chest; the heart where it is enlarged
    """
    enlarged = lesion.finding == "cardiomegaly"
    ratio = lesion.cardiothoracic_ratio if enlarged else anatomy.cardiothoracic_ratio
    pixel = float(abs(x[0, 1] - x[0, 0]) + abs(y[0, 1] - y[0, 0]))
    mottle = _mottle(texture, x.shape, 0.035 / pixel)

    distance = np.abs(x)
    wall, floor = anatomy.lateral_border(y), anatomy.diaphragm(x)
    cage = _inside(wall - distance)
    above_floor = _inside(floor - y)
    heart = _heart(anatomy, ratio, x, y)
    central = _inside(_mediastinum_border(anatomy, y) - np.abs(x - anatomy.rotation), 0.03)
    lungs = cage * above_floor * (1 - central)
    air = lungs * (1 - 0.94 * heart)
    opacity = _lesion_opacity(anatomy, lesion, x, y, wall, mottle)

    density = _body(anatomy, x, y)
    density += 0.14 * (1 - above_floor) * cage
    density -= _gastric_bubble(anatomy, x, y) * (1 - above_floor)
    density += 0.10 * central + 0.09 * heart + _spine(anatomy, x, y) - _trachea(anatomy, x, y)
    density += _ribs(anatomy, distance, y) * (0.35 + 0.65 * above_floor) * _inside(wall + 0.05 - distance)
    density += _clavicles(anatomy, x, y) + _breasts(anatomy, distance, y)
    density -= anatomy.aeration * air * (1 - _vessels(anatomy, x, y, texture) - 0.04 * mottle) * (1 - opacity)
    density -= 0.05 * air * np.clip(-y, -0.5, 0.8)  # the bases lie behind more tissue than the apices

    if lesion.finding == "normal":
        region = lungs > 0.5
    elif enlarged:
        region = heart > 0.5
    else:
        # without the mottle: the air left inside a consolidation belongs to its region
        shadow = _lesion_opacity(anatomy, lesion, x, y, wall, np.zeros_like(x)) * lungs
        region = shadow > 0.4 * shadow.max()
    return density.astype(np.float32), region


def _inside(depth: np.ndarray, softness: float = EDGE) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(depth * (1 / softness)))


def _blob(x: np.ndarray, y: np.ndarray, radius_x: float, radius_y: float) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * ((x / radius_x) ** 2 + (y / radius_y) ** 2)))


def _mottle(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    field: np.ndarray = gaussian_filter(
        rng.standard_normal(shape, dtype=np.float32), sigma, mode="reflect", truncate=2.5
    )
    return np.asarray(field / (field.std() + 1e-6))


def _body(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    shoulder = _inside(y - (anatomy.apex - 0.02) + 0.12 * np.abs(x), 0.05)
    width = 0.30 + (anatomy.half_width - 0.14) * shoulder
    return 0.04 + anatomy.soft_tissue * _inside(width - np.abs(x), 0.035)


def _heart(anatomy: ChestAnatomy, ratio: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    healthy_x, healthy_y, healthy_width, _ = anatomy.heart_ellipse()
    half_width = ratio * anatomy.half_width
    growth = half_width - healthy_width
    half_height = half_width * anatomy.heart_height
    dx, dy = x - (healthy_x + 0.3 * growth), y - (healthy_y - 0.3 * growth)
    cos, sin = np.cos(anatomy.heart_tilt), np.sin(anatomy.heart_tilt)
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    # a tilted ellipse is wider than its half axis says unless this is divided out
    widest = np.hypot(half_width * cos, half_height * 0.82 * sin) / half_width
    radius = np.sqrt((along / half_width) ** 2 + (across / (half_height * 0.82)) ** 2) * widest
    return _inside((1 - radius) * half_width, 0.022)


def _mediastinum_border(anatomy: ChestAnatomy, y: np.ndarray) -> np.ndarray:
    aortic_knob = 0.05 * _blob(y + 0.28, np.zeros(1, np.float32), 0.09, 1.0)
    return np.asarray(anatomy.mediastinum + aortic_knob + 0.05 * np.clip(-0.45 - y, 0, 0.4))


def _spine(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    vertebrae = 0.75 + 0.25 * np.cos(2 * np.pi * (y / (0.9 * anatomy.rib_spacing) + anatomy.rib_phase))
    return np.asarray(0.10 * vertebrae * _inside(0.075 - np.abs(x - 0.4 * anatomy.rotation), 0.015))


def _trachea(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(0.17 * _inside(0.045 - np.abs(x - anatomy.rotation), 0.015) * _inside(-0.30 - y, 0.04))


def _ribs(anatomy: ChestAnatomy, distance: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = distance / anatomy.half_width
    posterior = (y - anatomy.rib_slope * out**2 + 0.12 * out) / anatomy.rib_spacing + anatomy.rib_phase
    anterior = (y + 0.9 * anatomy.rib_slope * out - 0.15 * out**2) / (1.15 * anatomy.rib_spacing) + anatomy.rib_phase
    bands = _inside(np.cos(2 * np.pi * posterior) - 0.25, 0.18)
    front = _inside(np.cos(2 * np.pi * anterior) - 0.25, 0.18) * _inside(out - 0.45, 0.08)
    return np.asarray(anatomy.rib_contrast * (bands + 0.55 * front) * _inside(y - anatomy.apex, 0.04))


def _clavicles(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    from_midline = np.abs(x - 0.5 * anatomy.rotation)
    course = anatomy.clavicle - 0.22 * from_midline + 0.05 * np.sin(6.0 * from_midline)
    extent = _inside(from_midline - 0.09) * _inside(0.82 - from_midline)
    return np.asarray(0.13 * np.exp(-0.5 * ((y - course) / 0.035) ** 2) * extent)


def _breasts(anatomy: ChestAnatomy, distance: np.ndarray, y: np.ndarray) -> np.ndarray:
    return anatomy.breast * _inside(0.30 - np.hypot(distance - 0.52 * anatomy.half_width, 0.8 * (y - 0.24)), 0.04)


def _gastric_bubble(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if anatomy.gastric_bubble == 0:
        return np.zeros_like(x)
    top = float(anatomy.diaphragm(0.45)) + anatomy.gastric_bubble
    return 0.25 * _blob(x - 0.42, y - top, 1.3 * anatomy.gastric_bubble, 0.8 * anatomy.gastric_bubble)


def _vessels(anatomy: ChestAnatomy, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hila, and streaks that radiate from them and fade toward the chest wall."""
    angles = np.linspace(-np.pi, np.pi, 40, dtype=np.float32)
    vessels = np.zeros_like(x)
    for sign in (-1, 1):
        dx, dy = x - sign * 0.19 - anatomy.rotation, y + 0.10
        radius = np.hypot(dx, dy)
        bends = rng.uniform(-0.5, 0.5)
        streaks = np.interp(np.arctan2(dy, sign * dx) + bends * radius, angles, rng.uniform(0, 1, 40) ** 3)
        near = (sign * x > 0) * np.exp(-radius / 0.28)
        vessels += near * (3.0 * anatomy.vessels * streaks + 0.30 * np.exp(-((radius / 0.12) ** 2)))
    return vessels.astype(np.float32)


def _lesion_opacity(
    anatomy: ChestAnatomy,
    lesion: Lesion,
    x: np.ndarray,
    y: np.ndarray,
    wall: np.ndarray,
    mottle: np.ndarray,
) -> np.ndarray:
    """Return the share of air that the lesion displaces at each pixel, (H, W)."""
    dx, dy = x - lesion.x, y - lesion.y
    if lesion.finding == "nodule":
        return lesion.opacity * _inside(lesion.size - np.hypot(dx, dy), 0.015)
    if lesion.finding == "consolidation":
        clear = np.ones_like(x)
        for blob_x, blob_y, radius in lesion.blobs * lesion.size:
            clear *= 1 - _blob(dx - blob_x, dy - blob_y, radius, radius)
        return np.clip(lesion.opacity * (1 - clear) * (1 + 0.45 * mottle), 0, 1)
    if lesion.finding == "effusion":
        sign = 1 if lesion.side == "left" else -1
        height = np.where(sign * x > 0, lesion.size, lesion.size * lesion.bilateral)
        # fluid climbs the chest wall: the meniscus
        climb = np.clip(np.abs(x) / np.maximum(wall, EDGE), 0, 1.1) ** 3
        level = anatomy.base - height * (0.30 + 0.70 * climb)
        return lesion.opacity * _inside(y - level, 0.03) * (height > 0.02)
    return np.zeros_like(x)
