"""Proportion labels as MONAI transforms."""

import json
import os
import pickle

import monai.transforms
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose

from monai_vslp.data.proportions import ProportionLabel
from monai_vslp.transforms import labels
from monai_vslp.transforms.labels import (
    LoadProportions,
    LoadProportionsd,
    ParseProportions,
    ParseProportionsd,
    ProportionsFromMask,
    ProportionsFromMaskd,
    RandRaterNoise,
    RandRaterNoised,
    SimulateRaters,
    SimulateRatersd,
)
from monai_vslp.utils.errors import InputError, ProportionError

CLASSES = ("tumour", "stroma", "other")
MASK = np.array([[0, 0, 1, 255], [2, 0, 1, 1]], np.uint8)
PARTS = ("spread", "lower", "upper")


@pytest.mark.parametrize(
    "name", ["LoadProportions", "ParseProportions", "ProportionsFromMask", "RandRaterNoise", "SimulateRaters"]
)
def test_pairs_follow_monai(name):
    array, dictionary = getattr(labels, name), getattr(labels, f"{name}d")
    assert getattr(labels, f"{name}D") is getattr(labels, f"{name}Dict") is dictionary
    assert array.backend and dictionary.backend is array.backend
    for full in (name, f"{name}d", f"{name}D", f"{name}Dict"):
        assert full in labels.__all__ and not hasattr(monai.transforms, full)


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK[None],
        MASK.astype(np.uint16),
        torch.from_numpy(MASK.astype(np.int64)),
        torch.from_numpy(MASK)[None].float(),
        MetaTensor(torch.from_numpy(MASK)[None]),
    ],
)
def test_mask_to_fractions(mask):
    p = ProportionsFromMask(3)(mask)
    assert type(p) is torch.Tensor and p.dtype == torch.float32
    assert p.tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7])


def test_mask_against_brute_force():
    rng = np.random.default_rng(0)
    mask, mass = rng.integers(0, 4, (1, 20, 30)), rng.random((20, 30))
    expected = [sum(mass[i, j] for i in range(20) for j in range(30) if mask[0, i, j] == k) for k in range(4)]
    assert ProportionsFromMask(4)(mask, mass).numpy() == pytest.approx(np.array(expected) / sum(expected), rel=1e-5)


def test_mask_with_tissue():
    tissue = np.array([[1, 0, 0, 1], [1, 0, 0, 1]], bool)
    expected = [1 / 3, 1 / 3, 1 / 3]
    assert ProportionsFromMask(3)(MASK, tissue).tolist() == pytest.approx(expected)
    assert ProportionsFromMask(3)(MASK[None], torch.from_numpy(tissue)[None] * 0.5).tolist() == pytest.approx(expected)


def test_partially_annotated_masks():
    assert ProportionsFromMask(CLASSES, partial=["other", "tumour"])(MASK).tolist() == pytest.approx([1 / 4, 3 / 4])
    assert ProportionsFromMask(3, partial=[2, 0])(MASK).tolist() == pytest.approx([1 / 4, 3 / 4])
    with pytest.raises(ProportionError, match="Did you mean 'tumour'"):
        ProportionsFromMask(CLASSES, partial=["tumor"])
    for wrong in ([], [3]):
        with pytest.raises(InputError, match="partial"):
            ProportionsFromMask(CLASSES, partial=wrong)


@pytest.mark.parametrize(
    ("mask", "tissue", "error", "message"),
    [
        (MASK + 3, None, InputError, r"indices \[3, 4, 5\].*0 to 2"),
        (np.array([[-1, 0]]), None, InputError, r"\[-1\]"),
        (MASK / 2, None, InputError, "fractional"),
        (np.zeros((3, 4, 4)), None, InputError, "argmax"),
        (MASK, np.ones((3, 3)), InputError, "must agree"),
        (MASK, -np.ones((2, 4)), InputError, "not negative"),
        (MASK, np.zeros((2, 4)), ProportionError, "no pixel"),
        (np.full((2, 2), 255), None, ProportionError, "no pixel"),
    ],
)
def test_impossible_masks(mask, tissue, error, message):
    with pytest.raises(error, match=message):
        ProportionsFromMask(3)(mask, tissue)


def test_nothing_is_ignored_on_request():
    with pytest.raises(InputError, match="255"):
        ProportionsFromMask(3, ignore_index=None)(MASK)


def test_mask_dictionary():
    data = {"label": MASK[None], "mass": np.ones((1, 2, 4)), "other": 1}
    out = ProportionsFromMaskd("label", 3)(data)
    assert out["proportions"].tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert out["label"] is data["label"] and out["other"] == 1 and "proportions" not in data
    two = ProportionsFromMaskd(["a", "b"], 3, output_keys=["pa", "pb"], allow_missing_keys=True)({"b": MASK})
    assert set(two) == {"b", "pb"}
    with pytest.raises(InputError, match="output_keys"):
        ProportionsFromMaskd(["a", "b"], 3)
    with pytest.raises(KeyError):
        ProportionsFromMaskd("label", 3)({})


def test_parsing():
    cells = {"tumour": "10-20", "stroma": "~60%", "other": ""}
    label = ParseProportions(CLASSES)(cells)
    assert isinstance(label, ProportionLabel) and label.mean == pytest.approx([0.15, 0.6, 0.25])
    out = ParseProportionsd("proportions", CLASSES)({"proportions": cells})
    assert out["proportions"].dtype == torch.float32 and out["proportions"].tolist() == pytest.approx([0.15, 0.6, 0.25])
    for part in PARTS:
        assert out[f"proportions_{part}"].numpy() == pytest.approx(getattr(label, part), abs=1e-7)
    unknown = ParseProportionsd("proportions", CLASSES)({"proportions": {"tumour": ""}})
    assert unknown == {"proportions": None} and ParseProportions(CLASSES)({}) is None
    with pytest.raises(ProportionError, match="column 'stroma'"):
        ParseProportions(CLASSES)({"stroma": "lots"})
    with pytest.raises(ProportionError, match="sum to 85"):
        ParseProportions(CLASSES)({"tumour": 50, "stroma": 35, "other": 0})
    assert ParseProportions(CLASSES, tolerance=20)({"tumour": 50, "stroma": 35, "other": 0}).raw_sum == pytest.approx(0.85)


@pytest.mark.parametrize("level", ["low", "medium", "high", "uniform"])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda v: MetaTensor(torch.tensor(v))])
def test_rater_noise(level, kind):
    p = kind([0.5, 0.3, 0.2, 0.0])
    noise = RandRaterNoise(level=level).set_random_state(0)
    first, second = noise(p), noise(p)
    assert type(first) is type(p) and first.dtype == p.dtype and first.shape == p.shape
    assert float(first.sum()) == pytest.approx(1) and float(first[3]) == 0 and float(first.min()) >= 0
    assert np.asarray(noise(p, randomize=False)) == pytest.approx(np.asarray(second))
    again = RandRaterNoise(level=level).set_random_state(0)(p)
    assert np.asarray(again) == pytest.approx(np.asarray(first))
    rows = np.stack([np.asarray(noise(p)) for _ in range(20)])
    assert len(np.unique(rows.round(6), axis=0)) > 3


def test_rater_noise_by_probability():
    p = np.array([0.5, 0.5])
    assert RandRaterNoise(prob=0.0)(p) is p
    some = RandRaterNoise(prob=0.5, level="uniform").set_random_state(1)
    share = np.mean([some(p) is not p for _ in range(400)])
    assert 0.4 < share < 0.6
    with pytest.raises(ValueError, match="medium"):
        RandRaterNoise(level="mediun")
    some.randomize(2)
    some._do_transform = True
    with pytest.raises(InputError, match="2 classes.*have 3"):
        some(np.ones(3) / 3, randomize=False)


def test_rater_noise_dictionary():
    data = {"a": torch.tensor([0.6, 0.4]), "b": torch.tensor([0.6, 0.4]), "c": 3}
    both = RandRaterNoised(["a", "b"], level="uniform").set_random_state(3)
    out = both(data)
    assert torch.equal(out["a"], out["b"]) and not torch.equal(out["a"], data["a"]) and out["c"] == 3
    chain = Compose([RandRaterNoised("a", level="uniform")])
    assert torch.equal(chain.set_random_state(5)(data)["a"], chain.set_random_state(5)(data)["a"])
    assert RandRaterNoised("x", allow_missing_keys=True)(data) == data


def test_simulated_raters_keep_their_habits():
    p = torch.tensor([0.5, 0.5])
    simulate = SimulateRaters("high", raters=60, seed=1)
    rows = torch.stack([simulate(p) for _ in range(40)])
    assert rows.shape == (40, 60, 2) and rows.dtype == torch.float32
    assert rows.sum(-1).numpy() == pytest.approx(1, abs=1e-6)
    # Averaged over images, errors of single estimates cancel and the raters' habits remain.
    habits = rows[:20, :, 0].mean(0).numpy(), rows[20:, :, 0].mean(0).numpy()
    assert np.corrcoef(*habits)[0, 1] > 0.7
    assert torch.equal(SimulateRaters("high", 60, 1)(p), rows[0])
    assert torch.equal(simulate.set_random_state(1)(p), rows[0])
    assert not torch.equal(simulate.set_random_state(2)(p), rows[0])
    with pytest.raises(InputError, match="raters"):
        SimulateRaters(raters=0)


def test_simulated_raters_dictionary():
    p = torch.tensor([0.5, 0.3, 0.2])
    rows = SimulateRaters("medium", 5, seed=4)(p).numpy()
    out = SimulateRatersd("proportions", "medium", 5, seed=4)({"proportions": p})
    assert out["proportions"].numpy() == pytest.approx(rows.mean(0), abs=1e-6)
    assert out["proportions_spread"].numpy() == pytest.approx(rows.std(0, ddof=1), abs=1e-6)
    assert out["proportions_lower"].numpy() == pytest.approx(rows.min(0), abs=1e-6)
    assert out["proportions_upper"].numpy() == pytest.approx(rows.max(0), abs=1e-6)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        "image,split,rater,tumour,stroma,other\na.png,train,x,60,30,10\na.png,train,y,50,40,10\n"
        "b.png,train,x,10-20,,0\nc.png,val,x,,,\n"
    )
    return path


def test_loading_values():
    load = LoadProportions(CLASSES)
    label = ProportionLabel.exact(("other", "stroma", "tumour"), [0.1, 0.3, 0.6])
    for value in (
        {"tumour": "60%", "stroma": 30, "other": None},
        [0.6, 0.3, 0.1],
        (60, 30, 10),
        np.array([0.6, 0.3, 0.1], np.float32),
        torch.tensor([60.0, 30.0, 10.0]),
        label,
        label.to_dict(),
    ):
        p = load(value)
        assert p.dtype == torch.float32 and p.tolist() == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.6, 0.4], "2 numbers for 3 classes"),
        ([0.6, 0.3, 0.5], "sum to 1.4"),
        ([1e-9, 0.5, -0.5], "negative"),
        ({"tumor": 1}, "Did you mean 'tumour'"),
        ({"tumour": ""}, "not known"),
        (None, "expected {class: value}"),
        ({"classes": ["a", "b"], "mean": [0.5, 0.5]}, "expected tumour, stroma, other"),
    ],
)
def test_values_that_are_refused(value, message):
    with pytest.raises(ProportionError, match=message):
        LoadProportions(CLASSES)(value)


def test_loading_from_tables(table, tmp_path):
    load = LoadProportions(CLASSES)
    assert load(table, "a.png").tolist() == pytest.approx([0.55, 0.35, 0.1])
    assert load(str(table), tmp_path / "somewhere" / "b.tif").tolist() == pytest.approx([0.15, 0.85, 0])
    assert LoadProportions(CLASSES[::-1])(table, "a.png").tolist() == pytest.approx([0.1, 0.35, 0.55])
    fixed = LoadProportions(CLASSES, table)
    assert fixed("images/a.png").tolist() == pytest.approx([0.55, 0.35, 0.1])
    assert fixed.label("a.png").raters == 2
    assert pickle.loads(pickle.dumps(fixed))("a.png").tolist() == pytest.approx([0.55, 0.35, 0.1])
    with pytest.raises(ProportionError, match="3 images; say which"):
        load(table)
    with pytest.raises(ProportionError, match="no row for 'd.png'"):
        fixed("d.png")
    with pytest.raises(ProportionError, match="not known.*c.png"):
        fixed("c.png")
    with pytest.raises(ProportionError, match="does not exist"):
        LoadProportions(CLASSES, tmp_path / "absent.csv")
    with pytest.raises(InputError, match="not a class"):
        LoadProportions(("a", "b"), table)


def test_changed_tables_are_read_anew(table):
    load = LoadProportions(CLASSES)
    table.write_text("image,tumour,stroma,other\na.png,20,30,50\n")
    assert load(table).tolist() == pytest.approx([0.2, 0.3, 0.5])
    table.write_text("image,tumour,stroma,other\na.png,30,20,50\n")
    os.utime(table, ns=(10**18, 10**18))
    assert load(table).tolist() == pytest.approx([0.3, 0.2, 0.5])


def test_loading_from_json(tmp_path):
    load = LoadProportions(CLASSES)
    path = tmp_path / "a.json"
    label = ProportionLabel.exact(CLASSES, [0.6, 0.3, 0.1])
    for content in (
        {"tumour": 60, "stroma": "30 %", "other": 10},
        [0.6, 0.3, 0.1],
        {"proportions": {"tumour": 0.6, "stroma": 0.3, "other": 0.1}},
        label.to_dict(),
        {"proportions": label.to_dict(), "comment": "second look"},
    ):
        path.write_text(json.dumps(content))
        assert load(path).tolist() == pytest.approx([0.6, 0.3, 0.1])
        assert load(tmp_path / "a.png").tolist() == pytest.approx([0.6, 0.3, 0.1])  # beside the image
    with pytest.raises(ProportionError, match="b.json does not exist.*no table"):
        load(tmp_path / "b.png")
    path.write_text("{")
    with pytest.raises(ProportionError, match="a.json is no JSON"):
        load(path)
    path.write_text('{"tumour": "lots"}')
    with pytest.raises(ProportionError, match="a.json: .*column 'tumour': 'lots'"):
        load(path)


def test_items_of_image_and_label(table, tmp_path):
    (tmp_path / "x.json").write_text('{"tumour": 10, "stroma": 20, "other": 70}')
    load = LoadProportionsd("label", CLASSES)
    out = load({"image": str(tmp_path / "x.png"), "label": str(tmp_path / "x.json")})
    assert out["label"].tolist() == pytest.approx([0.1, 0.2, 0.7]) and out["image"] == str(tmp_path / "x.png")
    out = load({"image": "a.png", "label": str(table)})
    assert out["label"].tolist() == pytest.approx([0.55, 0.35, 0.1])
    assert out["label_spread"].numpy() == pytest.approx([np.sqrt(0.005), np.sqrt(0.005), 0], abs=1e-6)
    assert out["label_lower"].tolist() == pytest.approx([0.5, 0.3, 0.1])
    loaded = load({"image": torch.zeros(3, 4, 4), "image_path": "b.png", "label": str(table)})
    assert loaded["label"].tolist() == pytest.approx([0.15, 0.85, 0])
    assert LoadProportionsd("label", CLASSES, allow_missing_keys=True)({"image": "a.png"}) == {"image": "a.png"}


def test_in_a_data_loader(table):
    data = [{"image": name, "proportions": name} for name in ("a.png", "b.png")] * 4
    chain = Compose([LoadProportionsd("proportions", CLASSES, table), RandRaterNoised("proportions", level="low")])
    batch = next(iter(DataLoader(Dataset(data, chain), batch_size=8)))
    assert batch["proportions"].shape == (8, 3) and batch["proportions"].sum(1).numpy() == pytest.approx(1, abs=1e-6)
    assert batch["proportions_spread"].shape == (8, 3)
