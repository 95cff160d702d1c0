"""The report over a cohort: order, outliers, raters, failures, links, plots, and a table that sorts in a real browser."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import browser, needs_browser

from monai_vslp.io.cohort_report import MOST_POINTS, write_cohort_report
from monai_vslp.io.cohort_statistics import agreement, mean_difference, outlier_bound, rater_offsets_of, rater_spread
from monai_vslp.io.summary import build_summary
from monai_vslp.utils.errors import InputError

CLASSES, COLORS = ["stroma", "tumour <i>"], [[0, 158, 115], [213, 94, 0]]


def row(name, given=0.5, found=0.45, **changes):
    """The summary of a slide of 10 × 20 mm, 40 % tissue; ``given`` and ``found`` are shares of the first class."""
    fields = {
        "name": name,
        "kind": "slide",
        "source": f"{name}.svs",
        "classes": CLASSES,
        "colors": COLORS,
        "shape": (1000, 2000),
        "mpp": 10.0,
        "confidence": [found, 1 - found],
        "refined": [found, 1 - found],
        "labels": [found, 1 - found],
        "given": None if given is None else [given, 1 - given],
        "tissue_fraction": 0.4,
        "seconds": {"tiles": 100.0, "refinement": 20.0},
    }
    return build_summary(**(fields | changes))


def cohort(number=12):
    """Slides off by up to 5 points, one by 60 and one without given proportions."""
    rows = [row(f"s{i:02}", 0.3 + 0.02 * i, 0.3 + 0.02 * i + 0.01 * (i % 6)) for i in range(number)]
    return [*rows, row("far & away", 0.9, 0.3), row("free", None)]


class _Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.source, self.words, self.attributes, self.skip = path.read_text(encoding="utf-8"), [], [], False
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.skip = False

    def handle_data(self, data):
        if not self.skip:
            self.words.append(data)

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def test_outliers_come_first_and_what_has_no_proportions_last(tmp_path):
    path = write_cohort_report(tmp_path, cohort())
    page = _Page(path)
    assert path == tmp_path / "index.html"
    table = page.text[page.text.index("All inputs") :]
    places = [table.index(name) for name in ("far & away", "s05", "s04", "s03", "s00", "free")]
    assert places == sorted(places)
    assert table[: table.index("s05")].count("outlier") == 2  # in the note, and of the first input alone
    assert "outlier" not in table[table.index("s05") : table.index("Pictures")]
    assert "60.0 %" in table and "90.0 %" in table and "30.0 %" in table
    assert not re.search(r"https?://|<script[^>]*src|<link|@import|url\(", page.source)


def test_totals(tmp_path):
    rows = [*cohort(), row("image", kind="image", mpp=None, converged=False)]
    text = _Page(write_cohort_report(tmp_path, rows, failures=[{"name": "x", "reason": "y"}])).text
    for words in (
        "Slides 14",
        "Images 1",
        "Tissue, 1 unknown 11.2 cm²",  # 14 slides of 80 mm²
        "Computing time 30 min",
        "With proportions 14",
        "Outliers 1",
        "Not converged 1",
        "Failed 1",
    ):
        assert words in text


def test_failures_are_listed_with_their_reasons_even_alone(tmp_path):
    failures = [{"name": "bad <1>", "reason": "cannot be read: truncated & short"}]
    page = _Page(write_cohort_report(tmp_path, cohort(), failures=failures))
    assert "bad <1> cannot be read: truncated & short" in page.text and "bad <1>" not in page.source
    text = _Page(write_cohort_report(tmp_path, [], failures=failures)).text
    assert "bad <1>" in text and "Slides" not in text and "All inputs" not in text


def test_links_go_to_reports_that_exist(tmp_path):
    for name in ("a #1", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a #1" / "report.html").write_text("x")
    rows = [row("a") | {"folder": "a #1"}, row("b")]
    page = _Page(write_cohort_report(tmp_path, rows))
    assert set(page.values("href")) == {"a%20%231/report.html"}
    assert len(page.values("href")) == 4  # two plots, table, card


def test_plots_have_a_mark_where_the_proportions_are(tmp_path):
    page = _Page(write_cohort_report(tmp_path, cohort()))
    assert page.source.count("<svg") == 2 and page.source.count("<circle") == 24 and page.text.count("far & away: given") == 2
    first = page.source[page.source.index("<svg") : page.source.index("</svg>")]
    marks = re.findall(r'cx="([\d.]+)" cy="([\d.]+)".*?<title>s(\d\d): given ([\d.]+) %, network ([\d.]+) %', first)
    assert len(marks) == 12
    for x, y, _, given, found in marks:
        assert float(x) == pytest.approx(46 + 2.4 * float(given), abs=0.2)
        assert float(y) == pytest.approx(250 - 2.4 * float(found), abs=0.2)
    # Absolute error: 2·(0 + … + 5) points of twelve, and 60 of the outlier, over 13.
    assert f"{(30 + 60) / 13:.1f} in absolute terms" in page.text and "Network − given: −2.3 points" in page.text


def test_many_inputs_are_thinned_but_outliers_stay(tmp_path):
    rng = np.random.default_rng(0)
    base = row("s")
    rows = []
    for index in range(2 * MOST_POINTS + 10):
        found = float(rng.uniform(0.4, 0.5))
        proportions = base["proportions"] | {"confidence": dict(zip(CLASSES, (found, 1 - found)))}
        rows.append(base | {"name": f"s{index}", "proportions": proportions})
    rows[77] = row("odd one", 0.95, 0.1)
    page = _Page(write_cohort_report(tmp_path, rows))
    assert page.text.count("odd one: given") == 2
    assert page.source.count("<circle") <= 2 * MOST_POINTS and f"of {len(rows)} inputs are drawn" in page.text


def test_raters_have_spread_and_offsets(tmp_path):
    rows = [row("a", given_spread=[0.03, 0.03]), row("b", given_spread=[0.04, 0.04]), row("c", given_spread=[0.0, 0.0])]
    raters = {
        "a": {"Ann <A>": {"stroma": 0.6, "tumour <i>": 0.4}, "Bob": {"stroma": 0.5, "tumour <i>": 0.5}},
        "b": {"Ann <A>": {"stroma": 0.4, "tumour <i>": 0.6}, "Bob": {"stroma": 0.2, "tumour <i>": 0.8}},
    }
    text = _Page(write_cohort_report(tmp_path, rows, raters=raters)).text
    spread = text[text.index("Raters") : text.index("All inputs")]
    assert "2 3.5" in spread  # √((9 + 16) / 2) points over two inputs
    assert "Ann <A> 2 +15.0 ± 5.0 −15.0 ± 5.0" in spread and "Bob 2 −15.0 ± 5.0 +15.0 ± 5.0" in spread
    assert "Raters" not in _Page(write_cohort_report(tmp_path, [row("c")])).text


def test_damaged_pictures_are_failures_and_the_rest_is_shown(tmp_path, caplog):
    (tmp_path / "s00").mkdir()
    (tmp_path / "s00" / "thumbnail.jpg").write_bytes(b"no picture")
    text = _Page(write_cohort_report(tmp_path, cohort())).text
    assert "Failed 1" in text and "thumbnail.jpg cannot be read" in text and "s11" in text and "s00" in caplog.text


def test_rows_that_are_no_summaries_are_refused(tmp_path):
    with pytest.raises(InputError, match="row 1 is not a summary"):
        write_cohort_report(tmp_path, [row("a"), {"name": "b"}])
    assert not (tmp_path / "index.html").exists()


def test_statistics_in_closed_form():
    assert mean_difference(row("a", 0.9, 0.3)) == pytest.approx(0.6) and mean_difference(row("a", None)) is None
    assert outlier_bound([0.1] * 7) is None
    assert outlier_bound([0.1] * 8) == pytest.approx(0.1 + 3.5 * 0.01)
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 90.0]  # median 0.5, median deviation 0.2: one wild value changes nothing
    assert outlier_bound(values) == pytest.approx(0.5 + 3.5 * 1.4826 * 0.2)
    result = agreement([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])
    assert (result.count, result.bias, result.error, result.correlation) == pytest.approx((3, 0.1, 0.1, 1.0))
    assert agreement([0.1, 0.1, 0.1], [0.2, 0.3, 0.4]).correlation is None and agreement([0.1], [0.0]).bias == -0.1
    assert rater_spread([row("a"), row("b", given_spread=[0.1, 0.0])]) == {"stroma": (1, 0.1), "tumour <i>": (1, 0.0)}
    # Against the mean of the others, so that the number of raters does not shrink an offset.
    offsets = rater_offsets_of({"a": {"x": {"s": 0.5}, "y": {"s": 0.2}, "z": {"s": 0.2}}, "b": {"x": {"s": 0.9}}})
    assert offsets["x"]["s"].mean == pytest.approx(0.3) and offsets["x"]["s"].count == 1 and offsets["x"]["s"].error is None
    assert offsets["y"]["s"].mean == pytest.approx(-0.15)


@needs_browser
def test_the_table_sorts_in_a_browser(tmp_path):
    path = write_cohort_report(tmp_path, cohort())
    names = "return [...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[0].textContent)"
    with browser() as window:
        window.open(path)
        assert window.run(names)[0] == "far & away" and window.run(names)[-1] == "free"
        window.click(".sortable th:nth-child(2) button")
        window.click(".sortable th:nth-child(2) button")  # the other way round
        shown = window.run(names)
        assert shown[0] == "s00" and shown[-2:] == ["far & away", "free"]  # what is not known stays last
        assert window.run("return document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
        window.click(".sortable th:nth-child(1) button")
        window.press(["\ue007"])  # the button has the focus
        assert window.run(names) == ["far & away", "free", *(f"s{i:02}" for i in range(12))]
