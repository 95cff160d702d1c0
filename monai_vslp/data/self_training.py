"""Pseudo-labels made of proportions, and batches of tokens to learn them from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import optional_import
from torch.utils.data import Dataset

from monai_vslp.data.bags import FEATURES
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine

ndimage, _ = optional_import("scipy.ndimage")
tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["PseudoLabelTokens", "fill_enclosed", "prepare_tokens"]

CERTAINTY = 0.9  # that what is enclosed belongs to what encloses it
SMALLEST_SHARE = 1e-5  # of a class that a rater gave as absent: pseudo-labels may keep a trace of it


def fill_enclosed(labels: np.ndarray, enclosing: Sequence[int], largest: float) -> np.ndarray:
    """Give holes inside classes to the class that surrounds them, such as the lumen of a gland to its epithelium.

    Args:
        labels: class indices, shape ``[H, W]``.
        enclosing: classes that have no holes, taken together; what they enclose goes to the nearest of them.
        largest: px of the largest hole that is filled; more is taken for tissue between. Holes at the border stay.

    Returns:
        A new map of the same shape and type.
    """
    inside = np.isin(labels, list(enclosing))
    holes, count = ndimage.label(~inside)
    size = np.bincount(holes.ravel(), minlength=count + 1)
    fill = size <= largest
    fill[0] = False
    fill[np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))] = False
    filled = fill[holes]
    result = labels.copy()
    if filled.any():
        nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
        result[filled] = labels[tuple(nearest)][filled]
    return result


class PseudoLabelTokens(Dataset):
    r"""Batches of tokens with the maps that a teacher and the proportions agree on.

    The target of a training image is the variational refinement of the teacher's mean confidence over its views,

    .. math:: u = \arg\min_u E(u; q, p, \rho, \alpha),

    with the image's proportions: what the teacher confuses in amount, the proportions correct; what is noise, the regularizer
    removes. A student that learns these maps from single tokens of single views keeps what can be recognised. Batch i of
    epoch e depends on ``(seed, e, i)`` alone.

    Args:
        bags: items with ``features`` ``[V, F, h, w]``, ``mass`` ``[1, h, w]`` and ``proportions`` ``[C]``.
        head: the teacher's head: logits ``[V, C, h, w]`` of features ``[V, F, h, w]``.
        alpha: strength of the regularizer, in tokens.
        trust: :math:`\rho`; inf (or the text ``inf``, for configs) takes the proportions as they are.
        enclosing: class indices that have no holes (:func:`fill_enclosed`): the refined map is filled, the filled tokens
            are taken for nearly certain, and the map is refined again, twice. Empty for no such knowledge.
        largest_hole: tokens of the largest hole that is filled.
        images: images per batch.
        tokens: tokens per image, drawn by their tissue.
        length: batches per epoch.
        seed: of all draws.
        device: where the head is.
        progress: show a progress bar while targets are made.

    Raises:
        InputError: no bags.
    """

    def __init__(
        self,
        bags: Sequence[Mapping[str, Any]],
        head: torch.nn.Module,
        alpha: float = 1.0,
        trust: float | str = math.inf,
        enclosing: Sequence[int] = (),
        largest_hole: float = 300.0,
        images: int = 16,
        tokens: int = 256,
        length: int = 100,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> None:
        if len(bags) == 0:
            raise InputError("there are no bags to learn from.")
        self.bags, self.images, self.tokens, self.length, self.seed = bags, images, tokens, length, seed
        self.epoch = 0
        self.targets: list[torch.Tensor] = []
        head = head.eval()
        for index in tqdm(range(len(bags)), desc="pseudo-labels", unit="image", disable=not progress):
            item = bags[index]
            with torch.no_grad():
                q = head(item[FEATURES].to(device).float()).softmax(dim=1).mean(dim=0).cpu()
            p = item["proportions"].double().clamp_min(SMALLEST_SHARE)
            options = {"alpha": alpha, "trust": float(trust), "tolerance": 1e-3}
            result = refine(q, p / p.sum(), item["mass"][0], **options)
            for _ in range(2 if enclosing else 0):
                labels = torch.from_numpy(fill_enclosed(result.labels.numpy(), enclosing, largest_hole))
                known = F.one_hot(labels, len(q)).permute(2, 0, 1).to(q)
                q = torch.where(labels != result.labels, CERTAINTY * known + (1 - CERTAINTY) * q, q)
                result = refine(q, p / p.sum(), item["mass"][0], **options)
            self.targets.append(result.u.half())

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Draw other batches."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``image``: features ``[1, F, 1, n]``; ``label``: targets ``[1, C, 1, n]``; both float32."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) * 10_007 + index)
        features, targets = [], []
        for bag in torch.randint(len(self.bags), (self.images,), generator=g).tolist():
            item = self.bags[bag]
            mass = item["mass"].flatten().float()
            if not mass.any():
                continue
            view = int(torch.randint(len(item[FEATURES]), (), generator=g))
            drawn = torch.multinomial(mass, self.tokens, replacement=True, generator=g)
            features.append(item[FEATURES][view].flatten(1)[:, drawn].float())
            targets.append(self.targets[bag].flatten(1)[:, drawn].float())
        if not features:
            raise InputError("none of the training images has tissue; look at the tissue masks.")
        return {"image": torch.cat(features, dim=1)[None, :, None], "label": torch.cat(targets, dim=1)[None, :, None]}


def prepare_tokens(
    batch: Mapping[str, torch.Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``prepare_batch`` of MONAI's engines for batches of :class:`PseudoLabelTokens`."""
    return tuple(batch[key].to(device, non_blocking=non_blocking) for key in ("image", "label"))
