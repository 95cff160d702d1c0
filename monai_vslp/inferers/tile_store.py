"""Results of a slide's tiles on disk: one file for each batch, named by what it is the result of."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.utils.atomic import atomic_path, write_json

__all__ = ["TileCache", "TileStore"]

CACHE_BYTES = 2**27  # of tiles kept while they are blended

logger = logging.getLogger(__name__)


class TileStore:
    """Files with the results of one batch of tiles each, and ``plan.json``, which says what they are results of.

    The names of the files hold the digest of the plan, so a file is never taken for the result of another plan, and any
    number of processes may prepare, compute and write batches of one plan at once: they never delete each other's files,
    and each file is complete or absent.

    Args:
        folder: made when the first file is written.
        plan: plain JSON values; results of another plan are not used.

    Attributes:
        digest: names the plan, 16 hexadecimal digits.
    """

    def __init__(self, folder: str | Path, plan: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.plan = json.loads(json.dumps(plan))  # as it will be read back
        self.digest = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()[:16]

    def _file(self, index: int) -> Path:
        return self.folder / f"tiles-{self.digest}-{index:06d}.npz"

    def prepare(self) -> None:
        """Write ``plan.json`` and delete results of other plans."""
        path = self.folder / "plan.json"
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            reason = ", ".join(
                f"{key} was {old.get(key)!r}, is {value!r}" for key, value in self.plan.items() if old.get(key) != value
            )
        except FileNotFoundError:
            reason = "there is no plan.json"
        except (ValueError, AttributeError) as error:
            reason = f"plan.json is damaged ({error})"
        # A dot before the name marks an unfinished file.
        others = [
            path for path in (*self.folder.glob("tiles-*"), *self.folder.glob(".tiles-*")) if self.digest not in path.name
        ]
        if others:
            logger.warning("tile results in %s are not used but deleted: %s.", self.folder, reason)
        for other in others:
            other.unlink(missing_ok=True)
        if reason:
            write_json(path, self.plan)

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
            done = sum(1 for _ in self.folder.glob(f"tiles-{self.digest}-*.npz"))
            message = (
                f"tile results cannot be written to {self.folder}: {error.strerror or error}. {done} finished batches are kept "
                "there: make room, or move that folder to a larger disk, and run the same command again to go on."
            )
            raise OSError(error.errno, message) from error


class TileCache:
    """Batches of a store, those used last kept in memory; for several threads.

    Args:
        store: where batches are loaded from.
        limit: bytes that are kept at most; the batch used last is kept in any case.
    """

    def __init__(self, store: TileStore, limit: int = CACHE_BYTES) -> None:
        self.store, self.limit = store, limit
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, index: int) -> dict[str, np.ndarray] | None:
        """Arrays of one batch, not to be changed; None where they are missing or damaged."""
        with self._lock:  # also while loading: two threads that want one batch read it once
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
            arrays = self.store.load(index)
            if arrays is None:
                return None
            self._kept[index] = arrays
            self._bytes += sum(array.nbytes for array in arrays.values())
            while self._bytes > self.limit and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._bytes -= sum(array.nbytes for array in old.values())
            return arrays
