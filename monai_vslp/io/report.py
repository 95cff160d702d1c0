"""Self-contained HTML reports: what was found, and why a pixel got its label."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.ome_tiff import read_map_tiff
from monai_vslp.transforms.overlay import EnergyPicture, LabelOverlay
from monai_vslp.utils.atomic import write_text

__all__ = ["write_index", "write_report"]

Image, _ = optional_import("PIL.Image")

SIDE = 1600  # px, longer side of pictures in a report
_STYLE = """
:root{color-scheme:light;--ink:#1c2733;--soft:#5b6b7b;--line:#d9e0e7;--back:#f6f8fa}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px}h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.15rem;margin:1.6em 0 .5em}
p.lead,.note{color:var(--soft)}.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:8px;padding:10px}
figure img{display:block;width:100%;max-height:640px;object-fit:contain;background:#fff}figcaption{font-size:.9rem;padding-top:6px}
.legend span{display:inline-flex;align-items:center;margin-right:16px}.legend i,.sw{display:inline-block;width:14px;height:14px;
border-radius:3px;margin-right:6px}.bars{background:#fff;border:1px solid var(--line);border-radius:8px;padding:14px}
.bar{display:grid;grid-template-columns:150px 1fr 64px;gap:8px;align-items:center;font-size:.9rem;margin:2px 0}
.bar .track{position:relative;height:14px;background:#eef2f5;border-radius:3px}.bar .fill{height:14px;border-radius:3px}
.bar .whisker{position:absolute;top:5px;height:4px;background:var(--ink);opacity:.65;border-radius:2px}
.bar .num{text-align:right;font-variant-numeric:tabular-nums}.class{margin-bottom:12px}.class b{font-weight:600}
table{border-collapse:collapse;background:#fff;font-size:.92rem}td,th{border:1px solid var(--line);padding:5px 10px;text-align:left;
vertical-align:top}td.r{text-align:right;font-variant-numeric:tabular-nums}.ok{color:#08703f}.warn{color:#a33b00}
.scale{display:flex;align-items:center;gap:8px;font-size:.8rem;color:var(--soft);margin-top:4px}.scale i{flex:1;height:10px;
background:linear-gradient(90deg,#000004,#280b54,#65156e,#9f2a63,#d44842,#f57d15,#fac127,#fcffa4);border-radius:2px}
@media print{body{background:#fff}figure,.bars{break-inside:avoid}}
"""


def _picture(rgb: np.ndarray) -> str:
    """``[h, w, 3]`` uint8 as a JPEG data address, at most ``SIDE`` px long."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )


def _figure(rgb: np.ndarray, caption: str, scale: tuple[float, float] | None = None) -> str:
    bar = "" if scale is None else f'<div class="scale">{scale[0]:.2f}<i></i>{scale[1]:.2f} nats</div>'
    return f'<figure><img alt="{html.escape(caption)}" src="{_picture(rgb)}">{bar}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _rgb(color: Sequence[int]) -> str:
    return f"rgb({','.join(str(int(v)) for v in color)})"


def _overlay(thumbnail: np.ndarray, labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    rows = (np.arange(thumbnail.shape[0]) * labels.shape[0] // thumbnail.shape[0]).clip(max=labels.shape[0] - 1)
    columns = (np.arange(thumbnail.shape[1]) * labels.shape[1] // thumbnail.shape[1]).clip(max=labels.shape[1] - 1)
    drawn = LabelOverlay(colors, alpha=0.42)(np.moveaxis(thumbnail, -1, 0), labels[rows][:, columns][None])
    return np.moveaxis(drawn, 0, -1)


def _bars(summary: Mapping[str, Any]) -> str:
    rows = []
    sources = [("given", "given"), ("confidence", "before refinement"), ("refined", "after refinement")]
    spread = summary["proportions"].get("given_spread") or {}
    for name, color in zip(summary["classes"], summary["colors"]):
        lines = [f'<div class="class"><b><span class="sw" style="background:{_rgb(color)}"></span>{html.escape(name)}</b>']
        for key, label in sources:
            values = summary["proportions"].get(key)
            if values is None:
                continue
            value = 100 * (values[name] or 0.0)
            opacity = {"given": 1.0, "confidence": 0.45, "refined": 0.75}[key]
            sd = 100 * (spread.get(name) or 0.0)
            whisker = ""
            if key == "given" and sd > 0:
                left, right = max(value - sd, 0), min(value + sd, 100)
                whisker = f'<div class="whisker" style="left:{left:.1f}%;width:{right - left:.1f}%"></div>'
            lines.append(
                f'<div class="bar"><span>{label}</span><div class="track"><div class="fill" style="width:{value:.2f}%;'
                f'background:{_rgb(color)};opacity:{opacity}"></div>{whisker}</div><span class="num">{value:.1f} %</span></div>'
            )
        rows.append("".join(lines) + "</div>")
    return f'<div class="bars">{"".join(rows)}</div>'


def _curve(energies: Sequence[float]) -> str:
    if len(energies) < 2:
        return '<p class="note">One step: without regularizer the minimum is known in closed form.</p>'
    low, high = min(energies), max(energies)
    span = max(high - low, 1e-12)
    points = " ".join(
        f"{60 + 520 * i / (len(energies) - 1):.1f},{20 + 130 * (high - e) / span:.1f}" for i, e in enumerate(energies)
    )
    return (
        '<figure><svg viewBox="0 0 600 190" role="img" aria-label="energy after each step" style="width:100%;max-width:640px">'
        '<line x1="60" y1="155" x2="585" y2="155" stroke="#9aa7b4"/><line x1="60" y1="15" x2="60" y2="155" stroke="#9aa7b4"/>'
        f'<polyline points="{points}" fill="none" stroke="#0072b2" stroke-width="2.5"/>'
        f'<text x="55" y="25" text-anchor="end" font-size="12">{high:.3f}</text>'
        f'<text x="55" y="155" text-anchor="end" font-size="12">{low:.3f}</text>'
        f'<text x="60" y="175" font-size="12">step 0</text><text x="585" y="175" text-anchor="end" font-size="12">step '
        f"{len(energies) - 1}</text></svg><figcaption>Energy after each step (nats per unit of tissue); it never rises.</figcaption></figure>"
    )


def _facts(summary: Mapping[str, Any]) -> str:
    residual = summary["residual"]
    rows = [
        ("Source", summary["source"]),
        (
            "Size",
            f"{summary['level0_shape'][1]} × {summary['level0_shape'][0]} px, maps {summary['shape'][1]} × {summary['shape'][0]} px",
        ),
        ("Pixel size of the maps", "unknown" if summary["mpp"] is None else f"{summary['mpp']:.3f} µm"),
        ("Tissue", f"{100 * summary['tissue_fraction']:.1f} % of the area"),
        ("Refinement", ("converged: " if summary["converged"] else "stopped early: ") + str(summary["reason"])),
        ("Off the given proportions", "none given" if residual is None else f"{residual:.1e} (numerical residual)"),
        ("Options", json.dumps(summary["options"], ensure_ascii=False)),
        ("Time", ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())),
        ("Version", f"monai_vslp {summary['version']}"),
    ]
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _offsets(summary: Mapping[str, Any]) -> str:
    if summary["psi"] is None:
        return '<p class="note">No proportions were given, so no class was favoured: the map rests on the image alone.</p>'
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=r>{'does not occur' if value is None else f'{value:+.3f}'}</td></tr>"
        for name, value in summary["psi"].items()
    )
    return (
        f"<table><tr><th>class</th><th>offset ψ</th></tr>{cells}</table>"
        '<p class="note">To meet the given proportions each class got this offset on its log-confidence: plus where the image '
        "alone shows too little of it, minus where too much. Large offsets mean that image and report disagree.</p>"
    )


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of one segmented input; it needs no other file and no network.

    Args:
        folder: holds ``summary.json``, ``thumbnail.jpg``, ``labels.tif``, ``labels_argmax.tif`` and ``energies.npz``.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    thumbnail = np.asarray(Image.open(folder / "thumbnail.jpg").convert("RGB"))
    longest = max(thumbnail.shape[:2])
    refined = _overlay(thumbnail, read_map_tiff(folder / "labels.tif", longest), summary["colors"])
    first = _overlay(thumbnail, read_map_tiff(folder / "labels_argmax.tif", longest), summary["colors"])
    with np.load(folder / "energies.npz") as maps:
        energies = {name: maps[name].astype(np.float32) for name in maps.files}
    energies["total"] = energies["fidelity"] + energies["regularization"]
    high = float(np.nanquantile(energies["total"], 0.995)) if np.isfinite(energies["total"]).any() else 1.0
    low = min(0.0, float(np.nanmin(energies["total"]))) if np.isfinite(energies["total"]).any() else 0.0
    draw = EnergyPicture(low, high)
    explained = [
        ("fidelity", "Fidelity: how strongly the image contradicts the label"),
        ("regularization", "Regularization: the price of boundaries"),
        ("total", "Total: bright pixels are the doubtful ones"),
    ]
    energy_figures = "".join(
        _figure(np.moveaxis(draw(energies[name]), 0, -1), caption, (low, high)) for name, caption in explained
    )
    spread = ""
    if "spread" in energies:
        picture = np.moveaxis(EnergyPicture(0.0)(energies["spread"]), 0, -1)
        spread = (
            '<h2>Agreement of the views</h2><div class="grid">'
            + _figure(picture, "Standard deviation between augmented views; bright: the network wavers")
            + "</div>"
        )
    legend = "".join(
        f'<span><i style="background:{_rgb(color)}"></i>{html.escape(name)}</span>'
        for name, color in zip(summary["classes"], summary["colors"])
    )
    status = (
        '<b class="ok">converged</b>'
        if summary["converged"]
        else f'<b class="warn">not converged</b> ({html.escape(summary["reason"])})'
    )
    body = (
        f"<h1>{html.escape(summary['name'])}</h1><p class=lead>Tissue map from proportions; refinement {status}. "
        f'Research use only, not for diagnosis.</p><p class="legend">{legend}</p><div class="grid">'
        + _figure(thumbnail, "Input")
        + _figure(refined, "Refined segmentation")
        + _figure(first, "Network alone, before refinement")
        + f"</div><h2>Proportions</h2>{_bars(summary)}<h2>Why a pixel got its label</h2>"
        '<p class="note">All three maps share one scale.</p>'
        f'<div class="grid">{energy_figures}</div>{spread}<h2>Class offsets</h2>{_offsets(summary)}'
        f"<h2>Convergence</h2>{_curve(summary['energies'])}<h2>Facts</h2>{_facts(summary)}"
    )
    return write_text(folder / "report.html", _page(summary["name"], body))


def _disagreement(summary: Mapping[str, Any]) -> float | None:
    given, found = summary["proportions"]["given"], summary["proportions"]["confidence"]
    return None if given is None else 0.5 * sum(abs(given[name] - found[name]) for name in given)


COLUMNS = ("given", "confidence", "refined")


def _cell(values: Mapping[str, float] | None, name: str) -> str:
    return f"<td class=r>{'–' if values is None else format(100 * (values[name] or 0.0), '.1f')}</td>"


def write_index(output: str | Path) -> Path:
    """Write ``report.html`` over all segmented inputs in ``output``, largest disagreement first.

    Returns:
        Path of the index.
    """
    output = Path(output)
    summaries = []
    for path in sorted(output.glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        summaries.append((_disagreement(summary), path.parent.name, summary))
    summaries.sort(key=lambda entry: (-(entry[0] if entry[0] is not None else -1), entry[1]))
    rows = []
    for disagreement, stem, summary in summaries:
        image = Image.open(output / stem / "thumbnail.jpg").convert("RGB")
        image.thumbnail((220, 220))
        link = html.escape(stem) + "/report.html"
        proportions = summary["proportions"]
        shares = "".join(
            f"<tr><td>{html.escape(name)}</td>" + "".join(_cell(proportions[key], name) for key in COLUMNS) + "</tr>"
            for name in summary["classes"]
        )
        rows.append(
            f'<tr><td><a href="{link}"><img alt="{html.escape(stem)}" width="180" src="{_picture(np.asarray(image))}"></a></td>'
            f'<td><a href="{link}">{html.escape(stem)}</a><br><span class="note">'
            + (
                "no proportions given"
                if disagreement is None
                else f"image and report differ by {100 * disagreement:.1f} points"
            )
            + f"</span></td><td><table><tr><th>class</th><th>given %</th><th>network %</th><th>refined %</th></tr>{shares}</table></td></tr>"
        )
    scores = ""
    if (output / "evaluation.txt").exists():
        text = html.escape((output / "evaluation.txt").read_text(encoding="utf-8"))
        scores = f"<h2>Evaluation against masks</h2><pre>{text}</pre>"
    body = (
        f"<h1>Segmentations</h1><p class=lead>{len(summaries)} inputs; those in which network and report differ most come first."
        f"</p>{scores}<h2>Inputs</h2><table>{''.join(rows)}</table>"
    )
    return write_text(output / "report.html", _page("Segmentations", body))
