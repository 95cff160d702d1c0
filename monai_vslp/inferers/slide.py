"""Confidences of a whole slide: overlapping tiles over tissue, kept on disk until they are blended into maps on disk."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.utils import optional_import

from monai_vslp.data.inputs import content_mark
from monai_vslp.data.slides import Slide, area_resample
from monai_vslp.inferers.blending import blend_tiles, tile_weight
from monai_vslp.inferers.slide_maps import CHUNK, MAPS_NAME, SlideMaps, clear_work, create_maps, remove_maps
from monai_vslp.inferers.tile_store import TileCache, TileStore
from monai_vslp.transforms.tissue import TissueMask
from monai_vslp.utils.errors import InputError, SlideError

__all__ = ["SlideConfidence", "infer_slide", "network_predictor"]

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")

TISSUE_MPP = 8.0  # µm/px at which tissue is looked for
PREFETCH = 3  # batches read ahead of the network
READERS = 2  # threads that read one batch
UNWRITTEN = 2  # batches that may wait for the disk
BLENDERS = 2  # threads
FULL_SCALE = 65535  # 16-bit code of 1.0
SUM_ERROR = 1e-2  # of probabilities, largest

Prediction = tuple[torch.Tensor, "torch.Tensor | None"] | tuple[torch.Tensor, "torch.Tensor | None", torch.Tensor]
Predictor = Callable[[torch.Tensor], Prediction]

logger = logging.getLogger(__name__)


def network_predictor(network: torch.nn.Module, inferer: Inferer) -> Predictor:
    """What :func:`infer_slide` takes, from a network and an inferer that gives mean and spread.

    Args:
        network: gives logits ``[B, C, H, W]`` for images ``[B, 3, H, W]`` in [0, 1].
        inferer: ``inferer(images, network)`` gives ``[B, C + 1, H, W]``, probabilities and spread. Where it has an attribute
            ``spent``, it is the views that its last call spent on each image, shape ``[B]``.
    """

    def predict(images: torch.Tensor) -> Prediction:
        fused = inferer(images, network)
        spent = getattr(inferer, "spent", None)
        pair = fused[:, :-1], fused[:, -1:]
        return pair if spent is None else (*pair, spent)

    return predict


def _starts(length: int, size: int, step: int) -> np.ndarray:
    """Starts of intervals of ``size`` that cover ``length``; the last one is moved back inside."""
    count = max(0, math.ceil((length - size) / step)) + 1
    return np.minimum(np.arange(count) * step, max(0, length - size))


def _chunks(shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The chunks of a map ``[h, w]``, row by row."""
    spans = [[slice(start, min(start + CHUNK, side)) for start in range(0, side, CHUNK)] for side in shape]
    return [(rows, cols) for rows in spans[0] for cols in spans[1]]


class _Tissue:
    """Share of each map px that is tissue, computed where it is asked for; no map of it is held.

    Args:
        mask: bool ``[m, n]``.
        ratio: px of the mask per map px.
    """

    def __init__(self, mask: np.ndarray, ratio: float) -> None:
        self.mask, self.ratio = np.ascontiguousarray(mask, dtype=bool), ratio

    def __call__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Shares in a rectangle of map px, float32."""
        size = tuple(span.stop - span.start for span in part)
        begins = [span.start * self.ratio for span in part]
        first = [max(0, math.floor(begin)) for begin in begins]
        last = [math.ceil(span.stop * self.ratio) + 1 for span in part]
        seen = self.mask[first[0] : last[0], first[1] : last[1]]
        if not seen.any():
            return np.zeros(size, dtype=np.float32)
        start = (begins[0] - first[0], begins[1] - first[1])
        mass = area_resample(seen, start, self.ratio, size, smooth=False)
        # Rounding errors must not make tissue of glass.
        return np.where(mass < 1e-6, 0, np.clip(mass, 0, 1)).astype(np.float32)


class _Writer:
    """Writes batches in a thread of its own, a few at most waiting; after an error it writes nothing more."""

    def __init__(self, store: TileStore) -> None:
        self._store, self._failed = store, False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tile-writer")
        self._waiting: deque[Future] = deque()

    def _save(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        if self._failed:
            return
        try:
            self._store.save(index, arrays)
        except BaseException:
            self._failed = True
            raise

    def put(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Write one batch soon; waits where the disk is behind. Raises what an earlier write raised."""
        self._waiting.append(self._pool.submit(self._save, index, arrays))
        self.flush(UNWRITTEN)

    def flush(self, left: int = 0) -> None:
        """Wait until no more than ``left`` batches are unwritten."""
        while self._waiting and (len(self._waiting) > left or self._waiting[0].done()):
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait for the end of what was begun."""
        self._pool.shutdown(wait=True)


class SlideConfidence:
    """The job behind :func:`infer_slide`, in steps: :meth:`run` fills ``work_dir``, :meth:`merge` blends what is there.

    Batches are independent: any process that makes the same job may run any of them (``batches``), at the same time as
    others, and one of them merges when all are done.

    Args: see :func:`infer_slide`.

    Attributes:
        downsample: level-0 px per map px.
        mpp: µm per map px.
        shape: of the maps, ``(h, w)`` in px.
        tiles: upper left corner ``(row, col)`` of the blended part of each tile in map px, shape ``[N, 2]``, int64, row by row.
        batches: the tiles that are predicted together, a list of such arrays.
        reused: tiles that :meth:`run` found done.
        seconds: as in :class:`~monai_vslp.inferers.slide_maps.SlideMaps`.
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
        margin: int = 0,
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
        if margin < 0 or margin % map_downsample or 2 * margin >= tile:
            raise InputError(
                f"margin must be a multiple of map_downsample = {map_downsample}, at least 0 and less than half of the tile "
                f"({tile} px), got {margin}."
            )
        self.slide, self.num_classes, self.batch_size = slide, num_classes, batch_size
        self.tile, self.margin, self.map_downsample = tile, margin, map_downsample
        self.device, self.progress, self.fingerprint = torch.device(device), progress, fingerprint
        self.reused = 0
        self.seconds = dict.fromkeys(("read_wait", "network", "write_wait", "blend"), 0.0)
        self._scale = slide.downsample_at(mpp)  # level-0 px per px that the network sees
        self.downsample = self._scale * map_downsample
        self.mpp = self.downsample * slide.mpp
        self.shape = tuple(max(1, math.ceil(side / self.downsample - 1e-6)) for side in slide.shape)
        mask, down = self._tissue(tissue)
        self.mass = _Tissue(mask, self.downsample / down)
        self._size = (tile - 2 * margin) // map_downsample  # of the blended part, map px
        self.tiles = self._tiles_over_tissue(max(1, round(self._size * (1 - overlap))))
        self.batches = [self.tiles[i : i + batch_size] for i in range(0, len(self.tiles), batch_size)]
        size, changed = content_mark(slide.path)
        plan = {
            "slide": str(slide.path.resolve()),
            "size": size,
            "mtime_ns": changed,
            "reader": slide.reader,
            "slide_mpp": slide.mpp,
            "color": slide.color,
            "scale": self._scale,
            "tile": tile,
            "overlap": overlap,
            "margin": margin,
            "map_downsample": map_downsample,
            "batch_size": batch_size,
            "classes": num_classes,
            "tissue": hashlib.sha256(f"{mask.shape}/{down!r}".encode() + np.packbits(self.mass.mask).tobytes()).hexdigest(),
            "fingerprint": fingerprint,
        }
        self.store = TileStore(work_dir, plan)

    def _tissue(self, tissue: tuple[np.ndarray, float] | None) -> tuple[np.ndarray, float]:
        if tissue is None:
            down = max(1.0, TISSUE_MPP / self.slide.mpp)
            thumbnail = np.moveaxis(self.slide.thumbnail(downsample=down), -1, 0)
            found = TissueMask(mpp=down * self.slide.mpp)(thumbnail)[0]
            if self.slide.bounds is None:
                return found, down
            row, col, height, width = (side / down for side in self.slide.bounds)
            scanned = np.zeros_like(found)
            scanned[math.floor(row) : math.ceil(row + height), math.floor(col) : math.ceil(col + width)] = True
            return found & scanned, down
        mask, down = np.asarray(tissue[0]), float(tissue[1])
        wanted = tuple(side / down for side in self.slide.shape)
        if mask.ndim != 2 or any(abs(have - want) > 1 + 0.01 * want for have, want in zip(mask.shape, wanted)):
            expected = [math.ceil(v) for v in wanted]
            raise InputError(
                f"the tissue mask has shape {list(mask.shape)}; at downsample {down:g} the slide needs about {expected}."
            )
        return mask.astype(bool), down

    def _tiles_over_tissue(self, step: int) -> np.ndarray:
        """Corners of the tiles of a regular grid that have tissue, int64 ``[N, 2]``."""
        starts = [_starts(side, self._size, step) for side in self.shape]
        ends = [np.minimum(begin + self._size, side) for begin, side in zip(starts, self.shape)]
        # Borders of tiles cut the map into cells that are inside a tile or outside as a whole.
        borders = [np.unique(np.concatenate(pair)) for pair in zip(starts, ends)]
        cells = [np.searchsorted(border, np.arange(side), side="right") - 1 for border, side in zip(borders, self.shape)]
        has_tissue = np.zeros([len(border) for border in borders], dtype=bool)
        for rows, cols in _chunks(self.shape):
            row, col = np.nonzero(self.mass((rows, cols)))
            has_tissue[cells[0][rows][row], cells[1][cols][col]] = True
        if not has_tissue.any():
            raise InputError(
                f"no tissue was found on slide {self.slide.path}. If there is some, check the µm/px ({self.slide.mpp:g}; "
                "pass --mpp) or give a tissue mask."
            )
        # Counts of cells above and to the left of each border say at once which tiles touch tissue.
        counts = np.pad(has_tissue.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        (top, left), (bottom, right) = (
            [np.searchsorted(border, place) for border, place in zip(borders, places)] for places in (starts, ends)
        )
        inside = (
            counts[np.ix_(bottom, right)]
            - counts[np.ix_(top, right)]
            - counts[np.ix_(bottom, left)]
            + counts[np.ix_(top, left)]
        )
        chosen = np.argwhere(inside > 0)
        return np.stack([starts[0][chosen[:, 0]], starts[1][chosen[:, 1]]], axis=1)

    def estimate(self) -> dict[str, Any]:
        """What the job will need, before anything is computed.

        Returns:
            ``tiles``, ``batches``, ``map_shape`` ``[h, w]`` in px, ``tile_px`` (side of what the network sees), and bytes on
            disk: ``tile_bytes`` for results of tiles, ``map_bytes`` for maps (both without compression, with a spread; maps
            end up at a half or less), ``free_bytes`` on the disk of ``work_dir``.
        """
        folder = next(path for path in (self.store.folder, *self.store.folder.absolute().parents) if path.is_dir())
        return {
            "tiles": len(self.tiles),
            "batches": len(self.batches),
            "map_shape": list(self.shape),
            "tile_px": self.tile,
            "tile_bytes": len(self.tiles) * self._bytes_per_tile,
            "map_bytes": math.prod(self.shape) * (2 * (self.num_classes + 1) + 4 + 3),
            "free_bytes": shutil.disk_usage(folder).free,
        }

    @property
    def _bytes_per_tile(self) -> int:
        return (self.num_classes + 1) * self._size**2 * 2

    def _read(self, batch: np.ndarray) -> np.ndarray:
        """Tiles ``[B, T, T, 3]``, uint8; white beyond the slide."""
        corners = (batch * self.map_downsample - self.margin).tolist()
        return self.slide.read_many(corners, self.tile, self.tile, downsample=self._scale, workers=READERS)

    def _prepared(self, batch: np.ndarray) -> torch.Tensor:
        """Tiles ``[B, 3, T, T]`` as they go to the device: uint8 and pinned for a GPU, float32 in [0, 1] otherwise."""
        pixels = torch.from_numpy(self._read(batch)).permute(0, 3, 1, 2).contiguous()
        return pixels.pin_memory() if self.device.type == "cuda" else pixels.float().div_(255.0)

    def _predict(self, pixels: torch.Tensor, predictor: Predictor, batch: np.ndarray) -> dict[str, np.ndarray]:
        """What is kept of one batch: means over map px as 16-bit codes, ``mean [B, C, M, M]`` and ``spread [B, 1, M, M]``, and
        ``views [B]``, float32."""
        images = pixels.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(255.0)
        mean, spread, *views = predictor(images)
        wanted = {"mean": (len(batch), self.num_classes, self.tile, self.tile), "spread": (len(batch), 1, self.tile, self.tile)}
        kept = {}
        for name, value in (("mean", mean), ("spread", spread)):
            if value is None:
                continue
            if tuple(value.shape) != wanted[name]:
                raise ValueError(f"the predictor gave a {name} of shape {list(value.shape)}, expected {list(wanted[name])}.")
            pooled = torch.nn.functional.avg_pool2d(value.float(), self.map_downsample)
            low, high = (float(v) for v in torch.aminmax(pooled))
            off = float((pooled.sum(dim=1) - 1).abs().max()) if name == "mean" else 0.0
            if not (low >= -1e-3 and high <= 1 + 1e-3 and off <= SUM_ERROR):  # also catches NaN
                corners = [[round(float(v) * self.downsample) for v in corner] for corner in batch]
                raise ValueError(
                    f"the predictor gave a {name} from {low:g} to {high:g}, with sums off by {off:g}; expected 0 to 1, and "
                    f"sums of 1 over classes, for tiles at level-0 (row, col) {corners}."
                )
            edge = self.margin // self.map_downsample
            inner = pooled[..., edge : edge + self._size, edge : edge + self._size]
            kept[name] = (inner.clamp(0, 1) * FULL_SCALE).round().int().cpu().numpy().astype(np.uint16)
        if views:
            kept["views"] = np.asarray(torch.as_tensor(views[0]).cpu(), dtype=np.float32).reshape(len(batch))
        return kept

    def _warn_if_disk_small(self, missing: int) -> None:
        needs = self.estimate()
        needed = missing * self.batch_size * self._bytes_per_tile + needs["map_bytes"]
        if needed > needs["free_bytes"]:
            logger.warning(
                "%s has %.1f GB left, the tile results need up to %.1f GB with the maps.",
                self.store.folder,
                needs["free_bytes"] / 1e9,
                needed / 1e9,
            )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def finished(self) -> SlideMaps | None:
        """The maps, where they are complete already and the result of the same plan."""
        path = self.store.folder / MAPS_NAME
        if not path.is_dir():
            return None
        try:
            found = SlideMaps.read(path)
        except InputError as error:
            logger.warning("%s", error)
            return None
        return found if found.plan == self.store.digest else None

    def prepare(self) -> None:
        """Delete what other settings left in ``work_dir``; :meth:`run` does it, too. Safe beside others with the same job."""
        self.store.prepare()
        if (self.store.folder / MAPS_NAME).is_dir() and self.finished() is None:
            remove_maps(self.store.folder)

    def run(self, predictor: Predictor, batches: Iterable[int] | None = None) -> None:
        """Compute the batches that are not in ``work_dir`` yet; may be interrupted at any time and called again.

        Tiles are read ahead and results written behind in threads; :attr:`seconds` says what the network waited for.

        Args:
            predictor: see :func:`infer_slide`.
            batches: indices into :attr:`batches`; None for all.

        Raises:
            InputError: there is no such batch.
            OSError: the results cannot be written; those written before stay.
            SlideError: the slide is damaged.
            ValueError: the predictor gave a wrong shape or values outside [0, 1].
        """
        wanted = list(range(len(self.batches))) if batches is None else sorted(set(batches))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self.batches):
            raise InputError(f"batches are 0 to {len(self.batches) - 1}, got {wanted[0]} to {wanted[-1]}.")
        total = sum(len(self.batches[index]) for index in wanted)
        self.prepare()
        if self.finished() is not None:
            self.reused = total
            return
        missing = deque(index for index in wanted if self.store.load(index) is None)
        self.reused = total - sum(len(self.batches[index]) for index in missing)
        if self.reused:
            logger.info("%d of %d tiles are taken over from %s.", self.reused, total, self.store.folder)
        self._warn_if_disk_small(len(missing))
        shown = self.progress and has_tqdm
        bar = tqdm(total=total, initial=self.reused, unit="tile", desc=self.slide.path.name) if shown else None
        readers = ThreadPoolExecutor(1, thread_name_prefix="slide-reader")
        writer = _Writer(self.store)
        pending: deque[tuple[int, Future]] = deque()
        try:
            with torch.inference_mode():
                while missing or pending:
                    while missing and len(pending) < PREFETCH:
                        index = missing.popleft()
                        pending.append((index, readers.submit(self._prepared, self.batches[index])))
                    index, future = pending.popleft()
                    with self._timed("read_wait"):
                        pixels = future.result()
                    with self._timed("network"):
                        kept = self._predict(pixels, predictor, self.batches[index])
                    with self._timed("write_wait"):
                        writer.put(index, kept)
                    if bar is not None:
                        bar.update(len(self.batches[index]))
            with self._timed("write_wait"):
                writer.flush()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            writer.close()  # what was computed is written, whatever happened
            if bar is not None:
                bar.close()

    def merge(self) -> SlideMaps:
        """Blend the tiles chunk by chunk into ``work_dir / "maps.zarr"``.

        Each chunk adds the tiles that touch it in the order of the tiles, so the maps are the same bytes whatever
        interrupted the work and whoever did it. An interrupted merge starts over.

        Raises:
            OSError: a full disk, say; the tile results stay.
            SlideError: batches are missing or damaged (:meth:`run` computes them), or the slide cannot be read.
        """
        found = self.finished()
        if found is not None:
            return found
        started = time.perf_counter()
        first = self._load(self.store.load, 0)
        cache, weight = TileCache(self.store), tile_weight(self._size)
        views: dict[int, np.ndarray] = {}

        def values(tile: int) -> np.ndarray:
            index, place = divmod(tile, self.batch_size)
            stored = self._load(cache, index)
            if "views" in stored:
                views[index] = stored["views"]
            return np.concatenate([stored[name][place] for name in ("mean", "spread") if name in stored])

        try:
            with create_maps(self.store.folder, self.num_classes, self.shape, "spread" in first, self.store.digest) as group:
                arrays = {name: group[name] for name in group.array_keys()}
                pool = ThreadPoolExecutor(BLENDERS, thread_name_prefix="blender")
                try:
                    # Chunks share nothing but the cache, so their bytes do not depend on their order.
                    for done in [pool.submit(self._blend, arrays, values, weight, part) for part in _chunks(self.shape)]:
                        done.result()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
                self.seconds["blend"] += time.perf_counter() - started
                group.attrs.update(self._maps(np.concatenate([views[i] for i in sorted(views)]) if views else None).attributes)
        except OSError as error:
            message = (
                f"the maps cannot be written to {self.store.folder}: {error.strerror or error}. The tile results are kept "
                "there: make room, or move that folder to a larger disk, and run the same command again to go on."
            )
            raise OSError(error.errno, message) from error
        return SlideMaps.read(self.store.folder / MAPS_NAME)

    def _load(self, load: Callable[[int], dict[str, np.ndarray] | None], index: int) -> dict[str, np.ndarray]:
        stored = load(index)
        if stored is None:
            raise SlideError(f"batch {index} of the tiles of {self.slide.path} is missing in {self.store.folder}; run again.")
        return stored

    def _blend(
        self, arrays: dict[str, Any], values: Callable[[int], np.ndarray], weight: np.ndarray, part: tuple[slice, slice]
    ) -> None:
        """Write one chunk of all maps."""
        rows, cols = part
        size = rows.stop - rows.start, cols.stop - cols.start
        pixels = self.slide.read_at(rows.start, cols.start, *size, downsample=self.downsample)
        arrays["image"][:, rows, cols] = np.moveaxis(pixels, -1, 0)
        arrays["mass"][rows, cols] = self.mass(part)
        total = blend_tiles(self.tiles, weight, values, part)
        if total is None:
            return
        mean = total[: self.num_classes]
        norm = mean.sum(axis=0)
        mean /= np.where(norm > 0, norm, 1)
        arrays["confidence"][:, rows, cols] = mean.astype(np.float16)
        if "spread" in arrays:
            arrays["spread"][rows, cols] = (total[self.num_classes] / FULL_SCALE).astype(np.float16)

    def _maps(self, views: np.ndarray | None) -> SlideMaps:
        spent = None
        if views is not None:
            views = views.astype(np.float64)
            spent = {"total": float(views.sum()), "mean": float(views.mean()), "max": float(views.max())}
        return SlideMaps(
            path=self.store.folder / MAPS_NAME,
            shape=self.shape,
            classes=self.num_classes,
            downsample=self.downsample,
            mpp=self.mpp,
            level0_shape=tuple(self.slide.shape),
            slide=str(self.slide.path),
            reader=self.slide.reader,
            tiles=len(self.tiles),
            tile=self._size,
            fingerprint=self.fingerprint,
            plan=self.store.digest,
            views=spent,
            seconds=self.seconds,
            reused=self.reused,
        )

    def clear(self) -> None:
        """Delete the results of the tiles and the maps."""
        clear_work(self.store.folder)


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
    margin: int = 0,
    map_downsample: int = 4,
    tissue: tuple[np.ndarray, float] | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SlideMaps:
    """Confidences of a whole slide, as maps on disk.

    Tiles that touch tissue are read in the background, predicted, averaged to map pixels and written to ``work_dir`` batch by
    batch; at the end they are blended with a Gaussian window, chunk by chunk. A call that was interrupted, killed even, goes
    on where it stopped and gives the same bytes as one that was not. Memory holds some batches of tiles, some chunks of the
    maps and a tissue mask, whatever the size of the slide. Results of tiles are 16-bit fixed-point numbers, exact to 7.6e-6.

    Near the edge of a tile a network sees less than it would in the middle: padding instead of tissue. The weights there are
    small but not 0, and blending alone leaves traces of it. A network that looks no farther than r px leaves none with
    ``margin`` ≥ r: the map is then the same for any size of tiles.

    Args:
        slide: where a stored level is within 5 % of ``mpp``, it is taken as it is; see :meth:`Slide.downsample_at`.
        predictor: images ``[B, 3, T, T]``, float32 in [0, 1], on ``device`` to probabilities ``[B, C, T, T]``, their spread
            ``[B, 1, T, T]`` or None, and, optionally, views spent ``[B]``; :func:`network_predictor` makes one.
        num_classes: C.
        mpp: µm/px that the network sees.
        work_dir: folder of this slide's unfinished work and its maps; :meth:`SlideMaps.clear` empties it.
        fingerprint: names the model, its weights and its options; results made with another one are not reused.
        tile: T, side of the tiles in px at ``mpp``, a multiple of ``map_downsample``.
        overlap: share of a tile, without its margin, that it has in common with the next one, 0 ≤ overlap < 1.
        margin: px at ``mpp`` at each side of a tile that are predicted but not blended, a multiple of ``map_downsample``.
        map_downsample: px at ``mpp`` per map px.
        tissue: ``(mask, downsample)``: bool ``[h, w]`` and level-0 px per px of it; None to look for tissue at 8 µm/px.
        batch_size: tiles per call of ``predictor``.
        device: where ``predictor`` wants its images.
        progress: show a progress bar.

    Raises:
        InputError: an option is out of range, the tissue mask does not fit the slide, or there is no tissue.
        OSError: the results cannot be written (a full disk, say); those written before stay and are reused.
        SlideError: the slide is damaged.
        ValueError: the predictor gave a wrong shape or values that are no probabilities.
    """
    job = SlideConfidence(
        slide,
        num_classes,
        mpp=mpp,
        work_dir=work_dir,
        fingerprint=fingerprint,
        tile=tile,
        overlap=overlap,
        margin=margin,
        map_downsample=map_downsample,
        tissue=tissue,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    job.run(predictor)
    return job.merge()
