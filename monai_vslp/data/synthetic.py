"""Synthetic H&E-like tissue with known masks: cohorts, tables as people would write them, and whole slides.

Five tissues with their own nuclei, glands, fibres and vacuoles are drawn in optical density and stained with vectors that
vary from patient to patient. Colours overlap between tissues (lumina are as white as fat, necrosis is as pink as stroma), so
that structure has to be learned. It looks like histology and is none: figures measured on it say nothing about patients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.data.cohort import write_table
from monai_vslp.data.raters import NOISE_LEVELS, simulate_raters
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.variational.transport import solve_transport

__all__ = [
    "CLASSES",
    "COLORS",
    "SyntheticSlide",
    "SyntheticTissue",
    "label_map",
    "synthetic_image",
    "write_cohort",
    "write_slide",
]

Image, _ = optional_import("PIL.Image")
gaussian_filter, _ = optional_import("scipy.ndimage", name="gaussian_filter")
zoom, _ = optional_import("scipy.ndimage", name="zoom")
cKDTree, _ = optional_import("scipy.spatial", name="cKDTree")
tifffile, _ = optional_import("tifffile")

CLASSES = ("stroma", "tumour", "gland", "necrosis", "fat")
COLORS = ((148, 163, 184), (213, 94, 0), (0, 158, 115), (0, 114, 178), (240, 228, 66))
PERIOD = 640  # px at 1 µm/px; textures repeat beyond it
VARIANTS = 2  # textures per class
NO_TISSUE = 255

# Absorbance of haematoxylin and eosin in R, G, B (rows of unit length), as commonly measured.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
_GLASS = 243.0  # brightness of empty glass, 0 … 255


@dataclass(frozen=True)
class SyntheticTissue:
    """An image ``[H, W, 3]`` uint8, its classes ``[H, W]`` uint8 and their proportions ``[C]`` float64."""

    image: np.ndarray
    mask: np.ndarray
    proportions: np.ndarray


@dataclass(frozen=True)
class SyntheticSlide:
    """Files of a slide: ``path`` (pyramidal TIFF), ``mask`` (PNG, classes at 1 / ``mask_downsample``, 255 without tissue), and
    the proportions ``[C]`` of its tissue."""

    path: Path
    mask: Path
    mask_downsample: int
    proportions: np.ndarray


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float, periodic: bool = True) -> np.ndarray:
    """Smooth noise of zero mean and unit deviation with features of about ``scale`` px, float32."""
    step = max(1, int(scale // 3))
    coarse = rng.standard_normal([max(2, -(-side // step)) for side in shape])
    smooth = gaussian_filter(coarse, scale / step / 2, mode="wrap" if periodic else "reflect")
    if step > 1:
        smooth = zoom(
            smooth, [side / have for side, have in zip(shape, smooth.shape)], order=1, mode="grid-wrap", grid_mode=True
        )
    return ((smooth - smooth.mean()) / max(smooth.std(), 1e-12)).astype(np.float32)


def label_map(shape: tuple[int, int], proportions: Sequence[float], seed: int = 0, scale: float = 70.0) -> np.ndarray:
    """Irregular regions whose areas have the given proportions (to about half a percent on 256×256 px and more).

    Each class is a smooth random field; a pixel belongs to the class with the greatest field plus an offset, and the
    offsets are the potentials of the transport problem between pixels and classes.

    Args:
        shape: ``(H, W)`` in px.
        proportions: fractions per class; classes with 0 do not occur.
        seed: seed of the fields.
        scale: size of the regions, px.

    Returns:
        Class indices, shape ``[H, W]``, uint8.
    """
    rng = np.random.default_rng(seed)
    fields = np.stack([_noise(rng, shape, scale, periodic=False) for _ in proportions])
    step = max(1, int(np.sqrt(shape[0] * shape[1] / 16_000)))
    sample = torch.from_numpy(fields[:, ::step, ::step].reshape(len(fields), -1).astype(np.float64))
    mass = torch.full((sample.shape[1],), 1.0 / sample.shape[1], dtype=torch.float64)
    p = torch.as_tensor(proportions, dtype=torch.float64)
    psi = solve_transport(sample, mass, p / p.sum(), smoothing=0.01, tolerance=1e-5).psi.numpy()
    return (fields + psi.astype(np.float32)[:, None, None]).argmax(axis=0).astype(np.uint8)


def _grid_points(rng: np.random.Generator, spacing: float, jitter: float) -> np.ndarray:
    """Jittered grid of points ``(row, col)`` on the periodic square."""
    count = max(2, round(PERIOD / spacing))
    grid = (np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), axis=-1).reshape(-1, 2) + 0.5) / count
    return (grid * PERIOD + rng.uniform(-jitter, jitter, grid.shape) * spacing) % PERIOD


def _stamp(canvas: np.ndarray, points: np.ndarray, major, minor, angle, strength) -> None:
    """Darken ellipses: semi-axes in px, ``angle`` in radians from the columns' axis, one value per point or for all."""
    major, minor, angle, strength = (np.broadcast_to(v, len(points)) for v in (major, minor, angle, strength))
    for (row, col), a, b, phi, s in zip(points, major, minor, angle, strength):
        reach = int(np.ceil(a)) + 2
        rows = np.arange(int(row) - reach, int(row) + reach + 1)
        cols = np.arange(int(col) - reach, int(col) + reach + 1)
        y, x = (rows - row)[:, None], (cols - col)[None]
        along, across = x * np.cos(phi) + y * np.sin(phi), -x * np.sin(phi) + y * np.cos(phi)
        inside = 1.0 / (1.0 + np.exp(6.0 * (np.sqrt((along / a) ** 2 + (across / b) ** 2) - 1.0)))
        block = np.ix_(rows % PERIOD, cols % PERIOD)
        canvas[block] = np.maximum(canvas[block], s * inside)


def _stroma(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(PERIOD)[:, None] + 14 * _noise(rng, (PERIOD, PERIOD), 90) + 4 * _noise(rng, (PERIOD, PERIOD), 25)
    fibres = np.sin(2 * np.pi * rows / 8) + 0.6 * np.sin(2 * np.pi * rows / 20 + 1)
    eosin = 0.52 + 0.13 * fibres + 0.06 * _noise(rng, (PERIOD, PERIOD), 3)
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
    )
    nuclei *= 1 + 0.25 * _noise(rng, (PERIOD, PERIOD), 3)
    return nuclei + 0.12, 0.36 + 0.08 * _noise(rng, (PERIOD, PERIOD), 14) + 0.05 * _noise(rng, (PERIOD, PERIOD), 3)


def _gland(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = _grid_points(rng, 64, 0.14)
    lumen = rng.uniform(9, 17, len(centres))
    grid = np.stack(np.meshgrid(np.arange(PERIOD), np.arange(PERIOD), indexing="ij"), axis=-1).reshape(-1, 2)
    distance, nearest = cKDTree(centres, boxsize=PERIOD).query(grid)
    distance = distance.reshape(PERIOD, PERIOD) + 2.5 * _noise(rng, (PERIOD, PERIOD), 18)
    radius = lumen[nearest].reshape(PERIOD, PERIOD)
    inside, outside = distance < radius, distance > radius + 15
    haematoxylin, eosin = _stroma(rng)
    epithelium = 0.42 + 0.06 * _noise(rng, (PERIOD, PERIOD), 4)
    eosin = np.where(inside, 0.02, np.where(outside, eosin, epithelium))
    nuclei = np.zeros((PERIOD, PERIOD))
    for centre, r in zip(centres, lumen):
        ring = r + 10.5
        angle = np.arange(0, 2 * np.pi, 6.4 / ring) + rng.uniform(0, 1)
        points = centre + (ring + rng.normal(0, 1.0, len(angle)))[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        _stamp(nuclei, points % PERIOD, 4.4, 2.6, angle, rng.uniform(0.8, 1.2, len(angle)))
    return np.where(inside, 0.01, np.where(outside, haematoxylin, nuclei + 0.08)), eosin


def _necrosis(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    eosin = 0.5 + 0.13 * _noise(rng, (PERIOD, PERIOD), 3) + 0.1 * _noise(rng, (PERIOD, PERIOD), 30)
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
    return dots + 0.1 + 0.04 * _noise(rng, (PERIOD, PERIOD), 10), eosin


def _fat(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = _grid_points(rng, 38, 0.3)
    grid = np.stack(np.meshgrid(np.arange(PERIOD), np.arange(PERIOD), indexing="ij"), axis=-1).reshape(-1, 2)
    distances, _ = cKDTree(centres, boxsize=PERIOD).query(grid, k=2)
    gap = (distances[:, 1] - distances[:, 0]).reshape(PERIOD, PERIOD) + 0.8 * _noise(rng, (PERIOD, PERIOD), 12)
    septum = 1.0 / (1.0 + np.exp(1.6 * (gap - 3.4)))
    candidates = np.argwhere(septum > 0.8)
    points = candidates[rng.integers(0, len(candidates), int(PERIOD**2 / 2200))].astype(float)
    nuclei = np.zeros((PERIOD, PERIOD))
    _stamp(nuclei, points, 4.5, 1.8, rng.uniform(0, np.pi, len(points)), 0.9)
    return nuclei + 0.01, 0.03 + 0.5 * septum


_TEXTURES = {"stroma": _stroma, "tumour": _tumour, "gland": _gland, "necrosis": _necrosis, "fat": _fat}


@functools.cache
def _texture(name: str, variant: int) -> np.ndarray:
    """Concentrations of haematoxylin and eosin, ``[2, PERIOD, PERIOD]``, float32, periodic, at 1 µm/px."""
    rng = np.random.default_rng([CLASSES.index(name), variant])
    return np.stack([gaussian_filter(plane, 0.6, mode="wrap") for plane in _TEXTURES[name](rng)]).clip(0).astype(np.float32)


def _stain(rng: np.random.Generator, variation: float) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors ``[2, 3]`` and glass ``[3]`` of one patient."""
    vectors = (_STAINS + variation * rng.normal(0, 0.035, (2, 3))).clip(0.02)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(variation * rng.normal(0, 0.16, (2, 1))) * np.array([[1.5], [1.15]])
    return vectors * strength, _GLASS + variation * rng.uniform(-6, 6, 3)


def _render(concentration: np.ndarray, stain: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Concentrations ``[2, …]`` to RGB ``[…, 3]``, float32, 0 … 255."""
    density = np.einsum("s...,sc->...c", concentration, stain[0].astype(np.float32))
    return (stain[1] * np.exp(-density)).astype(np.float32)


def synthetic_image(
    shape: tuple[int, int] = (256, 256),
    proportions: Sequence[float] | None = None,
    seed: int = 0,
    stain_seed: int | None = None,
    stain_variation: float = 1.0,
) -> SyntheticTissue:
    """One image at 1 µm/px.

    Args:
        shape: ``(H, W)`` in px.
        proportions: fractions of :data:`CLASSES`; None draws diverse ones with some classes absent.
        seed: seed of everything but the stain.
        stain_seed: images with the same one look stained together; None for ``seed``.
        stain_variation: 0 for one stain throughout, 1 for what laboratories differ by.
    """
    rng = np.random.default_rng([seed, 1])
    if proportions is None:
        proportions = rng.dirichlet(np.full(len(CLASSES), 0.7)) * (rng.random(len(CLASSES)) < 0.75)
        proportions = np.where(proportions < 0.04, 0, proportions)
        if proportions.sum() == 0:
            proportions = np.eye(len(CLASSES))[rng.integers(len(CLASSES))]
    mask = label_map(shape, np.asarray(proportions, dtype=np.float64) / np.sum(proportions), seed=seed)
    concentration = np.zeros((2, *shape), dtype=np.float32)
    for index, name in enumerate(CLASSES):
        texture = _texture(name, int(rng.integers(VARIANTS)))
        texture = np.rot90(texture, rng.integers(4), axes=(1, 2))
        rows, cols = ((np.arange(side) + rng.integers(PERIOD)) % PERIOD for side in shape)
        inside = mask == index
        if inside.any():
            concentration[:, inside] = texture[:, rows][:, :, cols][:, inside]
    concentration *= 1 + 0.08 * _noise(rng, shape, 60, periodic=False)
    stain = _stain(np.random.default_rng([seed if stain_seed is None else stain_seed, 2]), stain_variation)
    image = _render(concentration, stain) + rng.normal(0, 3.0, (*shape, 3))
    share = np.bincount(mask.ravel(), minlength=len(CLASSES)) / mask.size
    return SyntheticTissue(image.round().clip(0, 255).astype(np.uint8), mask, share)


def write_cohort(folder: str | Path, train: int = 120, val: int = 20, size: int = 256, seed: int = 0) -> Path:
    """Write images, tables and, apart from them, masks.

    ``images/*.png``; ``masks/*.png`` (class indices, never needed for training); ``proportions.csv`` (exact); and
    ``proportions_rater_{low,medium,high}.csv``, each image as three raters would have entered it, in percent.

    Args:
        folder: where to write.
        train, val: number of images per split; four images share a patient and a stain.
        size: edge of the images, px.
        seed: seed of everything.

    Returns:
        Path of ``proportions.csv``.
    """
    folder = Path(folder)
    rows, shares = [], []
    for index in range(train + val):
        split = "train" if index < train else "val"
        patient = index // 4 if index < train else -(-train // 4) + (index - train) // 4
        tissue = synthetic_image((size, size), seed=seed * 10_007 + index, stain_seed=seed * 10_007 + 5_000 + patient)
        name = f"{split}_{index:04d}.png"
        for kind, array in (("images", tissue.image), ("masks", tissue.mask)):
            with atomic_path(folder / kind / name) as temporary:
                Image.fromarray(array).save(temporary)
        rows.append({"image": name, "split": split, "patient": f"p{patient:03d}", "mpp": "1.0"})
        shares.append(tissue.proportions)
    exact = np.array(shares)
    header = ["image", "split", "patient", "mpp"]
    table = [row | {c: f"{v:.4f}" for c, v in zip(CLASSES, p)} for row, p in zip(rows, exact)]
    path = write_table(folder / "proportions.csv", table, [*header, *CLASSES])
    for level in NOISE_LEVELS:
        noisy = simulate_raters(exact, level=level, raters=3, seed=seed)
        lines = [
            row | {"rater": f"r{r + 1}"} | {c: f"{100 * v:g}" for c, v in zip(CLASSES, np.round(noisy[r, i], 4))}
            for i, row in enumerate(rows)
            for r in range(len(noisy))
        ]
        write_table(folder / f"proportions_rater_{level}.csv", lines, [*header, "rater", *CLASSES])
    return path


def _tissue_pieces(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Two or three separate pieces on glass, bool ``[H, W]``."""
    centres = [(0.3, 0.3), (0.68, 0.66), (0.24, 0.78)][: int(rng.integers(2, 4))]
    rows, cols = np.arange(shape[0])[:, None] / shape[0], np.arange(shape[1])[None] / shape[1]
    wobble = 0.05 * _noise(rng, shape, shape[0] / 6, periodic=False) + 0.012 * _noise(rng, shape, shape[0] / 25, periodic=False)
    tissue = np.zeros(shape, dtype=bool)
    for (row, col), radius in zip(centres, (0.24, 0.27, 0.15)):
        tissue |= np.hypot(rows - row, cols - col) + wobble < radius
    return tissue


def write_slide(
    path: str | Path, shape: tuple[int, int] = (8192, 8192), seed: int = 0, mpp: float = 0.5, mask_downsample: int = 4
) -> SyntheticSlide:
    """Write a tiled pyramidal TIFF that cuCIM and OpenSlide read, with its mask beside it (``<stem>_mask.png``).

    Args:
        path: ends in ``.tif``.
        shape: ``(H, W)`` in px, multiples of ``mask_downsample``.
        seed: seed of everything.
        mpp: µm/px; 1 divided by a whole number.
        mask_downsample: px per px of the mask.
    """
    path = Path(path)
    rng = np.random.default_rng([seed, 3])
    small = tuple(side // mask_downsample for side in shape)
    tissue = _tissue_pieces(rng, small)
    shares = np.array([0.34, 0.26, 0.18, 0.12, 0.10])[rng.permutation(len(CLASSES))]
    labels = label_map(small, shares, seed=seed + 1, scale=420.0 / (mpp * mask_downsample) * shape[0] * mpp / 4096)
    labels[~tissue] = NO_TISSUE
    factor = round(1 / mpp)
    stain = _stain(np.random.default_rng([seed, 4]), 1.0)
    glass = np.broadcast_to(stain[1].astype(np.float32), (PERIOD * factor, PERIOD * factor, 3))
    palette = [glass]
    for name in CLASSES:
        fine = [zoom(plane, factor, order=1, mode="grid-wrap", grid_mode=True) for plane in _texture(name, 0)]
        palette.append(_render(np.stack(fine), stain))
    noise = rng.normal(0, 3.0, palette[0].shape).astype(np.float32)
    textures = np.stack([(texture + noise).round().clip(0, 255).astype(np.uint8) for texture in palette])
    index = np.where(labels == NO_TISSUE, 0, labels + 1).astype(np.uint8)
    level = np.empty((*shape, 3), dtype=np.uint8)
    cols = np.arange(shape[1])
    band = 64 * mask_downsample
    for top in range(0, shape[0], band):
        rows = np.arange(top, min(top + band, shape[0]))
        kinds = index[rows // mask_downsample][:, cols // mask_downsample]
        level[rows] = textures[kinds, (rows % textures.shape[1])[:, None], (cols % textures.shape[2])[None]]
    levels = [level]
    while max(levels[-1].shape) > 1024:
        height, width = (side // 2 * 2 for side in levels[-1].shape[:2])
        blocks = levels[-1][:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
        levels.append((blocks.sum(axis=(1, 3), dtype=np.uint16) // 4).astype(np.uint8))
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=level.nbytes > 2**31) as writer:
        for number, pixels in enumerate(levels):
            writer.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 88},
                resolution=(1e4 / (mpp * 2**number),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=0 if number == 0 else 1,
                metadata=None,
                maxworkers=2,
            )
    mask = path.with_name(f"{path.stem}_mask.png")
    with atomic_path(mask) as temporary:
        Image.fromarray(labels).save(temporary)
    counts = np.bincount(labels[tissue], minlength=len(CLASSES))[: len(CLASSES)]
    return SyntheticSlide(path, mask, mask_downsample, counts / counts.sum())
