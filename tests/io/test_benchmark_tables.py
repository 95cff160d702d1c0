"""Tables of made-up scores whose means and spreads are known in closed form."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monai_vslp.io.benchmark_tables import Row, Spread, aggregate, best_rows, plot, write_csv, write_markdown
from monai_vslp.utils.errors import InputError


def _result(argmax, refined, ece=None):
    """An evaluation in which all scores are known from the mean IoU of the two maps."""
    blocks = []
    for name, classes, shift in (("all classes", ["a", "b"], 0.0), ("g against rest", ["rest", "g"], 0.1)):
        rows = []
        for kind, value in (("argmax", argmax), ("refined", refined)):
            dice = dict.fromkeys(classes, None if value is None else value / 2)
            miou = None if value is None else value + shift
            row = {"map": kind, "miou": miou, "dice": dice, "boundary_f1": 0.5, "ece": ece, "proportion_error": 0.25}
            rows.append(row)
        blocks.append({"name": name, "classes": classes, "rows": rows})
    return {"blocks": blocks}


def _score(method, seed, refined, data="glas", noise="exact", **options):
    given = {"none": _result(0.1, refined, **options)}
    return {
        "data": data, "noise": noise, "method": method, "title": method.title(), "seed": seed,
        "train_seconds": 10.0 * (seed + 1), "given": given,
    }  # fmt: skip


def _find(rows, **wanted):
    (row,) = (row for row in rows if all(getattr(row, key) == value for key, value in wanted.items()))
    return row


def test_means_and_sample_deviations_in_closed_form():
    """Of 0.2, 0.4, 0.6 the mean is 0.4 and, with divisor n - 1, the standard deviation 0.2."""
    rows = aggregate([_score("m", 2, 0.6), _score("m", 0, 0.2), _score("m", 1, 0.4)])
    assert [row.map for row in rows] == ["argmax", "refined"]
    row = _find(rows, map="refined")
    assert row.seeds == (0, 1, 2) and row.title == "M"
    for column, mean, sd in (
        ("mIoU all classes", 0.4, 0.2),
        ("mIoU g against rest", 0.5, 0.2),
        ("Dice a", 0.2, 0.1),
        ("boundary F1", 0.5, 0.0),
        ("proportion error", 0.25, 0.0),
        ("training seconds", 20.0, 10.0),
    ):
        assert row.values[column].mean == pytest.approx(mean) and row.values[column].sd == pytest.approx(sd, abs=1e-12)
        assert row.values[column].n == 3
    assert row.values["ECE"] == Spread(None, None, 0)
    assert _find(rows, map="argmax").values["mIoU all classes"].mean == pytest.approx(0.1)


def test_scores_that_are_not_defined_do_not_count_and_one_seed_has_no_spread():
    row = _find(aggregate([_score("m", 0, 0.5, ece=0.1), _score("m", 1, None)]), map="refined")
    assert row.values["mIoU all classes"] == Spread(0.5, None, 1)
    assert row.values["ECE"] == Spread(0.1, None, 1) and row.values["ECE"].text() == "0.100"
    assert Spread(None, None, 0).text() == "–" and Spread(0.5, 0.0156, 2).text() == "0.500 ± 0.016"


def test_a_seed_given_twice_is_refused():
    with pytest.raises(InputError, match="seed 0 twice"):
        aggregate([_score("m", 0, 0.5), _score("m", 0, 0.6)])


def _rows(*spreads, column="mIoU all classes"):
    return [Row("d", "n", "none", f"m{i}", "refined", f"M{i}", (0,), {column: s}) for i, s in enumerate(spreads)]


@pytest.mark.parametrize(
    ("spreads", "best"),
    [
        ([Spread(0.8, 0.03, 3), Spread(0.7, 0.04, 3)], {0}),  # ahead by 0.1, pooled sd 0.0354
        ([Spread(0.8, 0.03, 3), Spread(0.77, 0.04, 3)], {0, 1}),
        ([Spread(0.7, 0.04, 3), Spread(0.8, 0.03, 3), Spread(0.79, 0.01, 3)], {1, 2}),
        ([Spread(0.8, 0.0, 3), Spread(0.76, 0.06, 2)], {0}),  # pooled sd by degrees of freedom: 0.06/√3 = 0.035
        ([Spread(0.8, 0.0, 2), Spread(0.76, 0.06, 2)], {0, 1}),  # 0.06/√2 = 0.042
        ([Spread(0.8, None, 1), Spread(0.7, 0.01, 3)], set()),  # how far a single seed is ahead, nobody knows
        ([Spread(0.8, 0.01, 3)], set()),
        ([Spread(0.8, 0.01, 3), Spread(None, None, 0)], set()),
    ],
)
def test_bold_is_what_is_ahead_by_more_than_the_pooled_deviation(spreads, best):
    assert best_rows(_rows(*spreads), "mIoU all classes") == best


def test_lower_errors_are_better_and_time_has_no_best():
    spreads = [Spread(0.1, 0.01, 3), Spread(0.2, 0.01, 3)]
    assert best_rows(_rows(*spreads, column="ECE"), "ECE") == {0}
    assert best_rows(_rows(*spreads, column="proportion error"), "proportion error") == {0}
    assert best_rows(_rows(*spreads, column="training seconds"), "training seconds") == set()


values = st.lists(st.floats(0, 1), min_size=2, max_size=5)


@settings(max_examples=50)
@given(st.lists(values, min_size=2, max_size=4))
def test_the_best_mean_is_always_among_the_best(columns):
    spreads = [Spread(float(np.mean(v)), float(np.std(v, ddof=1)), len(v)) for v in columns]
    found = best_rows(_rows(*spreads), "mIoU all classes")
    assert max(range(len(spreads)), key=lambda i: spreads[i].mean) in found


@pytest.fixture
def scores():
    """Method b is far ahead on glas, level on ebhi, whose block has the same classes."""
    result = []
    for seed in range(3):
        for noise in ("exact", "medium"):
            result += [_score("a", seed, 0.3 + 0.01 * seed, noise=noise), _score("b|x", seed, 0.8 + 0.01 * seed, noise=noise)]
            result += [_score(m, seed, 0.5 + 0.1 * seed, data="ebhi", noise=noise) for m in ("a", "b|x")]
    return result


def test_markdown_is_a_table_per_data_set_with_the_best_in_bold(scores, tmp_path):
    text = write_markdown(aggregate(scores), tmp_path / "t.md").read_text(encoding="utf-8")
    glas, ebhi = text.split("## ")[1:]
    assert glas.startswith("glas") and ebhi.startswith("ebhi")
    lines = [line for line in glas.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]
    assert len(lines) == 2 + 2 * 2 * 2 and len({len(row) for row in cells}) == 1
    column = cells[0].index("mIoU all classes")
    refined = {(row[0], row[2]): row[column] for row in cells[2:] if row[3] == "refined"}
    assert refined["exact", "B¦X"] == "**0.810 ± 0.010**" and refined["exact", "A"] == "0.310 ± 0.010"
    assert ebhi.count("**0.600 ± 0.100**") == 2 * 2, "level: all within the deviation are bold, for each table"
    assert "No run" in write_markdown([], tmp_path / "e.md").read_text(encoding="utf-8")


def test_csv_has_every_number(scores, tmp_path):
    rows = aggregate(scores)
    with open(write_csv(rows, tmp_path / "t.csv"), newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 2 * 2 * 2 * 2
    for line, row in zip(lines, rows):
        assert (line["data"], line["noise"], line["method"], line["map"]) == (row.data, row.noise, row.method, row.map)
        assert float(line["mIoU all classes, mean"]) == row.values["mIoU all classes"].mean
        assert math.isclose(float(line["mIoU all classes, sd"]), row.values["mIoU all classes"].sd)
        assert line["mIoU all classes, n"] == "3" and line["seeds"] == "0 1 2"
        assert line["ECE, mean"] == "" and line["ECE, n"] == "0"


def test_the_plot_shows_every_data_set_and_fails_clearly_without_values(scores, tmp_path):
    pytest.importorskip("matplotlib")
    rows = aggregate(scores)
    with Image.open(plot(rows, tmp_path / "p.png")) as picture:
        both = np.asarray(picture.convert("RGB")).astype(int)
    with Image.open(plot([row for row in rows if row.data == "glas"], tmp_path / "q.png")) as picture:
        assert picture.height < both.shape[0], "a panel per data set"
    for rgb in ((0, 114, 178), (213, 94, 0)):  # of the two tables of the training
        assert (np.abs(both - rgb).sum(axis=2) < 12).sum() > 20
    with pytest.raises(InputError, match="ECE"):
        plot(rows, tmp_path / "r.png", "ECE")
    assert not (tmp_path / "r.png").exists()
