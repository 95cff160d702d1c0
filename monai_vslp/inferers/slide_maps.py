"""Maps of a whole slide in a Zarr group: larger than memory, complete or absent."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.errors import InputError

__all__ = ["MAPS_NAME", "SlideMaps", "create_maps"]

zarr, _ = optional_import("zarr", descriptor="{} is needed for whole slides: pip install 'zarr>=3'")

MAPS_NAME = "maps.zarr"
CHUNK = 512  # px
GLASS = 255  # of the image where nothing was written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideMaps:
    """Maps of a slide, which stay on disk; this holds what is known about them.

    Pixel ``(r, c)`` covers level-0 px ``[r d, (r + 1) d)`` × ``[c d, (c + 1) d)`` with d = ``downsample``. The Zarr group
    at ``path`` (version 3, chunks of 512 × 512 px over all classes) has the arrays

    ============== ============== ==========================================================================
    ``confidence`` ``[C, h, w]``  float16, on the simplex to 5e-4 per class; 0 in all classes where no tile lies
    ``spread``     ``[h, w]``     float16, disagreement of the views; only where the predictor gave one
    ``mass``       ``[h, w]``     float32, share of each pixel that is tissue, 0 … 1
    ``image``      ``[3, h, w]``  uint8, the slide in RGB on the grid of the maps
    ============== ============== ==========================================================================

    and the fields below, but ``path``, as attributes.

    Attributes:
        path: the Zarr group.
        shape: ``(h, w)`` in map px.
        classes: C.
        downsample: level-0 px per map px, not always whole.
        mpp: µm per map px.
        level0_shape: ``(H, W)`` of the slide in level-0 px.
        slide: path of the slide.
        reader: what read it.
        tiles: how many tiles were predicted.
        tile: side of the blended part of a tile in map px.
        fingerprint: names the model, its weights and its options.
        plan: digest of all that the maps are the result of.
        views: views spent, ``total``, ``mean`` and ``max`` per tile in costs of one view of the tile; None where the
            predictor does not count them.
        seconds: of the process that wrote the maps: ``read_wait`` (the network waited for tiles), ``network``, ``write_wait``
            (it waited for the disk), ``blend``.
        reused: tiles that this process found done.
    """

    path: Path
    shape: tuple[int, int]
    classes: int
    downsample: float
    mpp: float
    level0_shape: tuple[int, int]
    slide: str
    reader: str
    tiles: int
    tile: int
    fingerprint: str
    plan: str
    views: dict[str, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reused: int = 0

    @classmethod
    def read(cls, path: str | Path) -> SlideMaps:
        """What is known about maps on disk.

        Raises:
            InputError: there are none, or they were not written by this package.
        """
        try:
            attributes = dict(zarr.open_group(str(path), mode="r").attrs)
            pairs = {name: tuple(attributes.pop(name)) for name in ("shape", "level0_shape")}
            return cls(path=Path(path), **pairs, **attributes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no maps of a slide ({error}); segment the slide again.") from error

    @property
    def attributes(self) -> dict[str, Any]:
        """The fields but ``path``, as plain JSON values."""
        values = asdict(self)
        del values["path"]
        return values | {"shape": list(self.shape), "level0_shape": list(self.level0_shape)}

    def _array(self, name: str) -> Any:
        return zarr.open_array(str(self.path / name), mode="r")

    @property
    def confidence(self) -> Any:
        """Zarr array ``[C, h, w]``, float16."""
        return self._array("confidence")

    @property
    def spread(self) -> Any:
        """Zarr array ``[h, w]``, float16; None where the predictor gave none."""
        return self._array("spread") if (self.path / "spread").is_dir() else None

    @property
    def mass(self) -> Any:
        """Zarr array ``[h, w]``, float32."""
        return self._array("mass")

    @property
    def image(self) -> Any:
        """Zarr array ``[3, h, w]``, uint8, RGB."""
        return self._array("image")

    def clear(self) -> None:
        """Delete the maps and the results of the tiles, once what was made from them is written.

        What else lies in their folder stays; the folder goes if nothing does.
        """
        clear_work(self.path.parent)


def clear_work(folder: Path) -> None:
    """Delete all that was kept of a slide in ``folder``, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    remove_maps(folder)
    for pattern in ("plan.json", "tiles-*.npz", ".tiles-*.npz", ".plan-*.json"):  # names with dots are unfinished
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for path in folder.glob(".maps-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def remove_maps(folder: Path) -> None:
    """Delete the maps in ``folder``; they are gone under their name at once."""
    try:
        place = _temporary(folder)
    except FileNotFoundError:
        return
    try:
        os.rename(folder / MAPS_NAME, place / MAPS_NAME)
    except FileNotFoundError:
        return
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """A new folder whose name says which process made it."""
    return Path(tempfile.mkdtemp(prefix=f".maps-{socket.gethostname()}-{os.getpid()}-", dir=folder))


def _remove_stale(folder: Path) -> None:
    """Delete what processes of this machine left that were killed while they wrote maps."""
    for path in folder.glob(f".maps-{socket.gethostname()}-*"):
        number = path.name.rsplit("-", 2)[1]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError) as error:
            logger.debug("%s is left alone: %s", path, error)


def _sync(folder: Path) -> None:
    """Make sure that all files of a folder are on disk, so that a rename never comes before its content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


@contextmanager
def create_maps(folder: Path, classes: int, shape: tuple[int, int], spread: bool, plan: str) -> Iterator[Any]:
    """Yield a Zarr group with the empty arrays of :class:`SlideMaps`; it gets its name in ``folder`` when the block succeeds.

    Several processes may write the maps of one plan at once: they are the same, and those of the first stay.

    Args:
        folder: where the maps go, under ``MAPS_NAME``.
        classes: C.
        shape: ``(h, w)`` in px.
        spread: whether there is a spread.
        plan: digest of what the maps are the result of.

    Raises:
        OSError: a full disk, say; nothing is left of the maps then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    place = _temporary(folder)
    try:
        group = zarr.open_group(str(place / MAPS_NAME), mode="w", zarr_format=3)
        arrays: dict[str, tuple[tuple[int, ...], type, float]] = {
            "confidence": ((classes,), np.float16, 0),
            "mass": ((), np.float32, 0),
            "image": ((3,), np.uint8, GLASS),
        }
        if spread:
            arrays["spread"] = ((), np.float16, 0)
        for name, (leading, dtype, fill) in arrays.items():
            group.create_array(
                name,
                shape=(*leading, *shape),
                chunks=(*leading, CHUNK, CHUNK),
                dtype=dtype,
                fill_value=fill,
                dimension_names=(*("channel" for _ in leading), "y", "x"),
            )
        yield group
        _sync(place)
        try:
            os.rename(place / MAPS_NAME, folder / MAPS_NAME)
        except OSError:  # a folder that is not empty is not replaced
            if not (folder / MAPS_NAME).is_dir() or SlideMaps.read(folder / MAPS_NAME).plan != plan:
                raise
            logger.info("another process has written %s already.", folder / MAPS_NAME)
    finally:
        shutil.rmtree(place, ignore_errors=True)
