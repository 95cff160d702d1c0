"""SVS and tiled TIFF through cuCIM."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.data.readers.base import SlideReader
from monai_vslp.data.readers.tiff import has_tifffile, inspect_tiff
from monai_vslp.utils.errors import SlideError

__all__ = ["CucimReader"]

SUFFIXES = (".svs", ".tif", ".tiff", ".btf", ".tf8")
PROBE_SECONDS = 60
BATCHES = 2  # regions per worker that cuCIM decodes at a time; measured on 256 and 896 px

# Tries cuCIM beside torch. Errors of the file itself are no reason not to use cuCIM: they come again, and are caught, later.
_PROBE = """
import sys, torch
from cucim import CuImage
try:
    CuImage(sys.argv[1]).read_region((0, 0), (16, 16), 0)
except Exception as error:
    print(error)
"""

_verdict: list[str | None] = []  # of _problem, for this process
# Two threads that make the first calls of a process at once wait for each other for ever inside cuCIM.
_first_calls = threading.Lock()


def _probe(path: Path) -> str | None:
    """Try cuCIM on a slide in a process of its own; why it cannot be used, or None."""
    command = [sys.executable, "-c", _PROBE, str(path)]
    try:
        done = subprocess.run(command, timeout=PROBE_SECONDS, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return f"beside a CUDA build of torch without a GPU driver it hung for {PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"beside a CUDA build of torch without a GPU driver it failed: {said}"


def _problem(path: Path) -> str | None:
    """Why cuCIM cannot be used in this process, or None; tried with the first slide only."""
    if not _verdict:
        # Beside a CUDA build of torch on a machine without GPU driver cuCIM can hang for good inside libcufile.
        risky = torch.version.cuda is not None and not torch.cuda.is_available()
        _verdict.append(_probe(path) if risky else None)
    return _verdict[0]


class CucimReader(SlideReader):
    """A slide through cuCIM; threads may share it."""

    name = "cucim"

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        if path.is_dir():
            return "it reads no folders"
        return None if path.suffix.lower() in SUFFIXES else f"it reads {', '.join(SUFFIXES)}, not {path.suffix or path.name}"

    def __init__(self, path: Path) -> None:
        reason = _problem(path)
        if reason is not None:
            raise SlideError(reason)
        with _first_calls:
            # Imported here and not above, because already the import may hang.
            cu_image, has_cucim = optional_import("cucim", name="CuImage")
            if not has_cucim:
                raise SlideError("it is not installed (pip install cucim)")
            self._handle = handle = cu_image(str(path))
            height, width = (int(side) for side in reversed(handle.resolutions["level_dimensions"][0]))
            pixels = np.asarray(handle.read_region((0, 0), (min(64, width), min(64, height)), 0))  # some open but do not decode
        facts = inspect_tiff(path) if has_tifffile else None
        levels = handle.resolutions
        self.level_shapes = tuple((int(height), int(width)) for width, height in levels["level_dimensions"])
        self.downsamples = tuple(float(value) for value in levels["level_downsamples"])
        if facts is not None and facts.levels > len(self.level_shapes):
            raise SlideError(f"it sees {len(self.level_shapes)} of {facts.levels} levels; the others are in SubIFDs")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] < 3:
            raise SlideError(f"pixels are {pixels.dtype} of shape {pixels.shape}, not 8-bit RGB")
        self.mpp = self._stated_mpp()
        if self.mpp is None and facts is not None and "aperio" not in handle.metadata:
            self.mpp = facts.mpp
        self.icc_profile = None if facts is None else facts.icc_profile
        self.associated = {name: partial(self._associated, name) for name in sorted(handle.associated_images)}

    def _stated_mpp(self) -> tuple[float, float] | None:
        metadata = self._handle.metadata
        if "aperio" in metadata:
            stated = metadata["aperio"].get("MPP")
            return None if stated is None else (float(stated), float(stated))
        # cuCIM gives a spacing of 1.0 where the file has none; only the units tell.
        spacing, units = metadata["cucim"]["spacing"], metadata["cucim"]["spacing_units"]
        return (float(spacing[1]), float(spacing[0])) if units[0] == units[1] == "micrometer" else None

    def _associated(self, name: str) -> np.ndarray:
        with _first_calls:
            return np.array(np.asarray(self._handle.associated_image(name))[..., :3])

    def _location(self, level: int, row: int, col: int) -> tuple[int, int]:
        """``(x, y)`` in level-0 px. cuCIM rounds down when it converts to the level, so round up to meet the pixel meant."""
        down = self.downsamples[level]
        return math.ceil(col * down), math.ceil(row * down)

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        return np.asarray(self._handle.read_region(self._location(level, row, col), (width, height), level))[..., :3]

    def read_batch(
        self, level: int, corners: Sequence[tuple[int, int]], height: int, width: int, workers: int
    ) -> np.ndarray | None:
        result = np.empty((len(corners), height, width, 3), dtype=np.uint8)
        if len(corners) == 1:  # of a list of one cuCIM makes an image and no parts
            result[0] = self.read(level, *corners[0], height, width)
            return result
        places = [self._location(level, row, col) for row, col in corners]
        batch = min(BATCHES * workers, len(places))
        start = 0
        parts = self._handle.read_region(places, (width, height), level, batch_size=batch, num_workers=workers)
        # Asked for one part more than there are, cuCIM 23.10 says that it ends and leaks three parts' memory.
        for _ in range(math.ceil(len(places) / batch)):
            pixels = np.asarray(next(parts))
            pixels = pixels[None] if pixels.ndim == 3 else pixels  # batches of one have no axis for it
            # Copied before the next one is asked for: cuCIM writes that into the same memory.
            result[start : start + len(pixels)] = pixels[..., :3]
            start += len(pixels)
        if start != len(places):
            raise SlideError(f"cuCIM gave {start} of {len(places)} regions")
        return result

    def close(self) -> None:
        self._handle.close()
