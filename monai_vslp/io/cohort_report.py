"""The report over a cohort: what stands out, how given and predicted proportions agree, how raters differ, what failed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from monai_vslp.io.cohort_statistics import agreement, mean_difference, outlier_bound, rater_offsets_of, rater_spread
from monai_vslp.io.evaluation_tables import evaluation_section
from monai_vslp.io.report_charts import Point, scatter_plot
from monai_vslp.io.report_pictures import data_address, draw_overlay, flat_colors, read_map, read_photo
from monai_vslp.io.report_style import (
    INDEX_NAME,
    REPORT_NAME,
    asset,
    class_name,
    escape,
    html_page,
    html_table,
    percent,
)
from monai_vslp.io.summary import SUMMARY_NAME, read_summary, validate_summary
from monai_vslp.utils.atomic import write_text
from monai_vslp.utils.errors import InputError

__all__ = ["write_cohort_report", "write_index"]

INDEX_SIDE = 280  # px, longer side of the pictures
MOST_CARDS = 60  # inputs with pictures, first those in which given proportions and network differ most
MOST_ROWS = 5000  # inputs in the table
MOST_POINTS = 2000  # inputs in a plot; outliers are always there
STYLE, SCRIPT = "cohort.css", "table.js"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """One input, ready to be shown.

    Attributes:
        name: as people know it.
        folder: of its outputs.
        link: relative address of its report, empty where there is none.
        summary: content of its ``summary.json``.
        difference: mean absolute difference of given and the network's proportions; None where nothing was given.
        flagged: whether it is an outlier.
    """

    name: str
    folder: Path
    link: str
    summary: Mapping[str, Any]
    difference: float | None
    flagged: bool

    @property
    def area(self) -> float | None:
        """Tissue, mm²; None where it is unknown."""
        mpp, fraction = self.summary["mpp"], self.summary["tissue_fraction"]
        if mpp is None or fraction is None:
            return None
        height, width = self.summary["shape"]
        return height * width * fraction * (mpp / 1000) ** 2

    @property
    def seconds(self) -> float:
        """Computing time, s."""
        return sum(self.summary["seconds"].values())

    @property
    def worst(self) -> str:
        """The class for which given proportions and the network differ most."""
        given, found = self.summary["proportions"]["given"], self.summary["proportions"]["confidence"]
        return max(given, key=lambda name: abs((given[name] or 0.0) - (found[name] or 0.0)))

    @property
    def colors(self) -> dict[str, Sequence[int]]:
        return dict(zip(self.summary["classes"], self.summary["colors"]))


def _entries(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[list[_Entry], float | None]:
    """All inputs, those with the largest difference first and those without given proportions last; and the bound."""
    summaries = [validate_summary(row, f"row {i}") for i, row in enumerate(rows)]
    differences = [mean_difference(summary) for summary in summaries]
    bound = outlier_bound([value for value in differences if value is not None])
    entries = []
    for summary, difference in zip(summaries, differences):
        place = str(summary.get("folder", summary["name"]))
        link = f"{quote(place)}/{REPORT_NAME}" if (folder / place / REPORT_NAME).exists() else ""
        flagged = bound is not None and difference is not None and difference > bound
        entries.append(_Entry(summary["name"], folder / place, link, summary, difference, flagged))
    return sorted(entries, key=lambda e: (math.inf if e.difference is None else -e.difference, e.name)), bound


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _area(value: float) -> str:
    return f"{value:,.3g} mm²" if value < 1000 else f"{value / 100:,.1f} cm²"


def _totals(entries: Sequence[_Entry], failures: Sequence[Mapping[str, str]]) -> str:
    kinds = [entry.summary["kind"] for entry in entries]
    areas = [entry.area for entry in entries if entry.area is not None]
    unknown = len(entries) - len(areas)
    facts = [(name, str(kinds.count(kind))) for kind, name in (("slide", "Slides"), ("image", "Images")) if kind in kinds]
    if areas:
        facts.append(("Tissue" if not unknown else f"Tissue, {unknown} unknown", _area(sum(areas))))
    facts += [
        ("Computing time", _time(sum(entry.seconds for entry in entries))),
        ("With proportions", str(sum(entry.difference is not None for entry in entries))),
        ("Outliers", str(sum(entry.flagged for entry in entries))),
        ("Not converged", str(sum(not entry.summary["converged"] for entry in entries))),
        ("Failed", str(len(failures))),
    ]
    return f'<dl class="totals">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)}</dl>'


def _failed(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return ""
    rows = [[f"<b>{escape(failure['name'])}</b>", escape(failure["reason"])] for failure in failures]
    return f'<h2>Failed</h2><div class="warning">{html_table(["Input", "Reason"], rows)}</div>'


def _linked(entry: _Entry) -> str:
    return f'<a href="{entry.link}">{escape(entry.name)}</a>' if entry.link else escape(entry.name)


# ---- proportions ------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    """A fraction as points with a sign; what is rounded to 0 has none."""
    points = f"{100 * value:+.1f}"
    return "0.0" if float(points) == 0 else points.replace("-", "−")


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most ``MOST_POINTS``, evenly chosen, but for flagged ones, which all stay."""
    rest = [point for point in points if not point.flagged]
    step = max(1, math.ceil(len(rest) / MOST_POINTS))
    return [*rest[::step], *(point for point in points if point.flagged)]


def _plots(entries: Sequence[_Entry]) -> str:
    """Given against predicted, one plot per class."""
    points: dict[str, list[Point]] = {}
    colors: dict[str, Sequence[int]] = {}
    for entry in entries:
        proportions = entry.summary["proportions"]
        for name, given in (proportions.get("given") or {}).items():
            found = proportions["confidence"][name]
            if given is not None and found is not None:
                points.setdefault(name, []).append(Point(given, found, entry.name, entry.link, entry.flagged))
                colors.setdefault(name, entry.colors[name])
    figures = []
    for name, all_points in points.items():
        shown, result = _thinned(all_points), agreement([p.x for p in all_points], [p.y for p in all_points])
        words = f"Network − given: {_signed(result.bias)} points on average, {100 * result.error:.1f} in absolute terms"
        words += "" if result.correlation is None else f"; correlation {result.correlation:.2f}".replace("-", "−")
        words += "" if len(shown) == len(all_points) else f". {len(shown)} of {len(all_points)} inputs are drawn"
        plot = scatter_plot(shown, f"{name}: given against the network's proportions", colors[name])
        figures.append(f"<figure>{plot}<figcaption><b>{class_name(name, colors[name])}</b><br>{words}.</figcaption></figure>")
    if not entries:
        return ""
    if not figures:
        return "<h2>Given and predicted proportions</h2><p class=note>No proportions were given.</p>"
    return (
        "<h2>Given and predicted proportions</h2><p class=note>Each mark is an input, and leads to its report. On the dashed "
        "line the network alone, before refinement, saw what was given; diamonds are outliers.</p>"
        f'<div class="grid plots">{"".join(figures)}</div>'
    )


def _raters(entries: Sequence[_Entry], estimates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """How far raters are apart, and the habits of each."""
    spread = rater_spread([entry.summary for entry in entries])
    offsets = rater_offsets_of(estimates)
    if not spread and not offsets:
        return ""
    colors = {name: color for entry in entries for name, color in entry.colors.items()}
    parts = ["<h2>Raters</h2>"]
    if spread:
        rows = [[class_name(name, colors[name]), str(count), f"{100 * value:.1f}"] for name, (count, value) in spread.items()]
        parts.append(
            html_table(["Class", "Inputs with several raters", "Between raters, ± points"], rows, "Spread", right=(1, 2))
        )
    if offsets:
        names = list(dict.fromkeys(name for by_class in offsets.values() for name in by_class))
        rows = []
        for rater, by_class in offsets.items():
            cells = [escape(rater), str(max(offset.count for offset in by_class.values()))]
            for name in names:
                offset = by_class.get(name)
                error = "" if offset is None or offset.error is None else f" ± {100 * offset.error:.1f}"
                cells.append("–" if offset is None else f"{_signed(offset.mean)}{error}")
            rows.append(cells)
        head = ["Rater", "Inputs", *(class_name(name, colors[name]) if name in colors else escape(name) for name in names)]
        parts.append(
            "<p class=note>How much more of a class a rater gives than the others do for the same inputs, in points, with the "
            f"standard error of this mean.</p>{html_table(head, rows, 'Mean offset per rater', right=range(1, len(head)))}"
        )
    return "".join(parts)


# ---- inputs -----------------------------------------------------------------------------------------------------------


def _status(entry: _Entry) -> str:
    words = ["outlier"] if entry.flagged else []
    words += [] if entry.summary["converged"] else ["solver not converged"]
    return f'<span class="flag">{", ".join(words)}</span>' if words else "–"


def _listing(entries: Sequence[_Entry], bound: float | None) -> str:
    """The table of all inputs."""
    if not entries:
        return ""
    rows, keys = [], []
    for entry in entries[:MOST_ROWS]:
        proportions, difference = entry.summary["proportions"], entry.difference
        worst = given = found = None
        if difference is not None:
            worst = entry.worst
            given, found = proportions["given"][worst], proportions["confidence"][worst]
        rows.append(
            [
                _linked(entry),
                percent(difference),
                "–" if worst is None else class_name(worst, entry.colors[worst]),
                percent(given),
                percent(found),
                "–" if entry.area is None else f"{entry.area:,.3g}",
                f"{entry.seconds:,.1f}",
                _status(entry),
            ]
        )
        status = 2 * entry.flagged + (not entry.summary["converged"])
        keys.append([entry.name, difference, worst, given, found, entry.area, entry.seconds, status])
    head = ["Input", "Mean difference", "Largest for", "Given", "Network", "Tissue, mm²", "Time, s", "Status"]
    note = "Mean difference: mean over the classes of the absolute difference between given proportions and the network's own."
    if bound is not None:
        note += f" Above {percent(bound)} (median + 3.5 robust standard deviations) an input is an outlier: look at it again."
    if len(entries) > MOST_ROWS:
        note += f" The first {MOST_ROWS} of {len(entries)} inputs are listed."
    table = html_table(head, rows, right=(1, 3, 4, 5, 6), keys=keys)
    return f'<h2>All inputs</h2><p class=note>{note}</p><div class="all" tabindex="0" aria-label="All inputs">{table}</div>'


def _card(entry: _Entry) -> str:
    """One input with its pictures.

    Raises:
        ImageReadError: a picture or map is there but cannot be read.
    """
    summary, name = entry.summary, escape(entry.name)
    photo = read_photo(entry.folder / "thumbnail.jpg", INDEX_SIDE)
    labels = read_map(entry.folder / "labels.tif", INDEX_SIDE)
    pictures = [] if photo is None else [(photo, "input")]
    if labels is not None:
        drawn = flat_colors(labels, summary["colors"]) if photo is None else draw_overlay(photo, labels, summary["colors"])
        pictures.append((drawn, "refined map"))
    images = "".join(f'<img alt="{name}: {what}" src="{data_address(picture, INDEX_SIDE)}">' for picture, what in pictures)
    status = "" if summary["converged"] else ', <b class="bad">solver not converged</b>'
    status = (', <b class="bad">outlier</b>' if entry.flagged else "") + status
    columns = [summary["proportions"].get(key) or {} for key in ("given", "confidence", "refined")]
    percents = [[None if values.get(name) is None else 100 * values[name] for values in columns] for name in summary["classes"]]
    rows = [
        [class_name(name, color), *("–" if value is None else f"{value:.1f}" for value in values)]
        for name, color, values in zip(summary["classes"], summary["colors"], percents)
    ]
    words = (
        "No proportions given"
        if entry.difference is None
        else f"Given and network differ by <b>{percent(entry.difference)}</b> per class"
    )
    return (
        f'<article><div class="pair">{images}</div><h3>{_linked(entry)}</h3><p class=note>{words}{status}</p>'
        f"{html_table(['Class, %', 'Given', 'Network', 'Refined'], rows, right=(1, 2, 3))}</article>"
    )


def _cards(entries: Sequence[_Entry]) -> tuple[str, list[dict[str, str]]]:
    """Pictures of the first inputs, and what cannot be read."""
    cards, failures = [], []
    for entry in entries[:MOST_CARDS]:
        try:
            cards.append(_card(entry))
        except InputError as error:
            logger.warning("%s has no pictures in the report: %s", entry.name, error)
            failures.append({"name": entry.name, "reason": str(error)})
    title = "Pictures" if len(entries) <= MOST_CARDS else f"Pictures of the first {MOST_CARDS}"
    return f'<h2>{title}</h2><div class="grid cards">{"".join(cards)}</div>' if cards else "", failures


def write_cohort_report(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    failures: Sequence[Mapping[str, str]] = (),
    raters: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    name: str = INDEX_NAME,
) -> Path:
    """Write the report over a cohort: one HTML file that needs no network, with links to the reports of its inputs.

    Inputs in which given proportions and those of the network alone differ most come first.

    Args:
        folder: where to; holds the output folders of the inputs, and ``evaluation.json`` if there was an evaluation.
        rows: per input the content of its ``summary.json``, and under ``folder`` the name of its output folder where that is
            not its ``name``.
        failures: ``name`` and ``reason`` of what failed.
        raters: input → rater → class → fraction, where several raters are known by name.
        name: of the file.

    Returns:
        Path of the report.

    Raises:
        InputError: a row is no summary.
        OSError: the file cannot be written; one that was there stays.
    """
    folder = Path(folder)
    entries, bound = _entries(folder, rows)
    cards, unreadable = _cards(entries)
    failures = [*failures, *unreadable]
    body = (
        "<h1>Tissue maps</h1><p class=soft>For research, not for diagnosis. Inputs in which the given proportions and the "
        f"network differ most come first.</p>{_totals(entries, failures)}{_failed(failures)}"
        f"{evaluation_section(folder / 'evaluation.json')}{_plots(entries)}{_raters(entries, raters or {})}"
        f"{_listing(entries, bound)}{cards}<script>\n{asset(SCRIPT)}</script>"
    )
    return write_text(folder / name, html_page("Tissue maps", body, [STYLE]))


def write_index(out_folder: str | Path, failed: Mapping[str, str] | None = None) -> Path:
    """Write ``report.html`` over all segmented inputs of a folder, as :func:`write_cohort_report` tells.

    Args:
        out_folder: holds one folder per input, each with ``summary.json``. Inputs that cannot be read are listed as failed.
        failed: name and reason of inputs that failed.

    Returns:
        Path of the report.

    Raises:
        InputError: there is no segmented input.
    """
    out_folder = Path(out_folder)
    folders = sorted(path.parent for path in out_folder.glob(f"*/{SUMMARY_NAME}"))
    if not folders:
        raise InputError(f"{out_folder} holds no */{SUMMARY_NAME}; give the output folder of 'monai-vslp segment'.")
    rows, failures = [], [{"name": name, "reason": reason} for name, reason in (failed or {}).items()]
    for folder in folders:
        if folder.name in (failed or {}):  # what lies there is of an earlier call
            continue
        try:
            rows.append(read_summary(folder) | {"folder": folder.name})
        except InputError as error:
            logger.warning("%s is not in the report: %s", folder, error)
            failures.append({"name": folder.name, "reason": str(error)})
    return write_cohort_report(out_folder, rows, failures=failures, name=REPORT_NAME)
