"""What several readers need to know of a TIFF file beside its pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.utils.errors import SlideError

__all__ = ["TiffFacts", "channel_axis", "check_complete", "inspect_tiff", "micrometers"]

tifffile, has_tifffile = optional_import("tifffile")

ICC_PROFILE, RESOLUTION_UNIT, X_RESOLUTION, Y_RESOLUTION = 34675, 296, 282, 283  # tags
TAG_UNITS = {2: "inch", 3: "cm"}
UNITS = {
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micrometer": 1.0, "micrometre": 1.0, "micron": 1.0,
    "nm": 1e-3, "nanometer": 1e-3, "nanometre": 1e-3, "å": 1e-4, "angstrom": 1e-4,
    "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3, "cm": 1e4, "centimeter": 1e4, "centimetre": 1e4,
    "m": 1e6, "meter": 1e6, "metre": 1e6, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip


@dataclass(frozen=True)
class TiffFacts:
    """What a TIFF file says about itself.

    Attributes:
        mpp: µm per level-0 px along ``(x, y)``, from OME-XML, else from the resolution tags; None where neither says.
        icc_profile: of the first page.
        levels: pyramid levels, those in SubIFDs included.
        samples: samples per pixel of the first page.
    """

    mpp: tuple[float, float] | None
    icc_profile: bytes | None
    levels: int
    samples: int


def micrometers(value: float, unit: str | None) -> float | None:
    """A length in µm; None where the unit is none of length (``pixel``, say) or missing."""
    factor = UNITS.get(str(unit).lower())
    return None if factor is None else float(value) * factor


def channel_axis(axes: Sequence[str], shape: Sequence[int]) -> int:
    """Position of the colour channels.

    Args:
        axes: a letter per axis, ``Y`` and ``X`` among them; colours are ``S`` (samples) or ``C`` (channels).
        shape: length of each axis.

    Raises:
        SlideError: there are not three colours, or several planes in depth, time or another axis.
    """
    lengths = dict(zip((axis.upper() for axis in axes), shape))
    said = f"axes {''.join(axes)} of lengths {list(shape)}"
    several = [axis for axis, length in lengths.items() if axis not in "YX" and length != 1]
    # A fourth sample is opacity; a fourth channel is a stain.
    if len(several) != 1 or (several[0], lengths[several[0]]) not in (("S", 3), ("S", 4), ("C", 3)):
        raise SlideError(f"it has {said}; expected three colours (C or S) beside Y and X, and no depth or time")
    return [axis.upper() for axis in axes].index(several[0])


def _all_pages(file: Any) -> Iterator[Any]:
    for page in file.pages:
        yield page
        yield from page.pages or ()  # SubIFDs


def check_complete(file: Any) -> None:
    """Decoders fill in what a truncated TIFF has lost as noise or black, without a word; so compare offsets with the size.

    Args:
        file: open ``tifffile.TiffFile``.

    Raises:
        SlideError: parts of the file are missing.
    """
    size = file.filehandle.size
    end = max((offset + n for page in _all_pages(file) for offset, n in zip(page.dataoffsets, page.databytecounts)), default=0)
    # tifffile stops at a directory that lies beyond the end: look where the last one points.
    tiff, handle, last = file.tiff, file.filehandle, file.pages[-1].offset
    handle.seek(last)
    (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    handle.seek(last + tiff.tagnosize + tags * tiff.tagsize)
    (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    needed = max(end, following)
    if needed > size:
        raise SlideError(f"the file is cut short: it has {size:,} bytes, its directory needs at least {needed:,}")


def _ome_mpp(file: Any) -> tuple[float, float] | None:
    image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    pixels = (image[0] if isinstance(image, (list, tuple)) else image)["Pixels"]
    sizes = [
        micrometers(pixels[f"PhysicalSize{axis}"], pixels.get(f"PhysicalSize{axis}Unit", "µm"))  # as the schema has it
        for axis in "XY"
        if f"PhysicalSize{axis}" in pixels
    ]
    return (sizes[0], sizes[1]) if len(sizes) == 2 and None not in sizes else None


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    unit = TAG_UNITS.get(page.tags.valueof(RESOLUTION_UNIT, 2))
    found = [page.tags.valueof(tag) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    if unit is None or any(value is None or 0 in value for value in found):
        return None
    x, y = (micrometers(value[1] / value[0], unit) for value in found)
    return x, y


def inspect_tiff(path: Path) -> TiffFacts:
    """Read the directories of a TIFF file.

    Raises:
        SlideError: parts of the file are missing.
    """
    with tifffile.TiffFile(path) as file:
        check_complete(file)
        page = file.pages[0]
        mpp = _ome_mpp(file) if file.is_ome else None
        profile = page.tags.valueof(ICC_PROFILE)
        return TiffFacts(
            mpp=_tag_mpp(page) if mpp is None else mpp,
            icc_profile=None if profile is None else bytes(profile),
            levels=len(file.series[0].levels),
            samples=page.samplesperpixel,
        )
