"""Bags for learning from proportions: images (or their cached features), tissue mass and proportions, in batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.utils import CommonKeys, optional_import
from torch.utils.data import Dataset

from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.digest import state_digest
from monai_vslp.utils.errors import InputError

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = [
    "FEATURES",
    "FeatureBagDataset",
    "bag_keys",
    "collate_bags",
    "fingerprint",
    "pad_to_multiple",
    "predicted_and_given",
    "prepare_bags",
]

FEATURES = "features"  # key of cached token features, [V, F, h, w]


def pad_to_multiple(image: torch.Tensor, mass: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad at the bottom and right to multiples of ``stride``: the image by repeating its edge, the mass by 0.

    Args:
        image: shape ``[3, H, W]``, float.
        mass: shape ``[1, H, W]``, float.
        stride: px per token.

    Returns:
        Image and mass of a common size whose sides are multiples of ``stride``.
    """
    height, width = image.shape[-2:]
    pad = (0, -width % stride, 0, -height % stride)
    return F.pad(image[None], pad, mode="replicate")[0], F.pad(mass, pad)


def _mass_of(item: Mapping[str, Any]) -> torch.Tensor:
    """Tissue mass ``[1, H, W]`` of an item; tissue everywhere where it has none."""
    mass = item.get("mass")
    if mass is None:
        return torch.ones(1, *item[CommonKeys.IMAGE].shape[-2:])
    return torch.as_tensor(mass, dtype=torch.float32)


class FeatureBagDataset(Dataset):
    """Bags whose frozen features were computed once, for several views that are mapped back to the image's grid.

    The head sees the same tissue under other orientations and stains without running the backbone again. With a folder the
    features lie on disk, and are mapped into memory as they are used: cohorts may be larger than memory.

    Args:
        bags: items with ``image`` ``[3, H, W]`` float in [0, 1], ``proportions`` ``[C]`` and optionally ``mass``
            ``[1, H, W]``.
        network: a network with ``features(x) -> [B, F, h, w]`` and ``stride`` (px per token).
        views: symmetries and stain changes, see :mod:`monai_vslp.networks.tta`; the first should be the identity.
        device: where features are computed; they are kept on the CPU in float16.
        cache: folder for one file per bag, made if needed; files of an earlier run are used again. None for memory.
        keys: name per bag, see :func:`bag_keys`; needed with ``cache``.
        progress: show a progress bar.
    """

    def __init__(
        self,
        bags: Sequence[Mapping[str, Any]],
        network: torch.nn.Module,
        views: Sequence[Any],
        device: torch.device | str = "cpu",
        progress: bool = True,
        cache: str | Path | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        if cache is not None and (keys is None or len(keys) != len(bags)):
            found = None if keys is None else len(keys)
            raise InputError(f"features kept on disk need one key per bag, {len(bags)}, got {found}.")
        self.items: list[dict[str, Any]] = []
        network = network.to(device).eval()
        for index in tqdm(range(len(bags)), desc="features", unit="image", disable=not progress):
            path = None if cache is None else Path(cache) / f"{keys[index]}.pt"
            if path is not None and path.exists():
                self.items.append(torch.load(path, mmap=True, weights_only=True))
                continue
            item = bags[index]
            image, mass = pad_to_multiple(torch.as_tensor(item[CommonKeys.IMAGE]), _mass_of(item), network.stride)
            batch = image[None].to(device)
            with torch.inference_mode():
                maps = [view(batch, network.features)[0].half().cpu() for view in views]
            entry = {
                FEATURES: torch.stack(maps).clone(),
                "mass": F.avg_pool2d(mass[None], network.stride)[0].clone(),
                "proportions": torch.as_tensor(item["proportions"], dtype=torch.float32).clone(),
            }
            if path is not None:
                with atomic_path(path) as temporary:
                    torch.save(entry, temporary)
                entry = torch.load(path, mmap=True, weights_only=True)
            self.items.append(entry)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def bag_keys(datalist: Sequence[Mapping[str, Any]], network: torch.nn.Module, views: str | Sequence[Any]) -> list[str]:
    """Names of bags on disk: they change with the image, its proportions, the network's features and the views.

    Args:
        datalist: items with ``image`` (a path) and ``proportions``.
        network: as its features are computed, with weights.
        views: says which views: a text, or parts that are joined by hyphens.
    """
    views = views if isinstance(views, str) else "-".join(str(part) for part in views)
    features = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
    options = (views, getattr(network, "window", None), getattr(network, "magnifications", None))
    base = state_digest(features, options)
    keys = []
    for item in datalist:
        image = Path(item[CommonKeys.IMAGE])
        known = (base, str(image.absolute()), image.stat().st_mtime_ns, [float(p) for p in item["proportions"]])
        keys.append(f"{image.stem}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}")
    return keys


def collate_bags(items: Sequence[Mapping[str, Any]], stride: int = 1) -> dict[str, torch.Tensor]:
    """Batch bags of different sizes by padding; padded pixels have mass 0.

    Args:
        items: with ``features`` ``[V, F, h, w]`` or ``image`` ``[3, H, W]``, ``proportions`` ``[C]``, and ``mass`` of
            the same height and width (optional for images).
        stride: sides of image batches become multiples of it, px.

    Returns:
        ``features`` ``[B, V, F, h, w]`` or ``image`` ``[B, 3, H, W]``, ``mass`` ``[B, 1, h, w]`` and ``proportions``
        ``[B, C]``.
    """
    key = FEATURES if FEATURES in items[0] else CommonKeys.IMAGE
    masses = [item["mass"] if key == FEATURES else _mass_of(item) for item in items]
    height = math.ceil(max(item[key].shape[-2] for item in items) / stride) * stride
    width = math.ceil(max(item[key].shape[-1] for item in items) / stride) * stride

    def padded(x: torch.Tensor, mode: str) -> torch.Tensor:
        x = torch.as_tensor(x)
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode=mode)

    # Images are continued as the network itself continues them, so that tokens at the border see the same.
    mode = "constant" if key == FEATURES else "replicate"
    return {
        str(key): torch.stack([padded(item[key], mode) for item in items]),
        "mass": torch.stack([padded(mass, "constant") for mass in masses]),
        "proportions": torch.stack([torch.as_tensor(item["proportions"], dtype=torch.float32) for item in items]),
    }


def prepare_bags(
    batch: Mapping[str, torch.Tensor],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[()], dict[str, torch.Tensor]]:
    """``prepare_batch`` of MONAI's engines for batches of :func:`collate_bags`.

    Returns:
        The input (features or images, float32), the target (a dictionary of ``mass`` and ``proportions``), and the
        arguments of the inferer (none, and the mass).
    """
    key = FEATURES if FEATURES in batch else CommonKeys.IMAGE
    target = {name: batch[name].to(device, non_blocking=non_blocking) for name in ("mass", "proportions")}
    inputs = batch[key].to(device, non_blocking=non_blocking).float()
    return inputs, target, (), {"mass": target["mass"]}


def predicted_and_given(output: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``output_transform`` of metrics: proportions predicted and given, both ``[B, C]``, of an evaluator's output."""
    return output[CommonKeys.PRED], output[CommonKeys.LABEL]["proportions"]


def fingerprint(datalist: Sequence[Mapping[str, Any]]) -> str:
    """Digest of image names and proportions, to tell whether a checkpoint belongs to the same bags."""
    digest = hashlib.sha256()
    for item in datalist:
        digest.update(Path(item[CommonKeys.IMAGE]).name.encode())
        digest.update(torch.as_tensor(item["proportions"], dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
