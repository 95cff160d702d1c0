"""Test-time augmentation that spends views only where the network is in doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer

from monai_vslp.inferers.tta import TTAInferer
from monai_vslp.networks.tta import Predict, TTAConfidence, View
from monai_vslp.utils.errors import InputError

__all__ = ["AdaptiveTTAInferer", "tta_inferer"]

GLASS = 0.85  # where the darkest channel is brighter nothing is in doubt
SEEN = 0.999  # of a pixel after resampling, to count as computed


class _Grid:
    """Windows that an image is cut into to be decided on, and predicted, one by one.

    Where windows do not fit evenly they overlap, and each stands for the part that is nearest to it.

    Args:
        size: ``(H, W)`` in px.
        window: edge in px; None for one window that is the whole image.
        apart: edge of the squares that the network sees apart, px, None where it does not. A last row or column of them for
            less than ``rest`` px would cost as much as any other; those px belong to no window.
        rest: px.
    """

    def __init__(self, size: tuple[int, int], window: int | None, apart: int | None, rest: int) -> None:
        self.size = size
        spans = []
        for side in size:
            over = side % apart if apart is not None and side > apart else 0
            used = side - (over if over < rest else 0)
            spans.append(self._spans(used, used if window is None else min(used, window)))
        self.shape = tuple(edge for edge, _ in spans)  # of what is predicted
        self.places = [(row, col) for row in spans[0][1] for col in spans[1][1]]

    @staticmethod
    def _spans(used: int, edge: int) -> tuple[int, list[tuple[int, slice]]]:
        """Edge of the windows; the start of each, and the px that it stands for."""
        count = math.ceil(used / edge)
        starts = [0] if count == 1 else [round(i * (used - edge) / (count - 1)) for i in range(count)]
        borders = [0, *((a + edge + b) // 2 for a, b in zip(starts, starts[1:])), used]
        return edge, [(start, slice(*own)) for start, own in zip(starts, zip(borders, borders[1:]))]

    def index(self) -> torch.Tensor:
        """Which window each px belongs to, −1 for none: float ``[1, 1, H, W]``."""
        result = torch.full((1, 1, *self.size), -1.0)
        for number, ((_, rows), (_, cols)) in enumerate(self.places):
            result[..., rows, cols] = number
        return result

    def predict(self, images: torch.Tensor, chosen: torch.Tensor, predict: Predict, batch: int) -> torch.Tensor:
        """Predictions in the chosen windows, 0 elsewhere, with a last channel that is 1 where there are any.

        Args:
            images: ``[B, 3, H, W]``.
            chosen: bool ``[B, number of windows]``, at least one of them.
            predict: gives ``[N, K, h, w]`` for N windows ``[N, 3, h, w]``.
            batch: the largest N.

        Returns:
            Shape ``[B, K + 1, H, W]``.
        """
        picks = [(image, *self.places[number]) for image, number in chosen.nonzero().tolist()]
        height, width = self.shape
        crops = [images[image, :, row : row + height, col : col + width] for image, (row, _), (col, _) in picks]
        found = torch.cat([predict(torch.stack(crops[first : first + batch])) for first in range(0, len(crops), batch)])
        result = found.new_zeros(len(images), found.shape[1] + 1, *self.size)
        for (image, (row, rows), (col, cols)), values in zip(picks, found):
            own = values[:, rows.start - row : rows.stop - row, cols.start - col : cols.stop - col]
            result[image, :-1, rows, cols] = own
            result[image, -1, rows, cols] = 1.0
        return result


def _seen_apart(network: torch.nn.Module) -> tuple[int | None, bool]:
    """Edge of the squares that a network's backbone sees apart, px, None where it does not; whether its head looks beyond."""
    window = getattr(network, "window", None)
    context = getattr(getattr(network, "head", None), "context", (1,))
    edge = None if window is None else math.ceil(window / min(getattr(network, "magnifications", (1.0,))))
    return edge, max(context) > 1 or getattr(network, "subtypes", None) is not None


class AdaptiveTTAInferer(Inferer):
    r"""Mean and spread over views, as of :class:`~monai_vslp.inferers.TTAInferer`; further views only where they may matter.

    The ``first`` views are computed everywhere. A cell of half a token is in doubt where it shows tissue and the two largest
    mean confidences so far are less than ``threshold`` apart. Each further view, up to ``most``, is cut into windows, and
    those are predicted in which a share of cells of at least ``share`` is in doubt, those of all images of a batch together.
    A pixel's mean and spread are over the views that it was seen in.

    Which views a tile gets follows from the tile alone, whatever was spent on others: an interrupted slide and
    one that several processes share come out the same.

    Networks that see windows of the image apart, such as :class:`~monai_vslp.networks.ConfidenceNet`, are asked for those;
    where a head looks beyond them, whole images are decided on. Along borders of windows single-window predictions differ a
    little from those of the whole image, since logits are not interpolated across.

    Args:
        views: name of a group of views, or a list of views, in the order in which they are spent.
        threshold: largest minus second largest confidence below which a cell is in doubt, 0 … 1; above 1 all tissue is.
        share: part of a window that must be in doubt, 0 … 1; 0 for any.
        first: views that are computed everywhere, at least 1.
        most: views that a pixel gets at most; None for all of the group.
        window: edge of the windows in px; ``auto`` for what the network sees apart, None for the whole image.
        batch: windows that go through the network together at most.
        amp: run the network in bfloat16.

    Attributes:
        spent: views that the last call spent on each image, the cost of one view of it being 1: float32 ``[B]``.

    Raises:
        InputError: an option out of range.
    """

    def __init__(
        self,
        views: str | Sequence[View] = "shifted_symmetries",
        threshold: float = 0.2,
        share: float = 0.05,
        first: int = 2,
        most: int | None = 4,
        window: int | str | None = "auto",
        batch: int = 32,
        amp: bool = False,
    ) -> None:
        if not threshold >= 0:
            raise InputError(f"threshold is a difference of confidences, at least 0, got {threshold}.")
        if not 0 <= share <= 1:
            raise InputError(f"share is a part of a window, 0 to 1, got {share}.")
        if first < 1 or (most is not None and most < first):
            raise InputError(f"first is at least 1 view and most at least as many, got first={first}, most={most}.")
        if not (window is None or window == "auto" or (isinstance(window, int) and window >= 1)):
            raise InputError(f"window is an edge in px, 'auto' or None, got {window!r}.")
        if batch < 1:
            raise InputError(f"batch must be at least 1 window, got {batch}.")
        self.views, self.threshold, self.share, self.first, self.most = views, threshold, share, first, most
        self.window, self.batch, self.amp = window, batch, amp
        self.spent = torch.zeros(0)

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: images ``[B, 3, H, W]``, float in [0, 1].
            network: gives logits ``[B, C, H, W]``; its ``stride`` (16 where it has none) sets the grid shifts.

        Returns:
            Mean and spread, ``[B, C + 1, H, W]``, float.
        """

        def predict(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                logits = network(x)
            return logits.float().softmax(dim=1)

        x = torch.as_tensor(inputs)
        stride = getattr(network, "stride", 16)
        apart, beyond = _seen_apart(network)
        window = self.window if self.window != "auto" else None if beyond else apart
        first, *others = TTAConfidence(self.views, stride=stride).views[: self.most]
        cell = max(1, stride // 2)
        tissue = F.avg_pool2d(x.amin(dim=1, keepdim=True), cell, ceil_mode=True) < GLASS
        mean = first(x, predict)
        deviation, count = torch.zeros_like(mean), torch.ones_like(mean[:, :1])
        windows = torch.zeros(len(x))
        for number, view in enumerate(others, start=1):
            grids: list[_Grid] = []

            def index(y: torch.Tensor, grids: list[_Grid] = grids) -> torch.Tensor:
                grids.append(_Grid(tuple(y.shape[-2:]), window, apart if window is None else window, stride))
                return grids[0].index().to(y)

            belongs = view(x[:1], index)
            grid = grids[0]
            if number < self.first:
                chosen = torch.ones(len(x), len(grid.places), dtype=torch.bool)
            else:
                chosen = self._chosen(self._doubt(mean, tissue, cell), belongs, cell, len(grid.places))
            if not chosen.any():
                continue
            windows = windows + chosen.sum(dim=1).cpu()
            found = view(x, lambda y, grid=grid, chosen=chosen: grid.predict(y, chosen, predict, self.batch))
            q, seen = found[:, :-1], (found[:, -1:] > SEEN).to(found)
            # Welford's update, with a count for each pixel.
            count = count + seen
            delta = (q - mean) * seen
            mean = mean + delta / count
            deviation = deviation + delta * (q - mean)
        self.spent = 1 + windows / len(_Grid(tuple(x.shape[-2:]), window, None, stride).places)
        spread = (deviation / count).clamp_min(0).sqrt().mean(dim=1, keepdim=True)
        return torch.cat([mean, spread], dim=1)

    def _doubt(self, mean: torch.Tensor, tissue: torch.Tensor, cell: int) -> torch.Tensor:
        """Cells in doubt, bool ``[B, 1, ceil(H / cell), ceil(W / cell)]``."""
        if mean.shape[1] == 1:
            return torch.zeros_like(tissue)
        best = F.avg_pool2d(mean, cell, ceil_mode=True).topk(2, dim=1).values
        return tissue & (best[:, :1] - best[:, 1:] < self.threshold)

    def _chosen(self, doubt: torch.Tensor, belongs: torch.Tensor, cell: int, count: int) -> torch.Tensor:
        """Windows to be predicted, bool ``[B, count]``.

        Args:
            doubt: bool ``[B, 1, h, w]`` over cells.
            belongs: index of the window of each px, float ``[1, 1, H, W]``, −1 for none.
            cell: px per cell.
            count: number of windows.
        """
        centers = [
            (torch.arange(n) * cell + cell // 2).clamp_max(side - 1) for n, side in zip(doubt.shape[-2:], belongs.shape[-2:])
        ]
        number = belongs[0, 0][centers[0][:, None].to(belongs.device), centers[1].to(belongs.device)].round().long().flatten()
        one_hot = F.one_hot(number.clamp_min(-1) + 1, count + 1)[:, 1:].double()
        share = (doubt.flatten(1).double() @ one_hot) / one_hot.sum(dim=0).clamp_min(1)
        return (share > 0) & (share >= self.share)


def tta_inferer(views: str | Sequence[View], adaptive: float | None = None, amp: bool = False) -> Inferer:
    """Mean and spread over views: all of them everywhere, or further ones where the first leaves doubt.

    Args:
        views: name of a group of views, or a list of them.
        adaptive: threshold of :class:`AdaptiveTTAInferer`; None for all views everywhere.
        amp: run the network in bfloat16.
    """
    if adaptive is None:
        return TTAInferer(views=views, output="mean_spread", amp=amp)
    return AdaptiveTTAInferer(views=views, threshold=adaptive, amp=amp)
