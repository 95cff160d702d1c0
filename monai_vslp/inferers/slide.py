"""Confidences of a whole slide: overlapping tiles over tissue, kept on disk until they are blended into one map."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.data.slides import Slide, area_resample
from monai_vslp.transforms.tissue import TissueMask
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError, SlideError

__all__ = ["SlideConfidence", "SlideMap", "infer_slide"]

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")

TISSUE_MPP = 8.0  # µm/px at which tissue is looked for
PREFETCH = 3  # batches read ahead of the network
READERS = 2  # threads
FULL_SCALE = 65535  # 16-bit code of 1.0

Predictor = Callable[[torch.Tensor], tuple[torch.Tensor, "torch.Tensor | None"]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideMap:
    """Confidences of a slide.

    Pixel ``(r, c)`` covers level-0 px ``[r d, (r + 1) d)`` × ``[c d, (c + 1) d)`` with d = ``downsample``.

    Attributes:
        mean: confidences, shape ``[C, h, w]``, float32, summing to 1 within C · 8e-6; 1 / C where no tile was needed.
        spread: disagreement of the views, shape ``[h, w]``, float32; None where the predictor gave none.
        mass: share of each pixel that is tissue, 0 … 1, shape ``[h, w]``, float32.
        downsample: level-0 px per map px, not always whole.
        mpp: µm per map px.
        tiles: upper left corner ``(row, col)`` of each tile in map px, shape ``[N, 2]``, int64.
        tile: side of the tiles in map px.
        reused: tiles taken over from an earlier run.
        work_dir: where the results of the tiles are.
    """

    mean: np.ndarray
    spread: np.ndarray | None
    mass: np.ndarray
    downsample: float
    mpp: float
    tiles: np.ndarray
    tile: int
    reused: int
    work_dir: Path

    def clear(self) -> None:
        """Delete the results of the tiles, once what was made from this map is written."""
        _TileStore(self.work_dir).clear()


class _TileStore:
    """Files with the results of one batch of tiles each, and ``plan.json``, which says what they are results of."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"tiles-{index:06d}.npz"

    def prepare(self, plan: dict[str, Any]) -> None:
        """Keep what is there if it was made by the same plan, else delete it."""
        plan = json.loads(json.dumps(plan))  # as it will be read back
        path = self.folder / "plan.json"
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            reason = ", ".join(
                f"{key} was {old.get(key)!r}, is {value!r}" for key, value in plan.items() if old.get(key) != value
            )
        except FileNotFoundError:
            reason = "there is no plan.json"
        except (ValueError, AttributeError) as error:
            reason = f"plan.json is damaged ({error})"
        if not reason:
            return
        if any(self.folder.glob("tiles-*.npz")):
            logger.warning("tile results in %s are not used but deleted: %s.", self.folder, reason)
        self.clear()
        write_json(path, plan)

    def load(self, index: int) -> dict[str, np.ndarray] | None:
        """Arrays of one batch; None where they are missing or damaged (the file has checksums)."""
        try:
            with np.load(self._file(index)) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged and computed again: %s", self._file(index), error)
            return None

    def save(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Write one batch atomically.

        Raises:
            OSError: the disk is full or not writable.
        """
        try:
            with atomic_path(self._file(index)) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            done = sum(1 for _ in self.folder.glob("tiles-*.npz"))
            message = (
                f"tile results cannot be written to {self.folder}: {error.strerror or error}. {done} finished batches are kept "
                "there: make room, or move that folder to a larger disk, and run the same command again to go on."
            )
            raise OSError(error.errno, message) from error

    def clear(self) -> None:
        """Delete all that this class wrote, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        # plan.json first: without it no leftover is ever taken for a result. The dotted names are unfinished files.
        for pattern in ("plan.json", "tiles-*.npz", ".tiles-*.npz", ".plan-*.json"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _starts(length: int, size: int, step: int) -> np.ndarray:
    """Where tiles start so that they cover ``length``; the last one is moved back inside."""
    count = max(0, math.ceil((length - size) / step)) + 1
    return np.minimum(np.arange(count) * step, max(0, length - size))


def _window(size: int) -> np.ndarray:
    """Gaussian weights ``[size, size]``, float32, positive everywhere."""
    line = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2)
    return np.outer(line, line).astype(np.float32)


class SlideConfidence:
    """The job behind :func:`infer_slide`, in steps: :meth:`run` fills ``work_dir``, :meth:`merge` blends what is there.

    Args: see :func:`infer_slide`.

    Attributes:
        downsample: level-0 px per map px.
        mpp: µm per map px.
        mass: share of each map px that is tissue, shape ``[h, w]``, float32.
        tiles: upper left corner ``(row, col)`` of each tile in map px, shape ``[N, 2]``, int64, row by row.
        reused: tiles that :meth:`run` found done.
    """

    def __init__(
        self,
        slide: Slide,
        num_classes: int,
        *,
        mpp: float,
        work_dir: str | Path,
        fingerprint: str,
        tile: int = 512,
        overlap: float = 0.25,
        map_downsample: int = 4,
        tissue: tuple[np.ndarray, float] | None = None,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        for name, value in (("tile", tile), ("map_downsample", map_downsample), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if tile % map_downsample:
            larger = (tile // map_downsample + 1) * map_downsample
            raise InputError(f"tile must be a multiple of map_downsample = {map_downsample}, got {tile}; the next is {larger}.")
        if not 0 <= overlap < 1:
            raise InputError(f"overlap must be at least 0 and less than 1 (a share of the tile), got {overlap}.")
        self.slide, self.num_classes, self.batch_size = slide, num_classes, batch_size
        self.tile, self.map_downsample, self.device, self.progress = tile, map_downsample, device, progress
        self.reused = 0
        self._scale = slide.downsample_at(mpp)  # level-0 px per px that the network sees
        self.downsample = self._scale * map_downsample
        self.mpp = self.downsample * slide.mpp
        height, width = (max(1, math.ceil(side / self.downsample - 1e-6)) for side in slide.shape)
        self.mass = self._mass((height, width), tissue)
        size = tile // map_downsample
        step = max(1, round(size * (1 - overlap)))
        rows, cols = _starts(height, size, step), _starts(width, size, step)
        # Counts of tissue pixels above and to the left of each corner say at once which tiles touch tissue.
        counts = np.zeros((height + 1, width + 1), dtype=np.int64)
        counts[1:, 1:] = (self.mass > 0).cumsum(axis=0).cumsum(axis=1)
        ends = np.minimum(rows + size, height), np.minimum(cols + size, width)
        inside = (
            counts[np.ix_(*ends)] - counts[np.ix_(rows, ends[1])] - counts[np.ix_(ends[0], cols)] + counts[np.ix_(rows, cols)]
        )
        chosen = np.argwhere(inside > 0)
        self.tiles = np.stack([rows[chosen[:, 0]], cols[chosen[:, 1]]], axis=1)
        self.batches = [self.tiles[i : i + batch_size] for i in range(0, len(self.tiles), batch_size)]
        self.store = _TileStore(work_dir)
        status = slide.path.stat()
        self.plan = {
            "slide": str(slide.path.resolve()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "reader": slide.reader,
            "slide_mpp": slide.mpp,
            "scale": self._scale,
            "tile": tile,
            "overlap": overlap,
            "map_downsample": map_downsample,
            "batch_size": batch_size,
            "classes": num_classes,
            "tissue": hashlib.sha256(self.mass.tobytes()).hexdigest(),
            "fingerprint": fingerprint,
        }

    def _mass(self, size: tuple[int, int], tissue: tuple[np.ndarray, float] | None) -> np.ndarray:
        if tissue is None:
            down = max(1.0, TISSUE_MPP / self.slide.mpp)
            thumbnail = np.moveaxis(self.slide.thumbnail(downsample=down), -1, 0)
            mask = TissueMask(mpp=down * self.slide.mpp)(thumbnail)[0]
        else:
            mask, down = np.asarray(tissue[0]), float(tissue[1])
            wanted = tuple(side / down for side in self.slide.shape)
            if mask.ndim != 2 or any(abs(have - want) > 1 + 0.01 * want for have, want in zip(mask.shape, wanted)):
                expected = [math.ceil(v) for v in wanted]
                raise InputError(
                    f"the tissue mask has shape {list(mask.shape)}; at downsample {down:g} the slide needs about {expected}."
                )
        mass = area_resample(mask.astype(bool), (0, 0), self.downsample / down, size, smooth=False)
        # Rounding errors must not make tissue of glass.
        mass = np.where(mass < 1e-6, 0, np.clip(mass, 0, 1)).astype(np.float32)
        if not mass.any():
            raise InputError(
                f"no tissue was found on slide {self.slide.path}. If there is some, check the µm/px ({self.slide.mpp:g}; "
                "pass --mpp) or give a tissue mask."
            )
        return mass

    def _read(self, batch: np.ndarray) -> torch.Tensor:
        """Tiles ``[B, 3, T, T]``, uint8."""
        corners = (batch * self.map_downsample).tolist()
        pixels = [self.slide.read_at(row, col, self.tile, self.tile, downsample=self._scale) for row, col in corners]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def _predict(self, pixels: torch.Tensor, predictor: Predictor, batch: np.ndarray) -> dict[str, np.ndarray]:
        """What is kept of one batch: means over map px as 16-bit codes, ``mean [B, C, M, M]`` and ``spread [B, 1, M, M]``."""
        images = pixels.to(self.device).float() / 255.0
        mean, spread = predictor(images)
        wanted = {"mean": (len(batch), self.num_classes, self.tile, self.tile), "spread": (len(batch), 1, self.tile, self.tile)}
        kept = {}
        for name, value in (("mean", mean), ("spread", spread)):
            if value is None:
                continue
            if tuple(value.shape) != wanted[name]:
                raise ValueError(f"the predictor gave a {name} of shape {list(value.shape)}, expected {list(wanted[name])}.")
            pooled = torch.nn.functional.avg_pool2d(value.float(), self.map_downsample)
            low, high = (float(v) for v in torch.aminmax(pooled))
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
                corners = [[round(float(v) * self.downsample) for v in corner] for corner in batch]
                raise ValueError(
                    f"the predictor gave a {name} from {low:g} to {high:g}, expected 0 to 1, for tiles at level-0 (row, col) "
                    f"{corners}."
                )
            kept[name] = (pooled.clamp(0, 1) * FULL_SCALE).round().int().cpu().numpy().astype(np.uint16)
        return kept

    def _warn_if_disk_small(self, missing: int) -> None:
        folder = next(parent for parent in (self.store.folder, *self.store.folder.absolute().parents) if parent.is_dir())
        side = self.tile // self.map_downsample
        needed = missing * self.batch_size * (self.num_classes + 1) * side**2 * 2
        free = shutil.disk_usage(folder).free
        if needed > free:
            logger.warning("%s has %.1f GB left, the tile results need up to %.1f GB.", folder, free / 1e9, needed / 1e9)

    def run(self, predictor: Predictor) -> None:
        """Compute the batches that are not in ``work_dir`` yet; may be interrupted at any time and called again.

        Args:
            predictor: images ``[B, 3, T, T]``, float32 in [0, 1], on ``device`` to probabilities ``[B, C, T, T]`` and their
                spread ``[B, 1, T, T]`` or None.

        Raises:
            OSError: the results cannot be written; those written before stay.
            SlideError: the slide is damaged.
            ValueError: the predictor gave a wrong shape or values outside [0, 1].
        """
        self.store.prepare(self.plan)
        missing = deque(index for index in range(len(self.batches)) if self.store.load(index) is None)
        self.reused = len(self.tiles) - sum(len(self.batches[index]) for index in missing)
        if self.reused:
            logger.info("%d of %d tiles are taken over from %s.", self.reused, len(self.tiles), self.store.folder)
        self._warn_if_disk_small(len(missing))
        shown = self.progress and has_tqdm
        bar = tqdm(total=len(self.tiles), initial=self.reused, unit="tile", desc=self.slide.path.name) if shown else None
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="slide-reader")
        pending: deque[tuple[int, Any]] = deque()
        try:
            with torch.inference_mode():
                while missing or pending:
                    while missing and len(pending) < PREFETCH:
                        index = missing.popleft()
                        pending.append((index, pool.submit(self._read, self.batches[index])))
                    index, pixels = pending.popleft()
                    self.store.save(index, self._predict(pixels.result(), predictor, self.batches[index]))
                    if bar is not None:
                        bar.update(len(self.batches[index]))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if bar is not None:
                bar.close()

    def merge(self) -> SlideMap:
        """Blend the tiles, in one pass in the order of the tiles, which makes the result the same whatever interrupted them.

        Raises:
            SlideError: batches are missing or damaged; :meth:`run` computes them.
        """
        height, width = self.mass.shape
        size = self.tile // self.map_downsample
        window = _window(size)
        total: np.ndarray | None = None
        weight = np.zeros((height, width), dtype=np.float32)
        for index, batch in enumerate(self.batches):
            stored = self.store.load(index)
            if stored is None:
                raise SlideError(
                    f"batch {index} of the tiles of {self.slide.path} is missing in {self.store.folder}; run again."
                )
            names = [name for name in ("mean", "spread") if name in stored]
            values = np.concatenate([stored[name] for name in names], axis=1)
            if total is None:
                total = np.zeros((values.shape[1], height, width), dtype=np.float32)
            for (row, col), value in zip(batch, values):
                rows, cols = min(size, height - row), min(size, width - col)
                part = window[:rows, :cols]
                here = np.s_[row : row + rows, col : col + cols]
                total[(slice(None), *here)] += value[:, :rows, :cols] * (part / np.float32(FULL_SCALE))
                weight[here] += part
        covered = weight > 0
        total /= np.where(covered, weight, 1)
        total[: self.num_classes, ~covered] = 1 / self.num_classes
        return SlideMap(
            mean=total[: self.num_classes],
            spread=total[self.num_classes] if len(total) > self.num_classes else None,
            mass=self.mass,
            downsample=self.downsample,
            mpp=self.mpp,
            tiles=self.tiles,
            tile=size,
            reused=self.reused,
            work_dir=self.store.folder,
        )

    def clear(self) -> None:
        """Delete the results of the tiles."""
        self.store.clear()


def infer_slide(
    slide: Slide,
    predictor: Predictor,
    num_classes: int,
    *,
    mpp: float,
    work_dir: str | Path,
    fingerprint: str,
    tile: int = 512,
    overlap: float = 0.25,
    map_downsample: int = 4,
    tissue: tuple[np.ndarray, float] | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SlideMap:
    """Confidences of a whole slide.

    Tiles that touch tissue are read in the background, predicted, averaged to map pixels and written to ``work_dir`` batch by
    batch; at the end they are blended with a Gaussian window. An interrupted call goes on where it stopped and gives the
    same bytes as one that was not. Memory holds the map and a few batches of tiles. Confidences are kept as 16-bit fixed-point
    numbers, exact to 7.6e-6.

    Args:
        slide: where a stored level is within 5 % of ``mpp``, it is taken as it is; see :meth:`Slide.downsample_at`.
        predictor: images ``[B, 3, T, T]``, float32 in [0, 1], on ``device`` to probabilities ``[B, C, T, T]`` and their
            spread ``[B, 1, T, T]`` or None.
        num_classes: C.
        mpp: µm/px that the network sees.
        work_dir: folder of this slide's unfinished work; :meth:`SlideMap.clear` empties it.
        fingerprint: names the model, its weights and its options; results made with another one are not reused.
        tile: T, side of the tiles in px at ``mpp``, a multiple of ``map_downsample``.
        overlap: share of a tile that it has in common with the next one, 0 ≤ overlap < 1.
        map_downsample: px at ``mpp`` per map px.
        tissue: ``(mask, downsample)``: bool ``[h, w]`` and level-0 px per px of it; None to look for tissue at 8 µm/px.
        batch_size: tiles per call of ``predictor``.
        device: where ``predictor`` wants its images.
        progress: show a progress bar.

    Raises:
        InputError: an option is out of range, the tissue mask does not fit the slide, or there is no tissue.
        OSError: the results cannot be written (a full disk, say); those written before stay and are reused.
        SlideError: the slide is damaged.
        ValueError: the predictor gave a wrong shape or values outside [0, 1].
    """
    job = SlideConfidence(
        slide,
        num_classes,
        mpp=mpp,
        work_dir=work_dir,
        fingerprint=fingerprint,
        tile=tile,
        overlap=overlap,
        map_downsample=map_downsample,
        tissue=tissue,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    job.run(predictor)
    return job.merge()
