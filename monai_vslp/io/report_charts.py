"""Charts of a report, as HTML and SVG that need no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai_vslp.io.report_style import class_name, escape, rgb

__all__ = ["Point", "energy_curve", "proportion_bars", "scatter_plot"]


def proportion_bars(summary: Mapping[str, Any]) -> str:
    """Proportions per class as horizontal bars: given with whisker, network alone, refined."""
    proportions = summary["proportions"]
    spread = proportions.get("given_spread") or {}
    bounds = (summary.get("interval") or {}).get("bounds") or {}
    sources = [("given", "Given"), ("confidence", "Network alone"), ("refined", "Refined map")]
    blocks = []
    for name, color in zip(summary["classes"], summary["colors"]):
        lines = [f"<h3>{class_name(name, color)}</h3>"]
        for key, label in sources:
            if proportions.get(key) is None:
                continue
            value = proportions[key][name]
            width = 100 * min(max(value or 0.0, 0.0), 1.0)
            deviation = (spread.get(name) or 0.0) if key == "given" else 0.0
            whisker = number = ""
            if deviation > 0:
                left, right = max(width - 100 * deviation, 0), min(width + 100 * deviation, 100)
                whisker = f'<div class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></div>'
                number = f" ± {100 * deviation:.1f}"
            if key == "confidence" and value is not None and bounds.get(name) is not None:
                low, high = (100 * bound for bound in bounds[name])
                whisker = f'<div class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
            style = f"width:{width:.2f}%;background:{rgb(color)};border-color:{rgb(color)}"
            style += ";opacity:.55" if key == "confidence" else ""
            shape = "fill hollow" if key == "given" else "fill"
            shown = "–" if value is None else f"{100 * value:.1f}{number} %"
            if key == "confidence" and value is not None and bounds.get(name) is not None:
                shown = f"{100 * value:.0f} % ({low:.0f}–{high:.0f} %)"
            lines.append(
                f'<div class="bar"><span>{label}</span><div class="track"><div class="{shape}" style="{style}"></div>{whisker}'
                f'</div><span class="num">{shown}</span></div>'
            )
        blocks.append(f'<div class="class">{"".join(lines)}</div>')
    return f'<div class="card">{"".join(blocks)}</div>{_interval_note(summary)}'


def _interval_note(summary: Mapping[str, Any]) -> str:
    """What the ranges at the network's bars mean; nothing where the network is not calibrated."""
    interval = summary.get("interval")
    if interval is None:
        return ""
    if interval["bounds"] is None:
        return f"<p class=note>No intervals: {escape(interval['reason'])}</p>"
    return (
        f"<p class=note>Ranges at <i>Network alone</i> hold the proportion of a class for {100 * interval['level']:g} % of "
        "images of new patients like those held out in calibration, each class by itself.</p>"
    )


def energy_curve(values: Sequence[float]) -> str:
    """Energies as a line plot."""
    energies = [float(value) for value in values if math.isfinite(value)]
    if len(energies) < 2:
        return '<p class="note">There is one energy only, so there is no curve: the minimum was found in one step.</p>'
    low, high = min(energies), max(energies)
    span = (high - low) or 1.0
    left, right, top, bottom = 78, 640, 14, 186
    points = [
        (left + (right - left) * i / (len(energies) - 1), top + (bottom - top) * (high - e) / span)
        for i, e in enumerate(energies)
    ]
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points) if len(points) <= 40 else ""
    ticks = "".join(
        f'<line x1="{left - 5}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".25"/>'
        f'<text x="{left - 9}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
        for y, value in ((top, high), ((top + bottom) / 2, (low + high) / 2), (bottom, low))
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    title = f"Energy from {energies[0]:.4g} to {energies[-1]:.4g} in {len(energies) - 1} steps"
    return (
        f'<figure><svg viewBox="0 0 660 232" role="img" aria-label="{title}"><title>{title}</title>{ticks}'
        f'<g fill="#2a7fc1"><polyline points="{line}" fill="none" stroke="#2a7fc1" stroke-width="2.5"/>{marks}</g>'
        f'<text x="{left}" y="{bottom + 20}">0</text>'
        f'<text x="{right}" y="{bottom + 20}" text-anchor="end">{len(energies) - 1}</text>'
        f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">step</text></svg>'
        "<figcaption><b>Energy after each step</b>In nats, mean over the tissue. Where the curve is flat, further steps "
        "would change nothing.</figcaption></figure>"
    )


@dataclass(frozen=True)
class Point:
    """One input in a scatter plot.

    Attributes:
        x, y: fractions in [0, 1].
        name: shown under the pointer.
        link: relative address, empty for none.
        flagged: drawn as a diamond, above the others.
    """

    x: float
    y: float
    name: str
    link: str = ""
    flagged: bool = False


def scatter_plot(points: Sequence[Point], title: str, color: Sequence[int]) -> str:
    """Given against predicted proportions of one class as SVG; equal ones lie on the diagonal."""
    left, right, top, bottom = 46, 286, 10, 250
    size = right - left
    lines = []
    for percent in (0, 25, 50, 75, 100):
        x, y = left + size * percent / 100, bottom - size * percent / 100
        lines.append(
            f'<path d="M{x} {top}V{bottom}M{left} {y}H{right}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{percent}</text>'
            f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{percent}</text>'
        )
    marks = []
    for point in sorted(points, key=lambda point: point.flagged):
        x, y = (min(max(value, 0.0), 1.0) for value in (point.x, point.y))
        x, y = left + size * x, bottom - size * y
        shape = (
            f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z" fill="{rgb(color)}" stroke="currentColor" stroke-width="2"/>'
            if point.flagged
            else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{rgb(color)}" fill-opacity=".75" stroke="currentColor" '
            'stroke-width=".7"/>'
        )
        words = f"{escape(point.name)}: given {100 * point.x:.1f} %, network {100 * point.y:.1f} %"
        mark = f"<g>{shape}<title>{words}</title></g>"
        marks.append(f'<a href="{escape(point.link)}" aria-label="{words}">{mark}</a>' if point.link else mark)
    middle = (left + right) / 2
    return (
        f'<svg viewBox="0 0 300 290" role="group" aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(lines)}'
        f'<path d="M{left} {bottom}L{right} {top}" stroke="currentColor" opacity=".6" stroke-dasharray="4 4"/>{"".join(marks)}'
        f'<text x="{middle}" y="{bottom + 35}" text-anchor="middle">given, %</text>'
        f'<text transform="translate(13 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">network alone, %</text></svg>'
    )
