"""Proportions of one image or slide as a table, for spreadsheets and programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_vslp.utils.atomic import write_json, write_text

__all__ = ["COLUMNS", "TABLE_NAMES", "proportion_rows", "write_proportions"]

TABLE_NAMES = ("proportions.csv", "proportions.json")
COLUMNS = (
    "region", "class", "given", "given_spread", "network", "refined", "labels", "lower", "upper", "level", "area_mm2",
)  # fmt: skip


def proportion_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per class, for the whole first and then for each region.

    ================ =====================================================================================================
    ``region``       name of the region, empty for the whole
    ``class``        name of the class
    ``given``        proportion that was given, a fraction of the tissue, as are all that follow
    ``given_spread`` standard deviation between raters
    ``network``      mean of the first stage over the tissue
    ``refined``      mean of the refined map over the tissue
    ``labels``       area of the labels
    ``lower``        lower bound of the interval around ``network``, from calibration
    ``upper``        upper bound
    ``level``        probability with which such intervals hold the true proportion of a new patient's image
    ``area_mm2``     area of the labels, mm²
    ================ =====================================================================================================

    Args:
        summary: as :func:`~monai_vslp.io.summary.build_summary` makes it.

    Returns:
        Dictionaries by column; None for what is not known: spread, network and bounds are known for the whole only, areas
        where the size of pixels is known.
    """
    proportions = summary["proportions"]
    interval = summary.get("interval") or {}
    bounds = interval.get("bounds") or {}
    mpp, (height, width) = summary["mpp"], summary["shape"]
    whole = None if mpp is None else height * width * mpp**2 / 1e6  # mm²

    def cell(values: Mapping[str, float | None] | None, name: str) -> float | None:
        return None if values is None else values.get(name)

    def area(share: float | None, tissue: float | None) -> float | None:
        return None if None in (share, tissue, whole) else share * tissue * whole

    rows = []
    for name in summary["classes"]:
        low, high = bounds.get(name) or (None, None)
        rows.append(
            {
                "region": "",
                "class": name,
                "given": cell(proportions.get("given"), name),
                "given_spread": cell(proportions.get("given_spread"), name),
                "network": cell(proportions["confidence"], name),
                "refined": cell(proportions["refined"], name),
                "labels": cell(proportions["labels"], name),
                "lower": low,
                "upper": high,
                "level": None if low is None else interval["level"],
                "area_mm2": area(cell(proportions["labels"], name), summary["tissue_fraction"]),
            }
        )
    for region in summary["regions"]:
        for name in summary["classes"]:
            known = {key: cell(region.get(key), name) for key in ("given", "refined", "labels")}
            known["area_mm2"] = area(known["labels"], region.get("tissue_fraction"))
            rows.append(dict.fromkeys(COLUMNS) | {"region": region["name"], "class": name} | known)
    return rows


def write_proportions(folder: str | Path, summary: Mapping[str, Any]) -> list[Path]:
    """Write ``proportions.csv`` (UTF-8, commas, empty cells for what is not known) and ``proportions.json`` (an object with
    ``name``, ``columns`` and ``rows``), atomically.

    Args:
        folder: of the outputs.
        summary: as for :func:`proportion_rows`.

    Returns:
        Paths of both.
    """
    rows = proportion_rows(summary)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = (row[column] for column in COLUMNS)
        writer.writerow(["" if v is None else format(v, ".9g") if isinstance(v, float) else v for v in cells])
    table, data = (Path(folder) / name for name in TABLE_NAMES)
    write_text(table, text.getvalue())
    write_json(data, {"name": summary["name"], "columns": list(COLUMNS), "rows": rows})
    return [table, data]
