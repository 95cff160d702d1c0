"""The report of one input: what was found, how sure that is, and why a pixel got its label.

One HTML file that holds its pictures and asks no server for anything; only its viewer loads tiles, from a folder beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.io.ome_tiff import read_map_tiff
from monai_vslp.io.report_charts import energy_curve, proportion_bars
from monai_vslp.io.report_pictures import (
    SIDE,
    band_picture,
    draw_overlay,
    energy_range,
    flat_colors,
    html_figure,
    nearest,
    read_energies,
    read_map,
    read_photo,
    spread_range,
)
from monai_vslp.io.report_style import REPORT_NAME, class_name, color_scale, escape, html_page, html_table, legend, percent
from monai_vslp.io.summary import read_summary
from monai_vslp.io.viewer import VIEWER_FOLDER, read_viewer
from monai_vslp.io.viewer_page import VIEWER_STYLE, viewer_section
from monai_vslp.transforms.overlay import EnergyPicture
from monai_vslp.utils.atomic import write_text
from monai_vslp.variational.outofcore import NO_TISSUE

__all__ = ["BAND_MAP", "disagreement", "write_report"]

BAND_MAP = "band.tif"  # how many moves of a rounding step change a label, and what it then is
BAND_MOVES = 6  # moves of a rounding step that are listed, those with most effect
SAME_WEIGHT = 0.05  # offsets closer than this to the mean leave a class as the image shows it


def _offsets(summary: Mapping[str, Any]) -> str:
    """ψ in plain words; what counts is how an offset compares with the others, so the mean is taken off."""
    psi = summary["psi"]
    if psi is None:
        return "<p class=note>No proportions were given: no class was raised or lowered, the map rests on the image alone.</p>"
    finite = [value for value in psi.values() if value is not None and math.isfinite(value)]
    mean = sum(finite) / max(len(finite), 1)
    rows = []
    for name, color in zip(summary["classes"], summary["colors"]):
        value = psi[name]
        if value is None or not math.isfinite(value):
            shown, meaning = "−∞", "Left out: it was given as 0 %."
        else:
            shown, factor = f"{value:+.3f}".replace("-", "−"), math.exp(min(value - mean, 50.0))
            if abs(value - mean) < SAME_WEIGHT:
                meaning = "Left as the image shows it."
            elif value > mean:
                meaning = f"Raised: its confidence counts {factor:.3g} times as much, to reach the given share."
            else:
                meaning = f"Lowered: its confidence counts {factor:.3g} times as much, to keep to the given share."
        rows.append([class_name(name, color), shown, meaning])
    table = html_table(["Class", "Offset ψ", "What it did"], rows, right=(1,))
    return (
        f'{table}<p class="note">To bring the map to the given proportions, each class got one offset on the logarithm of its '
        "confidence, the same at every pixel. Large differences between offsets mean that the image and the given "
        "proportions disagree: look at such a case again.</p>"
    )


def _size(shape: Sequence[int] | None, mpp: float | None) -> str:
    if shape is None:
        return "unknown"
    pixels = f"{shape[1]} × {shape[0]} px"
    return pixels if mpp is None else f"{pixels} ({shape[1] * mpp / 1000:.2f} × {shape[0] * mpp / 1000:.2f} mm)"


def _facts(summary: Mapping[str, Any]) -> str:
    mpp, residual, tissue = summary["mpp"], summary["residual"], summary["tissue_fraction"]
    source_mpp = None if mpp is None else mpp / summary["downsample"]
    given, refined = summary["proportions"].get("given"), summary["proportions"]["refined"]
    left = None if given is None else sum(abs((given[name] or 0.0) - (refined[name] or 0.0)) for name in given) / 2
    status = "Converged" if summary["converged"] else "Not converged"
    options = [f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in summary["options"].items()]
    seconds = [f"{key} {value:.1f} s" for key, value in summary["seconds"].items()]
    versions = [f"{key} {value}" for key, value in summary["versions"].items()]
    rows = [
        ("Source", escape(summary["source"])),
        ("Kind", escape(summary["kind"])),
        ("Size of the input", _size(summary["level0_shape"] or summary["shape"], source_mpp)),
        ("Size of the maps", _size(summary["shape"], mpp)),
        ("Pixel size of the maps", "unknown" if mpp is None else f"{mpp:.4g} µm/px"),
        ("Tissue", "unknown" if tissue is None else f"{percent(tissue)} of the area"),
        ("Solver", escape(f"{status}: {summary['reason'] or 'no reason given'}")),
        ("Refined against given proportions", "none given" if left is None else f"{percent(left)} of the tissue apart"),
        ("Residual of the solver", "none: no proportions were given" if residual is None else f"{residual:.2e}"),
        ("Options", "<br>".join(map(escape, options)) or "none recorded"),
        ("Time", escape(", ".join(seconds) or "not recorded")),
        ("Versions", escape(", ".join(versions) or "not recorded")),
    ]
    return html_table([], [(f"<b>{name}</b>", value) for name, value in rows])


def disagreement(summary: Mapping[str, Any]) -> float | None:
    """Half the L1 distance between given proportions and those of the network alone, in [0, 1]; None without given ones."""
    given, found = summary["proportions"].get("given"), summary["proportions"]["confidence"]
    return None if given is None else 0.5 * sum(abs((given[name] or 0.0) - (found[name] or 0.0)) for name in given)


def _opening(summary: Mapping[str, Any]) -> str:
    """Title, status and the one sentence that matters most."""
    given, found = summary["proportions"].get("given"), summary["proportions"]["confidence"]
    if given is None:
        lead = "No proportions were given; the map follows the image alone."
    else:
        worst = max(given, key=lambda name: abs((given[name] or 0.0) - (found[name] or 0.0)))
        lead = (
            f"Given proportions and network differ most for {escape(worst)}: given {percent(given[worst])}, "
            f"seen by the network {percent(found[worst])}. In all, {percent(disagreement(summary))} of the tissue would have "
            "to change its class for the two to agree."
        )
    if summary["converged"]:
        status, warning = '<span class="status good">✓ Solver converged</span>', ""
    else:
        status = '<span class="status bad">! Solver did not converge</span>'
        reason = escape(summary["reason"] or "no reason given")
        warning = (
            f'<p class="warning">The refinement ended before it had converged ({reason}). Take the refined map as '
            "provisional.</p>"
        )
    return (
        f"<h1>{escape(summary['name'])}</h1><p>{status} <span class=soft>Tissue map from an image and its proportions. For "
        f"research, not for diagnosis.</span></p>{warning}<p>{lead}</p>{legend(summary)}"
    )


def _maps(summary: Mapping[str, Any], folder: Path) -> str:
    """The input, the overlay, and the labels before and after refinement."""
    colors = summary["colors"]
    photo = read_photo(folder / "thumbnail.jpg", SIDE)
    refined, first = (read_map(folder / name, SIDE) for name in ("labels.tif", "labels_argmax.tif"))
    figures = []
    if photo is not None:
        figures.append(html_figure(photo, "Input"))
        if refined is not None:
            figures.append(
                html_figure(draw_overlay(photo, refined, colors), "Refined map over the input", "Lines mark the borders.")
            )
    parts = [f'<div class="grid two">{"".join(figures)}</div>'] if figures else []
    if refined is not None and first is not None:
        first = nearest(first, refined.shape)
        tissue = refined != NO_TISSUE
        by = "smooth borders" if summary["proportions"].get("given") is None else "the given proportions and smooth borders"
        changed = float(((first != refined) & tissue).sum() / max(int(tissue.sum()), 1))
        parts.append(
            "<h2>Before and after refinement</h2>"
            f"<p class=note>Refinement changed the class of {percent(changed)} of the tissue.</p>"
            '<div class="grid two">'
            + html_figure(
                flat_colors(first, colors), "Network alone", "The class that the network finds most probable.", form="PNG"
            )
            + html_figure(flat_colors(refined, colors), "Refined map", f"The same after refinement with {by}.", form="PNG")
            + "</div>"
        )
    elif refined is None:
        parts.append("<p class=note>There is no labels.tif in this folder, so no map is shown.</p>")
    return "".join(parts)


def _energies(energies: Mapping[str, np.ndarray], labels: np.ndarray | None) -> str:
    """Fidelity, regularization and their sum on one colour scale."""
    if not {"fidelity", "regularization"} <= set(energies):
        return "<p class=note>No energies were kept for this input.</p>"
    maps = {name: energies[name] for name in ("fidelity", "regularization")}
    maps["total"] = maps["fidelity"] + maps["regularization"]
    if labels is not None:
        nothing = nearest(labels, maps["total"].shape) == NO_TISSUE
        maps = {name: np.where(nothing, np.nan, values) for name, values in maps.items()}
    low, high = energy_range(maps)
    draw, scale = EnergyPicture(low, high, "magma"), color_scale(low, high, "nats", "magma")
    texts = {
        "fidelity": ("Fidelity", "How much the label contradicts what the network sees here."),
        "regularization": ("Regularization", "The price of borders: bright lines are where classes meet."),
        "total": ("Total", "The sum of both. Bright places are the doubtful ones."),
    }
    figures = "".join(html_figure(np.moveaxis(draw(maps[name]), 0, -1), *text, scale) for name, text in texts.items())
    return f'<p class="note">All three maps share one colour scale.</p><div class="grid">{figures}</div>'


def _spread(folder: Path, energies: Mapping[str, np.ndarray], labels: np.ndarray | None) -> str:
    """Standard deviation between augmented views, where there were several."""
    stored = read_map(folder / "spread.tif", SIDE)
    values = energies.get("spread") if stored is None else stored.astype(np.float32) / 255
    if values is None:
        return ""
    if labels is not None:
        values = np.where(nearest(labels, values.shape) == NO_TISSUE, np.nan, values)
    high = spread_range(values)[1]
    picture = np.moveaxis(EnergyPicture(0.0, high, "viridis")(values), 0, -1)
    figure = html_figure(
        picture,
        "Spread between views",
        "The input was looked at turned, mirrored and shifted. Bright: the network's answer depended on the view.",
        color_scale(0.0, high, "standard deviation of the confidence", "viridis"),
    )
    return f'<h2>How steady the network is</h2><div class="grid two">{figure}</div>'


def _band(summary: Mapping[str, Any], folder: Path, labels: np.ndarray | None) -> str:
    """What hangs on one rounding step of the proportions, where that was asked for."""
    band = summary.get("band")
    if band is None:
        return ""
    given, colors = summary["proportions"]["given"], dict(zip(summary["classes"], summary["colors"]))
    photo, figure = read_photo(folder / "thumbnail.jpg", SIDE), ""
    if photo is not None and labels is not None and (folder / BAND_MAP).exists():
        figure = html_figure(
            band_picture(photo, labels, read_map_tiff(folder / BAND_MAP, SIDE), summary["colors"]),
            "What hangs on one step",
            "Full colour: the class that a pixel would become. Faded: it keeps its class.",
        )
    rows = [
        [class_name(name, colors[name]), percent(given[name]), *(percent(area[key]) for key in ("map", "lower", "upper"))]
        for name, area in band["areas"].items()
    ]
    areas = html_table(["Class", "Given", "In the map", "At least", "At most"], rows, "Share of the tissue", right=(1, 2, 3, 4))
    largest = sorted(band["moves"], key=lambda move: -move["flipped"])[:BAND_MOVES]
    rows = [
        [
            class_name(m["from"], colors[m["from"]]),
            class_name(m["to"], colors[m["to"]]),
            percent(m["amount"]),
            percent(m["flipped"]),
        ]
        for m in largest
    ]
    caption = (
        "Every step"
        if len(largest) == len(band["moves"])
        else f"The {len(largest)} of {len(band['moves'])} steps with most effect"
    )
    moves = html_table(["From", "To", "Moved", "Tissue that changes class"], rows, caption, right=(2, 3))
    warning = "" if band["converged"] else (
        '<p class="warning">Not every one of these refinements converged, so some pixels may be marked for that reason.</p>'
    )  # fmt: skip
    return (
        "<h2>What hangs on one rounding step</h2>"
        f"<p class=note>The given proportions were moved by {percent(band['step'])} of the tissue from each class to each "
        "other one, as someone who rounds could have given them, and the map was refined anew. "
        f"<b>{percent(band['flipped'])}</b> of the tissue changes its class in at least one of these {len(band['moves'])} "
        f'maps; the rest keeps it in all of them.</p>{warning}<div class="grid two">{figure}<div>{areas}{moves}</div></div>'
    )


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of one segmented input.

    Args:
        folder: holds ``summary.json`` and, where they were made, ``thumbnail.jpg``, ``labels.tif``, ``labels_argmax.tif``,
            ``energies.npz``, ``spread.tif``, ``band.tif`` and ``viewer/``; what is absent is left out. Maps of slides are read
            reduced.

    Returns:
        Path of the report. It needs no network and no other file, but for its viewer, which loads tiles from ``viewer/``.

    Raises:
        InputError: ``summary.json`` is missing or damaged.
        ImageReadError: a map or picture is there but cannot be read.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    energies = read_energies(folder / "energies.npz")
    labels = read_map(folder / "labels.tif", SIDE)
    manifest = read_viewer(folder / VIEWER_FOLDER)
    viewer = "" if manifest is None else viewer_section(manifest)
    body = (
        f"{_opening(summary)}{viewer}{_maps(summary, folder)}<h2>Proportions</h2>{proportion_bars(summary)}"
        f"<h2>Why a pixel got its class</h2>{_energies(energies, labels)}{_spread(folder, energies, labels)}"
        f"<h2>What the given proportions did</h2>{_offsets(summary)}{_band(summary, folder, labels)}"
        f"<h2>How the solution was found</h2>{energy_curve(summary['energies'])}<h2>Details</h2>{_facts(summary)}"
    )
    return write_text(folder / REPORT_NAME, html_page(f"{summary['name']} – tissue map", body, [VIEWER_STYLE]))
