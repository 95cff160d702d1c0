"""Which classes are subtypes of one tissue: found by the proportions of held-out images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.data import Dataset

from monai_vslp.data.bags import FEATURES, FeatureBagDataset, bag_keys
from monai_vslp.data.cohort import Cohort
from monai_vslp.data.factories import split_items
from monai_vslp.networks.confidence import pool_proportions
from monai_vslp.networks.heads import pool_subtypes
from monai_vslp.networks.tta import tta_views
from monai_vslp.transforms.image import LoadTissueImaged
from monai_vslp.workflows.bundle import read_config

__all__ = ["EDGES", "find_subtypes", "search_subtypes"]

logger = logging.getLogger(__name__)

EDGES = (5, 9, 15, 25)  # of the squares that are tried, tokens
BETTER = 0.99  # of the error without subtypes; a smaller gain is chance
EQUAL = 1.005  # a further class joins unless the error becomes larger than so many times


class Subtypes(NamedTuple):
    """Subtypes of one tissue.

    Attributes:
        classes: their indices, ascending.
        edge: of the squares over which they are told apart, tokens.
        error: mean absolute error of held-out proportions with them.
        before: that without.
    """

    classes: tuple[int, ...]
    edge: int
    error: float
    before: float


def search_subtypes(
    logits: Sequence[torch.Tensor],
    masses: Sequence[torch.Tensor],
    proportions: torch.Tensor,
    classes: Sequence[int] | None = None,
    edges: Sequence[int] = EDGES,
) -> Subtypes | None:
    r"""Find the classes that proportions are met best with if they are told apart by their surroundings.

    :func:`~monai_vslp.networks.heads.pool_subtypes` over true subtypes of a tissue averages out errors of single tokens; over
    classes that lie side by side, such as glands and stroma, it blurs the borders, and the proportions of decided maps go
    wrong. So the pair of classes that lowers the error

    .. math:: \frac1{nC}\sum_I \lVert p_I - \hat p_I(S)\rVert_1

    most is taken, if by 1 % at least, and classes join one after the other as long as the error grows by half a percent at
    most.

    Args:
        logits: of each held-out image, ``[1, C, h, w]``.
        masses: tissue on the same grids, ``[1, 1, h, w]``.
        proportions: given, ``[n, C]``.
        classes: these and no others are tried; None to find them.
        edges: squares to try, in tokens.

    Returns:
        What was found; None where nothing lowers the error enough.
    """
    count = proportions.shape[1]

    def error(group: tuple[int, ...], edge: int) -> float:
        found = [
            pool_proportions(pool_subtypes(z, group, edge).softmax(dim=1), mass)[0]
            for z, mass in zip(logits, masses, strict=True)
        ]
        return float((torch.stack(found) - proportions).abs().mean())

    def best(groups: Sequence[tuple[int, ...]]) -> Subtypes:
        tried = ((error(group, edge), group, edge) for group in groups for edge in edges)
        lowest, group, edge = min(tried)
        return Subtypes(group, edge, lowest, before)

    before = error(tuple(range(count)), 1)  # edge 1 changes nothing
    if classes is not None:
        return best([tuple(sorted(classes))])
    if count < 3:
        return None  # subtypes leave another class beside them
    found = best(list(itertools.combinations(range(count), 2)))
    if found.error > BETTER * before:
        return None
    while len(found.classes) < count - 1:
        others = [c for c in range(count) if c not in found.classes]
        larger = best([tuple(sorted((*found.classes, c))) for c in others])
        if larger.error > EQUAL * found.error:
            break
        found = larger
    return found


@torch.inference_mode()
def find_subtypes(
    run: Path,
    cohort: Cohort,
    classes: Sequence[int] | None = None,
    bag_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """What ``subtypes`` of the network of a run should be, by the proportions of held-out images.

    Args:
        run: bundle folder with a trained network and a frozen backbone.
        cohort: whose split ``val`` is asked.
        classes: indices of the subtypes, where they are known; None to find them.
        bag_dir: folder where features of these images may lie already; None to compute them again.
        progress: show a progress bar.

    Returns:
        An argument of :class:`~monai_vslp.networks.ConfidenceNet`; None where nothing is gained.
    """
    config = read_config(run, "inference.json") | {"subtypes": None}
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(run / "models" / "model.pt", map_location="cpu", weights_only=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()
    datalist = split_items(cohort, "val")
    keys = None if bag_dir is None else bag_keys(datalist, network, "identity")
    images = Dataset(datalist, LoadTissueImaged(keys="image"))
    bags = FeatureBagDataset(images, network, tta_views("none"), device, progress, bag_dir, keys)
    logits = [network.head(bag[FEATURES].to(device).float()) for bag in bags]
    masses = [bag["mass"][None].to(device) for bag in bags]
    found = search_subtypes(logits, masses, torch.stack([bag["proportions"] for bag in bags]).to(device), classes)
    if found is None:
        logger.info("No classes are met better as subtypes of one tissue.")
        return None
    logger.info(
        "%s are told apart as subtypes of one tissue, over %d tokens: mean error of held-out proportions %.4f, before %.4f.",
        ", ".join(cohort.classes[c] for c in found.classes),
        found.edge,
        found.error,
        found.before,
    )
    return {"classes": list(found.classes), "edge": found.edge}
