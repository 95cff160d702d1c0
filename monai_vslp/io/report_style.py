"""How reports look: the page, its style, and the small pieces of HTML that all of them share."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_vslp.transforms.overlay import COLORMAPS

__all__ = [
    "INDEX_NAME",
    "REPORT_NAME",
    "asset",
    "class_name",
    "color_scale",
    "data_script",
    "escape",
    "html_page",
    "html_table",
    "legend",
    "percent",
    "rgb",
    "swatch",
]

REPORT_NAME = "report.html"
INDEX_NAME = "index.html"
ASSETS = Path(__file__).parent / "assets"  # style sheets and scripts that are copied into pages


def asset(name: str) -> str:
    """Text of a style sheet or script of the package."""
    return (ASSETS / name).read_text(encoding="utf-8")


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def data_script(identity: str, value: Any) -> str:
    """JSON for a script of the page; nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'


def html_page(title: str, body: str, styles: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        styles: names of style sheets of the package beside ``report.css``.
    """
    style = "".join(map(asset, ("report.css", *styles)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def rgb(color: Sequence[int]) -> str:
    return f"rgb({','.join(str(int(v)) for v in color)})"


def swatch(color: Sequence[int]) -> str:
    return f'<span class="sw" style="background:{rgb(color)}"></span>'


def class_name(name: str, color: Sequence[int]) -> str:
    return f'<span class="name">{swatch(color)}<span>{escape(name)}</span></span>'


def legend(summary: Mapping[str, Any]) -> str:
    entries = "".join(f"<li>{class_name(n, c)}</li>" for n, c in zip(summary["classes"], summary["colors"]))
    return f'<ul class="legend" aria-label="Colours of the classes">{entries}</ul>'


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    right: Sequence[int] = (),
    keys: Sequence[Sequence[Any]] | None = None,
) -> str:
    """A table of cells that are HTML already.

    Args:
        head: headings, may be empty.
        rows: cells.
        caption: plain text.
        right: columns that are aligned right.
        keys: what each cell is sorted by (None: not known); ``table.js`` then makes the headings buttons.
    """

    def cells(tag: str, values: Sequence[str], sorted_by: Sequence[Any] | None = None) -> str:
        parts = []
        for i, value in enumerate(values):
            attributes = " scope=col" if tag == "th" else ""
            attributes += " class=r" if i in right else ""
            attributes += "" if sorted_by is None else f' data-value="{"" if sorted_by[i] is None else escape(sorted_by[i])}"'
            parts.append(f"<{tag}{attributes}>{value}</{tag}>")
        return "".join(parts)

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    heading = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells('td', row, None if keys is None else keys[i])}</tr>" for i, row in enumerate(rows))
    kind = "" if keys is None else ' class="sortable"'
    return f'<div class="scroll"><table{kind}>{title}{heading}<tbody>{body}</tbody></table></div>'


def color_scale(low: float, high: float, unit: str, colormap: str, nothing: str = "grey") -> str:
    """A bar of a colormap with its ends and middle; ``nothing`` says how pixels without tissue look."""
    colors = ",".join(f"rgb{color}".replace(" ", "") for color in COLORMAPS[colormap])
    marks = "".join(f"<b>{value:.3g}</b>" for value in (low, (low + high) / 2, high))
    return (
        f'<div class="scale"><i style="background:linear-gradient(90deg,{colors})"></i><span>{marks}</span>'
        f"{escape(unit)}; {escape(nothing)}: no tissue</div>"
    )
