"""Figures of what a learned regularizer has learned: energies along its steps, energy maps, eigenfunctions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError
from monai_vslp.variational.analysis import Eigenfunction, EnergyPath, RegularizationMaps

__all__ = ["draw_eigenfunctions", "draw_energies", "draw_regularization", "write_figure"]

HINT = "{} is needed for figures: pip install matplotlib"
figure_module, _ = optional_import("matplotlib.figure", descriptor=HINT)
agg, _ = optional_import("matplotlib.backends.backend_agg", descriptor=HINT)
patches, _ = optional_import("matplotlib.patches", descriptor=HINT)

BOTH_SIGNS, ONE_SIGN = "RdBu_r", "viridis"
BACKGROUND = 0.85  # grey of pixels without tissue


def _figure(width: float, height: float) -> Any:
    """A figure of its own, in inches: no window, and no global state that others might share."""
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    agg.FigureCanvasAgg(figure)
    return figure


def _colors(colors: Sequence[Sequence[float]], classes: int) -> np.ndarray:
    found = np.asarray(colors, dtype=np.float64)
    if found.shape[1:] != (3,) or len(found) < classes or found.min() < 0 or found.max() > 255:
        raise InputError(f"colors must be RGB in 0 to 255 for {classes} classes, got shape {list(found.shape)}.")
    return found[:classes] / 255.0


def _array(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _plain(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _energy(figure: Any, axis: Any, values: np.ndarray, title: str, label: str) -> None:
    """Energy map with its colour bar, white at 0 where both signs occur; a few outliers do not decide on the range."""
    low, high = (float(x) for x in np.quantile(values, (0.005, 0.995)))
    cmap = ONE_SIGN
    if low < 0 < high:
        high = max(-low, high)
        low, cmap = -high, BOTH_SIGNS
    if high - low < 1e-12:
        low, high = low - 1e-12, high + 1e-12
    below, above = values.min() < low, values.max() > high
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    shown = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    _plain(axis, title)
    bar = figure.colorbar(shown, ax=axis, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def draw_energies(path: EnergyPath, title: str = "") -> Any:
    r"""Energies by step: one panel for each term, the proportion residual and, where there is a reference, the mIoU.

    Each image is a thin line and their mean a thick one; a dashed line marks the learned stopping time. Terms have scales of
    their own, because they differ by orders of magnitude.

    Args:
        path: of :func:`~monai_vslp.variational.analysis.energies_along`.
        title: above the figure.

    Returns:
        ``matplotlib`` figure with 3 to 6 axes: fidelity, regularization, ρ KL (a finite trust only), total, residual
        (proportions only), mIoU (a reference only).
    """
    panels = [("fidelity", path.fidelity, "#0072B2"), ("regularization α R", path.regularization, "#D55E00")]
    if bool((path.marginal != 0).any()):
        panels.append(("ρ KL(ū‖p)", path.marginal, "#CC79A7"))
    panels.append(("total energy", path.total, "#000000"))
    if path.residual is not None:
        panels.append(("‖ū − p‖₁", path.residual, "#009E73"))
    if path.miou is not None:
        panels.append(("mIoU", path.miou, "#56B4E9"))
    columns = 3 if len(panels) > 4 else len(panels) if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    figure = _figure(3.3 * columns, 2.4 * rows + 0.5)
    axes = [figure.add_subplot(rows, columns, 1 + index) for index in range(len(panels))]
    for index, (axis, (name, values, color)) in enumerate(zip(axes, panels)):
        curves = _array(values).astype(np.float64)
        at = np.arange(curves.shape[1])
        if len(curves) > 1:
            axis.plot(at, curves.T, color=color, linewidth=0.7, alpha=0.35)
        axis.plot(at, curves.mean(axis=0), color=color, linewidth=1.8, marker="o", markersize=3)
        if path.stopping_step <= at[-1]:
            axis.axvline(path.stopping_step, color="0.35", linestyle="--", linewidth=1)
        positive = curves[curves > 0]
        if name == "‖ū − p‖₁" and positive.size and positive.max() > 50 * positive.min():
            axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if index >= len(panels) - columns:
            axis.set_xlabel("step", fontsize=9)
    note = f"energies in nats; dashed: learned stopping time T = {path.stopping_time:.3g} (step {path.stopping_step})"
    figure.suptitle(f"{title}\n{note}" if title else note, fontsize=10)
    return figure


def draw_regularization(
    maps: RegularizationMaps,
    confidence: torch.Tensor,
    labels: torch.Tensor,
    colors: Sequence[Sequence[float]],
    class_names: Sequence[str] | None = None,
    *,
    index: int = 0,
    mass: torch.Tensor | None = None,
    unit: str = "",
) -> Any:
    """Energy maps before and after training, below the classes of the confidences and the labels.

    Args:
        maps: of :func:`~monai_vslp.variational.analysis.regularization_maps`.
        confidence: shape ``[B, C, H, W]``.
        labels: class indices, shape ``[B, H, W]``, such as those of the refined map.
        colors: RGB per class, 0 … 255.
        class_names: for the legend; "class 0" and so on by default.
        index: which image of the batch.
        mass: tissue, shape ``[B, H, W]``; background is drawn grey.
        unit: of the energies, for the colour bars.

    Returns:
        ``matplotlib`` figure with 6 axes: four panels and two colour bars. The two energy maps have scales of their own.
    """
    classes = confidence.shape[1]
    palette = _colors(colors, classes)
    names = [f"class {k}" for k in range(classes)] if class_names is None else list(class_names)
    tissue = None if mass is None else _array(mass[index]) > 0
    height, width = confidence.shape[2:]
    figure = _figure(8.0, 1.1 + 6.2 * height / width)
    axes = figure.subplots(2, 2)
    first, reference = _array(confidence[index]).argmax(axis=0), _array(labels[index])
    for axis, found, title in ((axes[0, 0], first, "confidence (argmax)"), (axes[0, 1], reference, "labels")):
        picture = np.full((*found.shape, 3), BACKGROUND)
        shown = (found >= 0) & (found < classes) if tissue is None else (found >= 0) & (found < classes) & tissue
        picture[shown] = palette[found[shown]]
        axis.imshow(picture, interpolation="nearest")
        _plain(axis, title)
    label = "energy r" + (f" ({unit})" if unit else "")
    _energy(figure, axes[1, 0], _array(maps.before[index]), "regularization energy before training", label)
    _energy(figure, axes[1, 1], _array(maps.after[index]), "regularization energy after training", label)
    handles = [patches.Patch(facecolor=palette[k], edgecolor="0.4", label=names[k]) for k in range(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(classes, 5), fontsize=9, frameon=False)
    return figure


def draw_eigenfunctions(found: Mapping[str, Eigenfunction], colors: Sequence[Sequence[float]]) -> Any:
    r"""Eigenfunctions in a grid: starts, what they led to, and how the residual fell.

    Maps are drawn as mixtures :math:`\sum_k w_{ik}\,\text{colour}_k` of the class colours at the contrast of the start, values
    outside [0, 1] cut off.

    Args:
        found: eigenfunctions by the name of their start, all of the same number of classes.
        colors: RGB per class, 0 … 255.

    Returns:
        ``matplotlib`` figure with 3 axes per start: the start, the eigenfunction with its eigenvalue Λ and relative residual,
        and the squared residual by step.
    """
    if not found:
        raise InputError("draw_eigenfunctions: nothing to draw; pass at least one eigenfunction.")
    columns = len(found)
    height, width = next(iter(found.values())).u.shape[1:]
    figure = _figure(2.4 * columns + 0.4, 2.4 * (2 * height / width + 0.75) + 0.6)
    axes = figure.subplots(3, columns, squeeze=False, height_ratios=[height / width, height / width, 0.75])
    for column, (name, one) in enumerate(found.items()):
        palette = _colors(colors, len(one.u))
        start, u = _array(one.start), _array(one.u)
        # Both at the same contrast: the largest at which the start is a mixture.
        mean = start.mean(axis=(1, 2), keepdims=True)
        deviation = start - mean
        room = np.where(deviation > 0, 1 - mean, mean) / np.maximum(np.abs(deviation), 1e-12)
        contrast = max(1.0, float(room[np.abs(deviation) > 1e-3].min(initial=np.inf)))  # the rest is rounding error
        contrast = contrast if np.isfinite(contrast) else 1.0
        for axis, values, title in (
            (axes[0, column], start, f"start: {name}"),
            (axes[1, column], u, f"Λ = {one.eigenvalue:.3g}, residual {one.residual:.2g}"),
        ):
            mixture = np.einsum("khw,kc->hwc", np.clip(mean + contrast * (values - mean), 0, 1), palette)
            axis.imshow(np.clip(mixture, 0, 1), interpolation="nearest")
            _plain(axis, title)
        below = axes[2, column]
        history = np.asarray(one.history)
        below.plot(np.arange(len(history)), np.maximum(history, 1e-30), color="0.2", linewidth=1.2)
        below.set_yscale("log")
        below.grid(alpha=0.25)
        below.tick_params(which="both", labelsize=7)
        below.set_xlabel("step", fontsize=8)
        if column == 0:
            below.set_ylabel("squared residual", fontsize=8)
    return figure


def write_figure(path: str | Path, figure: Any, dpi: int = 150) -> Path:
    """Save a figure as PNG, atomically.

    Args:
        path: ends in ``.png``.
        figure: of one of the functions above.
        dpi: dots per inch.

    Returns:
        ``path``.

    Raises:
        InputError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"write_figure: figures are saved as PNG, got {path.name}; choose a name that ends in .png.")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return path
