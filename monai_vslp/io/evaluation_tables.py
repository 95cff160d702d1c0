"""Scores of an evaluation as tables of the report over a cohort."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from monai_vslp.io.report_style import escape, html_table, percent

__all__ = ["evaluation_section"]

logger = logging.getLogger(__name__)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def evaluation_section(path: Path) -> str:
    """HTML of ``evaluation.json``; empty where there is no such file."""
    if not path.exists():
        return ""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        tables = []
        for block in result["blocks"]:
            rows = [
                [
                    escape(row["map"]),
                    _score(row["miou"]),
                    _score(row["mdice"]),
                    _score(row["accuracy"]),
                    percent(row["proportion_error"]),
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
                *(f"IoU {escape(name)}" for name in block["classes"]),
            ]
            tables.append(html_table(head, rows, block["name"], right=range(1, len(head))))
        number = len(result["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); evaluate again to have its scores in the report.", path, error)
        return f'<h2>Evaluation against masks</h2><p class="warning">{escape(path.name)} cannot be read; evaluate again.</p>'
    return (
        f"<h2>Evaluation against masks</h2><p class=note>{number} images, scores from their summed pixels.</p>{''.join(tables)}"
    )
