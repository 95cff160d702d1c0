"""Figures of the calibration report by hand."""

import numpy as np
import pytest

from monai_vslp.io.calibration_report import calibration_line, write_calibration_report
from monai_vslp.utils.errors import InputError

RESULT = {
    "temperature": 1.5,
    "offset": {"a": 0.1, "b|c": -0.1},
    "variant": "temperature",
    "reason": "Because.",
    "errors": {"none": 0.1, "temperature": 0.05},
    "temperatures": {"temperature": {"value": 1.5, "log_error": np.log(1.25)}},
    "interval": {"level": 0.8, "half_width": {"a": 0.12, "b|c": 0.08}, "reason": "", "patients": 4, "images": 4},
    "site": None,
    "counts": {"images": 4, "patients": 4, "unnamed": 1},
    "selected": True,
    "views": "none",
}
GIVEN = np.array([[0.2, 0.8], [0.4, 0.6], [0.6, 0.4], [0.7, 0.3]])


def test_the_line():
    predicted = np.array([0.1, 0.4, 0.5, 0.9])
    assert calibration_line(0.5 * predicted + 0.2, predicted) == pytest.approx((0.5, 0.2))
    given = np.array([0.3, 0.1, 0.7, 0.6])
    assert calibration_line(given, predicted) == pytest.approx(tuple(np.polyfit(predicted, given, 1)))
    assert calibration_line(given, np.full(4, 0.3)) is None


def test_the_report(tmp_path):
    before, after = GIVEN + [0.1, -0.1], GIVEN + [[0.0, 0.0], [0.0, 0.0], [0.05, -0.05], [0.0, 0.0]]
    path = write_calibration_report(
        tmp_path, RESULT, ["w.png", "x.png", "y.png", "z.png"], ["p", "p", "q", ""], GIVEN, {"before": before, "after": after}
    )
    text = path.read_text()
    assert "| a | before | 10.0 | +10.0 | 1.00 | -10.0 |" in text
    assert "| b\\|c | after | 1.2 | -1.2 |" in text
    assert "| **temperature** | 5.0 | 1.5 | 1.25 |" in text and "| none | 10.0 | 1 | – |" in text
    assert "| a | 12.0 |" in text and "80 % of images" in text
    assert "| y.png | q | 5.0 | 60.0: 70.0 → 65.0 | 40.0: 30.0 → 35.0 |" in text
    assert text.index("| y.png") < text.index("| w.png")
    assert "name no patient (1)" in text and "chose the best pass" in text
    assert (tmp_path / "calibration.png").stat().st_size > 5000


def test_a_report_without_fit_has_no_after(tmp_path):
    result = RESULT | {
        "variant": "none",
        "selected": False,
        "interval": RESULT["interval"] | {"half_width": None, "reason": "Few."},
    }
    names, shifted = ["w.png", "x.png", "y.png", "z.png"], GIVEN + [0.1, -0.1]
    text = write_calibration_report(tmp_path, result, names, [""] * 4, GIVEN, {"before": shifted, "after": shifted}).read_text()
    assert "after" not in text.lower() and "→" not in text and "None: Few." in text and "chose the best pass" not in text
    assert "| w.png |  | 10.0 | 20.0: 30.0 | 80.0: 70.0 |" in text


def test_shapes(tmp_path):
    with pytest.raises(InputError, match="shape"):
        write_calibration_report(tmp_path, RESULT, ["w.png"], ["p"], GIVEN, {"before": GIVEN, "after": GIVEN})
    assert not list(tmp_path.iterdir())
