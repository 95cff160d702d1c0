"""The viewer's part of a report: its controls, its description of the tiles, and its script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai_vslp.io.report_style import asset, color_scale, data_script, escape, swatch
from monai_vslp.io.viewer import VIEWER_FOLDER

__all__ = ["VIEWER_STYLE", "viewer_section"]

VIEWER_STYLE = "viewer.css"
LABELS_OPACITY, VALUES_OPACITY = 50, 85  # percent, where the slider begins
BUTTONS = (
    ("in", "Zoom in", "+"),
    ("out", "Zoom out", "−"),
    ("reset", "Show everything", "Reset"),
    ("full", "Fill the screen", "Full screen"),
)


def _choice(key: str, title: str, checked: bool) -> str:
    mark = " checked" if checked else ""
    return (
        f'<label class="pill"><input type="radio" name="viewer-layer" value="{key}"{mark}><span>{escape(title)}</span></label>'
    )


def _keys(manifest: Mapping[str, Any], maps: Sequence[Mapping[str, Any]]) -> str:
    """A legend per map: switches of the classes, or a colour scale."""
    blocks = []
    if any(layer["kind"] == "labels" for layer in maps):
        switches = "".join(
            f'<label class="name"><input type="checkbox" value="{index}" checked>{swatch(color)}'
            f"<span>{escape(name)}</span></label>"
            for index, (name, color) in enumerate(zip(manifest["classes"], manifest["colors"]))
        )
        blocks.append(f'<fieldset class="classes" data-for="labels"><legend>Classes shown</legend>{switches}</fieldset>')
    for layer in maps:
        if layer["kind"] == "values":
            scale = color_scale(layer["low"], layer["high"], layer["unit"], layer["colormap"], "clear")
            blocks.append(f'<div data-for="{layer["key"]}" hidden>{scale}</div>')
    return "".join(blocks)


def _sizes(manifest: Mapping[str, Any]) -> str:
    """What one px of the finest tiles covers, and which layers were reduced for the viewer."""
    mpp, groups = manifest["mpp"], {}
    for layer in manifest["layers"]:
        scale = layer["levels"][0]["scale"]
        size = f"{scale:.3g} px of the input" if mpp is None else f"{scale * mpp:.3g} µm"
        size += "" if layer["reduced"] == 1 else f" ({layer['reduced']} px of the full map, which was reduced to stay small)"
        groups.setdefault(size, []).append(layer["title"])
    if len(groups) == 1:
        return f"One px of the finest tiles is {next(iter(groups))}"
    return "One px of the finest tiles is " + "; ".join(f"{size} for {', '.join(titles)}" for size, titles in groups.items())


def viewer_section(manifest: Mapping[str, Any]) -> str:
    """HTML of the viewer, for a page that lies beside the folder ``viewer``.

    Args:
        manifest: of :func:`~monai_vslp.io.viewer.read_viewer`.
    """
    maps = [layer for layer in manifest["layers"] if layer["kind"] != "image"]
    has_image = len(maps) < len(manifest["layers"])
    first = "labels" if any(layer["key"] == "labels" for layer in maps) else (maps[0]["key"] if maps else "")
    choices = [("none", "None")] if has_image and maps else []
    choices += [(layer["key"], layer["title"]) for layer in maps]
    radios = "".join(_choice(key, title, key == first) for key, title in choices)
    buttons = "".join(
        f'<button type="button" data-do="{do}" aria-label="{name}" title="{name}">{face}</button>' for do, name, face in BUTTONS
    )
    layers = f"<fieldset><legend>Map{' over the slide' if has_image else ''}</legend>{radios}</fieldset>" if maps else ""
    slider = (
        f'<label class="opacity">Opacity <input type="range" min="0" max="100" value="{LABELS_OPACITY}"></label>'
        if maps
        else ""
    )
    data = dict(manifest) | {"folder": VIEWER_FOLDER, "opacity": {"labels": LABELS_OPACITY, "values": VALUES_OPACITY}}
    return (
        '<section class="viewer" id="viewer" aria-labelledby="viewer-title"><h2 id="viewer-title">Look closer</h2>'
        '<noscript><p class="warning">This viewer needs JavaScript; the pictures below do not.</p></noscript>'
        f'<p class="warning lost" hidden>Tiles of this viewer are missing. Its folder <b>{VIEWER_FOLDER}</b> must lie beside '
        f'this page; copy both.</p><div class="tools">{layers}{slider}<div class="buttons">{buttons}</div></div>'
        '<div class="stage"><canvas tabindex="0" role="application" aria-label="Map to pan and zoom" '
        'aria-describedby="viewer-help"></canvas><div class="cross" aria-hidden="true"></div>'
        '<div class="bar-of-scale"><span></span><i></i></div></div>'
        '<div class="under"><output class="where" aria-live="polite"></output>'
        f'<a class="here" href="#viewer">Link to this view</a></div>{_keys(manifest, maps)}'
        '<p class="note" id="viewer-help">Drag to move, wheel or pinch to zoom, or click the map and '
        "use the arrow keys, + and −, and 0 for everything; the cross then marks the place that is described. "
        f"{escape(_sizes(manifest))}.</p></section>"
        f"{data_script('viewer-data', data)}<script>\n{asset('viewer.js')}</script>"
    )
