"""Reading images as 8-bit RGB, whatever they are, or saying why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import OptionalImportError, optional_import

from monai_vslp.utils.errors import ImageReadError

__all__ = ["IMAGE_SUFFIXES", "check_images", "image_size", "list_images", "read_image"]

Image, _ = optional_import("PIL.Image")
tifffile, _ = optional_import("tifffile")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LARGEST = 20_000 * 20_000  # px; beyond it an image belongs through the slide reader, tile by tile
BIT_DEPTHS = (8, 10, 12, 14, 16, 32)  # of cameras and scanners; files often have more bits than the data
BITS_PER_SAMPLE = 258  # TIFF tag
MOST_PROBLEMS = 20

logger = logging.getLogger(__name__)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise ImageReadError(f"image {path} does not exist.")
    if not path.is_file():
        raise ImageReadError(f"{path} is a folder; expected an image file ({', '.join(IMAGE_SUFFIXES)}).")
    return path


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def _failure(path: Path, error: Exception) -> ImageReadError:
    if isinstance(error, OptionalImportError):
        package = str(error).split("\n")[0]
        return ImageReadError(f"image {path} cannot be read; install what is missing (pip install pillow tifffile): {package}")
    return ImageReadError(f"image {path} cannot be read; it is damaged, cut short or no image: {error}")


def _check_pixels(path: Path, height: int, width: int) -> None:
    if height * width > LARGEST:
        raise ImageReadError(
            f"image {path} has {width} x {height} px, more than is read at once ({LARGEST:.0e} px). Treat it as a slide, which "
            "is read tile by tile: save it as a pyramidal TIFF."
        )


def _open(path: Path) -> Any:
    """Open with Pillow, whose guard against decompression bombs would refuse large images that are meant."""
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < LARGEST:
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
    except Exception as error:  # Pillow raises many kinds for files that it does not know
        if not _is_tiff(path):
            raise _failure(path, error) from error
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            return page.imagelength, page.imagewidth
    except Exception as error:
        raise _failure(path, error) from error


def _to_eight_bit(array: np.ndarray, path: Path) -> np.ndarray:
    """Scale to 8 bit by the smallest usual bit depth that holds the values; floats up to 1 by 1."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not np.isfinite(array).all():
        raise ImageReadError(f"image {path} has NaN or infinite values; expected brightness from 0.")
    largest = float(array.max(initial=0))
    if float(array.min(initial=0)) < 0:
        raise ImageReadError(f"image {path} has negative values; expected brightness from 0.")
    if array.dtype.kind == "f" and largest <= 1.0:
        full = 1.0
    else:
        full = 2.0 ** next(bits for bits in BIT_DEPTHS if largest < 2.0**bits or bits == BIT_DEPTHS[-1]) - 1.0
    logger.info("%s: values are %s up to %g; scaled to 8 bit, %g becomes 255.", path.name, array.dtype, largest, full)
    return np.round(np.clip(array / full, 0, 1) * 255).astype(np.uint8)


def _to_rgb(array: np.ndarray, path: Path, alpha: bool) -> np.ndarray:
    """``[H, W]`` or ``[H, W, channels]`` to ``[H, W, 3]`` uint8; with ``alpha`` the last channel is opacity."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] - alpha not in (1, 3):
        raise ImageReadError(f"image {path} has shape {array.shape}; expected grey, RGB or RGBA.")
    if alpha:
        # Transparent means nothing was scanned there: white, like glass.
        color, opacity = _to_eight_bit(array[..., :-1], path), _to_eight_bit(array[..., -1:], path) / np.float32(255.0)
        array = np.round(color * opacity + 255.0 * (1.0 - opacity))
    array = _to_eight_bit(array, path) if not alpha else array.astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array)


def _read_pillow(path: Path) -> np.ndarray | None:
    """RGB by Pillow; None for TIFF files that it would read wrongly or not at all."""
    try:
        image = _open(path)
    except Exception as error:  # Pillow raises many kinds for files that it does not know
        if _is_tiff(path):
            return None
        raise _failure(path, error) from error
    with image:
        _check_pixels(path, image.height, image.width)
        # Pillow keeps the upper byte of 16-bit RGB, black for 12-bit data, and misreads it where it is planar.
        if image.format == "TIFF" and max(np.atleast_1d(image.tag_v2.get(BITS_PER_SAMPLE, 1))) > 8:
            return None
        if ";16" in str(image.tile) and not image.mode.startswith("I"):
            logger.info("%s: 16 bits per channel, of which the upper 8 are kept.", path.name)
        try:
            image.load()
            if image.mode == "PA" or ("transparency" in image.info and image.mode in ("1", "L", "P", "RGB")):
                image = image.convert("RGBA")
            elif image.mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
                image = image.convert("RGB")
        except Exception as error:
            raise _failure(path, error) from error
        return _to_rgb(np.asarray(image), path, alpha=image.mode in ("LA", "RGBA"))


def _read_tiff(path: Path) -> np.ndarray:
    """RGB of the first page by tifffile."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            _check_pixels(path, page.imagelength, page.imagewidth)
            end = max(offset + count for offset, count in zip(page.dataoffsets, page.databytecounts))
            if end > path.stat().st_size or not all(page.databytecounts):
                # tifffile leaves what is missing black.
                raise EOFError(f"its pixels need {end} bytes, the file has {path.stat().st_size}, or parts were never written")
            array = page.asarray()
            kind = page.photometric.name
            planar = page.planarconfig == 2 and array.ndim == 3
            extra = [sample.name for sample in page.extrasamples]
    except ImageReadError:
        raise
    except Exception as error:
        raise _failure(path, error) from error
    if kind not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR"):
        raise ImageReadError(f"image {path} has colours of kind {kind}; expected grey or RGB. Convert it to RGB.")
    array = np.moveaxis(array, 0, 2) if planar else array
    alpha = extra[:1] in (["UNASSALPHA"], ["ASSOCALPHA"])
    if extra and array.ndim == 3:
        array = array[..., : array.shape[2] - len(extra) + alpha]  # channels without a meaning
    rgb = _to_rgb(array, path, alpha)
    return 255 - rgb if kind == "MINISWHITE" else rgb


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as RGB.

    Grey becomes three equal channels, transparency is laid on white, palettes and CMYK are converted, 16-bit and float
    images are scaled to 8 bit: the full scale is the smallest of 8, 10, 12, 14, 16 and 32 bits that holds the values (1 for
    floats up to 1), but 16-bit RGB in PNG files keeps its upper 8 bits. Of files with several pages the first is read. Pixels
    stay as stored: an EXIF orientation is not applied, so that labels keep the grid of the file.

    Args:
        path: PNG, JPEG, TIFF or BMP of up to 20,000 x 20,000 px.

    Returns:
        Shape ``[H, W, 3]``, uint8.

    Raises:
        ImageReadError: the file is missing, truncated, no image, too large, or of an unsupported kind.
    """
    path = _existing(path)
    image = _read_pillow(path)
    return _read_tiff(path) if image is None else image


def list_images(folder: str | Path) -> list[Path]:
    """Image files directly in ``folder``, sorted by name; hidden files are left out."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def check_images(paths: Iterable[str | Path]) -> None:
    """Decode every image once, before hours are spent on the others.

    Raises:
        ImageReadError: lists the images that cannot be read (the first 20, and how many more).
    """

    def problem(path: str | Path) -> str | None:
        try:
            read_image(path)
        except ImageReadError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each holds one decoded image
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ImageReadError("\n  ".join([f"{len(problems)} image(s) cannot be read:", *problems[:MOST_PROBLEMS], *more]))
