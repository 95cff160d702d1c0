"""Features of a frozen backbone, kept on disk: no window of tissue goes through it twice."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path

import torch
from torch import nn

from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.digest import state_digest

__all__ = ["FeatureCache"]

logger = logging.getLogger(__name__)


class FeatureCache:
    """What a frozen backbone gives for a window, found again by the window's pixels.

    Entries are named by a digest of the backbone's weights and options and of the window, so that runs which differ in
    heads, losses or seeds share them, and nothing stale is ever read. Values are rounded to half precision, whether they were
    computed or read, so that a first and a second run agree to the last bit. Files are written atomically: processes may
    share a folder, and it may be deleted at any time. A full disk costs time, not the run.

    Args:
        folder: made if needed. A window of 224 px of a small ViT takes 0.2 MiB.
        backbone: gives features ``[B, F, h, w]`` for normalised windows ``[B, 3, H, W]``; must not change any more.
        options: whatever else changes its output.
    """

    def __init__(self, folder: str | Path, backbone: nn.Module, options: object = None) -> None:
        self.folder, self.backbone = Path(folder), backbone
        self._prefix = state_digest(backbone.state_dict(), options).encode()
        self._writes = True

    def _path(self, window: torch.Tensor) -> Path:
        digest = hashlib.blake2b(self._prefix, digest_size=16)
        digest.update(repr(tuple(window.shape)).encode())
        digest.update(window.detach().float().cpu().contiguous().numpy().tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.pt"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features ``[B, F, h, w]``, float32 and without gradient, of windows ``[B, 3, H, W]``."""
        paths = [self._path(window) for window in x]
        found = [self._read(path) for path in paths]
        missing = [index for index, entry in enumerate(found) if entry is None]
        if missing:
            with torch.no_grad():
                computed = self.backbone(x[missing]).half().cpu()
            for index, entry in zip(missing, computed):
                found[index] = entry
                self._keep(entry, paths[index])
        return torch.stack(found).to(x.device).float()

    @staticmethod
    def _read(path: Path) -> torch.Tensor | None:
        try:
            return torch.load(path, weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s); its window is computed anew.", path, error)
            return None

    def _keep(self, entry: torch.Tensor, path: Path) -> None:
        if not self._writes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path, durable=False) as temporary:  # a damaged entry is computed anew
                torch.save(entry.clone(), temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self._writes = False
            logger.warning("Features are no longer kept in %s (%s); the run goes on and computes them.", self.folder, error)
