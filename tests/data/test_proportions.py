"""Proportions as people write them."""

import datetime
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from monai_vslp.data.proportions import ProportionLabel, combine_raters, parse_entry, parse_row
from monai_vslp.utils.errors import ProportionError

CLASSES = ("tumour", "stroma", "other")
quick = settings(deadline=None, max_examples=60)


def row(*cells, classes=CLASSES, **kwargs):
    return parse_row(dict(zip(classes, cells)), classes, **kwargs)


@st.composite
def simplex(draw, least=2, most=6):
    weights = draw(st.lists(st.floats(0, 1), min_size=least, max_size=most))
    assume(sum(weights) > 1e-3)
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize(
    ("text", "value", "lower", "upper"),
    [
        ("60", 0.6, 0.6, 0.6),
        ("60%", 0.6, 0.6, 0.6),
        ("60 %", 0.6, 0.6, 0.6),
        ("60 percent", 0.6, 0.6, 0.6),
        (60.0, 0.6, 0.6, 0.6),
        (60, 0.6, 0.6, 0.6),
        (np.float32(60), 0.6, 0.6, 0.6),
        (0.6, 0.6, 0.6, 0.6),
        ("0.6", 0.6, 0.6, 0.6),
        (".6", 0.6, 0.6, 0.6),
        ("60.", 0.6, 0.6, 0.6),
        (1e-5, 1e-5, 1e-5, 1e-5),
        ("0.5%", 0.005, 0.005, 0.005),
        ("12,5", 0.125, 0.125, 0.125),
        ("~30%", 0.3, 0.3, 0.3),
        ("ca. 30", 0.3, 0.3, 0.3),
        ("approx. 30 %", 0.3, 0.3, 0.3),
        ("10-20", 0.15, 0.1, 0.2),
        ("10 – 20 %", 0.15, 0.1, 0.2),
        ("10%-20%", 0.15, 0.1, 0.2),
        ("10 to 20", 0.15, 0.1, 0.2),
        ("~10-20 %", 0.15, 0.1, 0.2),
        ("0.1-0.2", 0.15, 0.1, 0.2),
        ("0-1", 0.005, 0.0, 0.01),
        ("<5", 0.025, 0.0, 0.05),
        ("≤5", 0.025, 0.0, 0.05),
        ("< 5 %", 0.025, 0.0, 0.05),
        ("<1", 0.005, 0.0, 0.01),
        ("up to 5", 0.025, 0.0, 0.05),
        (">90", 0.95, 0.9, 1.0),
        (">= 0.5", 0.75, 0.5, 1.0),
        ("trace", 0.01, 0.0, 0.02),
        ("  60   % ", 0.6, 0.6, 0.6),
    ],
)
def test_entries(text, value, lower, upper):
    entry = parse_entry(text)
    assert (entry.value, entry.lower, entry.upper) == pytest.approx((value, lower, upper))
    assert entry.bounded == (lower != upper)


@pytest.mark.parametrize("text", ["", " ", "-", "–", "n/a", "N/A", "NA", None, "?"])
def test_blank_entries(text):
    assert parse_entry(text).value is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-5", "negative"),
        (-0.1, "negative"),
        (float("nan"), "NaN"),
        (float("inf"), "'?inf'? is not a proportion"),
        ("nan", "not a proportion"),
        ("much", "not a proportion"),
        ("20-10", "smaller value first"),
        ("120", "more than 100"),
        ("101 %", "more than 100"),
        ("50-120", "more than 100"),
        (True, "not a proportion"),
        ("10-Dec", "date"),
        ("Oct-20", "date"),
        ("2026-10-20 00:00:00", "date"),
        (datetime.datetime(2026, 10, 20), "date"),
        ("1.000,5", "not a proportion"),
    ],
)
def test_refused_entries_name_the_place(text, message):
    with pytest.raises(ProportionError, match=f"here: .*{message}"):
        parse_entry(text, "here")


def test_unit_belongs_to_the_row():
    assert row("60", "39.5", "0.5").mean == pytest.approx([0.6, 0.395, 0.005])
    assert row("0.6", "0.395", "0.005").mean == pytest.approx([0.6, 0.395, 0.005])
    assert row("60%", "39.5", "0.5").mean == pytest.approx([0.6, 0.395, 0.005])
    assert row("0.5%", "", "0.5").mean == pytest.approx([0.005, 0.99, 0.005])
    assert row(1, 0, 0).mean == pytest.approx([1, 0, 0])
    assert row("1", "99", "0").mean == pytest.approx([0.01, 0.99, 0])


def test_trace_fits_either_unit():
    assert row("0.6", "0.39", "trace").mean == pytest.approx([0.6, 0.39, 0.01])
    assert row("60", "39", "trace").mean == pytest.approx([0.6, 0.39, 0.01])
    assert row("60%", "40%", "trace").mean == pytest.approx([0.6, 0.4, 0.0])  # moves within its bounds first


def test_mixed_units_are_refused_with_advice():
    with pytest.raises(ProportionError, match="one unit: 'stroma' may be meant as fractions"):
        row("60%", "0.4", "0")
    with pytest.raises(ProportionError, match="one unit"):
        row("60", "0.4", "0")


@pytest.mark.parametrize("cells", [("3", "4", "0"), ("0.03", "0.04", "0"), ("30", "20", "10"), ("60", "60", "60")])
def test_sums_far_from_the_whole_are_refused(cells):
    with pytest.raises(ProportionError, match=r"row 7, proportions sum to .*tumour = .*expected about 100"):
        row(*cells, row=7)


def test_one_beside_blanks_is_ambiguous():
    with pytest.raises(ProportionError, match=r"column 'tumour': '1' .* write '1%' or '100%'"):
        row("1", "", "")
    assert row("1%", "", "").mean == pytest.approx([0.01, 0.495, 0.495])
    assert row("1.0", "", "").mean == pytest.approx([1, 0, 0])


def test_blanks_take_the_rest():
    one = row("70", "20", "")
    assert one.mean == pytest.approx([0.7, 0.2, 0.1])
    assert one.missing.tolist() == [False, False, True]
    assert (one.lower[2], one.upper[2]) == pytest.approx((0.1, 0.1))
    two = row("70", "", "-")
    assert two.mean == pytest.approx([0.7, 0.15, 0.15])
    assert (two.lower[1], two.upper[1]) == pytest.approx((0, 0.3))
    assert row("70", "30", "").mean == pytest.approx([0.7, 0.3, 0])
    assert row("0", "", "0").mean == pytest.approx([0, 1, 0])
    interval = row("10-20", "60", "")
    assert interval.mean == pytest.approx([0.15, 0.6, 0.25])
    assert (interval.lower[2], interval.upper[2]) == pytest.approx((0.2, 0.3))
    assert row("0.6", "0.4").mean == pytest.approx([0.6, 0.4, 0])  # absent class


def test_a_blank_row_is_unknown():
    assert row("", "-", None) is None
    assert parse_row({}, CLASSES) is None


def test_sums_near_100_are_scaled_and_remembered():
    label = row("50", "30", "25")
    assert label.mean == pytest.approx(np.array([50, 30, 25]) / 105)
    assert label.raw_sum == pytest.approx(1.05)
    assert label.lower == pytest.approx(label.mean)
    with pytest.raises(ProportionError, match="Look for a slip"):
        row("50", "30", "31")
    assert row("50", "30", "31", tolerance=12).mean.sum() == pytest.approx(1)


def test_intervals_give_way_before_values():
    label = row("10-30", "60", "15")  # middle 20 would make 95
    assert label.mean == pytest.approx([0.25, 0.6, 0.15])
    assert (label.lower[0], label.upper[0]) == pytest.approx((0.1, 0.3))
    wide = row(">50", "15", "15")
    assert wide.mean == pytest.approx([0.7, 0.15, 0.15])
    beyond = row("<5", "90", "0")  # the bound alone does not suffice: 95, then all are scaled
    assert beyond.mean == pytest.approx([5 / 95, 90 / 95, 0])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("-5", "50", "55"), r"row 3, column 'tumour': '-5' is negative"),
        (("lots", "50", "50"), r"row 3, column 'tumour': 'lots'"),
        (("50", float("nan"), "50"), r"row 3, column 'stroma': NaN"),
        (("50", "120%", "0"), r"row 3, column 'stroma': '120%' is more than 100"),
        (("0", "0", "0"), r"row 3, all proportions are zero"),
    ],
)
def test_errors_name_row_column_and_value(cells, message):
    with pytest.raises(ProportionError, match=message):
        row(*cells, row=3)


def test_unknown_class_gets_a_suggestion():
    with pytest.raises(ProportionError, match=r"row 2.*unknown class 'tumor'.*Did you mean 'tumour'"):
        parse_row({"tumor": "50", "stroma": "50"}, CLASSES, row=2)


@quick
@given(simplex())
def test_round_trip_of_fractions_and_percent(p):
    classes = [f"c{k}" for k in range(len(p))]
    for cells in (
        p.tolist(),
        [repr(v) for v in p.tolist()],
        [f"{100 * v!r}%" for v in p.tolist()],
        [f"{v:.6f}".replace(".", ",") for v in p.tolist()],
        np.round(p, 12).tolist(),
    ):
        label = row(*cells, classes=classes)
        # six decimals of up to six classes: each may be off by 5e-7, and so may the sum that they are divided by
        assert label.mean == pytest.approx(p, abs=5e-6)
        assert label.mean.sum() == pytest.approx(1, abs=1e-12)


entries = st.one_of(
    st.integers(0, 100).map(str),
    st.tuples(st.integers(0, 50), st.integers(50, 100)).map(lambda t: f"{t[0]}-{t[1]}%"),
    st.integers(0, 100).map(lambda v: f"<{v}"),
    st.integers(0, 100).map(lambda v: f">{v}%"),
    st.sampled_from(["", "-", "trace", "0.3", "~20%"]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(entries, min_size=2, max_size=5))
def test_labels_are_on_the_simplex_within_bounds_or_refused(cells):
    classes = [f"c{k}" for k in range(len(cells))]
    try:
        label = row(*cells, classes=classes, tolerance=50)
    except ProportionError:
        return
    if label is None:
        assert set(cells) <= {"", "-"}
        return
    assert label.mean.sum() == pytest.approx(1, abs=1e-12)
    assert (label.mean >= 0).all() and (label.lower >= 0).all() and (label.upper <= 1).all()
    assert (label.lower <= label.mean).all() and (label.mean <= label.upper).all()
    assert label.missing.tolist() == [cell in ("", "-") for cell in cells]
    back = ProportionLabel.from_dict(json.loads(json.dumps(label.to_dict())))
    for part in ("lower", "upper", "spread", "missing"):
        assert (getattr(back, part) == getattr(label, part)).all()
    assert back.mean == pytest.approx(label.mean, abs=1e-15)
    assert (back.classes, back.raters, back.raw_sum) == (label.classes, label.raters, label.raw_sum)


def test_stored_labels_are_checked():
    assert ProportionLabel.from_dict({"classes": ["a", "b"], "mean": [0.25, 0.75]}).mean.tolist() == [0.25, 0.75]
    with pytest.raises(ProportionError, match="needs 'mean'"):
        ProportionLabel.from_dict({"classes": ["a"]})
    with pytest.raises(ProportionError, match="'spread'.*shape"):
        ProportionLabel.from_dict({"classes": ["a", "b"], "mean": [0.5, 0.5], "spread": [0.1]})


@pytest.mark.parametrize("values", [[0.5], [0, 0], [-1, 2], [np.nan, 1], [np.inf, 1]])
def test_exact_refuses_what_is_no_proportion(values):
    with pytest.raises(ProportionError):
        ProportionLabel.exact(("a", "b"), values)


def test_exact_scales_amounts():
    assert ProportionLabel.exact(("a", "b"), [30, 10]).mean.tolist() == [0.75, 0.25]


def test_raters_are_combined_to_mean_and_deviation():
    labels = [row("60", "30", "10"), row("50-70", "30", "10"), row("70", "30", "")]
    both = combine_raters(labels)
    assert both.mean == pytest.approx([1.9 / 3, 0.3, 0.2 / 3])
    assert both.spread == pytest.approx([np.std([0.6, 0.6, 0.7], ddof=1), 0, np.std([0.1, 0.1, 0], ddof=1)], abs=1e-12)
    assert (both.lower[0], both.upper[0]) == pytest.approx((0.5, 0.7))
    assert both.raters == 3 and not both.missing.any()
    assert combine_raters(labels[:1]) is labels[0]


@quick
@given(st.integers(2, 5).flatmap(lambda c: st.lists(simplex(c, c), min_size=1, max_size=5)))
def test_combined_raters_stay_on_the_simplex(rows):
    classes = [f"c{k}" for k in range(len(rows[0]))]
    label = combine_raters([ProportionLabel.exact(classes, p) for p in rows])
    assert label.mean.sum() == pytest.approx(1)
    assert (label.lower <= label.mean).all() and (label.mean <= label.upper).all() and (label.spread >= 0).all()


def test_raters_of_different_classes_are_refused():
    with pytest.raises(ProportionError, match="different classes"):
        combine_raters([ProportionLabel.exact(("a", "b"), [1, 1]), ProportionLabel.exact(("a", "c"), [1, 1])])
    with pytest.raises(ProportionError, match="no rater"):
        combine_raters([])
