"""What a library must offer so that slides can be read through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from monai_vslp.utils.plugins import PluginStore

__all__ = ["SLIDE_READERS", "SlideReader"]

SLIDE_READERS = PluginStore("slide readers", "Libraries that read whole slides; subclasses of SlideReader.")


class SlideReader(ABC):
    """One open slide. Whoever adds a format subclasses this and adds the class to ``SLIDE_READERS`` under its name.

    A reader knows pixels of stored levels only; borders, other resolutions, the check of the pixel size and colours are the
    matter of :class:`monai_vslp.data.slides.Slide`. :meth:`read` is called by several threads at once: a library that does
    not bear that needs a lock in its reader.

    Attributes:
        name: under which it is found in ``SLIDE_READERS``.
        level_shapes: ``(H, W)`` of each level in px, the largest first.
        downsamples: level-0 px per px of each level as the library states it.
        mpp: µm per level-0 px along ``(x, y)`` as the file states it, None where it does not.
        icc_profile: ICC profile of the pixels, None where the file has none.
        bounds: ``(row, col, height, width)`` in level-0 px of the part that was scanned, None where the file does not say.
        associated: name (``label``, ``macro``, ``thumbnail`` …) to a function that reads that image as RGB ``[H, W, 3]``,
            uint8.
    """

    name: ClassVar[str]
    level_shapes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    mpp: tuple[float, float] | None = None
    icc_profile: bytes | None = None
    bounds: tuple[int, int, int, int] | None = None
    associated: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({})

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        """Why this reader need not be tried on ``path``, told by name or first bytes alone; None where it should be."""
        return None

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open ``path``; whatever is raised passes it on to the next reader, its text being the reason."""

    @abstractmethod
    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Pixels of a rectangle that lies within a level.

        Args:
            level: pyramid level.
            row, col: upper left corner in px of the level.
            height, width: size in px of the level.

        Returns:
            RGB ``[height, width, 3]``, uint8.
        """

    def read_batch(
        self, level: int, corners: Sequence[tuple[int, int]], height: int, width: int, workers: int
    ) -> np.ndarray | None:
        """Many rectangles of one size that lie within a level, where the library has a faster way than one by one.

        Args:
            level: pyramid level.
            corners: ``(row, col)`` of each upper left corner in px of the level.
            height, width: size in px of the level.
            workers: threads.

        Returns:
            RGB ``[N, height, width, 3]``, uint8; None where there is no faster way.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the file."""
