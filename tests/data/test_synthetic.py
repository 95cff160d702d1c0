import csv

import numpy as np
import pytest
from PIL import Image

from monai_vslp.data import read_cohort
from monai_vslp.data.slides import open_slide
from monai_vslp.data.synthetic import CLASSES, COLORS, label_map, synthetic_image, write_cohort, write_slide


@pytest.mark.parametrize("p", [[0.2, 0.2, 0.2, 0.2, 0.2], [0.9, 0.1, 0, 0, 0], [0.03, 0.47, 0, 0.5, 0], [1, 0, 0, 0, 0]])
def test_label_maps_have_the_proportions_asked_for(p):
    labels = label_map((256, 256), p, seed=3)
    found = np.bincount(labels.ravel(), minlength=5) / labels.size
    np.testing.assert_allclose(found, p, atol=0.01)
    assert not found[np.array(p) == 0].any()


def test_the_seed_decides_every_byte_and_only_the_seed():
    first, again, other = (synthetic_image(seed=s) for s in (4, 4, 5))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (256, 256, 3) and first.image.dtype == np.uint8
    assert len(CLASSES) == len(COLORS) == len(first.proportions)
    assert first.proportions.sum() == pytest.approx(1)


def test_proportions_are_diverse():
    shares = np.array([synthetic_image((64, 64), seed=s).proportions for s in range(30)])
    assert (shares == 0).mean() > 0.15
    assert (shares.std(axis=0) > 0.15).all()


def test_mean_colour_alone_does_not_tell_the_classes():
    """A linear classifier of colours, with masks at hand, stays far from a useful map: structure has to be learned."""
    from sklearn.linear_model import LogisticRegression

    from monai_vslp.metrics import ConfusionMatrix

    images = [synthetic_image((128, 128), [0.2] * 5, seed=s) for s in range(8)]
    colours = [tissue.image.reshape(-1, 3) / 255.0 for tissue in images]
    masks = [tissue.mask.ravel() for tissue in images]
    model = LogisticRegression(max_iter=300).fit(np.concatenate(colours[:6])[::9], np.concatenate(masks[:6])[::9])
    matrix = ConfusionMatrix(5)
    for colour, mask in zip(colours[6:], masks[6:]):
        matrix.update(model.predict(colour)[None], mask[None])
    assert matrix.compute().miou < 0.4


def test_cohort_has_images_masks_apart_and_tables_of_three_raters(tmp_path):
    table = write_cohort(tmp_path, train=5, val=3, size=64)
    cohort = read_cohort(table, tmp_path / "images")
    assert cohort.classes == CLASSES
    assert (len(cohort.split("train")), len(cohort.split("val"))) == (5, 3)
    train, val = ({r.patient for r in cohort.split(s).records} for s in ("train", "val"))
    assert not train & val
    for record in cohort.records:
        mask = np.array(Image.open(tmp_path / "masks" / record.image.name))
        np.testing.assert_allclose(record.proportions.mean, np.bincount(mask.ravel(), minlength=5) / mask.size, atol=1e-3)
    for level in ("low", "medium", "high"):
        path = tmp_path / f"proportions_rater_{level}.csv"
        rows = list(csv.DictReader(path.open()))
        assert len(rows) == 24 and {row["rater"] for row in rows} == {"r1", "r2", "r3"}
        assert all(float(row[c]) % 5 == 0 for row in rows for c in CLASSES)
        rated = read_cohort(path, tmp_path / "images")
        assert rated.records[0].proportions.raters == 3


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_slides_open_in_both_readers_with_levels_and_scale(tmp_path, reader):
    slide = write_slide(tmp_path / "s.tif", shape=(2048, 2048), seed=1)
    with open_slide(slide.path, reader=reader) as opened:
        assert opened.shape == (2048, 2048)
        assert opened.mpp == pytest.approx(0.5, rel=1e-3)
        assert [round(d) for d in opened.level_downsamples] == [1, 2]
        thumbnail = opened.thumbnail(downsample=8)
    mask = np.array(Image.open(slide.mask))
    assert mask.shape == (512, 512) and slide.mask_downsample == 4
    glass = mask[1::2, 1::2] == 255
    assert thumbnail[glass].mean() > thumbnail[~glass].mean() + 20
    counts = np.bincount(mask[mask != 255], minlength=5)
    np.testing.assert_allclose(slide.proportions, counts / counts.sum())
