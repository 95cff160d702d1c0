"""What a calibration did, for people: ``calibration.md`` and ``calibration.png``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.atomic import atomic_path, write_text
from monai_vslp.utils.errors import InputError

__all__ = ["calibration_line", "write_calibration_report"]

figure_module, has_matplotlib = optional_import("matplotlib.figure")
agg, _ = optional_import("matplotlib.backends.backend_agg")

REPORT, PLOT = "calibration.md", "calibration.png"
WORST = 10  # images in the report
KINDS = ("before", "after")
MARKS = {"before": ("o", "#999999"), "after": (".", "#0072B2")}
KNOWN = {
    "proportions": "proportions of its images",
    "mean": "the mean proportions of its images",
    "images": "its images alone (expectation maximisation)",
}

logger = logging.getLogger(__name__)


def calibration_line(given: np.ndarray, predicted: np.ndarray) -> tuple[float, float] | None:
    r"""Slope and intercept of the least-squares line :math:`p \approx s\,\hat p + t` of given on predicted proportions.

    1 and 0 are perfect. A slope below 1 says that predictions are too extreme, above 1 that they are too timid; a measured
    intercept is meant at :math:`\hat p = 0`.

    Args:
        given, predicted: of one class, shape ``[n]``, fractions.

    Returns:
        ``(slope, intercept)``, or None where predictions do not vary.
    """
    given, predicted = np.asarray(given, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if len(predicted) < 2 or predicted.std() < 1e-6:
        return None
    slope = float(np.cov(predicted, given, bias=True)[0, 1] / predicted.var())
    return slope, float(given.mean() - slope * predicted.mean())


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _fitted(given: np.ndarray, predicted: np.ndarray) -> list[str]:
    line = calibration_line(given, predicted)
    return ["–", "–"] if line is None else [f"{line[0]:.2f}", f"{100 * line[1]:+.1f}"]


def _markdown(
    result: Mapping[str, Any],
    names: Sequence[str],
    patients: Sequence[str],
    given: np.ndarray,
    predicted: Mapping[str, np.ndarray],
) -> str:
    classes, counts, interval = list(result["offset"]), result["counts"], result["interval"]
    offsets = ", ".join(f"{name} {value:+.3f}" for name, value in result["offset"].items())
    text = [
        "# Calibration\n",
        f"{counts['images']} held-out images of {counts['patients']} patients, views `{result['views']}`. No mask was used: "
        "proportions see how predicted proportions move, not whether single pixels are as sure as they should be.\n",
        f"**T = {result['temperature']:.3g}**, offsets: {offsets}. {result['reason']}\n",
    ]
    if result["errors"]:
        text += [
            _line(["variant", "error of patients left out, %", "T (all images)", "T within a factor of"]),
            "|---|---:|---:|---:|",
        ]
        for name, error in result["errors"].items():
            fit = result["temperatures"].get(name)
            numbers = ["1", "–"] if fit is None else [f"{fit['value']:.3g}", f"{np.exp(min(fit['log_error'], 50)):.2f}"]
            text.append(_line([f"**{name}**" if name == result["variant"] else name, _percent(error), *numbers]))
        text.append("\nThe factor is one standard error of log T, by the jackknife over what was left out.\n")
    if result["site"] is not None:
        site = result["site"]
        text += [
            f"## Another site\n\nThe offsets above hold those of a site, from {KNOWN[site['known']]} ({site['images']} "
            "images). The tables below are of the held-out images, without them.\n",
            _line(["class", "offset of the site", "mean before, %", "mean after, %"]),
            "|---|---:|---:|---:|",
        ]
        for name in classes:
            means = (_percent(site[key][name]) for key in ("mean_before", "mean_after"))
            text.append(_line([name, f"{site['offset'][name]:+.3f}", *means]))
        text.append("")
    half, kinds = interval["half_width"], KINDS if result["variant"] != "none" else KINDS[:1]
    after = "*After*: each image predicted by a calibration that has not seen its patient. " if len(kinds) > 1 else ""
    chosen = (
        "These images chose the best pass of the training, so errors are a little too small. " if result["selected"] else ""
    )
    text += [
        "## Given against predicted proportions\n",
        f"{after}{chosen}The line is given = slope · predicted "
        "+ intercept: a slope below 1 says that predictions are too extreme, above 1 too timid. Errors and intercepts in "
        "percentage points.\n",
        _line(["class", "", "error", "mean of predicted − given", "slope", "intercept"]),
        "|---|---|---:|---:|---:|---:|",
    ]
    for k, name in enumerate(classes):
        for kind in kinds:
            difference = predicted[kind][:, k] - given[:, k]
            values = [_percent(np.abs(difference).mean()), f"{100 * difference.mean():+.1f}"]
            text.append(_line([name, kind, *values, *_fitted(given[:, k], predicted[kind][:, k])]))
    text.append("\n## Intervals\n")
    if half is None:
        text.append(f"None: {interval['reason']}\n")
    else:
        text += [
            f"A predicted proportion ± its half width holds the given one for {100 * interval['level']:g} % of images of new "
            "patients like these, each class by itself.\n",
            _line(["class", "half width, percentage points"]),
            "|---|---:|",
            *(_line([name, _percent(value)]) for name, value in half.items()),
            "",
        ]
        if counts["unnamed"]:
            text.append(
                f"Images that name no patient ({counts['unnamed']}) count as one each: where several are of one patient, these "
                "intervals are too narrow.\n"
            )
    error = np.abs(predicted["after"] - given).mean(axis=1)
    order = np.argsort(-error, kind="stable")[:WORST]
    text += [
        f"## Images that fit worst\n\nThe {len(order)} with the largest errors: given, then {' → '.join(kinds)} "
        "calibration, in %. Look for slips in these rows of the table, too.\n",
        _line(["image", "patient", "error", *classes]),
        "|---|---|---:" + "|---:" * len(classes) + "|",
    ]
    for i in order:
        cells = [
            f"{_percent(given[i, k])}: {' → '.join(_percent(predicted[kind][i, k]) for kind in kinds)}"
            for k in range(len(classes))
        ]
        text.append(_line([names[i], patients[i], _percent(error[i]), *cells]))
    return "\n".join(text) + "\n"


def _plot(result: Mapping[str, Any], given: np.ndarray, predicted: Mapping[str, np.ndarray], path: Path) -> None:
    """Given against predicted in %, a panel per class, before and after, with the interval as a band."""
    classes, half = list(result["offset"]), result["interval"]["half_width"]
    columns = min(len(classes), 3)
    rows = -(-len(classes) // columns)
    figure = figure_module.Figure(figsize=(3.4 * columns, 0.4 + 3.8 * rows), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for k, (axis, name) in enumerate(zip(axes, classes)):
        axis.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
        if half is not None:
            x = np.array([0.0, 100.0])
            label = f"{100 * result['interval']['level']:g} % interval"
            axis.fill_between(
                x, x - 100 * half[name], x + 100 * half[name], color="#0072B2", alpha=0.1, linewidth=0, label=label
            )
        for kind in KINDS if result["variant"] != "none" else KINDS[:1]:
            mark, color = MARKS[kind]
            x, y = 100 * predicted[kind][:, k], 100 * given[:, k]
            axis.plot(x, y, mark, color=color, markerfacecolor="none" if kind == "before" else color, label=kind)
            if (line := calibration_line(y, x)) is not None:
                axis.axline((0, line[1]), slope=line[0], color=color, linewidth=1, linestyle="--")
        axis.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal", xlabel="predicted, %", ylabel="given, %")
        axis.set_title(name, fontsize=10)
    for axis in axes[len(classes) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def write_calibration_report(
    folder: str | Path,
    result: Mapping[str, Any],
    names: Sequence[str],
    patients: Sequence[str],
    given: np.ndarray,
    predicted: Mapping[str, np.ndarray],
) -> Path:
    """Write ``calibration.md`` and, where matplotlib is there, ``calibration.png``.

    Args:
        folder: made if needed.
        result: content of ``calibration.json``.
        names: of the n images.
        patients: of the images; empty where unknown.
        given: shape ``[n, C]``, fractions.
        predicted: ``before`` and ``after``, shape ``[n, C]`` each.

    Returns:
        ``calibration.md``.

    Raises:
        InputError: shapes that do not fit.
    """
    shapes = [np.shape(given), *(np.shape(predicted[kind]) for kind in KINDS)]
    if set(shapes) != {(len(names), len(result["offset"]))} or len(patients) != len(names):
        raise InputError(
            f"given and predicted proportions must have shape {[len(names), len(result['offset'])]}, got {shapes}."
        )
    folder = Path(folder)
    if has_matplotlib:
        _plot(result, np.asarray(given), predicted, folder / PLOT)
    else:
        (folder / PLOT).unlink(missing_ok=True)
        logger.warning("There is no plot: install matplotlib to have one.")
    return write_text(folder / REPORT, _markdown(result, names, patients, np.asarray(given), predicted))
