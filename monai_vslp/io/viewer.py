"""Tiles of the pan-and-zoom viewer: a pyramid per layer in a folder beside the report."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.lazy_maps import Derived, MapLike
from monai_vslp.io.map_blocks import halve_block
from monai_vslp.io.report_pictures import energy_range, spread_range
from monai_vslp.transforms.overlay import EnergyPicture
from monai_vslp.utils.atomic import write_text
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.variational.outofcore import NO_TISSUE

__all__ = ["LAYERS", "MANIFEST", "MAX_PIXELS", "VIEWER_FOLDER", "Layer", "read_viewer", "write_viewer"]

Image, _ = optional_import("PIL.Image")

VIEWER_FOLDER = "viewer"
MANIFEST = "viewer.json"
FORM = 1  # of the manifest
MAX_PIXELS = 2**26  # of the finest level of image and labels
VALUE_SHARE = 4  # maps of values are smooth: their finest level may have this many times fewer pixels
TILE = 512  # px
SAMPLES = 2**20  # values that a colour scale is found from
SHADES = 63  # colours of a map of values; more would make its files larger and look the same
GLASS = (241, 241, 241)  # behind a slide whose background is not known
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Layer:
    """A kind of layer.

    Attributes:
        title: what people see.
        kind: ``image``, ``labels`` or ``values``.
        explanation: one sentence about it.
        unit: of its values.
        colormap: of its values.
    """

    title: str
    kind: str
    explanation: str
    unit: str = ""
    colormap: str = ""


LAYERS = {
    "image": Layer("Slide", "image", "The input."),
    "labels": Layer("Refined labels", "labels", "The class of each pixel after refinement."),
    "network": Layer("Network's labels", "labels", "The class that the network alone finds most probable."),
    "confidence": Layer("Confidence", "values", "Confidence of the network in its class.", "confidence", "viridis"),
    "spread": Layer(
        "Spread",
        "values",
        "How much the network's answer depended on the view.",
        "standard deviation of the confidence",
        "viridis",
    ),
    "fidelity": Layer(
        "Fidelity energy", "values", "How much the label contradicts what the network sees here.", "nats", "magma"
    ),
    "regularization": Layer("Regularization energy", "values", "The price of borders.", "nats", "magma"),
    "total": Layer("Total energy", "values", "The sum of both: bright places are the doubtful ones.", "nats", "magma"),
}
FORMATS = {"image": "jpg", "labels": "js", "values": "png"}


def _checked(
    layers: Mapping[str, MapLike], classes: Sequence[str], colors: Sequence[Sequence[int]], tile: int
) -> dict[str, MapLike]:
    """The layers in their order, with the total where both energies are there."""
    unknown = [name for name in layers if name not in LAYERS]
    if unknown or not layers:
        raise InputError(f"a viewer has layers of {', '.join(LAYERS)}; got {', '.join(unknown) or 'none'}.")
    if len(classes) != len(colors):
        raise InputError(f"a viewer needs one colour per class, got {len(colors)} for {len(classes)} classes.")
    if tile < 2 or tile % 2:
        raise InputError(f"tile must be an even number of px, got {tile}.")
    for name, array in layers.items():
        kind, shape, dtype = LAYERS[name].kind, tuple(array.shape), np.dtype(array.dtype)
        if kind == "image":
            fits, wanted = len(shape) == 3 and shape[0] == 3 and dtype == np.uint8, "uint8 [3, H, W]"
        elif kind == "labels":
            fits, wanted = len(shape) == 2 and dtype == np.uint8, "uint8 [H, W]"
        else:
            ranks = (2, 3) if name == "confidence" else (2,)
            fits, wanted = len(shape) in ranks and (dtype == np.uint8 or dtype.kind == "f"), "float or uint8 [H, W]"
        if not fits or 0 in shape:
            raise InputError(f"layer {name!r} of a viewer must be {wanted}, got {dtype} {list(shape)}.")
    layers = dict(layers)
    if "total" not in layers and {"fidelity", "regularization"} <= set(layers):
        first, second = layers["fidelity"], layers["regularization"]
        if tuple(first.shape) != tuple(second.shape):
            raise InputError(f"fidelity and regularization must have one size, got {first.shape} and {second.shape}.")
        layers["total"] = Derived(lambda a, b: np.add(a, b, dtype=np.float32), first, second, dtype=np.float32)
    return {name: layers[name] for name in LAYERS if name in layers}


# ---- pixels -----------------------------------------------------------------------------------------------------------


def _halve(block: np.ndarray, kind: str) -> np.ndarray:
    """Half the size, sides rounded up: majorities of 2×2 labels, means of anything else, from which NaN stays out."""
    if kind == "image":
        return halve_block(block, labels=False)
    if kind == "labels":
        return halve_block(block[None], labels=True)[0]
    height, width = block.shape
    block = np.pad(block, ((0, height % 2), (0, width % 2)), mode="edge")
    four = np.stack([block[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    present = np.isfinite(four)
    count = present.sum(axis=0)
    total = np.where(present, four, np.float32(0)).sum(axis=0, dtype=np.float32)
    return np.where(count > 0, total / np.maximum(count, 1), np.float32(np.nan))


def _runs(labels: np.ndarray) -> bytes:
    """Labels ``[h, w]`` row by row as pairs of bytes: label, number of pixels (1 … 255) that have it."""
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    pieces = -(-lengths // 255)
    values = np.repeat(flat[starts], pieces)
    counts = np.full(values.size, 255, dtype=np.uint8)
    counts[np.cumsum(pieces) - 1] = lengths - 255 * (pieces - 1)
    return np.stack([values, counts], axis=1).tobytes()


class _Source:
    """A layer at full resolution, read block by block."""

    def __init__(self, name: str, array: MapLike, labels: MapLike | None, classes: int) -> None:
        self.name, self.kind, self.array, self.labels, self.classes = name, LAYERS[name].kind, array, labels, classes
        self.shape = tuple(int(side) for side in array.shape[-2:])
        self.glass = np.zeros((3, 256), dtype=np.int64)  # how often each value occurs beside the tissue of an image

    def tissue(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Where the block has tissue, bool; labels of another size are looked up at the centres of the pixels."""
        if self.labels is None:
            return np.ones((bottom - top, right - left), dtype=bool)
        if tuple(self.labels.shape) == self.shape:
            return np.asarray(self.labels[top:bottom, left:right]) != NO_TISSUE
        centres = [
            ((np.arange(low, high) + 0.5) * labelled / size).astype(int)
            for low, high, labelled, size in zip((top, left), (bottom, right), self.labels.shape, self.shape)
        ]
        (rows, columns), (first, start) = centres, (centre[0] for centre in centres)
        block = np.asarray(self.labels[int(first) : int(rows[-1]) + 1, int(start) : int(columns[-1]) + 1])
        return block[rows[:, None] - first, columns - start] != NO_TISSUE

    def read(self, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, bool]:
        """The block as it is reduced and drawn, and whether there is anything in it."""
        block = np.asarray(self.array[..., top:bottom, left:right])
        if self.kind == "labels":
            present = block != NO_TISSUE
            highest = int(block[present].max(initial=0))
            if highest >= self.classes:
                raise InputError(
                    f"layer {self.name!r} has label {highest}, but there are {self.classes} classes; {NO_TISSUE} is no tissue."
                )
            return block, bool(present.any())
        tissue = self.tissue(top, bottom, left, right)
        if self.kind == "image":
            unread = ~tissue & (block == 0).all(axis=0)  # what nobody read is glass, not black
            outside = block[:, ~tissue & ~unread]
            self.glass += [np.bincount(channel, minlength=256) for channel in outside]
            return np.where(unread, np.array(GLASS, dtype=np.uint8)[:, None, None], block), bool(tissue.any())
        values = block.astype(np.float32) / (255 if block.dtype == np.uint8 else 1)
        values = values.max(axis=0) if values.ndim == 3 else values
        values = np.where(tissue & np.isfinite(values), values, np.float32(np.nan))
        return values, bool(np.isfinite(values).any())

    @property
    def backdrop(self) -> list[int]:
        """RGB of the glass, the median of what was read of it."""
        count = self.glass[0].sum()
        return [int(np.searchsorted(channel.cumsum(), count / 2)) for channel in self.glass] if count else list(GLASS)

    def sample(self, side: int) -> np.ndarray:
        """About ``SAMPLES`` values of the tissue, evenly spread, ``[n]``, float32."""
        height, width = self.shape
        step = math.ceil(math.sqrt(height * width / SAMPLES))
        found = []
        for top in range(0, height, side):
            for left in range(0, width, side):
                block = self.read(top, min(top + side, height), left, min(left + side, width))[0]
                block = block[-top % step :: step, -left % step :: step]
                found.append(block[np.isfinite(block)])
        return np.concatenate(found)


class _Writer:
    """Cuts one layer into tiles, each from its four children, so that no more than a few tiles are in memory."""

    def __init__(self, folder: Path, source: _Source, most: int, tile: int, low: float, high: float) -> None:
        self.folder, self.source, self.tile, self.low, self.high = folder, source, tile, low, high
        self.halvings = 0
        height, width = source.shape
        while math.ceil(height / 2**self.halvings) * math.ceil(width / 2**self.halvings) > most:
            self.halvings += 1
        self.shapes = [tuple(math.ceil(side / 2**self.halvings) for side in source.shape)]
        while max(self.shapes[-1]) > tile:
            self.shapes.append(tuple(math.ceil(side / 2) for side in self.shapes[-1]))
        self.grids = [(math.ceil(height / tile), math.ceil(width / tile)) for height, width in self.shapes]
        self.present: list[set[tuple[int, int]]] = [set() for _ in self.shapes]
        colormap = LAYERS[source.name].colormap
        if colormap:
            shades = EnergyPicture(0.0, 1.0, colormap)(np.linspace(0, 1, SHADES)[None])
            self.palette = [0, 0, 0, *np.moveaxis(shades, 0, -1).ravel().tolist()]

    def write(self) -> None:
        """Write all tiles."""
        for level in range(len(self.shapes)):
            (self.folder / self.source.name / str(level)).mkdir(parents=True)
        self._build(len(self.shapes) - 1, 0, 0)

    def _build(self, level: int, row: int, column: int) -> np.ndarray:
        if level == 0:
            side = self.tile << self.halvings
            top, left = row * side, column * side
            bottom, right = (min(low + side, size) for low, size in zip((top, left), self.source.shape))
            block, present = self.source.read(top, bottom, left, right)
            for _ in range(self.halvings):
                block = _halve(block, self.source.kind)
        else:
            rows, columns = self.grids[level - 1]
            children = [
                [(r, c) for c in range(2 * column, min(2 * column + 2, columns))]
                for r in range(2 * row, min(2 * row + 2, rows))
            ]
            lines = [np.concatenate([self._build(level - 1, r, c) for r, c in line], axis=-1) for line in children]
            block = _halve(np.concatenate(lines, axis=-2), self.source.kind)
            present = any(place in self.present[level - 1] for line in children for place in line)
        if present or (self.source.kind == "image" and level == len(self.shapes) - 1):
            self._save(level, row, column, block)
            self.present[level].add((row, column))
        return block

    def _save(self, level: int, row: int, column: int, block: np.ndarray) -> None:
        key = f"{self.source.name}/{level}/{row}_{column}"
        path = self.folder / f"{key}.{FORMATS[self.source.kind]}"
        if self.source.kind == "image":
            Image.fromarray(np.ascontiguousarray(np.moveaxis(block, 0, -1))).save(path, quality=JPEG_QUALITY)
        elif self.source.kind == "labels":
            # A script, because a page from a file may look at the pixels of no picture: classes are toggled and named.
            path.write_text(f'vslpTile("{key}","{base64.b64encode(_runs(block)).decode()}")\n', encoding="ascii")
        else:
            position = np.clip((block - self.low) / max(self.high - self.low, 1e-12), 0, 1)
            index = np.zeros(block.shape, dtype=np.uint8)  # 0 is clear
            tissue = np.isfinite(block)
            index[tissue] = 1 + np.round(position[tissue] * (SHADES - 1))
            picture = Image.frombytes("P", block.shape[::-1], index.tobytes())
            picture.putpalette(self.palette)
            picture.save(path, transparency=0)

    def describe(self, extent: tuple[int, int]) -> dict[str, Any]:
        """The layer's part of the manifest."""
        layer = LAYERS[self.source.name]
        # Sizes of maps are rounded up, so the larger ratio is the better one.
        scale = max(full / size for full, size in zip(extent, self.source.shape))
        levels = [
            {
                "shape": list(shape),
                "scale": scale * 2 ** (self.halvings + level),
                "tiles": "".join("01"[(r, c) in self.present[level]] for r in range(grid[0]) for c in range(grid[1])),
            }
            for level, (shape, grid) in enumerate(zip(self.shapes, self.grids))
        ]
        described = {
            "key": self.source.name,
            "title": layer.title,
            "kind": layer.kind,
            "explanation": layer.explanation,
            "format": FORMATS[layer.kind],
            "reduced": 2**self.halvings,
            "levels": levels,
        }
        if layer.kind == "values":
            described |= {"low": self.low, "high": self.high, "unit": layer.unit, "colormap": layer.colormap}
        return described


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; swap it in when the block succeeds, else delete it.

    What a killed process left behind is deleted first. Between the two renames there is a moment without ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scales(sources: Mapping[str, _Source], side: int) -> dict[str, tuple[float, float]]:
    """Ends of the colour scale of each map of values; the energies share one."""
    samples = {
        name: source.sample(side) for name, source in sources.items() if source.kind == "values" and name != "confidence"
    }
    scales = {"confidence": (0.0, 1.0)}
    if "spread" in samples:
        scales["spread"] = spread_range(samples.pop("spread"))
    if samples:
        common = energy_range({"total": np.concatenate(list(samples.values())), **samples})
        scales |= dict.fromkeys(samples, common)
    return scales


def write_viewer(
    folder: str | Path,
    layers: Mapping[str, MapLike],
    *,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    level0_shape: tuple[int, int] | None = None,
    mpp: float | None = None,
    max_pixels: int = MAX_PIXELS,
    tile: int = TILE,
) -> Path:
    """Write the tiles that the viewer in ``report.html`` shows.

    Every layer covers the same area, whatever its size. A tile is made from its four finer ones, so memory holds a few tiles,
    not layers. Tiles without tissue are left out. The folder appears, or replaces an older one, when it is complete; the same
    layers give the same bytes.

    Args:
        folder: ``viewer`` beside the report that is to show it.
        layers: NumPy or Zarr arrays, or others with their slicing, by name, all optional: ``image`` uint8 ``[3, H, W]``;
            ``labels`` (refined) and ``network`` uint8 ``[H, W]``, 255 without tissue; ``confidence`` ``[H, W]``, or
            ``[C, H, W]`` of which the largest is shown, and ``spread`` ``[H, W]``, float in [0, 1] or uint8 with 255 = 1.0;
            ``fidelity``, ``regularization`` and ``total`` float ``[H, W]``, nats, the last made from the other two where it
            is absent.
        classes: names, in the order of the labels.
        colors: RGB per class, 0 … 255.
        level0_shape: ``(H, W)`` of the input in level-0 px; None for that of the largest layer.
        mpp: µm per level-0 px; None where unknown.
        max_pixels: bound on the finest level of image and labels; maps of values get a quarter. What is larger is halved.
        tile: side of the tiles in px, even.

    Returns:
        Path of the manifest ``viewer.json``.

    Raises:
        InputError: layers, types, shapes, labels and classes do not fit each other.
        OSError: the disk is full or not writable; a viewer that was there stays.
    """
    folder = Path(folder)
    arrays = _checked(layers, classes, colors, tile)
    shapes = [tuple(array.shape[-2:]) for array in arrays.values()]
    extent = tuple(int(side) for side in (level0_shape or max(shapes, key=math.prod)))
    tissue = arrays.get("labels", arrays.get("network"))
    sources = {name: _Source(name, array, tissue, len(classes)) for name, array in arrays.items()}
    scales = _scales(sources, 4 * tile)
    with _atomic_folder(folder) as temporary:
        described = []
        for name, source in sources.items():
            most = max_pixels // VALUE_SHARE if source.kind == "values" else max_pixels
            writer = _Writer(temporary, source, most, tile, *scales.get(name, (0.0, 1.0)))
            writer.write()
            described.append(writer.describe(extent))
        manifest = {
            "form": FORM,
            "extent": list(extent),
            "mpp": None if mpp is None else float(mpp),
            "tile": tile,
            "classes": list(classes),
            "colors": [[int(value) for value in color] for color in colors],
            "backdrop": sources["image"].backdrop if "image" in sources else list(GLASS),
            "layers": described,
        }
        write_text(temporary / MANIFEST, json.dumps(manifest, ensure_ascii=False, sort_keys=True) + "\n")
    return folder / MANIFEST


def read_viewer(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a viewer folder, or None where there is none.

    Raises:
        ImageReadError: it is there but damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["form"] != FORM:
            raise ValueError(f"its form is {manifest['form']}, this version reads {FORM}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageReadError(f"{path} cannot be read ({error}); segment this input again.") from error
    return manifest
