"""What the synthetic tissues are drawn from: periodic textures of two stains, and the stains themselves."""

from __future__ import annotations

import functools

import numpy as np
from monai.utils import optional_import

__all__ = ["CLASSES", "PERIOD", "draw_stain", "render", "smooth_noise", "texture"]

gaussian_filter, _ = optional_import("scipy.ndimage", name="gaussian_filter")
zoom, _ = optional_import("scipy.ndimage", name="zoom")
cKDTree, _ = optional_import("scipy.spatial", name="cKDTree")

CLASSES = ("stroma", "tumour", "gland", "necrosis", "fat")
PERIOD = 640  # µm; textures repeat beyond it

# Absorbance of haematoxylin and eosin in R, G, B (rows of unit length), as commonly measured.
_STAINS = np.array([[0.62, 0.71, 0.34], [0.10, 0.92, 0.37]])
_GLASS = 243.0  # brightness of empty glass, 0 … 255


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float, periodic: bool = True) -> np.ndarray:
    """Smooth noise of zero mean and unit deviation with features of about ``scale`` px, float32."""
    step = max(1, int(scale // 3))
    coarse = rng.standard_normal([max(2, -(-side // step)) for side in shape])
    smooth = gaussian_filter(coarse, scale / step / 2, mode="wrap" if periodic else "reflect")
    if step > 1:
        smooth = zoom(
            smooth,
            [side / have for side, have in zip(shape, smooth.shape)],
            order=1,
            mode="grid-wrap" if periodic else "nearest",
            grid_mode=True,
        )
    return ((smooth - smooth.mean()) / max(smooth.std(), 1e-12)).astype(np.float32)


def _grid_points(rng: np.random.Generator, spacing: float, jitter: float) -> np.ndarray:
    """Jittered grid of points ``(row, col)`` on the periodic square, every other row shifted by half."""
    count = 2 * round(PERIOD / spacing / 2)
    grid = np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), axis=-1) + 0.25
    grid[1::2, :, 1] += 0.5
    return (grid.reshape(-1, 2) * PERIOD / count + rng.uniform(-jitter, jitter, (count**2, 2)) * spacing) % PERIOD


def _stamp(canvas: np.ndarray, points: np.ndarray, major, minor, angle, strength, clear: float = 0.0) -> None:
    """Darken ellipses: semi-axes in px, ``angle`` in radians from the columns' axis, one value per point or for all.

    ``clear`` is how far chromatin gives way inside the rim, as in vesicular nuclei.
    """
    major, minor, angle, strength = (np.broadcast_to(v, len(points)) for v in (major, minor, angle, strength))
    for (row, col), a, b, phi, s in zip(points, major, minor, angle, strength):
        reach = int(np.ceil(a)) + 2
        rows = np.arange(int(row) - reach, int(row) + reach + 1)
        cols = np.arange(int(col) - reach, int(col) + reach + 1)
        y, x = (rows - row)[:, None], (cols - col)[None]
        along, across = x * np.cos(phi) + y * np.sin(phi), -x * np.sin(phi) + y * np.cos(phi)
        radius = np.sqrt((along / a) ** 2 + (across / b) ** 2)
        inside = (1.0 - clear * np.exp(-((radius / 0.6) ** 4))) / (1.0 + np.exp(6.0 * (radius - 1.0)))
        block = np.ix_(rows % PERIOD, cols % PERIOD)
        canvas[block] = np.maximum(canvas[block], s * inside)


def _stroma(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rows = (
        np.arange(PERIOD)[:, None] + 14 * smooth_noise(rng, (PERIOD, PERIOD), 90) + 4 * smooth_noise(rng, (PERIOD, PERIOD), 25)
    )
    fibres = np.sin(2 * np.pi * rows / 8) + 0.6 * np.sin(2 * np.pi * rows / 20 + 1)
    eosin = 0.52 + 0.13 * fibres + 0.06 * smooth_noise(rng, (PERIOD, PERIOD), 3)
    slope = np.arctan2(-np.gradient(rows, axis=1), np.gradient(rows, axis=0))
    points = rng.uniform(0, PERIOD, (int(PERIOD**2 / 420), 2))
    along = slope[points[:, 0].astype(int), points[:, 1].astype(int)]
    nuclei = np.zeros((PERIOD, PERIOD))
    _stamp(
        nuclei,
        points,
        rng.uniform(5, 8, len(points)),
        rng.uniform(1.6, 2.4, len(points)),
        along,
        rng.uniform(0.7, 1.1, len(points)),
    )
    return nuclei + 0.05, eosin


def _tumour(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    points = _grid_points(rng, 10.5, 0.45)
    major = rng.lognormal(np.log(4.6), 0.22, len(points))
    nuclei = np.zeros((PERIOD, PERIOD))
    _stamp(
        nuclei,
        points,
        major,
        major * rng.uniform(0.65, 1.0, len(points)),
        rng.uniform(0, np.pi, len(points)),
        rng.uniform(0.6, 1.25, len(points)),
        clear=0.45,
    )
    nucleoli = points[rng.random(len(points)) < 0.5]
    _stamp(nuclei, nucleoli + rng.uniform(-1, 1, nucleoli.shape), 1.3, 1.2, 0.0, 1.1)
    nuclei *= 1 + 0.25 * smooth_noise(rng, (PERIOD, PERIOD), 3)
    return nuclei + 0.12, 0.36 + 0.08 * smooth_noise(rng, (PERIOD, PERIOD), 14) + 0.05 * smooth_noise(rng, (PERIOD, PERIOD), 3)


def _gland(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = _grid_points(rng, 64, 0.2)
    lumen = rng.uniform(7, 17, len(centres))
    grid = np.stack(np.meshgrid(np.arange(PERIOD), np.arange(PERIOD), indexing="ij"), axis=-1).reshape(-1, 2)
    distance, nearest = cKDTree(centres, boxsize=PERIOD).query(grid)
    distance = distance.reshape(PERIOD, PERIOD) + 3.5 * smooth_noise(rng, (PERIOD, PERIOD), 24)
    radius = lumen[nearest].reshape(PERIOD, PERIOD)
    inside, outside = distance < radius, distance > radius + 15
    haematoxylin, eosin = _stroma(rng)
    epithelium = 0.42 + 0.06 * smooth_noise(rng, (PERIOD, PERIOD), 4)
    eosin = np.where(inside, 0.02, np.where(outside, eosin, epithelium))
    nuclei = np.zeros((PERIOD, PERIOD))
    for centre, r in zip(centres, lumen):
        ring = r + 10.5
        angle = np.arange(0, 2 * np.pi, 6.4 / ring) + rng.uniform(0, 1)
        points = centre + (ring + rng.normal(0, 1.0, len(angle)))[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        _stamp(nuclei, points % PERIOD, 4.4, 2.6, angle, rng.uniform(0.8, 1.2, len(angle)))
    return np.where(inside, 0.01, np.where(outside, haematoxylin, nuclei + 0.08)), eosin


def _necrosis(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    eosin = 0.5 + 0.13 * smooth_noise(rng, (PERIOD, PERIOD), 3) + 0.1 * smooth_noise(rng, (PERIOD, PERIOD), 30)
    dots = np.zeros((PERIOD, PERIOD))
    points = rng.uniform(0, PERIOD, (int(PERIOD**2 / 150), 2))
    _stamp(
        dots,
        points,
        rng.uniform(1.0, 2.2, len(points)),
        rng.uniform(0.9, 1.6, len(points)),
        0.0,
        rng.uniform(0.5, 1.3, len(points)),
    )
    return dots + 0.1 + 0.04 * smooth_noise(rng, (PERIOD, PERIOD), 10), eosin


def _fat(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = _grid_points(rng, 38, 0.36)
    grid = np.stack(np.meshgrid(np.arange(PERIOD), np.arange(PERIOD), indexing="ij"), axis=-1).reshape(-1, 2)
    distances, _ = cKDTree(centres, boxsize=PERIOD).query(grid, k=2)
    gap = (distances[:, 1] - distances[:, 0]).reshape(PERIOD, PERIOD) + 0.8 * smooth_noise(rng, (PERIOD, PERIOD), 12)
    septum = 1.0 / (1.0 + np.exp(1.6 * (gap - 3.4)))
    candidates = np.argwhere(septum > 0.8)
    points = candidates[rng.integers(0, len(candidates), int(PERIOD**2 / 2200))].astype(float)
    nuclei = np.zeros((PERIOD, PERIOD))
    _stamp(nuclei, points, 4.5, 1.8, rng.uniform(0, np.pi, len(points)), 0.9)
    return nuclei + 0.01, 0.03 + 0.5 * septum


_TEXTURES = {"stroma": _stroma, "tumour": _tumour, "gland": _gland, "necrosis": _necrosis, "fat": _fat}


@functools.cache
def _drawn(name: str, variant: int) -> np.ndarray:
    rng = np.random.default_rng([CLASSES.index(name), variant])
    return np.stack([gaussian_filter(plane, 0.6, mode="wrap") for plane in _TEXTURES[name](rng)]).clip(0).astype(np.float32)


@functools.lru_cache(maxsize=64)
def texture(name: str, variant: int, mpp: float = 1.0) -> np.ndarray:
    """One drawing of a tissue.

    Args:
        name: one of :data:`CLASSES`.
        variant: number of the drawing; no two share a nucleus.
        mpp: µm/px. Drawn at 1; finer ones are magnified and get a grain of chromatin and fibrils.

    Returns:
        Concentrations of haematoxylin and eosin, shape ``[2, P, P]`` with P = :data:`PERIOD` / mpp rounded, float32, periodic.
    """
    drawn = _drawn(name, variant)
    if mpp == 1:
        return drawn
    side = max(2, round(PERIOD / mpp))
    blur = max(0.0, 0.4 * (mpp - 1))  # px of 1 µm; keeps coarse images free of aliasing
    planes = [gaussian_filter(plane, blur, mode="wrap") if blur else plane for plane in drawn]
    scaled = np.stack([zoom(plane, side / PERIOD, order=1, mode="grid-wrap", grid_mode=True) for plane in planes])
    if mpp < 1:
        rng = np.random.default_rng([CLASSES.index(name), variant, side])
        scaled *= 1 + 0.1 * smooth_noise(rng, (side, side), 2)
    return scaled.clip(0)


def draw_stain(rng: np.random.Generator, variation: float) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors ``[2, 3]`` and glass ``[3]`` of one patient."""
    vectors = (_STAINS + variation * rng.normal(0, 0.035, (2, 3))).clip(0.02)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(variation * rng.normal(0, 0.16, (2, 1))) * np.array([[1.5], [1.15]])
    return vectors * strength, _GLASS + variation * rng.uniform(-6, 6, 3)


def render(concentration: np.ndarray, stain: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Concentrations ``[2, …]`` to RGB ``[…, 3]``, float32, 0 … 255."""
    density = np.einsum("s...,sc->...c", concentration, stain[0].astype(np.float32))
    return (stain[1] * np.exp(-density)).astype(np.float32)
