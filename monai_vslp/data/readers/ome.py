"""OME-TIFF, and TIFF of any compression, through tifffile; OME-Zarr through zarr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.readers.base import SlideReader
from monai_vslp.data.readers.tiff import channel_axis, has_tifffile, inspect_tiff, micrometers
from monai_vslp.utils.errors import SlideError

__all__ = ["OmeReader"]

tifffile, _ = optional_import("tifffile")
zarr, has_zarr = optional_import("zarr")

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".tf2")
BLOSC_SIZE = slice(12, 16)  # of a chunk's header: its length in bytes, little endian
LARGEST_ANISOTROPY = 0.1  # of the factor between two levels


def _checked_store(path: Path) -> Any:
    """A folder for zarr which raises for chunks of Blosc that were cut short: Blosc decodes them as noise, without a word.

    ``blosc`` takes the paths within the folder of the arrays that are compressed so.
    """
    local_store, _ = optional_import("zarr.storage", name="LocalStore")

    class CheckedStore(local_store):
        blosc: tuple[str, ...] = ()

        async def get(self, key: str, *args: Any, **options: Any) -> Any:
            value = await super().get(key, *args, **options)
            if value is None or not key.startswith(self.blosc) or key.rpartition("/")[2].startswith((".z", "zarr.json")):
                return value
            size = int.from_bytes(value.as_numpy_array()[BLOSC_SIZE].tobytes(), "little")
            if size > len(value):
                raise SlideError(f"the chunk {key} is cut short: it has {len(value):,} of {size:,} bytes")
            return value

    return CheckedStore(path, read_only=True)


class OmeReader(SlideReader):
    """A slide as arrays that are read chunk by chunk: the pages of a TIFF, or the arrays of an OME-Zarr folder.

    Axes may come in any order, with ``Y``, ``X``, three colours, and depth and time of length 1. Of an OME-Zarr folder (0.4
    and 0.5) the first multiscale image is read, or the first image where bioformats2raw wrote several. The factors between
    levels and µm/px come from its scale transformations; translations are not applied, because for pyramids of area means
    they say only that a pixel's centre lies half a pixel from its corner.

    A chunk whose file is damaged or cut short raises when it is read. One whose file is missing does not: by the Zarr
    specification it has the fill value, which is how empty parts are stored, so a folder from which chunk files were lost
    cannot be told from a slide with empty parts. A level whose metadata is missing is told when the slide is opened. Threads
    may share the reader: tifffile guards its file, zarr opens one per chunk.
    """

    name = "ome"

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        if path.is_dir():
            return None if path.suffix.lower() == ".zarr" else "of folders it reads *.zarr"
        return None if path.suffix.lower() in TIFF_SUFFIXES else f"it reads TIFF and Zarr, not {path.suffix or path.name}"

    def __init__(self, path: Path) -> None:
        if not has_zarr:
            raise SlideError("zarr is not installed (pip install zarr)")
        self._tiff = None
        try:
            arrays, axes, self.downsamples = self._open_zarr(path) if path.is_dir() else self._open_tiff(path)
            names = [axis.upper() for axis in axes]
            self._channel = channel_axis(names, arrays[0].shape)
            self._row, self._col = names.index("Y"), names.index("X")
            for array in arrays:
                if array.dtype != np.uint8 or channel_axis(names, array.shape) != self._channel:
                    raise SlideError(f"pixels are {array.dtype} of shape {array.shape}, not 8-bit RGB")
            self._arrays = arrays
            self.level_shapes = tuple((array.shape[self._row], array.shape[self._col]) for array in arrays)
            if self.downsamples is None:
                height, width = self.level_shapes[0]
                self.downsamples = tuple((height / rows + width / cols) / 2 for rows, cols in self.level_shapes)
            self.read(0, 0, 0, 1, 1)  # some open but cannot be decoded
        except Exception:
            self.close()
            raise

    def _open_tiff(self, path: Path) -> tuple[list[Any], str, None]:
        if not has_tifffile:
            raise SlideError("tifffile is not installed (pip install tifffile imagecodecs)")
        facts = inspect_tiff(path)
        self.mpp, self.icc_profile = facts.mpp, facts.icc_profile
        self._tiff = tifffile.TiffFile(path)
        series = self._tiff.series[0]
        stores = [series.aszarr(level=level) for level in range(len(series.levels))]
        return [zarr.open_array(store, mode="r") for store in stores], series.axes, None

    def _open_zarr(self, path: Path) -> tuple[list[Any], list[str], tuple[float, ...]]:
        store = _checked_store(path)
        group = zarr.open_group(store, mode="r")
        if "bioformats2raw.layout" in self._ome(group):
            group = group["0"]
        images = self._ome(group).get("multiscales")
        if not images:
            raise SlideError("it has no multiscales, so it is no OME-Zarr image")
        image = images[0]
        axes, datasets = image["axes"], image["datasets"]
        names = [axis["name"] for axis in axes]
        row, col = names.index("y"), names.index("x")
        steps = [self._scale(dataset, len(axes)) * self._scale(image, len(axes)) for dataset in datasets]
        factors = [(step[row] / steps[0][row], step[col] / steps[0][col]) for step in steps]
        for level, (down, across) in enumerate(factors):
            if abs(down / across - 1) > LARGEST_ANISOTROPY:
                raise SlideError(f"level {level} is {down:g} times coarser in y and {across:g} times in x")
        x, y = (micrometers(steps[0][axis], axes[axis].get("unit")) for axis in (col, row))
        self.mpp = None if x is None or y is None else (x, y)
        arrays = [group[dataset["path"]] for dataset in datasets]
        # Shards hold several chunks behind one another and check their index themselves.
        compressed = [a for a in arrays if a.shards is None and any("Blosc" in type(c).__name__ for c in a.compressors)]
        store.blosc = tuple(f"{array.path}/" for array in compressed)
        return arrays, names, tuple((down + across) / 2 for down, across in factors)

    @staticmethod
    def _ome(group: Any) -> Mapping[str, Any]:
        """Attributes of a group by OME: below ``ome`` from version 0.5 on."""
        attributes = group.attrs.asdict()
        return attributes.get("ome", attributes)

    @staticmethod
    def _scale(owner: Mapping[str, Any], axes: int) -> np.ndarray:
        """Scale per axis by the transformations of an image or of one of its levels, ones where there is none."""
        scale = np.ones(axes)
        for step in owner.get("coordinateTransformations", ()):
            if step["type"] == "scale":
                scale = scale * np.asarray(step["scale"], dtype=float)
            elif step["type"] not in ("translation", "identity"):
                raise SlideError(f"its levels are transformed by {json.dumps(step)}; expected a scale")
        return scale

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        array = self._arrays[level]
        place: list[Any] = [0] * array.ndim
        place[self._row], place[self._col] = slice(row, row + height), slice(col, col + width)
        place[self._channel] = slice(0, 3)
        pixels = np.asarray(array[tuple(place)])
        # Integers took away the axes of length 1; what is left keeps its order.
        left = sorted((self._row, self._col, self._channel))
        return pixels.transpose([left.index(axis) for axis in (self._row, self._col, self._channel)])

    def close(self) -> None:
        if self._tiff is not None:
            self._tiff.close()
