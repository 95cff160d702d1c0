"""Which images fit their proportions worst: what active learning proposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from monai_vslp.utils.atomic import write_json

__all__ = ["Fit", "FitStore", "rank_fits"]


@dataclass(frozen=True)
class Fit:
    """How an image's given proportions and those of the network alone compare.

    Attributes:
        image: id in the datastore.
        given, network: fractions ``[C]``.
        classes: names.
    """

    image: str
    given: Sequence[float]
    network: Sequence[float]
    classes: Sequence[str]

    @property
    def difference(self) -> float:
        """Mean absolute difference over the classes, a fraction."""
        return sum(abs(a - b) for a, b in zip(self.given, self.network)) / len(self.given)

    @property
    def worst(self) -> str:
        """The class that differs most."""
        return max(zip(self.given, self.network, self.classes), key=lambda row: abs(row[0] - row[1]))[2]


def rank_fits(fits: Iterable[Fit]) -> list[Fit]:
    """Those with the largest difference first; equal ones by name."""
    return sorted(fits, key=lambda fit: (-fit.difference, fit.image))


@dataclass(frozen=True)
class _Stored:
    mark: str
    network: list[float]


class FitStore:
    """What the network predicted of each image, kept in a folder.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, image: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', image)}.json"

    def put(self, image: str, mark: str, network: Sequence[float]) -> None:
        """Keep proportions of the network, fractions ``[C]``; ``mark`` says of which image and weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(image), asdict(_Stored(mark, [float(value) for value in network])))

    def get(self, image: str, mark: str) -> list[float] | None:
        """What was kept for the same mark, or None."""
        try:
            found = json.loads(self._path(image).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found["network"] if found.get("mark") == mark else None
