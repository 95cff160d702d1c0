"""Principal components of token features: what a head for few bags needs of many channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.utils import CommonKeys, optional_import

from monai_vslp.networks.confidence import ConfidenceNet
from monai_vslp.utils.errors import InputError

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["fit_projection"]


@torch.no_grad()
def fit_projection(
    network: ConfidenceNet,
    bags: Sequence[Mapping[str, Any]],
    images: int = 48,
    tokens: int = 400,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> None:
    r"""Set the network's projection to the principal components of its features.

    .. math::
        y = s\,V^\top(f - \mu), \qquad \operatorname{Cov} f = V\,\mathrm{diag}(\lambda)\,V^\top,\quad
        s = \bigl(\tfrac1r\textstyle\sum_{k\le r}\lambda_k\bigr)^{-1/2},

    with the r largest eigenvalues. The scale is one for all components: those that vary most keep the most weight, which is
    the prior that serves few bags (whitening them costs up to a third of the mIoU).

    Args:
        network: with a frozen backbone and ``rank``; changed in place.
        bags: items with ``image`` ``[3, H, W]`` in [0, 1] and optionally ``mass`` ``[1, H, W]``.
        images: how many of them are looked at, evenly spread.
        tokens: drawn from each of these, on tissue.
        seed: of the draws.
        device: where features are computed.
        progress: show a progress bar.

    Raises:
        InputError: the network has no projection, or there is no tissue.
    """
    if network.projection is None:
        raise InputError("this network has no projection: make it with rank, the number of components to keep.")
    network = network.to(device).eval()
    chosen = torch.linspace(0, len(bags) - 1, min(images, len(bags))).round().long().unique().tolist()
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for index in tqdm(chosen, desc="components", unit="image", disable=not progress):
        item = bags[index]
        features = network.raw_features(torch.as_tensor(item[CommonKeys.IMAGE])[None].to(device).float())[0].flatten(1).cpu()
        mass = item.get("mass")
        if mass is not None:
            weight = network.tokens_of_mass(torch.as_tensor(mass)[None].float())[0].flatten()
            features = features[:, weight > 0]
        drawn.append(features[:, torch.randperm(features.shape[1], generator=generator)[:tokens]])
    sample = torch.cat(drawn, dim=1).double()
    rank = network.projection.out_channels
    if sample.shape[1] < 2:
        raise InputError("the images have no tissue to find components of; look at the tissue masks.")
    mean = sample.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh((sample - mean) @ (sample - mean).T / sample.shape[1])
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    # The sign of an eigenvector is arbitrary; its largest entry is made positive so that machines agree.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    weight = (vectors * largest.sign() / values.mean().clamp_min(1e-12).sqrt()).T
    network.projection.weight.copy_(weight[:, :, None, None])
    network.projection.bias.copy_(-(weight @ mean).flatten())
