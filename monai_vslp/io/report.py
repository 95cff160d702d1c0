"""Reports a person can read: what was found, how sure that is, and why a pixel got its label.

Each report is one HTML file that holds its pictures and asks no server for anything.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.ome_tiff import read_map_tiff
from monai_vslp.io.summary import SUMMARY_NAME, read_summary
from monai_vslp.transforms.overlay import COLORMAPS, NO_TISSUE_COLOR, EnergyPicture, LabelOverlay
from monai_vslp.utils.atomic import write_text
from monai_vslp.utils.errors import ImageReadError, InputError

__all__ = ["BAND_MAP", "REPORT_NAME", "band_picture", "disagreement", "write_index", "write_report"]

Image, _ = optional_import("PIL.Image")

REPORT_NAME = "report.html"
BAND_MAP = "band.tif"  # how many moves of a rounding step change a label, and what it then is
SIDE = 1600  # px, longer side of the pictures in a report
INDEX_SIDE = 280  # px, longer side of the pictures in the index
NO_TISSUE = 255  # label of pixels without tissue
BAND_LINE = (45, 45, 45)  # colour of the line around what hangs on a rounding step
BAND_MOVES = 6  # moves of a rounding step that are listed, those with most effect
SAME_WEIGHT = 0.05  # offsets closer than this to the mean leave a class as the image shows it

logger = logging.getLogger(__name__)

_STYLE = """
:root{color-scheme:light dark;--ink:#1b2530;--soft:#51606f;--line:#d5dce3;--page:#f5f7f9;--card:#fff;--track:#e8edf1;
--link:#075c9c;--good:#0b6b3c;--bad:#9c3a00;--badback:#fff3ea}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#a5b2be;--line:#39444f;--page:#14191e;--card:#1d242b;
--track:#303a44;--link:#7cc0f4;--good:#6fd09b;--bad:#ffb380;--badback:#3a2617}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}h1{font-size:1.6rem;line-height:1.25;margin:.2em 0}
h2{font-size:1.2rem;margin:2em 0 .5em}h3{font-size:1rem;margin:.2em 0}p{margin:.4em 0}a{color:var(--link)}
.soft,.note{color:var(--soft)}.note{font-size:.92rem;max-width:75ch}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:14px}
.two{grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr))}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(390px,100%),1fr))}
figure,.card,article{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
figure img{display:block;width:100%;max-height:80vh;object-fit:contain}figcaption{font-size:.92rem;padding-top:6px}
figcaption b{display:block}.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:.6em 0;padding:0;list-style:none}
.name{display:inline-flex;align-items:baseline;overflow-wrap:break-word}.sw{display:inline-block;flex:none;width:.9em;height:.9em;border-radius:3px;margin-right:.45em;vertical-align:-.08em;
border:1px solid rgba(128,128,128,.6)}
.status{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 .7em;font-size:.92rem;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.warning{border-left:4px solid var(--bad);background:var(--badback);
padding:8px 12px;border-radius:4px;margin:.8em 0}
.class{padding:8px 0;border-top:1px solid var(--line)}.class:first-child{border-top:0}.bar{display:grid;
grid-template-columns:8.5em minmax(0,1fr) 8.5em;gap:10px;align-items:center;font-size:.92rem;line-height:1.7}
.track{position:relative;height:13px;background:var(--track);border-radius:3px}.fill{height:100%;border-radius:3px}
.fill.hollow{background:transparent!important;border:3px solid}
.whisker{position:absolute;top:5px;height:3px;background:var(--ink)}
.whisker::before,.whisker::after{content:"";position:absolute;top:-4px;height:11px;width:2px;background:var(--ink)}
.whisker::before{left:0}.whisker::after{right:0}.num{font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin-bottom:12px}article .scroll{margin:0}article .name{overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.92rem;background:var(--card)}caption{text-align:left;
color:var(--soft);padding-bottom:4px}td,th{border:1px solid var(--line);padding:5px 10px;text-align:left;vertical-align:top}
th{font-weight:600}th{white-space:nowrap}td.r,th.r{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.scale{margin-top:8px;font-size:.85rem;color:var(--soft)}.scale i{display:block;height:10px;border-radius:2px}
.scale span{display:flex;justify-content:space-between;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;max-width:680px;height:auto;color:var(--ink)}svg text{fill:currentColor;font-size:13px}
article .pair{display:grid;grid-template-columns:1fr 1fr;gap:6px;margin-bottom:8px}article img{width:100%;display:block}
article table{width:100%;font-size:.85rem}article td,article th{padding:2px 6px}
@media (max-width:560px){.bar{grid-template-columns:6.6em minmax(0,1fr) 5em}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#333;--line:#bbb;--page:#fff;--card:#fff;--track:#eee;--link:#000;
--good:#064;--bad:#830;--badback:#fff}figure,article,.card,table,h2{break-inside:avoid}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}@page{margin:14mm}
.grid{grid-template-columns:repeat(3,1fr)}.two,.cards{grid-template-columns:repeat(2,1fr)}}
"""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


# ---- arrays -----------------------------------------------------------------------------------------------------------


def _nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` sampled at the centres of a grid of ``size`` (height, width)."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, array.shape))
    return array[rows[:, None], columns]


def _fitted(shape: Sequence[int], longest: int) -> tuple[int, int]:
    """Height and width of ``shape`` reduced, never enlarged, to a longer side of at most ``longest`` px."""
    factor = min(1.0, longest / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _read_map(path: Path, longest: int) -> np.ndarray | None:
    """A map ``[H, W]`` of at most ``longest`` px, or None where there is no such file."""
    if not path.exists():
        return None
    array = read_map_tiff(path, longest)
    if array.ndim != 2:
        raise ImageReadError(f"map {path} must have one channel, got shape {array.shape}.")
    return _nearest(array, _fitted(array.shape, longest))


def _read_photo(path: Path, longest: int) -> np.ndarray | None:
    """RGB ``[H, W, 3]`` uint8 of at most ``longest`` px, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as file:
            file.draft("RGB", (longest, longest))  # a JPEG is then decoded at a fraction of its size
            image = file.convert("RGB")
    except OSError as error:
        raise ImageReadError(f"picture {path} cannot be read: {error}") from error
    image.thumbnail((longest, longest))
    return np.asarray(image)


def _read_energies(path: Path) -> dict[str, np.ndarray]:
    """Maps by name, float32 ``[H, W]``, reduced by leaving out pixels where they are much larger than shown."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            maps = {name: file[name].squeeze() for name in file.files}
    except Exception as error:  # zip, zlib and NumPy raise different kinds for damaged files
        raise ImageReadError(f"{path} cannot be read ({error}); segment this input again.") from error
    steps = {name: max(1, max(values.shape) // (2 * SIDE)) for name, values in maps.items()}
    return {name: values[:: steps[name], :: steps[name]].astype(np.float32) for name, values in maps.items()}


def _overlay(
    photo: np.ndarray, labels: np.ndarray, colors: Sequence[Sequence[int]], alpha: float = 0.4, outline: int | None = None
) -> np.ndarray:
    draw = LabelOverlay(colors, alpha, max(1, round(max(photo.shape) / 800)) if outline is None else outline)
    return np.moveaxis(draw(np.moveaxis(photo, -1, 0), _nearest(labels, photo.shape[:2])), 0, -1)


def band_picture(photo: np.ndarray, labels: np.ndarray, band: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """A faded map in which only what hangs on a rounding step has full colour: that of the class it would become.

    Args:
        photo: shape ``[h, w, 3]``, uint8.
        labels: class indices, shape ``[H, W]``; 255 without tissue.
        band: shape ``[2, H, W]``, uint8: number of moves that change the label, and the other class, 255 for none.
        colors: RGB per class.

    Returns:
        RGB, shape ``[h, w, 3]``, uint8.
    """
    size = photo.shape[:2]
    shown, other = _nearest(labels, size), _nearest(band[1], size)
    grey = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
    faded = _overlay(np.round(130 + grey * (125 / 255)).astype(np.uint8), shown, colors, alpha=0.22, outline=0)
    marked = other != NO_TISSUE
    near = marked.copy()
    for shift in range(1, max(1, round(max(size) / 800)) + 1):
        near[shift:] |= marked[:-shift]
        near[:-shift] |= marked[shift:]
        near[:, shift:] |= marked[:, :-shift]
        near[:, :-shift] |= marked[:, shift:]
    # The line lies outside, so that a band one pixel wide keeps its colour; quiet colours need it to be seen.
    faded[near & ~marked] = BAND_LINE
    return np.where(marked[..., None], _flat(other, colors), faded)


def _flat(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels in plain class colours, no tissue light grey; ``[H, W, 3]`` uint8."""
    table = np.full((256, 3), NO_TISSUE_COLOR, dtype=np.uint8)
    table[: len(colors)] = colors
    return table[labels]


# ---- pieces of HTML ---------------------------------------------------------------------------------------------------


def _data_address(rgb: np.ndarray, longest: int, form: str = "JPEG") -> str:
    """``[H, W, 3]`` uint8 as a picture inside the page."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    if max(image.size) > longest:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 86} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(rgb: np.ndarray, title: str, explanation: str = "", scale: str = "", form: str = "JPEG") -> str:
    alt = f"{title}. {explanation}" if explanation else title
    return (
        f'<figure><img alt="{_text(alt)}" src="{_data_address(rgb, SIDE, form)}">{scale}'
        f"<figcaption><b>{_text(title)}</b>{_text(explanation)}</figcaption></figure>"
    )


def _scale(low: float, high: float, unit: str, colormap: str) -> str:
    colors = ",".join(f"rgb{color}".replace(" ", "") for color in COLORMAPS[colormap])
    marks = "".join(f"<b>{value:.3g}</b>" for value in (low, (low + high) / 2, high))
    return (
        f'<div class="scale"><i style="background:linear-gradient(90deg,{colors})"></i><span>{marks}</span>'
        f"{_text(unit)}; grey: no tissue</div>"
    )


def _rgb(color: Sequence[int]) -> str:
    return f"rgb({','.join(str(int(v)) for v in color)})"


def _swatch(color: Sequence[int]) -> str:
    return f'<span class="sw" style="background:{_rgb(color)}"></span>'


def _class(name: str, color: Sequence[int]) -> str:
    return f'<span class="name">{_swatch(color)}<span>{_text(name)}</span></span>'


def _legend(summary: Mapping[str, Any]) -> str:
    entries = "".join(f"<li>{_class(n, c)}</li>" for n, c in zip(summary["classes"], summary["colors"]))
    return f'<ul class="legend" aria-label="Colours of the classes">{entries}</ul>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", right: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns in ``right`` are aligned right."""

    def cells(tag: str, values: Sequence[str], scope: str = "") -> str:
        return "".join(f"<{tag}{scope}{' class=r' if i in right else ''}>{value}</{tag}>" for i, value in enumerate(values))

    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    heading = f"<thead><tr>{cells('th', head, ' scope=col')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{title}{heading}<tbody>{body}</tbody></table></div>'


def _bars(summary: Mapping[str, Any]) -> str:
    """Proportions per class as horizontal bars: given with whisker, network alone, refined."""
    proportions = summary["proportions"]
    spread = proportions.get("given_spread") or {}
    bounds = (summary.get("interval") or {}).get("bounds") or {}
    sources = [("given", "Given"), ("confidence", "Network alone"), ("refined", "Refined map")]
    blocks = []
    for name, color in zip(summary["classes"], summary["colors"]):
        lines = [f"<h3>{_class(name, color)}</h3>"]
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
            style = f"width:{width:.2f}%;background:{_rgb(color)};border-color:{_rgb(color)}"
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
        return f"<p class=note>No intervals: {_text(interval['reason'])}</p>"
    return (
        f"<p class=note>Ranges at <i>Network alone</i> hold the proportion of a class for {100 * interval['level']:g} % of "
        "images of new patients like those held out in calibration, each class by itself.</p>"
    )


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
        rows.append([_class(name, color), shown, meaning])
    table = _table(["Class", "Offset ψ", "What it did"], rows, right=(1,))
    return (
        f'{table}<p class="note">To bring the map to the given proportions, each class got one offset on the logarithm of its '
        "confidence, the same at every pixel. Large differences between offsets mean that the image and the given "
        "proportions disagree: look at such a case again.</p>"
    )


def _curve(values: Sequence[float]) -> str:
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
        ("Source", _text(summary["source"])),
        ("Kind", _text(summary["kind"])),
        ("Size of the input", _size(summary["level0_shape"] or summary["shape"], source_mpp)),
        ("Size of the maps", _size(summary["shape"], mpp)),
        ("Pixel size of the maps", "unknown" if mpp is None else f"{mpp:.4g} µm/px"),
        ("Tissue", "unknown" if tissue is None else f"{_percent(tissue)} of the area"),
        ("Solver", _text(f"{status}: {summary['reason'] or 'no reason given'}")),
        ("Refined against given proportions", "none given" if left is None else f"{_percent(left)} of the tissue apart"),
        ("Residual of the solver", "none: no proportions were given" if residual is None else f"{residual:.2e}"),
        ("Options", "<br>".join(map(_text, options)) or "none recorded"),
        ("Time", _text(", ".join(seconds) or "not recorded")),
        ("Versions", _text(", ".join(versions) or "not recorded")),
    ]
    return _table([], [(f"<b>{name}</b>", value) for name, value in rows])


# ---- one input --------------------------------------------------------------------------------------------------------


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
            f"Given proportions and network differ most for {_text(worst)}: given {_percent(given[worst])}, "
            f"seen by the network {_percent(found[worst])}. In all, {_percent(disagreement(summary))} of the tissue would have "
            "to change its class for the two to agree."
        )
    if summary["converged"]:
        status, warning = '<span class="status good">✓ Solver converged</span>', ""
    else:
        status = '<span class="status bad">! Solver did not converge</span>'
        reason = _text(summary["reason"] or "no reason given")
        warning = (
            f'<p class="warning">The refinement ended before it had converged ({reason}). Take the refined map as '
            "provisional.</p>"
        )
    return (
        f"<h1>{_text(summary['name'])}</h1><p>{status} <span class=soft>Tissue map from an image and its proportions. For "
        f"research, not for diagnosis.</span></p>{warning}<p>{lead}</p>{_legend(summary)}"
    )


def _maps(summary: Mapping[str, Any], folder: Path) -> str:
    """The input, the overlay, and the labels before and after refinement."""
    colors = summary["colors"]
    photo = _read_photo(folder / "thumbnail.jpg", SIDE)
    refined, first = (_read_map(folder / name, SIDE) for name in ("labels.tif", "labels_argmax.tif"))
    figures = []
    if photo is not None:
        figures.append(_figure(photo, "Input"))
        if refined is not None:
            figures.append(_figure(_overlay(photo, refined, colors), "Refined map over the input", "Lines mark the borders."))
    parts = [f'<div class="grid two">{"".join(figures)}</div>'] if figures else []
    if refined is not None and first is not None:
        first = _nearest(first, refined.shape)
        tissue = refined != NO_TISSUE
        by = "smooth borders" if summary["proportions"].get("given") is None else "the given proportions and smooth borders"
        changed = float(((first != refined) & tissue).sum() / max(int(tissue.sum()), 1))
        parts.append(
            "<h2>Before and after refinement</h2>"
            f"<p class=note>Refinement changed the class of {_percent(changed)} of the tissue.</p>"
            '<div class="grid two">'
            + _figure(_flat(first, colors), "Network alone", "The class that the network finds most probable.", form="PNG")
            + _figure(_flat(refined, colors), "Refined map", f"The same after refinement with {by}.", form="PNG")
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
        nothing = _nearest(labels, maps["total"].shape) == NO_TISSUE
        maps = {name: np.where(nothing, np.nan, values) for name, values in maps.items()}
    inside = maps["total"][np.isfinite(maps["total"])]
    low = min(float(np.nanmin(values)) for values in maps.values()) if inside.size else 0.0
    high = max(float(np.quantile(inside, 0.995)), 1e-3) if inside.size else 1.0
    low = low if low < -0.02 * high else 0.0  # entropy and the floor of the confidences push it slightly below 0
    draw, scale = EnergyPicture(low, high, "magma"), _scale(low, high, "nats", "magma")
    texts = {
        "fidelity": ("Fidelity", "How much the label contradicts what the network sees here."),
        "regularization": ("Regularization", "The price of borders: bright lines are where classes meet."),
        "total": ("Total", "The sum of both. Bright places are the doubtful ones."),
    }
    figures = "".join(_figure(np.moveaxis(draw(maps[name]), 0, -1), *text, scale) for name, text in texts.items())
    return f'<p class="note">All three maps share one colour scale.</p><div class="grid">{figures}</div>'


def _spread(folder: Path, energies: Mapping[str, np.ndarray], labels: np.ndarray | None) -> str:
    """Standard deviation between augmented views, where there were several."""
    stored = _read_map(folder / "spread.tif", SIDE)
    values = energies.get("spread") if stored is None else stored.astype(np.float32) / 255
    if values is None:
        return ""
    if labels is not None:
        values = np.where(_nearest(labels, values.shape) == NO_TISSUE, np.nan, values)
    inside = values[np.isfinite(values)]
    high = max(float(np.quantile(inside, 0.995)), 0.01) if inside.size else 1.0
    picture = np.moveaxis(EnergyPicture(0.0, high, "viridis")(values), 0, -1)
    figure = _figure(
        picture,
        "Spread between views",
        "The input was looked at turned, mirrored and shifted. Bright: the network's answer depended on the view.",
        _scale(0.0, high, "standard deviation of the confidence", "viridis"),
    )
    return f'<h2>How steady the network is</h2><div class="grid two">{figure}</div>'


def _band(summary: Mapping[str, Any], folder: Path, labels: np.ndarray | None) -> str:
    """What hangs on one rounding step of the proportions, where that was asked for."""
    band = summary.get("band")
    if band is None:
        return ""
    given, colors = summary["proportions"]["given"], dict(zip(summary["classes"], summary["colors"]))
    photo, figure = _read_photo(folder / "thumbnail.jpg", SIDE), ""
    if photo is not None and labels is not None and (folder / BAND_MAP).exists():
        figure = _figure(
            band_picture(photo, labels, read_map_tiff(folder / BAND_MAP, SIDE), summary["colors"]),
            "What hangs on one step",
            "Full colour: the class that a pixel would become. Faded: it keeps its class.",
        )
    rows = [
        [_class(name, colors[name]), _percent(given[name]), *(_percent(area[key]) for key in ("map", "lower", "upper"))]
        for name, area in band["areas"].items()
    ]
    areas = _table(["Class", "Given", "In the map", "At least", "At most"], rows, "Share of the tissue", right=(1, 2, 3, 4))
    largest = sorted(band["moves"], key=lambda move: -move["flipped"])[:BAND_MOVES]
    rows = [
        [_class(m["from"], colors[m["from"]]), _class(m["to"], colors[m["to"]]), _percent(m["amount"]), _percent(m["flipped"])]
        for m in largest
    ]
    caption = (
        "Every step"
        if len(largest) == len(band["moves"])
        else f"The {len(largest)} of {len(band['moves'])} steps with most effect"
    )
    moves = _table(["From", "To", "Moved", "Tissue that changes class"], rows, caption, right=(2, 3))
    warning = "" if band["converged"] else (
        '<p class="warning">Not every one of these refinements converged, so some pixels may be marked for that reason.</p>'
    )  # fmt: skip
    return (
        "<h2>What hangs on one rounding step</h2>"
        f"<p class=note>The given proportions were moved by {_percent(band['step'])} of the tissue from each class to each "
        "other one, as someone who rounds could have given them, and the map was refined anew. "
        f"<b>{_percent(band['flipped'])}</b> of the tissue changes its class in at least one of these {len(band['moves'])} "
        f'maps; the rest keeps it in all of them.</p>{warning}<div class="grid two">{figure}<div>{areas}{moves}</div></div>'
    )


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of one segmented input.

    Args:
        folder: holds ``summary.json`` and, where they were made, ``thumbnail.jpg``, ``labels.tif``, ``labels_argmax.tif``,
            ``energies.npz``, ``spread.tif`` and ``band.tif``; what is absent is left out. Maps of slides are read reduced.

    Returns:
        Path of the report, a file that needs no other file and no network.

    Raises:
        InputError: ``summary.json`` is missing or damaged.
        ImageReadError: a map or picture is there but cannot be read.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    energies = _read_energies(folder / "energies.npz")
    labels = _read_map(folder / "labels.tif", SIDE)
    body = (
        f"{_opening(summary)}{_maps(summary, folder)}<h2>Proportions</h2>{_bars(summary)}"
        f"<h2>Why a pixel got its class</h2>{_energies(energies, labels)}{_spread(folder, energies, labels)}"
        f"<h2>What the given proportions did</h2>{_offsets(summary)}{_band(summary, folder, labels)}"
        f"<h2>How the solution was found</h2>{_curve(summary['energies'])}<h2>Details</h2>{_facts(summary)}"
    )
    return write_text(folder / REPORT_NAME, _page(f"{summary['name']} – tissue map", body))


# ---- all inputs -------------------------------------------------------------------------------------------------------


def _card(folder: Path, summary: Mapping[str, Any]) -> str:
    """One input in the index."""
    proportions = summary["proportions"]
    photo, labels = _read_photo(folder / "thumbnail.jpg", INDEX_SIDE), _read_map(folder / "labels.tif", INDEX_SIDE)
    pictures = [] if photo is None else [(photo, "input")]
    if labels is not None:
        drawn = _flat(labels, summary["colors"]) if photo is None else _overlay(photo, labels, summary["colors"])
        pictures.append((drawn, "refined map"))
    images = "".join(
        f'<img alt="{_text(summary["name"])}: {what}" src="{_data_address(picture, INDEX_SIDE)}">' for picture, what in pictures
    )
    title = _text(summary["name"])
    if (folder / REPORT_NAME).exists():
        title = f'<a href="{quote(folder.name)}/{REPORT_NAME}">{title}</a>'
    difference = disagreement(summary)
    status = "" if summary["converged"] else ', <b class="bad">solver not converged</b>'
    columns = [proportions.get(key) or {} for key in ("given", "confidence", "refined")]
    percents = [[None if values.get(name) is None else 100 * values[name] for values in columns] for name in summary["classes"]]
    rows = [
        [_class(name, color), *("–" if value is None else f"{value:.1f}" for value in values)]
        for name, color, values in zip(summary["classes"], summary["colors"], percents)
    ]
    words = "No proportions given" if difference is None else f"Given and network differ by <b>{_percent(difference)}</b>"
    return (
        f'<article><div class="pair">{images}</div><h3>{title}</h3><p class=note>{words}{status}</p>'
        f"{_table(['Class, %', 'Given', 'Network', 'Refined'], rows, right=(1, 2, 3))}</article>"
    )


def _score(value: float | None, percent: bool = False) -> str:
    return "–" if value is None else (_percent(value) if percent else f"{value:.3f}")


def _evaluation(path: Path) -> str:
    """Tables of ``evaluation.json``, where it is there."""
    if not path.exists():
        return ""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        tables = []
        for block in result["blocks"]:
            rows = [
                [
                    _text(row["map"]),
                    _score(row["miou"]),
                    _score(row["mdice"]),
                    _score(row["accuracy"]),
                    _score(row["proportion_error"], percent=True),
                    *(_score(row["iou"][name]) for name in block["classes"]),
                ]
                for row in block["rows"]
            ]
            head = [
                "Map",
                "Mean IoU",
                "Mean Dice",
                "Accuracy",
                "Proportion error",
                *(f"IoU {_text(name)}" for name in block["classes"]),
            ]
            tables.append(_table(head, rows, block["name"], right=range(1, len(head))))
        number = len(result["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); evaluate again to have its scores in the report.", path, error)
        return f'<h2>Evaluation against masks</h2><p class="warning">{_text(path.name)} cannot be read; evaluate again.</p>'
    return (
        f"<h2>Evaluation against masks</h2><p class=note>{number} images, scores from their summed pixels.</p>{''.join(tables)}"
    )


def write_index(out_folder: str | Path) -> Path:
    """Write ``report.html`` over all segmented inputs of a folder, largest disagreement first.

    Args:
        out_folder: holds one folder per input, each with ``summary.json``, and ``evaluation.json`` if there was an
            evaluation. Inputs that cannot be read are listed as such.

    Returns:
        Path of the index.

    Raises:
        InputError: there is no segmented input.
    """
    out_folder = Path(out_folder)
    folders = sorted(path.parent for path in out_folder.glob(f"*/{SUMMARY_NAME}"))
    if not folders:
        raise InputError(f"{out_folder} holds no */{SUMMARY_NAME}; give the output folder of 'monai-vslp segment'.")
    cards, failed = [], []
    for folder in folders:
        try:
            summary = read_summary(folder)
            difference = disagreement(summary)
            cards.append((math.inf if difference is None else -difference, folder.name, _card(folder, summary)))
        except InputError as error:
            logger.warning("%s is not in the index: %s", folder, error)
            failed.append(f"<li><b>{_text(folder.name)}</b>: {_text(error)}</li>")
    cards.sort(key=lambda card: card[:2])
    problems = f'<div class="warning"><b>Could not be read</b><ul>{"".join(failed)}</ul></div>' if failed else ""
    body = (
        f"<h1>Tissue maps</h1><p class=soft>{len(cards)} inputs, for research, not for diagnosis. Those in which the given "
        f"proportions and the network differ most come first.</p>{problems}{_evaluation(out_folder / 'evaluation.json')}"
        f'<h2>Inputs</h2><div class="grid cards">{"".join(card[2] for card in cards)}</div>'
    )
    return write_text(out_folder / REPORT_NAME, _page("Tissue maps", body))
