"""Reading images as 8-bit RGB, whatever they are, or saying why not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.errors import ImageReadError

__all__ = ["IMAGE_SUFFIXES", "check_images", "image_size", "list_images", "read_image"]

Image, _ = optional_import("PIL.Image")
tifffile, _ = optional_import("tifffile")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LARGEST = 20_000 * 20_000  # px; beyond it an image belongs through the slide reader, tile by tile

logger = logging.getLogger(__name__)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ImageReadError(f"image {path} does not exist.")
    return path


def _open(path: Path):
    Image.MAX_IMAGE_PIXELS = LARGEST
    return Image.open(path)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width in px, from the header alone.

    Raises:
        ImageReadError: the file is missing or no image.
    """
    path = _existing(path)
    try:
        with _open(path) as image:
            return image.height, image.width
    except Exception as pil_error:  # Pillow raises many kinds for files that it does not know
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise ImageReadError(f"image {path} cannot be read: {pil_error}") from pil_error
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            return page.imagelength, page.imagewidth
    except Exception as error:
        raise ImageReadError(f"image {path} cannot be read: {error}") from error


def _to_eight_bit(array: np.ndarray, path: Path) -> np.ndarray:
    """Scale integers and floats to 8 bit by the range that their values use."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.isfinite(array).all():
        raise ImageReadError(f"image {path} has NaN or infinite values.")
    largest = float(array.max(initial=0))
    if float(array.min(initial=0)) < 0:
        raise ImageReadError(f"image {path} has negative values; expected brightness from 0.")
    # Cameras store 10 to 14 bit in 16-bit files: the next power of two above the largest value is the full scale.
    full = 1.0 if largest <= 1.0 and array.dtype.kind == "f" else 2.0 ** np.ceil(np.log2(max(largest, 255.0) + 1)) - 1
    logger.info("%s: %s scaled to 8 bit (full scale %g).", path.name, array.dtype, full)
    return np.round(np.clip(array / full, 0, 1) * 255).astype(np.uint8)


def _to_rgb(array: np.ndarray, path: Path) -> np.ndarray:
    array = _to_eight_bit(array, path)
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)  # planar files
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise ImageReadError(f"image {path} has shape {array.shape}; expected grey, RGB or RGBA.")
    if array.shape[2] in (2, 4):
        # Transparent means nothing was scanned there: white, like glass.
        alpha = array[..., -1:].astype(np.float32) / 255.0
        array = np.round(array[..., :-1] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as RGB.

    Grey becomes three equal channels, transparency is laid on white, palettes and CMYK are converted, 16-bit and float
    images are scaled to 8 bit. Pixels stay as stored: an EXIF orientation is not applied, so that labels keep the grid of
    the file.

    Args:
        path: PNG, JPEG, TIFF or BMP.

    Returns:
        Shape ``[H, W, 3]``, uint8.

    Raises:
        ImageReadError: the file is missing, truncated, no image, or of an unsupported kind.
    """
    path = _existing(path)
    try:
        with _open(path) as image:
            image.load()
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")
            elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                image = image.convert("RGB")
            return _to_rgb(np.asarray(image), path)
    except ImageReadError:
        raise
    except Exception as pil_error:  # Pillow raises many kinds for damaged files
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise ImageReadError(f"image {path} cannot be read, it may be truncated: {pil_error}") from pil_error
    try:
        return _to_rgb(tifffile.imread(path, key=0), path)  # 16-bit RGB, which Pillow does not know
    except ImageReadError:
        raise
    except Exception as error:
        raise ImageReadError(f"image {path} cannot be read, it may be truncated: {error}") from error


def list_images(folder: str | Path) -> list[Path]:
    """Image files directly in ``folder``, sorted by name; hidden files are left out."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def check_images(paths: Iterable[str | Path]) -> None:
    """Decode every image once, before hours are spent on the others.

    Raises:
        ImageReadError: lists every image that cannot be read.
    """

    def problem(path: str | Path) -> str | None:
        try:
            read_image(path)
        except ImageReadError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ImageReadError(f"{len(problems)} image(s) cannot be read:\n  {shown}{more}")
