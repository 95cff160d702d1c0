"""Steps between a network's definition and its use, by name for configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_vslp.networks.calibration import calibrate_network
from monai_vslp.utils.errors import InputError

__all__ = ["group_rates", "load_checkpoint", "parameters_of", "place_network", "tokens_of_area"]


def place_network(
    network: nn.Module,
    device: torch.device | str,
    calibration: Mapping[str, Any] | None = None,
    evaluation: bool = False,
) -> nn.Module:
    """Bring a network to a device and make it ready.

    Args:
        network: changed in place.
        device: where it will run.
        calibration: see :func:`~monai_vslp.networks.calibrate_network`; None for none.
        evaluation: switch it to evaluation mode.

    Returns:
        ``network``.
    """
    network = network.to(device)
    return calibrate_network(network.eval() if evaluation else network, calibration)


def load_checkpoint(network: nn.Module, path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load a state dictionary into a network; nothing but tensors is read from the file.

    Args:
        network: changed in place.
        path: file of ``torch.save(network.state_dict())``.
        device: where the tensors are read to.

    Returns:
        ``network``.

    Raises:
        InputError: the file does not exist, or belongs to another network.
    """
    if not Path(path).is_file():
        raise InputError(f"weights {path} do not exist; train first, or give the file (--checkpoint).")
    try:
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except RuntimeError as error:
        raise InputError(f"weights {path} do not fit the network that the config defines: {error}") from error
    return network


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """All parameters of a module, for an optimizer."""
    return list(module.parameters())


def group_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Learning rate of each group of an optimizer, for schedules that scale them."""
    return [group["lr"] for group in optimizer.param_groups]


def tokens_of_area(network: nn.Module, area: float) -> float:
    """Tokens on an area.

    Args:
        network: with ``stride``, px per token.
        area: px.
    """
    return area / network.stride**2
