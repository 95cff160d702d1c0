"""Held-out proportions find the classes that are subtypes of one tissue, and a run that was trained has them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import SMALL_BACKBONE, write_small_backbone
from PIL import Image

from monai_vslp.data import write_table
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import segment, train
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.subtypes import search_subtypes

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

CLASSES = ["stroma", "benign", "malignant", "necrosis"]


def blocks(rng, classes, size, edge):
    """A map of square regions, each of one class."""
    coarse = torch.from_numpy(rng.choice(classes, size=(-(-size // edge), -(-size // edge))))
    return coarse.repeat_interleave(edge, 0).repeat_interleave(edge, 1)[:size, :size]


def held_out(subtypes, others, images=24, size=32, noise=3.0, seed=0):
    """Logits and proportions of maps whose regions hold one subtype each; tokens err in the subtype, not in the tissue."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    count = len(subtypes) + len(others)
    logits, shares = [], []
    for _ in range(images):
        kinds = blocks(rng, subtypes[: rng.integers(1, len(subtypes) + 1)] if subtypes else others, size, 16)
        tissue = blocks(rng, [0, 1], size, 4) if others and subtypes else torch.full((size, size), int(bool(subtypes)))
        labels = torch.where(tissue == 1, kinds, blocks(rng, others, size, 4)) if others else kinds
        z = 4.0 * F.one_hot(labels, count).permute(2, 0, 1)[None].float()
        for c in subtypes:
            z[:, c] += 2.0 * torch.isin(labels, torch.tensor(subtypes))
        error = noise * torch.randn(1, count, size, size, generator=generator)
        error[:, others] = 0.0
        logits.append(z + error * torch.isin(labels, torch.tensor(subtypes or [-1])))
        shares.append(torch.bincount(labels.flatten(), minlength=count) / labels.numel())
    return logits, [torch.ones(1, 1, size, size)] * images, torch.stack(shares)


@pytest.mark.parametrize(("subtypes", "others"), [([1, 2], [0, 3]), ([1, 2, 3], [0]), ([0, 3], [1, 2])])
def test_subtypes_are_found(subtypes, others):
    logits, masses, proportions = held_out(subtypes, others)
    found = search_subtypes(logits, masses, proportions)
    assert found.classes == tuple(subtypes)
    assert found.error < 0.9 * found.before


def test_where_there_are_none_none_are_found():
    logits, masses, proportions = held_out([], [0, 1, 2])
    assert search_subtypes(logits, masses, proportions) is None


def test_two_classes_have_no_subtypes():
    logits, masses, proportions = held_out([1], [0])
    assert search_subtypes(logits, masses, proportions) is None


def test_named_subtypes_are_taken_as_they_are():
    logits, masses, proportions = held_out([1, 2, 3], [0])
    found = search_subtypes(logits, masses, proportions, classes=[3, 1], edges=(3, 9))
    assert found.classes == (1, 3) and found.edge in (3, 9)


COLOURS = {"stroma": (225, 150, 190), "benign": (110, 70, 150), "malignant": (130, 60, 130)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Images of stroma and of one of two kinds of glands, hardly different; returns the table."""
    folder, rng, rows = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0), []
    (folder / "images").mkdir()
    for index in range(10):
        labels = np.zeros((64, 64), dtype=int)
        labels[:, rng.integers(16, 48) :] = 1 + index % 2
        rgb = np.array(list(COLOURS.values()))[labels] + rng.normal(0, 25, (64, 64, 3))
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"i{index}.png")
        shares = {name: f"{100 * (labels == c).mean():.1f}" for c, name in enumerate(COLOURS)}
        split = "train" if index < 6 else "val"
        rows.append({"image": f"i{index}.png", "split": split, "patient": f"p{index}", **shares})
    return write_table(folder / "table.csv", rows, list(COLOURS))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_small_backbone(tmp_path_factory.mktemp("weights") / "vit.safetensors")


def run(cohort, weights, output, **options):
    values = {
        "backbone_kwargs": SMALL_BACKBONE,
        "blocks": [0, 1],
        "window": 32,
        "rank": 16,
        "hidden": 8,
        "epochs": 3,
        "rounds": 0,
    }
    return train(cohort, cohort.parent / "images", output, weights=weights, progress=False, **{**values, **options})


NAMES = ("inference.json", "slide_inference.json", "train_regularizer.json")


def test_training_leaves_a_run_with_named_subtypes(cohort, weights, tmp_path, caplog):
    caplog.set_level("INFO")
    one = run(cohort, weights, tmp_path / "one", subtypes=["malignant", "benign"])
    assert "benign, malignant are told apart as subtypes of one tissue" in caplog.text
    found = read_config(one, "inference.json")["subtypes"]
    assert found["classes"] == [1, 2] and found["edge"] in (5, 9, 15, 25)
    assert all(read_config(one, name)["subtypes"] == found for name in NAMES)
    none = run(cohort, weights, tmp_path / "none", subtypes=[])
    assert all(read_config(none, name)["subtypes"] is None for name in NAMES)
    # The network is the same, what it says is not.
    states = [torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (one, none)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    image = cohort.parent / "images" / "i8.png"
    maps = []
    for folder in (one, none):
        assert segment([image], folder, tmp_path / f"out-{folder.name}", views="none", progress=False) == {}
        maps.append((tmp_path / f"out-{folder.name}" / "i8" / "confidence.tif").read_bytes())
    assert maps[0] != maps[1]
    # The same command again finds the same.
    before = (one / "models" / "model.pt").stat().st_mtime_ns
    run(cohort, weights, one, subtypes=["malignant", "benign"])
    assert read_config(one, "inference.json")["subtypes"] == found
    assert (one / "models" / "model.pt").stat().st_mtime_ns == before


def test_the_search_follows_by_itself(cohort, weights, tmp_path, monkeypatch):
    asked = []

    def found(run, cohort, classes, bag_dir, progress):
        asked.append((classes, len(list(bag_dir.glob("*.pt")))))
        return {"classes": [1, 2], "edge": 9}

    monkeypatch.setitem(train.__globals__, "find_subtypes", found)
    target = run(cohort, weights, tmp_path / "run")
    assert len(asked) == 1 and asked[0][0] is None
    assert asked[0][1] >= 10, "the features of all images are still there"
    assert all(read_config(target, name)["subtypes"] == {"classes": [1, 2], "edge": 9} for name in NAMES)
    run(cohort, weights, tmp_path / "recipe", recipe="proportion_pooling")
    assert len(asked) == 1, "methods for comparison go without"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtypes": ["gland", "benign"]}, "no class of .*stroma, benign, malignant"),
        ({"subtypes": ["benign"]}, "two classes .* at least"),
        ({"subtypes": ["benign", "malignant"], "finetune": True}, "chosen by held-out proportions"),
    ],
)
def test_bad_subtypes_are_refused_before_training(cohort, weights, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(cohort, weights, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
