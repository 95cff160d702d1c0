"""The programs in examples/, run as their pages say, on little data."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from cases import write_two_class_cohort
from PIL import Image

from monai_vslp.io import read_summary

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

EXAMPLES = Path(__file__).parents[2] / "examples"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_of_ones_own_is_refined(tmp_path, capsys):
    accuracy = _load("refine_my_model").refine_my_model(tmp_path / "out", steps=80)
    assert accuracy["refined"] > accuracy["network alone"] > 0.3
    assert Image.open(tmp_path / "out" / "refined.png").size == (4 * 128, 128)
    confidence = np.load(tmp_path / "out" / "confidence.npy")
    assert confidence.shape[1:] == (128, 128) and np.allclose(confidence.sum(axis=0), 1, atol=1e-5)
    assert "its odds were multiplied by" in capsys.readouterr().out


def test_own_cohort_and_its_report(tmp_path, capsys):
    table = write_two_class_cohort(tmp_path / "cohort", train=8, val=4)
    report = _load("own_cohort").own_cohort(tmp_path / "out", table, table.parent / "images", epochs=2, progress=False)
    assert report.is_file() and "in the map" in capsys.readouterr().out

    rows = _load("cohort_report").cohort_report(tmp_path / "out" / "maps")
    with open(tmp_path / "out" / "maps" / "disagreement.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    differences = [float(row["difference"]) for row in rows]
    assert len(rows) == 4 and differences == sorted(differences, reverse=True)
    summary = read_summary(tmp_path / "out" / "maps" / rows[0]["input"])
    given, found = summary["proportions"]["given"], summary["proportions"]["confidence"]
    assert differences[0] == pytest.approx(100 * np.mean([abs(given[name] - found[name]) for name in given]), abs=0.051)
    assert "percentage points" in capsys.readouterr().out
    (tmp_path / "cohort" / "table.csv").write_text("image,pink,purple\nnot_there.png,50,50\n")
    with pytest.raises(SystemExit, match="Mend the table"):
        _load("own_cohort").own_cohort(tmp_path / "other", table, table.parent / "images", progress=False)
