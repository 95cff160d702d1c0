"""``monai-vslp choose``: strength and trust without a single mask."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose
from monai.utils import optional_import

from monai_vslp.data.cohort import read_cohort
from monai_vslp.data.regularization import ConfidenceStacks, stack_keys
from monai_vslp.networks import ConfidenceNet, TTAConfidence
from monai_vslp.transforms import LoadTissueImaged
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine
from monai_vslp.workflows.bundle import NETWORK, read_config
from monai_vslp.workflows.regularizer import REGULARIZER

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["Choice", "choose", "choose_strength", "choose_trust", "target_strength"]

logger = logging.getLogger(__name__)

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # in cells
TRUSTS = (0.3, 1.0, 3.0, 10.0, 30.0, math.inf)


@dataclass(frozen=True)
class Choice:
    """A parameter chosen from candidates.

    Attributes:
        value: the choice.
        candidates: what was tried.
        errors: mean absolute error of held-out proportions for each, fractions.
        standard_error: of the smallest of them, over images.
    """

    value: float
    candidates: tuple[float, ...]
    errors: tuple[float, ...]
    standard_error: float

    def __str__(self) -> str:
        tried = ", ".join(f"{c:g}: {100 * e:.2f} %" for c, e in zip(self.candidates, self.errors))
        return f"{self.value:g} (error of held-out proportions by candidate: {tried})"


def _largest_within_one_error(candidates: Sequence[float], errors: np.ndarray) -> Choice:
    """The largest candidate whose error, ``errors`` ``[candidates, images]``, is within one standard error of the smallest."""
    mean = errors.mean(axis=1)
    best = int(mean.argmin())
    # Errors of one image under two candidates go together, so their difference is what scatters.
    count = max(errors.shape[1], 1)
    spread = (errors - errors[best]).std(axis=1, ddof=1 if count > 1 else 0) / math.sqrt(count)
    allowed = [c for c, m, s in zip(candidates, mean, spread) if m - mean[best] <= s]
    own = float(errors[best].std(ddof=1 if count > 1 else 0) / math.sqrt(count))
    return Choice(max(allowed), tuple(candidates), tuple(mean.tolist()), own)


def choose_strength(stacks: ConfidenceStacks, candidates: Sequence[float] = STRENGTHS, progress: bool = True) -> Choice:
    r"""Choose the regularizer's strength α by proportions that the refinement is not told.

    .. math::
        \alpha^* = \max\Bigl\{\alpha : \bar e(\alpha) - \bar e_{\min} \le \mathrm{se}\Bigr\}, \qquad
        e(\alpha) = \tfrac1C\lVert\bar u_\alpha - p\rVert_1,

    where :math:`u_\alpha` is refined without proportions and ``se`` the standard error of the difference over images: of
    strengths that explain held-out proportions equally well, the one with the simplest maps.

    Args:
        stacks: confidences with proportions, of images that the network was not trained on where there are some.
        candidates: strengths, in cells of the stacks.
        progress: show a progress bar.
    """
    errors = np.empty((len(candidates), len(stacks)))
    for index in tqdm(range(len(stacks)), desc="strength", unit="image", disable=not progress):
        entry = stacks[index]
        q = entry["stack"].mean(dim=0)
        for row, alpha in enumerate(candidates):
            found = refine(q, None, entry["mass"], entry["image"], alpha=alpha).proportions
            errors[row, index] = float((found - entry["proportions"]).abs().mean())
    return _largest_within_one_error(candidates, errors)


def target_strength(
    given: float | None, training: ConfidenceStacks, held_out: ConfidenceStacks, progress: bool = True
) -> float:
    """Strength of the total variation that a regularizer's targets are made with, in cells.

    Args:
        given: used as it is; None to choose it by :func:`choose_strength`.
        training, held_out: stacks; those held out are used where there are some.
        progress: show a progress bar.
    """
    if given is not None:
        return float(given)
    choice = choose_strength(held_out if len(held_out) else training, progress=progress)
    logger.info("Strength of the targets, in cells: %s", choice)
    return choice.value


def choose_trust(
    stacks: ConfidenceStacks,
    raters: Sequence[np.ndarray],
    alpha: float,
    candidates: Sequence[float] = TRUSTS,
    progress: bool = True,
) -> Choice:
    """Choose the trust ρ by leaving raters out: how well does a map refined with one rater's proportions meet the others'?

    Args:
        stacks: confidences.
        raters: for each image the estimates of its raters, shape ``[R, C]``, fractions; images with one rater are left out.
        alpha: strength, in cells.
        candidates: trusts.
        progress: show a progress bar.

    Raises:
        InputError: no image has two raters.
    """
    several = [index for index, given in enumerate(raters) if len(given) > 1]
    if not several:
        raise InputError("trust is chosen by comparing raters; no image has two. Give a number (3 suits medium noise).")
    errors = np.empty((len(candidates), len(several)))
    for column, index in enumerate(tqdm(several, desc="trust", unit="image", disable=not progress)):
        entry, given = stacks[index], raters[index]
        q = entry["stack"].mean(dim=0)
        others = (given.sum(axis=0, keepdims=True) - given) / (len(given) - 1)
        for row, trust in enumerate(candidates):
            gaps = []
            for one, rest in zip(given, others):
                # An estimate of 0 by one rater is no proof that the class is absent.
                p = torch.from_numpy(np.maximum(one, 1e-3))
                result = refine(q, p / p.sum(), entry["mass"], entry["image"], alpha=alpha, trust=trust)
                gaps.append(float(np.abs(result.proportions.numpy() - rest).mean()))
            errors[row, column] = np.mean(gaps)
    return _largest_within_one_error(candidates, errors)


def choose(
    model: str | Path, table: str | Path | None = None, images: str | Path | None = None, progress: bool = True
) -> dict[str, Choice]:
    """Choose strength and, where raters can be compared, trust for a trained network; no mask is read.

    Args:
        model: bundle folder of ``monai-vslp train``.
        table: proportions; None for the table of the training. Its rows of split ``val`` are used, or ``train`` without any.
        images: folder of the images; None for that of the training.
        progress: show progress bars.

    Returns:
        ``alpha`` in px of the network's images, and ``trust`` where an image has several raters.

    Raises:
        InputError: a folder or table that cannot be used.
    """
    run = Path(model)
    trained, inference = read_config(run, "train.json"), read_config(run, "inference.json")
    checkpoint = run / "models" / "model.pt"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} does not exist; has the training of {run} finished an epoch?")
    cohort = read_cohort(table or trained["table"], images or trained["dataset_dir"], inference["classes"])
    rows = cohort.split("val") if len(cohort.split("val")) else cohort.split("train")
    datalist = rows.datalist()
    datalist = [item for item in datalist if "proportions" in item]
    if not datalist:
        raise InputError(f"table {table or trained['table']} has no row with proportions to choose by.")
    network = ConfidenceNet(len(cohort.classes), **{key: inference[key] for key in NETWORK if key in inference})
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    load = Compose([LoadTissueImaged(keys="image")])
    cell = 4
    stacks = ConfidenceStacks(
        [load(item) for item in datalist],
        network,
        TTAConfidence(inference["views"], "stack", stride=network.stride),
        cell,
        run / REGULARIZER / "stacks",
        stack_keys(datalist, checkpoint, inference["views"], cell),
        progress=progress,
    )
    strength = choose_strength(stacks, progress=progress)
    found = {
        "alpha": Choice(
            strength.value * cell, tuple(c * cell for c in strength.candidates), strength.errors, strength.standard_error
        )
    }
    raters = [np.stack([label.mean for label in r.estimates]) for r in rows.records if r.proportions is not None]
    if any(len(given) > 1 for given in raters):
        found["trust"] = choose_trust(stacks, raters, strength.value, progress=progress)
    return found
