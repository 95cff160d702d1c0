"""Tables of proportions."""

from __future__ import annotations

import csv
import json

import pytest

from monai_vslp.io.summary import build_summary
from monai_vslp.io.table import COLUMNS, proportion_rows, write_proportions
from monai_vslp.utils.errors import InputError

CLASSES = ["gland, large", "stroma"]
FIELDS = {
    "name": "a",
    "kind": "image",
    "source": "a.png",
    "classes": CLASSES,
    "colors": [[1, 2, 3], [4, 5, 6]],
    "shape": (1000, 2000),
    "confidence": [0.35, 0.65],
    "refined": [0.3, 0.7],
    "labels": [0.25, 0.75],
    "given": [0.3, 0.7],
    "given_spread": [0.05, 0.05],
    "tissue_fraction": 0.5,
    "mpp": 2.0,
}
REGION = {"name": "core ä1", "given": [1.0, 0.0], "refined": [0.9, 0.1], "labels": [0.8, 0.2], "tissue_fraction": 0.1}
CALIBRATION = {"interval": {"level": 0.9, "half_width": {CLASSES[0]: 0.4, CLASSES[1]: 0.1}, "reason": ""}}


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_classes_of_the_whole_and_of_regions(tmp_path):
    summary = build_summary(**FIELDS, regions=[REGION], options={"calibration": CALIBRATION})
    paths = write_proportions(tmp_path, summary)
    assert [path.name for path in paths] == ["proportions.csv", "proportions.json"]
    rows = read(paths[0])
    assert [(row["region"], row["class"]) for row in rows] == [(r, c) for r in ("", "core ä1") for c in CLASSES]
    first, region = rows[0], rows[2]
    assert tuple(first) == COLUMNS
    assert (first["given"], first["given_spread"], first["network"], first["refined"]) == ("0.3", "0.05", "0.35", "0.3")
    assert (float(first["lower"]), float(first["upper"]), float(first["level"])) == (0.0, 0.75, 0.9)  # around the network's
    # 1000 x 2000 px of 4 µm², half of it tissue, a quarter of that with this label
    assert float(first["area_mm2"]) == pytest.approx(2e6 * 4e-6 * 0.5 * 0.25)
    assert float(region["area_mm2"]) == pytest.approx(2e6 * 4e-6 * 0.1 * 0.8)
    assert region["given"] == "1" and region["network"] == region["lower"] == region["given_spread"] == ""
    data = json.loads(paths[1].read_text(encoding="utf-8"))
    assert data["name"] == "a" and data["columns"] == list(COLUMNS) and data["rows"] == proportion_rows(summary)
    assert data["rows"][2]["network"] is None


def test_areas_of_all_rows_add_up_to_the_tissue():
    rows = proportion_rows(build_summary(**FIELDS))
    assert sum(row["area_mm2"] for row in rows) == pytest.approx(1000 * 2000 * 0.5 * 2.0**2 / 1e6)


def test_what_is_not_known_is_empty(tmp_path):
    without = FIELDS | {"given": None, "given_spread": None, "mpp": None, "kind": "slide"}
    rows = read(write_proportions(tmp_path, build_summary(**without, options={"calibration": CALIBRATION}))[0])
    assert len(rows) == 2
    for row in rows:
        assert row["given"] == row["given_spread"] == row["area_mm2"] == ""
        assert row["lower"] == row["level"] == ""  # intervals are measured on images


def test_same_summary_gives_same_bytes(tmp_path):
    summary = build_summary(**FIELDS, regions=[REGION])
    first, second = (write_proportions(tmp_path / name, summary) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    "regions",
    [[{"given": [0.5, 0.5]}], [{"name": ""}], [{"name": "x", "typo": 1}], [{"name": "x", "given": [1.0]}], [REGION, REGION]],
)
def test_wrong_regions_are_refused(regions):
    with pytest.raises(InputError, match="region"):
        build_summary(**FIELDS, regions=regions)
