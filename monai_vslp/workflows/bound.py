"""What the network of a run would reach if it learned from masks: the bound for learning from proportions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.utils import optional_import
from torch import nn

from monai_vslp.data.bags import FEATURES, FeatureBagDataset
from monai_vslp.networks.tta import training_views
from monai_vslp.transforms import LoadTissueImaged
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.evaluate import NO_TISSUE, find_mask, true_labels

__all__ = ["fit_to_masks", "token_targets"]

tqdm, _ = optional_import("tqdm", name="tqdm")


def token_targets(labels: np.ndarray, classes: int, stride: int) -> torch.Tensor:
    """Share of each token's pixels that each class has.

    Args:
        labels: class indices ``[H, W]``; ``NO_TISSUE`` where nothing is known.
        classes: C.
        stride: px per token.

    Returns:
        Shape ``[C, ceil(H / stride), ceil(W / stride)]``, float32; sums over classes are the share of pixels that are known.
    """
    known = torch.from_numpy(labels.astype(np.int64))
    hot = F.one_hot(torch.where(known == NO_TISSUE, classes, known), classes + 1)[..., :classes].permute(2, 0, 1).float()
    return F.avg_pool2d(F.pad(hot, (0, -hot.shape[2] % stride, 0, -hot.shape[1] % stride))[None], stride)[0]


def fit_to_masks(
    run: str | Path,
    output: str | Path,
    images: Sequence[str | Path],
    masks: str | Path,
    *,
    ignore_index: int = 255,
    epochs: int = 60,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    dropout: float = 0.3,
    views: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    r"""Fit the head of a run anew, to masks: same backbone, components, surroundings and number of parameters.

    .. math:: \min_\theta\ -\sum_I\sum_i\sum_c y_{ic}\log q_{ic}(\theta)

    over the tokens i, with the shares :math:`y_{ic}` of :func:`token_targets`, by AdamW from the head of the run. Never part of
    learning from proportions: it says how much of what the features could give that reaches.

    Args:
        run: bundle folder of ``monai-vslp train`` with a frozen backbone.
        output: bundle folder to write; usable with :func:`~monai_vslp.workflows.segment`.
        images: to learn from; score others.
        masks: folder of index masks named as the images.
        ignore_index: value of mask pixels that do not count.
        epochs, batch_size: passes, and images per step.
        learning_rate, weight_decay: of AdamW; the rate follows one cycle.
        dropout: in the head, where it has any.
        views: stains and orientations of each image.
        seed: of all draws.
        progress: show progress bars.

    Returns:
        ``output``.

    Raises:
        InputError: a mask is missing, or the run has no frozen backbone.
    """
    run, output, masks = Path(run), Path(output), Path(masks)
    config = read_config(run, "inference.json")
    if not read_config(run, "train.json")["freeze_backbone"]:
        raise InputError(f"{run} fine-tuned its backbone; the bound is fitted on frozen features.")
    if missing := [Path(path).name for path in images if find_mask(masks, Path(path).stem) is None]:
        raise InputError(f"{masks} has no mask for {', '.join(missing[:5])}.")
    classes = config["classes"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(run / "models" / "model.pt", map_location="cpu", weights_only=True))
    network = network.to(device).eval()
    items = Dataset([{"image": str(path)} for path in images], LoadTissueImaged(keys="image"))
    unknown = torch.zeros(len(classes))
    data = [{**items[index], "proportions": unknown} for index in range(len(items))]
    bags = FeatureBagDataset(data, network, training_views(seed, views), device, progress)
    labels = [true_labels(find_mask(masks, Path(path).stem), classes, ignore_index) for path in images]
    targets = [token_targets(one, len(classes), network.stride) for one in labels]
    head = network.head.train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(bags) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    for _ in tqdm(range(epochs), desc="masks", unit="epoch", disable=not progress):
        order = torch.randperm(len(bags)).tolist()
        for start in range(0, len(order), batch_size):
            optimizer.zero_grad()
            for index in order[start : start + batch_size]:  # images differ in size
                view = int(torch.randint(views, ()))
                logits = head(bags[index][FEATURES][view : view + 1].to(device).float())
                target = targets[index].to(device)
                loss = -(target * logits[0].log_softmax(dim=0)).sum() / target.sum().clamp_min(1.0)
                (loss / batch_size).backward()
            optimizer.step()
            schedule.step()
    shutil.copytree(run / "configs", output / "configs", dirs_exist_ok=True)
    with atomic_path(output / "models" / "model.pt") as temporary:
        torch.save(network.state_dict(), temporary)
    return output
