"""A network that starts from the weights of another one."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from monai_vslp.networks.backbone import load_weights
from monai_vslp.utils.errors import InputError

__all__ = ["load_start"]

HEAD = "head."  # prefix of the parameters that belong to the classes
MOST_NAMES = 5

logger = logging.getLogger(__name__)


def load_start(network: nn.Module, path: str | Path, keep_head: bool = True) -> nn.Module:
    """Give a network the weights of a trained one.

    Args:
        network: of the same architecture, such as :class:`~monai_vslp.networks.ConfidenceNet` with the same options.
        path: file of a state dict, ``models/model.pt`` of a bundle folder.
        keep_head: take the head too; False where the classes are others, the head is then left as it is.

    Returns:
        ``network``.

    Raises:
        InputError: the file cannot be read, or its weights do not fit.
    """
    given = load_weights(path)
    wanted = {name: value for name, value in network.state_dict().items() if keep_head or not name.startswith(HEAD)}
    wrong = [name for name, value in wanted.items() if name not in given or given[name].shape != value.shape]
    if wrong:
        if all(name.startswith(HEAD) for name in wrong):
            raise InputError(f"the head of {path} has other classes: leave it out (keep_head false), it is then learned anew.")
        raise InputError(
            f"{path} does not fit the network: {len(wrong)} of its {len(wanted)} weights are missing or of another shape "
            f"({', '.join(wrong[:MOST_NAMES])}). Give the options (backbone, blocks, window …) that it was trained with."
        )
    network.load_state_dict({name: given[name] for name in wanted}, strict=False)
    logger.info("Starting from %s%s.", path, "" if keep_head else ", with a new head")
    return network
