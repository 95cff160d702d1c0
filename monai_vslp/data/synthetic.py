"""Synthetic H&E-like tissue with known masks: cohorts, tables as people would write them, and whole slides.

Five tissues with their own nuclei, glands, fibres and vacuoles are drawn in optical density and stained with vectors that
vary from patient to patient. Colours overlap between tissues (lumina are as white as fat, necrosis is as pink as stroma), so
that structure has to be learned. It looks like histology and is none: figures measured on it say nothing about patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.data.cohort import write_table
from monai_vslp.data.raters import NOISE_LEVELS, simulate_raters
from monai_vslp.data.synthetic_textures import CLASSES, PERIOD, draw_stain, render, smooth_noise, texture
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational.transport import solve_transport

__all__ = [
    "CLASSES",
    "COLORS",
    "SLIDE_VARIANTS",
    "TRAIN_VARIANTS",
    "VAL_VARIANTS",
    "SyntheticSlide",
    "SyntheticTissue",
    "label_map",
    "synthetic_image",
    "write_cohort",
    "write_slide",
]

Image, _ = optional_import("PIL.Image")
connected, _ = optional_import("scipy.ndimage", name="label")
tifffile, _ = optional_import("tifffile")

COLORS = ((148, 163, 184), (213, 94, 0), (0, 158, 115), (0, 114, 178), (240, 228, 66))
# Drawings of each tissue. Validation images and slides have their own, so that none of their nuclei was seen in training.
TRAIN_VARIANTS, VAL_VARIANTS, SLIDE_VARIANTS = (0, 1), (2, 3), (4, 5)
NO_TISSUE = 255
REGION = 70.0  # µm; size of the regions of an image
NOISE = 3.0  # standard deviation of the sensor noise, grey levels
TILE = 256
SHADES = 16  # steps of the slow changes of a slide's staining


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


def label_map(shape: tuple[int, int], proportions: Sequence[float], seed: int = 0, scale_px: float = REGION) -> np.ndarray:
    """Irregular regions whose areas have the given proportions (within half a percent on 256×256 px and more).

    Each class is a smooth random field; a pixel belongs to the class with the greatest field plus an offset, and the
    offsets are the potentials of the transport problem between pixels and classes.

    Args:
        shape: ``(H, W)`` in px.
        proportions: fractions or weights per class; classes with 0 do not occur.
        seed: seed of the fields.
        scale_px: size of the regions, px.

    Returns:
        Class indices, shape ``[H, W]``, uint8.

    Raises:
        ProportionError: weights that are negative, not finite or all 0.
    """
    p = np.asarray(proportions, dtype=np.float64)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise ProportionError(f"regions need one weight of at least 0 per class, not all of them 0; got {p.tolist()}.")
    rng = np.random.default_rng(seed)
    fields = np.stack([smooth_noise(rng, shape, scale_px, periodic=False) for _ in p])
    step = max(1, int(np.sqrt(shape[0] * shape[1] / 16_000)))
    sample = torch.from_numpy(fields[:, ::step, ::step].reshape(len(fields), -1).astype(np.float64))
    mass = torch.full((sample.shape[1],), 1.0 / sample.shape[1], dtype=torch.float64)
    psi = solve_transport(sample, mass, torch.from_numpy(p / p.sum()), smoothing=0.01, tolerance=1e-5).psi.numpy()
    return (fields + psi.astype(np.float32)[:, None, None]).argmax(axis=0).astype(np.uint8)


def synthetic_image(
    shape: tuple[int, int] = (256, 256),
    proportions: Sequence[float] | None = None,
    seed: int = 0,
    mpp: float = 1.0,
    stain_variation: float = 1.0,
    stain_seed: int | None = None,
    variants: Sequence[int] = TRAIN_VARIANTS,
) -> SyntheticTissue:
    """One image.

    Args:
        shape: ``(H, W)`` in px.
        proportions: fractions of :data:`CLASSES`; None draws diverse ones with some classes absent.
        seed: seed of everything but the stain.
        mpp: µm/px.
        stain_variation: 0 for one stain throughout, 1 for what laboratories differ by.
        stain_seed: images with the same one look stained together; None for ``seed``.
        variants: drawings of each tissue to choose from; disjoint ones share no nucleus.

    Raises:
        ProportionError: ``proportions`` are not one weight per class.
        InputError: ``mpp`` is not positive.
    """
    if not mpp > 0:
        raise InputError(f"mpp must be a positive number of µm per px, got {mpp}.")
    rng = np.random.default_rng([seed, 1])
    if proportions is None:
        proportions = rng.dirichlet(np.full(len(CLASSES), 0.7)) * (rng.random(len(CLASSES)) < 0.75)
        proportions = np.where(proportions < 0.04, 0, proportions)
        if proportions.sum() == 0:
            proportions = np.eye(len(CLASSES))[rng.integers(len(CLASSES))]
    if len(proportions) != len(CLASSES):
        raise ProportionError(f"proportions need {len(CLASSES)} values, for {', '.join(CLASSES)}; got {len(proportions)}.")
    mask = label_map(shape, proportions, seed=seed, scale_px=REGION / mpp)
    concentration = np.zeros((2, *shape), dtype=np.float32)
    for index, name in enumerate(CLASSES):
        drawn = np.rot90(texture(name, int(rng.choice(variants)), mpp), rng.integers(4), axes=(1, 2))
        rows, cols = ((np.arange(side) + rng.integers(PERIOD)) % drawn.shape[1] for side in shape)
        inside = mask == index
        if inside.any():
            concentration[:, inside] = drawn[:, rows][:, :, cols][:, inside]
    concentration *= 1 + 0.08 * smooth_noise(rng, shape, 60 / mpp, periodic=False)
    stain = draw_stain(np.random.default_rng([seed if stain_seed is None else stain_seed, 2]), stain_variation)
    image = render(concentration.clip(0), stain) + rng.normal(0, NOISE, (*shape, 3))
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
        tissue = synthetic_image(
            (size, size),
            seed=seed * 10_007 + index,
            stain_seed=seed * 10_007 + 5_000 + patient,
            variants=TRAIN_VARIANTS if split == "train" else VAL_VARIANTS,
        )
        name = f"{split}_{index:04d}.png"
        for kind, array in (("images", tissue.image), ("masks", tissue.mask)):
            with atomic_path(folder / kind / name) as temporary:
                Image.fromarray(array).save(temporary)
        rows.append({"image": name, "split": split, "patient": f"p{patient:03d}", "mpp": "1.0"})
        shares.append(tissue.proportions)
    exact = np.array(shares)
    header = ["image", "split", "patient", "mpp"]
    table = [row | {c: f"{v:.8f}" for c, v in zip(CLASSES, p)} for row, p in zip(rows, exact)]
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
    """Two or three separate pieces, clear of each other and of the border, bool ``[H, W]``."""
    rows, cols = (np.arange(shape[0])[:, None] + 0.5) / shape[0], (np.arange(shape[1])[None] + 0.5) / shape[1]
    short = min(shape)
    wobble = sum(a * smooth_noise(rng, shape, short / n, periodic=False) for a, n in ((0.03, 6), (0.008, 25)))
    centres = np.array([(0.3, 0.28), (0.68, 0.66), (0.22, 0.77)]) + rng.uniform(-0.02, 0.02, (3, 2))
    # How deep a pixel lies inside each piece; a pixel belongs to one alone only if it is clearly less deep in the others.
    depth = np.stack([r - np.hypot(rows - y, cols - x) for (y, x), r in zip(centres, (0.25, 0.28, 0.17))])
    depth = depth[: int(rng.integers(2, 4))]
    depth += np.stack([0.02 * smooth_noise(rng, shape, short / 8, periodic=False) for _ in depth])
    border = np.minimum(np.minimum(rows, 1 - rows), np.minimum(cols, 1 - cols)) - 0.05
    tissue = np.zeros(shape, dtype=bool)
    for number, own in enumerate(depth):
        others = np.delete(depth, number, axis=0).max(axis=0)
        pieces, _ = connected((np.minimum(own, border) + wobble.clip(-0.06, 0.045) > 0) & (own > others + 0.04))
        tissue |= pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    return tissue


def _double(labels: np.ndarray) -> np.ndarray:
    """Twice the size with corners cut (Scale2x), so that edges of a coarse map do not show as stairs."""
    around = np.pad(labels, 1, mode="edge")
    up, down, left, right = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    edge = (up != down) & (left != right)
    double = labels.repeat(2, axis=0).repeat(2, axis=1)
    for row, vertical in enumerate((up, down)):
        for col, horizontal in enumerate((left, right)):
            double[row::2, col::2] = np.where(edge & (vertical == horizontal), horizontal, labels)
    return double


def _halve(image: np.ndarray) -> np.ndarray:
    """Means of 2×2 px, uint8; an odd last row or column is dropped."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    pairs = image[:height:2].astype(np.uint16) + image[1:height:2]
    return ((pairs[:, :width:2] + pairs[:, 1:width:2] + 2) // 4).astype(np.uint8)


def _tiles(band: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows of a level into tiles, those at the border continued."""
    height, width = band.shape[:2]
    band = np.pad(band, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    for top in range(0, band.shape[0], TILE):
        for left in range(0, band.shape[1], TILE):
            yield np.ascontiguousarray(band[top : top + TILE, left : left + TILE])


class _SlidePainter:
    """Renders bands of a slide from its map of tissues."""

    def __init__(self, labels: np.ndarray, downsample: int, mpp: float, rng: np.random.Generator) -> None:
        self.doublings = downsample.bit_length() - 1
        self.downsample = downsample
        shape = tuple(side * downsample for side in labels.shape)
        stain = draw_stain(rng, 1.0)
        pictures = [render(np.zeros_like(texture(CLASSES[0], SLIDE_VARIANTS[0], mpp)), stain)]
        pictures += [render(texture(name, variant, mpp), stain) for name in CLASSES for variant in SLIDE_VARIANTS]
        noise = rng.normal(0, NOISE, pictures[0].shape).astype(np.float32)
        self.pictures = np.stack([(picture + noise).round().clip(0, 255).astype(np.uint8) for picture in pictures])
        # Which picture each pixel shows; regions of one tissue take turns with its drawings.
        self.kinds = np.zeros(labels.shape, dtype=np.uint8)
        for index in range(len(CLASSES)):
            regions, _ = connected(labels == index)
            first = 1 + index * len(SLIDE_VARIANTS)
            self.kinds[regions > 0] = first + regions[regions > 0] % len(SLIDE_VARIANTS)
        # Bending rows and columns hides that the pictures repeat.
        bend = [150 / mpp * smooth_noise(rng, (side, 1), 1500 / mpp, periodic=False)[:, 0] for side in shape]
        self.row_shift, self.col_shift = (np.round(b).astype(np.int64) for b in (bend[1], bend[0]))
        coarse = tuple(max(2, -(-side // 64)) for side in shape)
        slow = smooth_noise(rng, coarse, max(3.0, 250 / mpp / 64), periodic=False)
        self.shade = ((slow / 5 + 0.5).clip(0, 1) * (SHADES - 1)).round().astype(np.uint16)
        gain = np.linspace(0.8, 1.2, SHADES)[:, None]
        glass = float(stain[1].mean())
        grey = np.arange(256.0)[None]
        self.tone = np.where(grey < glass, glass * (grey / glass) ** gain, grey).round().astype(np.uint8).ravel()
        # Dust: centre (row, col) and radius in px, and darkness.
        count = max(3, round(shape[0] * shape[1] * mpp**2 / 4e5))
        self.dust = rng.uniform((0, 0, 2 / mpp, 0.08), (*shape, 9 / mpp, 0.45), (count, 4))

    def __call__(self, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom`` (multiples of the map's downsample), ``[rows, W, 3]``, uint8."""
        d = self.downsample
        start, stop = max(0, top // d - 2), min(len(self.kinds), bottom // d + 2)
        kinds = self.kinds[start:stop]
        for _ in range(self.doublings):
            kinds = _double(kinds)
        kinds = kinds[top - start * d : bottom - start * d]
        period = self.pictures.shape[1]
        rows, cols = np.arange(top, bottom), np.arange(kinds.shape[1])
        at_row = (rows[:, None] + self.row_shift[None]) % period
        at_col = (cols[None] + self.col_shift[top:bottom, None]) % period
        band = self.pictures.reshape(-1, 3)[(kinds.astype(np.int64) * period + at_row) * period + at_col]
        shade = self.shade[rows // 64][:, cols // 64] << 8
        shade[kinds == 0] = 7 << 8  # glass is the same everywhere
        band = self.tone[shade[..., None] | band]
        for row, col, radius, strength in self.dust:
            near = slice(max(top, int(row - radius)), max(top, min(bottom, int(row + radius) + 1)))
            across = slice(max(0, int(col - radius)), int(col + radius) + 1)
            block = band[near.start - top : near.stop - top, across]
            y, x = (np.arange(s.start, s.start + n) for s, n in zip((near, across), block.shape))
            inside = np.hypot(y[:, None] - row, (x[None] - col) * 1.4) < radius
            block[inside] = (block[inside] * (1 - strength)).astype(np.uint8)
        return band


def write_slide(
    path: str | Path, shape: tuple[int, int] = (8192, 8192), seed: int = 0, mpp: float = 0.5, mask_downsample: int = 4
) -> SyntheticSlide:
    """Write a tiled pyramidal TIFF that cuCIM and OpenSlide read, with its mask beside it (``<stem>_mask.png``).

    Level 0 is rendered in bands and never held whole; memory grows with level 1, a quarter of it.

    Args:
        path: ends in ``.tif``.
        shape: ``(H, W)`` in px, multiples of ``mask_downsample``.
        seed: seed of everything.
        mpp: µm/px.
        mask_downsample: px per px of the mask, a power of 2. Level 0 smooths the mask's stairs, so that the two differ by
            less than a px of the mask along edges.

    Raises:
        InputError: a shape or downsample that does not fit, or a µm/px that is not positive.
    """
    path = Path(path)
    d = mask_downsample
    if d < 1 or d & (d - 1) or d > TILE:
        raise InputError(f"mask_downsample must be a power of 2 up to {TILE}, got {d}.")
    if not mpp > 0 or any(side % d or side < 16 * d for side in shape):
        raise InputError(
            f"a slide needs sides that are multiples of {d} (mask_downsample) from {16 * d} px on, and a positive µm/px; "
            f"got shape {tuple(shape)} and mpp {mpp}."
        )
    rng = np.random.default_rng([seed, 3])
    small = tuple(side // d for side in shape)
    tissue = _tissue_pieces(rng, small)
    shares = np.array([0.34, 0.26, 0.18, 0.12, 0.10])[rng.permutation(len(CLASSES))]
    labels = label_map(small, shares, seed=seed + 1, scale_px=max(small) / 10)
    labels[~tissue] = NO_TISSUE
    paint = _SlidePainter(labels, d, mpp, np.random.default_rng([seed, 4]))
    halves: list[np.ndarray] = []

    def level0() -> Iterator[np.ndarray]:
        for top in range(0, shape[0], TILE):
            band = paint(top, min(top + TILE, shape[0]))
            halves.append(_halve(band))
            yield from _tiles(band)

    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=shape[0] * shape[1] > 2**30) as writer:

        def write(tiles: Iterator[np.ndarray], size: tuple[int, int], number: int) -> None:
            writer.write(
                tiles,
                shape=(*size, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 88},
                resolution=(1e4 / (mpp * 2**number),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=0 if number == 0 else 1,
                metadata=None,
                maxworkers=2,
            )

        write(level0(), shape, 0)
        pixels, number = np.concatenate(halves), 1
        halves.clear()
        while max(pixels.shape) * 2 > 1024:
            write(_tiles(pixels), pixels.shape[:2], number)
            pixels, number = _halve(pixels), number + 1
    mask = path.with_name(f"{path.stem}_mask.png")
    with atomic_path(mask) as temporary:
        Image.fromarray(labels).save(temporary)
    counts = np.bincount(labels[tissue], minlength=len(CLASSES))[: len(CLASSES)]
    return SyntheticSlide(path, mask, d, counts / counts.sum())
