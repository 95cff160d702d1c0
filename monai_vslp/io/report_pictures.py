"""Pictures of a report: maps and photographs read at the size in which they are shown, and drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.ome_tiff import read_map_tiff
from monai_vslp.io.report_style import escape
from monai_vslp.transforms.overlay import NO_TISSUE_COLOR, LabelOverlay
from monai_vslp.utils.errors import ImageReadError
from monai_vslp.variational.outofcore import NO_TISSUE

__all__ = [
    "SIDE",
    "band_picture",
    "data_address",
    "draw_overlay",
    "energy_range",
    "flat_colors",
    "html_figure",
    "nearest",
    "read_energies",
    "read_map",
    "read_photo",
    "spread_range",
]

Image, _ = optional_import("PIL.Image")

SIDE = 1600  # px, longer side of the pictures in a report
BAND_LINE = (45, 45, 45)  # colour of the line around what hangs on a rounding step


def nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` sampled at the centres of a grid of ``size`` (height, width)."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, array.shape))
    return array[rows[:, None], columns]


def fitted(shape: Sequence[int], longest: int) -> tuple[int, int]:
    """Height and width of ``shape`` reduced, never enlarged, to a longer side of at most ``longest`` px."""
    factor = min(1.0, longest / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def read_map(path: Path, longest: int) -> np.ndarray | None:
    """A map ``[H, W]`` of at most ``longest`` px, or None where there is no such file."""
    if not path.exists():
        return None
    array = read_map_tiff(path, longest)
    if array.ndim != 2:
        raise ImageReadError(f"map {path} must have one channel, got shape {array.shape}.")
    return nearest(array, fitted(array.shape, longest))


def read_photo(path: Path, longest: int) -> np.ndarray | None:
    """RGB ``[H, W, 3]`` uint8 of at most ``longest`` px, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as file:
            file.draft("RGB", (longest, longest))  # a JPEG is then decoded at a fraction of its size
            image = file.convert("RGB")
    except OSError as error:
        raise ImageReadError(f"picture {path} cannot be read: {error}") from error
    image.thumbnail((longest, longest))
    return np.asarray(image)


def read_energies(path: Path) -> dict[str, np.ndarray]:
    """Maps by name, float32 ``[H, W]``, reduced by leaving out pixels where they are much larger than shown."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            maps = {name: file[name].squeeze() for name in file.files}
    except Exception as error:  # zip, zlib and NumPy raise different kinds for damaged files
        raise ImageReadError(f"{path} cannot be read ({error}); segment this input again.") from error
    steps = {name: max(1, max(values.shape) // (2 * SIDE)) for name, values in maps.items()}
    return {name: values[:: steps[name], :: steps[name]].astype(np.float32) for name, values in maps.items()}


def energy_range(maps: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Ends of the one colour scale of all energies, nats.

    Args:
        maps: ``fidelity``, ``regularization`` and ``total``, arrays of any shape, float; NaN where there is no tissue.
    """
    inside = maps["total"][np.isfinite(maps["total"])]
    if not inside.size:
        return 0.0, 1.0
    low = min(float(np.nanmin(values)) for values in maps.values())
    high = max(float(np.quantile(inside, 0.995)), 1e-3)
    return (low if low < -0.02 * high else 0.0), high  # entropy and the floor of the confidences push it slightly below 0


def spread_range(values: np.ndarray) -> tuple[float, float]:
    """Ends of the colour scale of a map of standard deviations; NaN where there is no tissue."""
    inside = values[np.isfinite(values)]
    return 0.0, (max(float(np.quantile(inside, 0.995)), 0.01) if inside.size else 1.0)


def draw_overlay(
    photo: np.ndarray, labels: np.ndarray, colors: Sequence[Sequence[int]], alpha: float = 0.4, outline: int | None = None
) -> np.ndarray:
    draw = LabelOverlay(colors, alpha, max(1, round(max(photo.shape) / 800)) if outline is None else outline)
    return np.moveaxis(draw(np.moveaxis(photo, -1, 0), nearest(labels, photo.shape[:2])), 0, -1)


def band_picture(photo: np.ndarray, labels: np.ndarray, band: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """A faded map in which only what hangs on a rounding step has full colour: that of the class it would become.

    Args:
        photo: shape ``[h, w, 3]``, uint8.
        labels: class indices, shape ``[H, W]``; 255 without tissue.
        band: shape ``[2, H, W]``, uint8: number of moves that change the label, and the other class, 255 for none.
        colors: RGB per class.

    Returns:
        RGB, shape ``[h, w, 3]``, uint8.
    """
    size = photo.shape[:2]
    shown, other = nearest(labels, size), nearest(band[1], size)
    grey = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
    faded = draw_overlay(np.round(130 + grey * (125 / 255)).astype(np.uint8), shown, colors, alpha=0.22, outline=0)
    marked = other != NO_TISSUE
    near = marked.copy()
    for shift in range(1, max(1, round(max(size) / 800)) + 1):
        near[shift:] |= marked[:-shift]
        near[:-shift] |= marked[shift:]
        near[:, shift:] |= marked[:, :-shift]
        near[:, :-shift] |= marked[:, shift:]
    # The line lies outside, so that a band one pixel wide keeps its colour; quiet colours need it to be seen.
    faded[near & ~marked] = BAND_LINE
    return np.where(marked[..., None], flat_colors(other, colors), faded)


def flat_colors(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels in plain class colours, no tissue light grey; ``[H, W, 3]`` uint8."""
    table = np.full((256, 3), NO_TISSUE_COLOR, dtype=np.uint8)
    table[: len(colors)] = colors
    return table[labels]


def data_address(rgb: np.ndarray, longest: int, form: str = "JPEG") -> str:
    """``[H, W, 3]`` uint8 as a picture inside the page."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    if max(image.size) > longest:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 86} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def html_figure(rgb: np.ndarray, title: str, explanation: str = "", scale: str = "", form: str = "JPEG") -> str:
    alt = f"{title}. {explanation}" if explanation else title
    return (
        f'<figure><img alt="{escape(alt)}" src="{data_address(rgb, SIDE, form)}">{scale}'
        f"<figcaption><b>{escape(title)}</b>{escape(explanation)}</figcaption></figure>"
    )
