"""Data of a training, by name for configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from monai_vslp.data.bags import FeatureBagDataset, collate_bags
from monai_vslp.data.cohort import Cohort
from monai_vslp.utils.errors import InputError

__all__ = ["bag_collation", "class_indices", "class_names", "feature_bags", "split_items"]


def split_items(cohort: Cohort, split: str) -> list[dict[str, Any]]:
    """Items of one split as MONAI's data sets take them, see :meth:`~monai_vslp.data.Cohort.datalist`."""
    return cohort.split(split).datalist()


def class_names(cohort: Cohort) -> list[str]:
    """Classes of a cohort, in their order."""
    return list(cohort.classes)


def class_indices(cohort: Cohort, names: Sequence[str]) -> list[int]:
    """Where classes stand in a cohort.

    Raises:
        InputError: a name that is no class.
    """
    if unknown := [name for name in names if name not in cohort.classes]:
        raise InputError(f"{unknown[0]!r} is no class of {cohort.source}; it has {', '.join(cohort.classes)}.")
    return [cohort.classes.index(name) for name in names]


def feature_bags(
    bags: Sequence[Mapping[str, Any]],
    network: torch.nn.Module,
    views: Sequence[Any],
    device: torch.device | str = "cpu",
    progress: bool = True,
    cached: bool = True,
) -> Sequence[Mapping[str, Any]]:
    """Bags with features that are computed once, or the bags as they are.

    Args:
        bags, network, views, device, progress: as of :class:`~monai_vslp.data.FeatureBagDataset`.
        cached: False leaves images for a network whose backbone is trained.
    """
    return FeatureBagDataset(bags, network, views, device, progress) if cached else bags


def bag_collation(network: torch.nn.Module, cached: bool = True) -> Callable[..., dict[str, torch.Tensor]]:
    """:func:`~monai_vslp.data.collate_bags` for features (``cached``), or for images, padded to the stride of ``network``."""
    return partial(collate_bags, stride=1 if cached else network.stride)
