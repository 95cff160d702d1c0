"""What a regularizer is trained on: confidences of all views, targets made of proportions, degraded label maps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import CommonKeys, optional_import
from torch.utils.data import Dataset

from monai_vslp.data.raters import RATER_LEVELS, apply_rater, draw_noise, rater_offsets
from monai_vslp.data.synthetic_labels import random_label_map
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine
from monai_vslp.variational.learned import normalized

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = [
    "ConfidenceStacks",
    "Degradation",
    "HeldOutMaps",
    "RegularizerBatches",
    "prepare_refinement",
    "stack_keys",
]


class ConfidenceStacks(Dataset):
    """Confidences of every test-time view of each image, averaged to cells, kept on disk.

    Args:
        bags: items with ``image`` ``[3, H, W]`` float in [0, 1], ``proportions`` ``[C]`` and optionally ``mass``.
        network: gives logits ``[B, C, H, W]``.
        views: a :class:`~monai_vslp.networks.TTAConfidence` with ``output="stack"``.
        cell: edge of a cell, px.
        cache: folder of the kept stacks; one file per image, named by ``keys``.
        keys: name per image; must change when image or network change.
        device: where the network runs.
        progress: show a progress bar.
    """

    def __init__(
        self,
        bags: Sequence[Mapping[str, Any]],
        network: torch.nn.Module,
        views: Any,
        cell: int = 4,
        cache: str | Path | None = None,
        keys: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> None:
        if cell < 1:
            raise InputError(f"the edge of a cell must be at least 1 px, got {cell}.")
        self.items: list[dict[str, torch.Tensor]] = []
        network = network.to(device).eval()
        for index in tqdm(range(len(bags)), desc="views", unit="image", disable=not progress):
            path = None if cache is None else Path(cache) / f"{keys[index]}.pt"
            if path is not None and path.exists():
                self.items.append(torch.load(path, weights_only=True))
                continue
            item = bags[index]
            image = torch.as_tensor(item[CommonKeys.IMAGE]).float()
            with torch.inference_mode():
                stack = views(image[None].to(device), network)[0].cpu().float()
            mass = item.get("mass")
            mass = torch.ones(1, *image.shape[1:]) if mass is None else torch.as_tensor(mass).float()
            share = _pool(mass, cell)
            entry = {
                "stack": (_pool(stack * mass, cell) / share.clamp_min(1e-6)).half(),
                "mass": share[0].half(),
                "image": normalized(_pool(image, cell)).half(),
                "proportions": torch.as_tensor(item["proportions"], dtype=torch.float32).clone(),
            }
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    torch.save(entry, temporary)
            self.items.append(entry)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        entry = {key: value.float() for key, value in self.items[index].items()}
        total = entry["stack"].sum(dim=1, keepdim=True)
        # Cells of background have no confidence: even ones keep logarithms finite, their mass of 0 discards them.
        entry["stack"] = torch.where(
            total > 0.5, entry["stack"] / total.clamp_min(1e-6), torch.full_like(entry["stack"], 1 / entry["stack"].shape[1])
        )
        return entry


def _pool(x: torch.Tensor, cell: int) -> torch.Tensor:
    return x if cell == 1 else F.avg_pool2d(x, cell, ceil_mode=True, count_include_pad=False)


def _centred_logits(q: torch.Tensor, axis: int) -> torch.Tensor:
    logits = (q + 1e-3).log()
    return logits - logits.mean(dim=axis, keepdim=True)


class Degradation:
    r"""How the first stage blurs and confuses classes, measured without masks.

    With pseudo-labels :math:`\ell_i` of the training images (proportion-consistent ones) and centred logits
    :math:`z_i = \log(q_i + 10^{-3})`, the confusion is :math:`M_k = \operatorname{mean}\{z_i : \ell_i = k\}` and what it leaves
    over are fields :math:`e_i = z_i - M_{\ell_i}` that carry the real noise with its spatial correlation. A label map
    :math:`L` is degraded to

    .. math:: q_i = \operatorname{softmax}(M_{L_i} + e_i)

    with :math:`e` cut from a random image.

    Args:
        confidences: mean confidences, each ``[C, h, w]``.
        labels: pseudo-labels, each ``[h, w]``, int64.
    """

    def __init__(self, confidences: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> None:
        classes = len(confidences[0])
        total, count = torch.zeros(classes, classes), torch.zeros(classes)
        logits = [_centred_logits(q, 0) for q in confidences]
        for z, label in zip(logits, labels):
            onehot = F.one_hot(label.flatten(), classes).float()
            total += onehot.T @ z.reshape(classes, -1).T
            count += onehot.sum(dim=0)
        # A class that no pseudo-label has is drawn as a confident one.
        seen = (count > 0)[:, None]
        certain = _centred_logits(0.9 * torch.eye(classes) + 0.1 / classes, 1)
        self.confusion = torch.where(seen, total / count.clamp_min(1)[:, None], certain)
        self.fields = [z - self.confusion[label].permute(2, 0, 1) for z, label in zip(logits, labels)]

    def __call__(self, labels: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
        """Confidences ``[C, h, w]`` of a label map ``[h, w]`` under a field ``[C, h, w]``."""
        return torch.softmax(self.confusion[labels].permute(2, 0, 1) + field, dim=0)


class RegularizerBatches(Dataset):
    r"""Batches that an unrolled refinement is trained on; no pixel label enters.

    Two kinds of crops in turn:

    - *views*: one view, or the mean of all, of a training image; the target is the mean of all views made
      consistent with the image's proportions by the variational stage with total variation weighted by the image;
    - *maps*: a synthetic label map, degraded by what was measured of the first stage; the target is the map.

    A third of the batches comes with the exact proportions of their targets as a constraint, a third with proportions as a
    rater would have given them and a finite trust, a third without any, so that what is learned serves all three. Batch ``i``
    of epoch ``e`` depends on ``(seed, e, i)`` alone.

    Args:
        stacks: confidences of the training images.
        size: edge of the crops, in cells.
        batch_size: crops per batch.
        length: batches per epoch.
        seed: of all draws.
        maps: share of batches that come from label maps, in [0, 1].
        target_alpha: strength of the total variation that targets of views are made with, in cells.
        trust: ρ of the batches with a rater's proportions.
        rater: noise of those, a level of :data:`monai_vslp.data.raters.RATER_LEVELS`.
        scale: range of the typical size of structures in label maps, in cells.
        progress: show a progress bar while targets are made.
    """

    def __init__(
        self,
        stacks: ConfidenceStacks,
        size: int = 64,
        batch_size: int = 4,
        length: int = 50,
        seed: int = 0,
        maps: float = 0.5,
        target_alpha: float = 2.0,
        trust: float = 3.0,
        rater: str = "medium",
        scale: tuple[float, float] = (12.0, 40.0),
        progress: bool = True,
    ) -> None:
        if len(stacks) == 0:
            raise InputError("there are no training images to learn a regularizer from.")
        if not 0 <= maps <= 1:
            raise InputError(f"maps is a share of batches in [0, 1], got {maps}.")
        if rater not in RATER_LEVELS:
            raise InputError(f"rater is one of {', '.join(RATER_LEVELS)}, got {rater!r}.")
        self.stacks, self.batch_size, self.length, self.seed = stacks, batch_size, length, seed
        self.maps, self.trust, self.rater, self.scale = maps, trust, rater, scale
        self.epoch = 0
        self.means: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        labels = []
        for index in tqdm(range(len(stacks)), desc="targets", unit="image", disable=not progress):
            entry = stacks[index]
            mean = entry["stack"].mean(dim=0)
            edges = {"image": entry["image"]} if entry["image"].any() else {}
            target = refine(mean, entry["proportions"], entry["mass"], **edges, alpha=target_alpha, tolerance=1e-4)
            self.means.append(mean)
            self.targets.append(target.u)
            labels.append(target.labels)
        self.degradation = Degradation(self.means, labels)
        self.classes = len(self.means[0])
        shortest = min(min(mean.shape[1:]) for mean in self.means)
        self.size = min(size, shortest)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Draw other batches."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A batch.

        Returns:
            ``image``: confidences ``[B, C, s, s]``; ``label``: targets, same shape; ``reference``: crisp label maps, same
            shape; ``proportions`` ``[B, C]``; ``trust`` (0: do not use them);
            ``guide``: the image ``[B, 3, s, s]``; ``mass`` ``[B, s, s]``;
            ``from_maps``: whether the targets are label maps.
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) * 10_007 + index)
        from_maps = torch.rand((), generator=g).item() < self.maps
        crops = [self._crop(from_maps, g) for _ in range(self.batch_size)]
        batch = {key: torch.stack([crop[key] for crop in crops]) for key in crops[0]}
        kind = ("exact", "rated", "none")[int(torch.randint(3, (), generator=g))]
        weight = batch["mass"] / batch["mass"].sum(dim=(1, 2), keepdim=True).clamp_min(1e-6)
        p = (batch["label"] * weight[:, None]).sum(dim=(2, 3)).clamp_min(1e-4)
        if kind == "rated":
            # An estimate of 0 would forbid a class that the target has; people's tables do that, training must survive it.
            p = torch.stack([self._rated(row, g) for row in p]).clamp_min(1e-3)
        batch["proportions"] = p / p.sum(dim=1, keepdim=True)
        batch["trust"] = torch.tensor({"exact": math.inf, "rated": self.trust, "none": 0.0}[kind])
        batch["from_maps"] = torch.tensor(from_maps)
        return batch

    def _rated(self, p: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=g)))
        offset = rater_offsets(self.rater, self.classes, rng)
        noise, step = draw_noise(self.rater, self.classes, rng)
        return torch.from_numpy(apply_rater((p / p.sum()).double().numpy(), self.rater, offset, noise, step)).float()

    def _crop(self, from_map: bool, g: torch.Generator) -> dict[str, torch.Tensor]:
        index = int(torch.randint(len(self.means), (), generator=g))
        height, width = self.means[index].shape[1:]
        top = int(torch.randint(height - self.size + 1, (), generator=g))
        left = int(torch.randint(width - self.size + 1, (), generator=g))
        turn, mirror = int(torch.randint(4, (), generator=g)), bool(torch.randint(2, (), generator=g))

        def cut(x: torch.Tensor) -> torch.Tensor:
            x = x[..., top : top + self.size, left : left + self.size]
            return torch.rot90(x.flip(-1) if mirror else x, turn, (-2, -1)).contiguous()

        entry = self.stacks[index]
        low, high = self.scale
        scale = low * (high / low) ** float(torch.rand((), generator=g))
        labels = random_label_map((self.size, self.size), self.classes, g, scale=scale)
        reference = F.one_hot(labels, self.classes).permute(2, 0, 1).float()
        guide, mass = cut(entry["image"]), cut(entry["mass"])
        if from_map:
            q = self.degradation(labels, cut(self.degradation.fields[index]))
            return {
                "image": q,
                "label": reference,
                "reference": reference,
                # An image that has nothing to do with the map must not be learned from.
                "guide": torch.zeros_like(guide),
                "mass": torch.ones_like(mass),
            }
        views = entry["stack"]
        one = bool(torch.randint(2, (), generator=g))
        q = views[int(torch.randint(len(views), (), generator=g))] if one else self.means[index]
        return {"image": cut(q), "label": cut(self.targets[index]), "reference": reference, "guide": guide, "mass": mass}


class HeldOutMaps(Dataset):
    """Whole images as batches of one, for checks that need no mask.

    Args:
        stacks: confidences of images that are not trained on.
    """

    def __init__(self, stacks: ConfidenceStacks) -> None:
        self.stacks = stacks

    def __len__(self) -> int:
        return len(self.stacks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``image`` (mean confidences ``[1, C, h, w]``), ``mass``, ``guide``, ``proportions``, ``trust``."""
        entry = self.stacks[index]
        mean = entry["stack"].mean(dim=0)[None]
        return {
            "image": mean,
            "label": mean,
            "reference": mean,
            "mass": entry["mass"][None],
            "guide": entry["image"][None],
            "proportions": entry["proportions"][None],
            "trust": torch.tensor(math.inf),
        }


def prepare_refinement(
    batch: Mapping[str, torch.Tensor],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[()], dict[str, torch.Tensor]]:
    """``prepare_batch`` of MONAI's engines for batches of confidences: input, target, and the arguments of the inferer."""
    moved = {key: value.to(device, non_blocking=non_blocking) for key, value in batch.items()}
    target = {key: moved[key] for key in ("label", "reference", "mass", "proportions")}
    return moved["image"], target, (), {key: moved[key] for key in ("proportions", "trust", "mass", "guide")}


def stack_keys(datalist: Sequence[Mapping[str, Any]], checkpoint: str | Path, views: str, cell: int) -> list[str]:
    """Names under which stacks are kept: they change with the image, its proportions, the network, the views and the cell."""
    stat = Path(checkpoint).stat()
    keys = []
    for item in datalist:
        image = Path(item[CommonKeys.IMAGE])
        known = (str(image.absolute()), image.stat().st_mtime_ns, stat.st_size, stat.st_mtime_ns, views, cell)
        digest = hashlib.sha256(repr((known, [float(p) for p in item["proportions"]])).encode()).hexdigest()[:16]
        keys.append(f"{image.stem}-{digest}")
    return keys
