"""Folds by patient, balanced in size and proportions."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_vslp.data import assign_folds, divide, read_cohort, write_fold_table, write_table
from monai_vslp.utils.errors import InputError


@st.composite
def cohorts(draw):
    """Patients with one, two or up to nine images, proportions of two to five classes, and a number of folds."""
    largest = draw(st.sampled_from([1, 2, 9]))
    sizes = draw(st.lists(st.integers(1, largest), min_size=2, max_size=25))
    groups = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = rng.permutation(groups).tolist()
    proportions = rng.dirichlet([draw(st.sampled_from([0.05, 1.0, 50.0]))] * draw(st.integers(2, 5)), size=len(groups))
    return groups, proportions, draw(st.integers(2, min(len(sizes), 7))), draw(st.integers(0, 99))


@given(cohorts())
def test_groups_stay_whole_every_fold_has_some_and_sizes_are_bounded(case):
    groups, proportions, folds, seed = case
    found = assign_folds(groups, proportions, folds, seed)
    assert found.shape == (len(groups),) and set(found.tolist()) == set(range(folds))
    assert len(set(zip(groups, found.tolist()))) == len(set(groups)), "a group lies in one fold"
    sizes = np.bincount(found)
    largest = max(groups.count(name) for name in groups)
    assert sizes.max() - sizes.min() <= largest
    assert (assign_folds(groups, proportions, folds, seed) == found).all()


@given(cohorts())
def test_names_of_patients_do_not_matter(case):
    groups, proportions, folds, seed = case
    found = assign_folds(groups, proportions, folds, seed)
    assert (assign_folds([(name, 1) for name in groups], proportions, folds, seed) == found).all()


def test_balance_is_far_better_than_that_of_random_divisions():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
    centres = rng.dirichlet([0.6, 0.6, 0.6], size=40)
    proportions = np.stack([rng.dirichlet(30 * centres[g] + 0.1) for g in groups])

    def imbalance(found):
        means = np.stack([proportions[found == f].mean(axis=0) for f in range(5)])
        return np.abs(means - proportions.mean(axis=0)).mean(), np.bincount(found).std()

    mine = imbalance(assign_folds(groups, proportions, 5, 0))
    others = []
    for _ in range(200):
        found = rng.permutation(np.arange(40) % 5)[groups]
        others.append(imbalance(found))
    means, sizes = np.array(others).T
    assert mine[0] < 0.25 * np.median(means) and mine[0] <= means.min()
    assert mine[1] <= 0.5 < np.median(sizes)


def test_a_pure_cohort_by_hand():
    """Four pure images of each of two classes, one per patient: each of four folds gets one of each."""
    proportions = np.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1]]
    for seed in range(5):
        found = assign_folds(range(8), proportions, 4, seed)
        assert sorted(found[:4]) == sorted(found[4:]) == [0, 1, 2, 3]


def test_seeds_give_different_folds():
    proportions = np.random.default_rng(0).dirichlet([1, 1, 1], size=30)
    found = {tuple(assign_folds(range(30), proportions, 3, seed)) for seed in range(5)}
    assert len(found) == 5


@pytest.mark.parametrize("folds", [1, 0, -2, 2.0, True, "3"])
def test_fewer_than_two_folds_are_refused(folds):
    with pytest.raises(InputError, match="whole number from 2"):
        assign_folds("abcd", np.full((4, 2), 0.5), folds)


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(InputError, match="3 patients cannot be divided into 4 folds"):
        assign_folds("aabbc", np.full((5, 2), 0.5), 4)
    with pytest.raises(InputError, match=r"shape \[3, C\], got \[2, 2\]"):
        assign_folds("abc", np.full((2, 2), 0.5), 2)


# ---- tables ----------------------------------------------------------------------------------------------------------------

ROWS = [
    ("a.png", "train", "p1", "60", "40"),
    ("b.png", "", "p1", "10-20", "80-90"),
    ("c.png", "val", "p2", "~30%", ""),
    ("d.png", "test", "p3", "50", "50"),
    ("e.png", "train", "", "<5", "97"),
    ("f.png", "train", "", "0.6", "0.4"),
    ("g.png", "val", "p4", "", ""),
]


def cohort_of(folder, rows, rater=None):
    names = ("image", "split", "patient", "tumour", "stroma")
    rows = [dict(zip(names, row)) for row in rows]
    if rater is not None:
        rows = [row | {"rater": name} for row in rows for name in rater]
    for row in rows:
        (folder / row["image"]).write_bytes(b"x")
    return read_cohort(write_table(folder / "table.csv", rows, ["tumour", "stroma"]))


def test_train_and_val_are_pooled_test_and_unknown_proportions_left_out(tmp_path, caplog):
    cohort = cohort_of(tmp_path, ROWS)
    place = divide(cohort, 2, seed=1)
    assert [path.name for path in place] == ["a.png", "b.png", "c.png", "e.png", "f.png"]
    assert place[tmp_path / "a.png"] == place[tmp_path / "b.png"] and set(place.values()) == {0, 1}
    assert "1 image(s) have no proportions" in caplog.text
    assert set(divide(cohort, 4).values()) == {0, 1, 2, 3}, "images without a patient stand for themselves"
    with pytest.raises(InputError, match="4 patients cannot be divided into 5"):
        divide(cohort, 5)


def test_one_patient_with_most_images_and_no_patients_are_warned_of(tmp_path, caplog):
    rows = [(f"{i}.png", "train", "big" if i < 4 else f"p{i}", "50", "50") for i in range(7)]
    with caplog.at_level(logging.WARNING):
        divide(cohort_of(tmp_path, rows), 2)
        assert "'big' has 4 of 7 images" in caplog.text
        caplog.clear()
        divide(cohort_of(tmp_path, rows[1:]), 2)
        assert not caplog.text, "three of six are not over half"
        divide(cohort_of(tmp_path, [(name, split, "", *cells) for name, split, _, *cells in rows]), 2)
        assert "names no patients" in caplog.text


def test_a_table_without_usable_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="no row of split train or val with proportions"):
        divide(cohort_of(tmp_path, [ROWS[3], ROWS[6]]), 2)


def test_fold_tables_keep_what_was_written(tmp_path):
    (tmp_path / "images").mkdir()
    cohort = cohort_of(tmp_path, ROWS)
    splits = {tmp_path / "b.png": "val", tmp_path / "c.png": "train", tmp_path / "e.png": "train"}
    path = write_fold_table(tmp_path / "out" / "fold1.csv", cohort, tmp_path, splits)
    assert path.read_text().splitlines() == [
        "image,split,patient,tumour,stroma",
        "b.png,val,p1,10-20,80-90",
        "c.png,train,p2,~30%,",
        "e.png,train,,<5,97",
    ]
    again = {record.image: record for record in read_cohort(path, tmp_path).records}
    for record in cohort.records:
        if record.image in again:
            for name in ("mean", "lower", "upper", "missing"):
                np.testing.assert_array_equal(getattr(again[record.image].proportions, name), getattr(record.proportions, name))


def test_fold_tables_keep_raters_and_columns_in_their_order(tmp_path):
    cohort = cohort_of(tmp_path, ROWS[:3], rater=["x", "y"])
    path = write_fold_table(tmp_path / "fold.csv", cohort, tmp_path, dict.fromkeys([tmp_path / "a.png"], "val"))
    assert path.read_text().splitlines() == [
        "image,split,patient,rater,tumour,stroma",
        "a.png,val,p1,x,60,40",
        "a.png,val,p1,y,60,40",
    ]
