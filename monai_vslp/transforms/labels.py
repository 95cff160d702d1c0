"""Proportion labels as MONAI transforms: from masks, from what people write, from files, and with raters' noise."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from monai.utils import (
    TransformBackends,
    convert_data_type,
    convert_to_dst_type,
    convert_to_tensor,
    ensure_tuple,
    look_up_option,
)

from monai_vslp.data.cohort import Cohort, read_cohort
from monai_vslp.data.proportions import TOLERANCE, ProportionLabel, check_classes, combine_raters, parse_row
from monai_vslp.data.raters import RATER_LEVELS, apply_rater, draw_noise, rater_offsets
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = [
    "LoadProportions",
    "LoadProportionsD",
    "LoadProportionsDict",
    "LoadProportionsd",
    "ParseProportions",
    "ParseProportionsD",
    "ParseProportionsDict",
    "ParseProportionsd",
    "ProportionsFromMask",
    "ProportionsFromMaskD",
    "ProportionsFromMaskDict",
    "ProportionsFromMaskd",
    "RandRaterNoise",
    "RandRaterNoiseD",
    "RandRaterNoiseDict",
    "RandRaterNoised",
    "SimulateRaters",
    "SimulateRatersD",
    "SimulateRatersDict",
    "SimulateRatersd",
]

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xls")


def _vector(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def _plane(array: NdarrayOrTensor, name: str) -> torch.Tensor:
    """``[H, W]`` of an array ``[H, W]`` or ``[1, H, W]``."""
    x = convert_to_tensor(array, track_meta=False)
    x = x[0] if x.ndim == 3 and x.shape[0] == 1 else x
    if x.ndim != 2:
        raise InputError(f"{name} must have shape [H, W] or [1, H, W], got {tuple(x.shape)}; take the argmax of one-hot masks.")
    return x


def _store(d: dict[Hashable, Any], key: Hashable, label: ProportionLabel) -> None:
    """Write a label under ``key`` and its uncertainty under ``{key}_spread``, ``{key}_lower`` and ``{key}_upper``."""
    d[key] = _vector(label.mean)
    for part in ("spread", "lower", "upper"):
        d[f"{key}_{part}"] = _vector(getattr(label, part))


class ProportionsFromMask(Transform):
    """Area fractions of the classes of an index mask.

    Args:
        classes: number of classes, or their names in the order of the mask's indices.
        ignore_index: index of pixels that do not count; None if every pixel counts.
        partial: the classes (indices or names) that the mask annotates, where it leaves the others out. Pixels of other
            classes then do not count, and the result covers these classes alone, in the order given, scaled to sum 1:
            nothing is claimed about the share of the others. None: all classes are annotated.

    Raises:
        InputError: ``partial`` names no class or an unknown one.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        classes: int | Sequence[str],
        ignore_index: int | None = 255,
        partial: Sequence[int | str] | None = None,
    ) -> None:
        self.names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        self.ignore_index = ignore_index
        if not self.names:
            raise InputError("at least one class is needed.")
        self.partial = None
        if partial is not None:
            check_classes([str(c) for c in partial if not isinstance(c, int)], self.names, "partial classes")
            self.partial = [c if isinstance(c, int) else self.names.index(c) for c in partial]
            if not self.partial or not all(0 <= k < len(self.names) for k in self.partial):
                raise InputError(f"partial must list classes from 0 to {len(self.names) - 1} or their names, got {partial!r}.")

    def __call__(self, mask: NdarrayOrTensor, tissue: NdarrayOrTensor | None = None) -> torch.Tensor:
        """
        Args:
            mask: class indices, shape ``[H, W]`` or ``[1, H, W]``, integers of any dtype.
            tissue: tissue mask (bool) or mass (non-negative), shape ``[H, W]`` or ``[1, H, W]``; None counts every pixel.

        Returns:
            Fractions, shape ``[C]`` (``[len(partial)]`` with ``partial``), float32, sum 1.

        Raises:
            InputError: wrong shapes, an index without a class, or a mass that is negative or not finite.
            ProportionError: no pixel counts.
        """
        labels = _plane(mask, "mask")
        if labels.is_floating_point() and not bool((labels == labels.round()).all()):
            raise InputError("mask must hold class indices, got fractional values; resample masks with mode 'nearest'.")
        labels = labels.long()
        weight = torch.ones(labels.shape, dtype=torch.float64, device=labels.device)
        if tissue is not None:
            weight = _plane(tissue, "tissue").to(weight)
            if weight.shape != labels.shape:
                raise InputError(f"tissue has shape {tuple(weight.shape)}, mask {tuple(labels.shape)}; they must agree.")
            if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
                raise InputError("tissue must be a mask or a mass that is finite and not negative.")
        counts = torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index
        labels, weight = labels[counts], weight[counts]
        unknown = labels[(labels < 0) | (labels >= len(self.names))].unique().tolist()
        if unknown:
            raise InputError(
                f"mask has indices {unknown[:10]} but classes are 0 to {len(self.names) - 1} ({', '.join(self.names)}), "
                f"ignored is {self.ignore_index}."
            )
        area = torch.bincount(labels, weight, minlength=len(self.names))
        if self.partial is not None:
            area = area[self.partial]
        total = area.sum()
        if total <= 0:
            raise ProportionError("the mask has no pixel of an annotated class in tissue; its proportions are not defined.")
        return (area / total).float()


class ProportionsFromMaskd(MapTransform):
    """Dictionary twin of :class:`ProportionsFromMask`; the mask stays.

    Args:
        keys: keys of masks.
        classes, ignore_index, partial: see :class:`ProportionsFromMask`.
        output_keys: where the proportions go, one per key.
        tissue_key: key of the tissue mask or mass; absent there, or None, means tissue everywhere.
        allow_missing_keys: skip keys that are absent.
    """

    backend = ProportionsFromMask.backend

    def __init__(
        self,
        keys: KeysCollection,
        classes: int | Sequence[str],
        ignore_index: int | None = 255,
        partial: Sequence[int | str] | None = None,
        output_keys: KeysCollection = "proportions",
        tissue_key: str | None = "mass",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple(output_keys)
        if len(self.output_keys) != len(self.keys):
            raise InputError(f"output_keys {self.output_keys} must name one key for each of {self.keys}.")
        self.tissue_key = tissue_key
        self.converter = ProportionsFromMask(classes, ignore_index, partial)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, output in self.key_iterator(d, self.output_keys):
            d[output] = self.converter(d[key], d.get(self.tissue_key))
        return d


class ParseProportions(Transform):
    """Understand proportions as people write them; see :func:`monai_vslp.data.proportions.parse_row`.

    Args:
        classes: class names in the order of the result.
        tolerance: percentage points by which a row may miss 100 and is still scaled.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, classes: Sequence[str], tolerance: float = TOLERANCE) -> None:
        self.classes = tuple(classes)
        self.tolerance = tolerance

    def __call__(self, cells: Mapping[str, Any]) -> ProportionLabel | None:
        """
        Args:
            cells: what was written per class, for instance ``{"tumour": "10-20", "stroma": "~60%", "other": ""}``.

        Returns:
            The label, or None if all cells are blank (proportions not known).

        Raises:
            ProportionError: the cells are not understood; names column and value.
        """
        return parse_row(cells, self.classes, tolerance=self.tolerance)


class ParseProportionsd(MapTransform):
    """Dictionary twin of :class:`ParseProportions`.

    ``data[key]``, a mapping from class to text, becomes float32 fractions ``[C]``; ``{key}_spread``, ``{key}_lower`` and
    ``{key}_upper`` (same shape) are added. Unknown proportions become None, without these.

    Args:
        keys: keys of mappings.
        classes, tolerance: see :class:`ParseProportions`.
        allow_missing_keys: skip keys that are absent.
    """

    backend = ParseProportions.backend

    def __init__(
        self, keys: KeysCollection, classes: Sequence[str], tolerance: float = TOLERANCE, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.parser = ParseProportions(classes, tolerance)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label = self.parser(d[key])
            if label is None:
                d[key] = None
            else:
                _store(d, key, label)
        return d


class RandRaterNoise(RandomizableTransform):
    """Replace proportions by what a rater might have estimated, another rater each time.

    The model is that of :func:`monai_vslp.data.raters.simulate_raters`: log-ratio noise, then rounding to 10 % or 5 %.

    Args:
        prob: probability of a change.
        level: ``low``, ``medium``, ``high`` or ``uniform`` (±0.1, without rounding).

    Raises:
        ValueError: an unknown level.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, prob: float = 1.0, level: str = "medium") -> None:
        RandomizableTransform.__init__(self, prob)
        self.level = look_up_option(level, RATER_LEVELS)
        self._draw: tuple[np.ndarray, np.ndarray, float] = (np.zeros(0), np.zeros(0), 0.0)

    def randomize(self, data: int) -> None:  # data: number of classes
        super().randomize(None)
        self._draw = (rater_offsets(self.level, data, self.R), *draw_noise(self.level, data, self.R))

    def __call__(self, proportions: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """
        Args:
            proportions: shape ``[C]``, fractions that sum to 1.
            randomize: draw anew; else repeat the last draw.

        Returns:
            Same type and shape, on the simplex; classes that do not occur stay at 0.
        """
        p = convert_data_type(proportions, np.ndarray, dtype=np.float64)[0]
        if randomize:
            self.randomize(len(p))
        if not self._do_transform:
            return proportions
        if len(self._draw[0]) != len(p):
            raise InputError(f"the last draw was for {len(self._draw[0])} classes, these proportions have {len(p)}.")
        return convert_to_dst_type(apply_rater(p / p.sum(), self.level, *self._draw), proportions)[0]


class RandRaterNoised(RandomizableTransform, MapTransform):
    """Dictionary twin of :class:`RandRaterNoise`; all keys get the same rater and the same error.

    Args:
        keys: keys of proportions ``[C]``, all of one length.
        prob, level: see :class:`RandRaterNoise`.
        allow_missing_keys: skip keys that are absent.
    """

    backend = RandRaterNoise.backend

    def __init__(
        self,
        keys: KeysCollection = "proportions",
        prob: float = 1.0,
        level: str = "medium",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.noise = RandRaterNoise(prob, level)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandRaterNoised:
        super().set_random_state(seed, state)
        self.noise.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        first = self.first_key(d)
        if first in d:
            self.noise.randomize(len(d[first]))
        for key in self.key_iterator(d):
            d[key] = self.noise(d[key], randomize=False)
        return d


class SimulateRaters(Randomizable, Transform):
    """Estimates of the same few raters for one image after another.

    Each rater keeps the habits (offsets per class) drawn when the first image is seen; the errors of single estimates are
    drawn anew for each image.

    Args:
        level: ``low``, ``medium``, ``high`` or ``uniform``; see :func:`monai_vslp.data.raters.simulate_raters`.
        raters: number of raters.
        seed: seed of all draws.

    Raises:
        InputError: fewer than one rater.
        ValueError: an unknown level.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, level: str = "medium", raters: int = 3, seed: int = 0) -> None:
        if raters < 1:
            raise InputError(f"raters must be at least 1, got {raters}.")
        self.level = look_up_option(level, RATER_LEVELS)
        self.raters = raters
        self.set_random_state(seed)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> SimulateRaters:
        super().set_random_state(seed, state)
        self._offsets: np.ndarray | None = None  # new raters
        self._draws: list[tuple[np.ndarray, float]] = []
        return self

    def randomize(self, data: int) -> None:  # data: number of classes
        if self._offsets is None or self._offsets.shape[1] != data:
            self._offsets = np.stack([rater_offsets(self.level, data, self.R) for _ in range(self.raters)])
        self._draws = [draw_noise(self.level, data, self.R) for _ in range(self.raters)]

    def __call__(self, proportions: NdarrayOrTensor) -> torch.Tensor:
        """
        Args:
            proportions: shape ``[C]``, fractions that sum to 1.

        Returns:
            Shape ``[raters, C]``, float32, each row on the simplex.
        """
        p = convert_data_type(proportions, np.ndarray, dtype=np.float64)[0]
        self.randomize(len(p))
        rows = [apply_rater(p / p.sum(), self.level, offset, *draw) for offset, draw in zip(self._offsets, self._draws)]
        return _vector(np.stack(rows))


class SimulateRatersd(Randomizable, MapTransform):
    """Dictionary twin of :class:`SimulateRaters`: proportions become the mean of the raters.

    ``data[key]`` is replaced by the mean ``[C]``; ``{key}_spread`` (standard deviation between raters), ``{key}_lower`` and
    ``{key}_upper`` (their extremes), all float32 ``[C]``, are added.

    Args:
        keys: keys of proportions ``[C]``.
        level, raters, seed: see :class:`SimulateRaters`.
        allow_missing_keys: skip keys that are absent.
    """

    backend = SimulateRaters.backend

    def __init__(
        self,
        keys: KeysCollection = "proportions",
        level: str = "medium",
        raters: int = 3,
        seed: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.simulator = SimulateRaters(level, raters, seed)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> SimulateRatersd:
        super().set_random_state(seed, state)
        self.simulator.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            rows = self.simulator(d[key]).double().numpy()
            names = [str(k) for k in range(rows.shape[1])]
            _store(d, key, combine_raters([ProportionLabel.exact(names, row) for row in rows]))
        return d


@functools.lru_cache(maxsize=8)
def _cached_table(path: str, modified: int, classes: tuple[str, ...]) -> Cohort:
    """A table, read once for all of its images; ``modified`` (ns) makes a changed file a new one."""
    return read_cohort(path, classes=classes, check_files=False)


class LoadProportions(Transform):
    """Proportions of an image from wherever they are kept.

    Understood are

    - a table (CSV, TSV, XLSX; see :func:`monai_vslp.data.cohort.read_cohort`), in which the image is looked up by name; a
      table of one image needs no name;
    - a JSON file with ``{class: value}``, a list of C fractions, a stored :class:`~monai_vslp.data.ProportionLabel`, or any of
      these under the key ``proportions``;
    - an image file: its row of ``table``, or else ``<stem>.json`` beside it;
    - a mapping ``{class: value}`` or C numbers (fractions or percent) in memory.

    Values are read as :func:`~monai_vslp.data.proportions.parse_row` tells.

    Args:
        classes: class names in the order of the result.
        table: table for sources that are image files; None looks for a JSON file beside the image.
        tolerance: percentage points by which the values may miss 100 and are still scaled (JSON and memory).

    Raises:
        InputError: the table is not understood.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, classes: Sequence[str], table: str | Path | None = None, tolerance: float = TOLERANCE) -> None:
        self.classes = tuple(classes)
        self.table = None if table is None else Path(table)
        self.tolerance = tolerance
        if self.table is not None:
            self._table(self.table)

    def label(self, source: Any, image: str | Path | None = None) -> ProportionLabel:
        """Proportions with their uncertainty; arguments and errors as in :meth:`__call__`."""
        if isinstance(source, ProportionLabel):
            return self._ordered(source)
        if not isinstance(source, (str, Path)):
            return self._value(source, "the proportions")
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix in TABLE_SUFFIXES:
            return self._row(path, image)
        if suffix == ".json":
            return self._json(path)
        if self.table is not None:
            return self._row(self.table, path)
        return self._json(path.with_suffix(".json"), f" Proportions of {path.name} are expected there where no table is given.")

    def __call__(self, source: Any, image: str | Path | None = None) -> torch.Tensor:
        """
        Args:
            source: path or value, see above.
            image: path or name of the image, to find its row if ``source`` is a table.

        Returns:
            Fractions, shape ``[C]``, float32, sum 1.

        Raises:
            ProportionError: no file, no row, unknown proportions, or values that are not understood.
        """
        return _vector(self.label(source, image).mean)

    def _table(self, path: Path) -> Cohort:
        if not path.is_file():
            raise ProportionError(f"table of proportions {path} does not exist.")
        return _cached_table(str(path.absolute()), path.stat().st_mtime_ns, self.classes)

    def _row(self, path: Path, image: str | Path | None) -> ProportionLabel:
        cohort = self._table(path)
        if image is None and len(cohort) != 1:
            raise ProportionError(f"table {path} has {len(cohort)} images; say which one is meant (its path or name).")
        label = cohort.records[0].proportions if image is None else cohort.lookup(image)
        return self._known(label, f"{path} ({image or cohort.records[0].image.name})")

    def _json(self, path: Path, hint: str = "") -> ProportionLabel:
        if not path.is_file():
            raise ProportionError(f"proportion file {path} does not exist.{hint}")
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ProportionError(f"proportion file {path} is no JSON: {error}.") from error
        if isinstance(content, Mapping) and "proportions" in content and "proportions" not in self.classes:
            content = content["proportions"]
        return self._value(content, str(path))

    def _value(self, value: Any, name: str) -> ProportionLabel:
        if isinstance(value, Mapping) and {"classes", "mean"} <= set(value):
            return self._ordered(ProportionLabel.from_dict(value))
        if value is None:
            raise ProportionError(f"{name}: expected {{class: value}} or {len(self.classes)} numbers, got nothing.")
        if not isinstance(value, Mapping):
            try:
                numbers = np.asarray(value, dtype=np.float64).reshape(-1)
            except (TypeError, ValueError) as error:
                raise ProportionError(f"{name}: expected {{class: value}} or numbers, got {value!r}.") from error
            if len(numbers) != len(self.classes):
                raise ProportionError(
                    f"{name}: got {len(numbers)} numbers for {len(self.classes)} classes ({', '.join(self.classes)})."
                )
            value = dict(zip(self.classes, numbers.tolist()))
        try:
            label = parse_row(value, self.classes, tolerance=self.tolerance)
        except ProportionError as error:
            raise ProportionError(f"{name}: {error}") from error
        return self._known(label, name)

    def _known(self, label: ProportionLabel | None, name: str) -> ProportionLabel:
        if label is None:
            raise ProportionError(f"proportions are blank, so not known: {name}. Fill them in, or leave the image out.")
        return label

    def _ordered(self, label: ProportionLabel) -> ProportionLabel:
        """The label with its classes in the order asked for."""
        if set(label.classes) != set(self.classes):
            raise ProportionError(f"stored proportions are of {', '.join(label.classes)}, expected {', '.join(self.classes)}.")
        order = [label.classes.index(name) for name in self.classes]
        arrays = [getattr(label, part)[order] for part in ("mean", "lower", "upper", "spread", "missing")]
        return ProportionLabel(self.classes, *arrays, label.raters, label.raw_sum)


class LoadProportionsd(MapTransform):
    """Dictionary twin of :class:`LoadProportions`.

    ``data[key]`` (a path or a value) becomes float32 fractions ``[C]``; ``{key}_spread``, ``{key}_lower`` and ``{key}_upper``
    (same shape) are added. For items ``{"image": path, "label": path}`` take ``keys="label"``: the label may be a JSON file, or
    a table in which the image is looked up.

    Args:
        keys: keys of paths or values.
        classes, table, tolerance: see :class:`LoadProportions`.
        image_key: key of the image's path, to find its row in a table; it must not have been loaded yet, or
            ``{image_key}_path`` must hold the path.
        allow_missing_keys: skip keys that are absent.
    """

    backend = LoadProportions.backend

    def __init__(
        self,
        keys: KeysCollection,
        classes: Sequence[str],
        table: str | Path | None = None,
        image_key: str = "image",
        tolerance: float = TOLERANCE,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.loader = LoadProportions(classes, table, tolerance)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = next((d[k] for k in (f"{self.image_key}_path", self.image_key) if isinstance(d.get(k), (str, Path))), None)
        for key in self.key_iterator(d):
            _store(d, key, self.loader.label(d[key], image))
        return d


LoadProportionsD = LoadProportionsDict = LoadProportionsd
ParseProportionsD = ParseProportionsDict = ParseProportionsd
ProportionsFromMaskD = ProportionsFromMaskDict = ProportionsFromMaskd
RandRaterNoiseD = RandRaterNoiseDict = RandRaterNoised
SimulateRatersD = SimulateRatersDict = SimulateRatersd
