import csv
import hashlib

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from monai_vslp.data import read_cohort, synthetic
from monai_vslp.data.slides import open_slide
from monai_vslp.data.synthetic import CLASSES, COLORS, label_map, synthetic_image, write_cohort, write_slide
from monai_vslp.data.synthetic_textures import smooth_noise, texture
from monai_vslp.utils.errors import InputError, ProportionError


@pytest.mark.parametrize("p", [[0.2, 0.2, 0.2, 0.2, 0.2], [0.9, 0.1, 0, 0, 0], [0.03, 0.47, 0, 0.5, 0], [1, 0, 0, 0, 0]])
def test_label_maps_have_the_proportions_asked_for(p):
    labels = label_map((256, 256), p, seed=3)
    found = np.bincount(labels.ravel(), minlength=5) / labels.size
    np.testing.assert_allclose(found, p, atol=0.005)
    assert not found[np.array(p) == 0].any()


@pytest.mark.parametrize("p", [[0.5, -0.1, 0.6], [0, 0, 0], [np.nan, 1, 0], [[0.5, 0.5]]])
def test_label_maps_refuse_what_are_no_proportions(p):
    with pytest.raises(ProportionError, match="one weight"):
        label_map((32, 32), p)


def test_noise_meets_at_the_borders_only_if_it_is_periodic():
    """Interpolation across the border once drew strips of the other side's regions."""
    for shape in ((256, 256), (200, 300)):
        open_, closed = (smooth_noise(np.random.default_rng(0), shape, 70, periodic=p) for p in (False, True))
        for axis in (0, 1):
            steps = np.abs(np.diff(open_, axis=axis)).max()
            assert np.abs(np.diff(open_.take(range(-30, 0), axis=axis), axis=axis)).max() < 0.15 >= steps
            assert np.abs(closed.take(0, axis=axis) - closed.take(-1, axis=axis)).max() < 0.15
            assert np.abs(open_.take(0, axis=axis) - open_.take(-1, axis=axis)).max() > 0.5


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


def test_structures_keep_their_size_in_micrometres():
    for name in CLASSES:
        coarse, fine = texture(name, 0), texture(name, 0, 0.5)
        halved = fine.reshape(2, 640, 2, 640, 2).mean(axis=(2, 4))
        assert np.corrcoef(coarse.ravel(), halved.ravel())[0, 1] > 0.97
    assert texture("stroma", 0, 2.0).shape == (2, 320, 320)
    assert synthetic_image((64, 96), seed=1, mpp=0.5).image.shape == (64, 96, 3)


def test_drawings_of_training_validation_and_slides_differ():
    used = [*synthetic.TRAIN_VARIANTS, *synthetic.VAL_VARIANTS, *synthetic.SLIDE_VARIANTS]
    assert len(set(used)) == len(used)
    shares = np.eye(5)[1]
    train, val = (synthetic_image((64, 64), shares, seed=3, variants=v).image for v in ([0], [2]))
    assert not np.array_equal(train, val)


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(ProportionError, match="5 values"):
        synthetic_image((64, 64), [0.5, 0.5])
    with pytest.raises(InputError, match="mpp"):
        synthetic_image((64, 64), mpp=0)
    with pytest.raises(InputError, match="power of 2"):
        write_slide(tmp_path / "s.tif", (1024, 1024), mask_downsample=3)
    with pytest.raises(InputError, match="multiples of 4"):
        write_slide(tmp_path / "s.tif", (1026, 1024))
    assert not list(tmp_path.iterdir())


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
        np.testing.assert_allclose(record.proportions.mean, np.bincount(mask.ravel(), minlength=5) / mask.size, atol=1e-6)
    for level in ("low", "medium", "high"):
        path = tmp_path / f"proportions_rater_{level}.csv"
        rows = list(csv.DictReader(path.open()))
        assert len(rows) == 24 and {row["rater"] for row in rows} == {"r1", "r2", "r3"}
        assert all(float(row[c]) % 5 == 0 for row in rows for c in CLASSES)
        rated = read_cohort(path, tmp_path / "images")
        assert rated.records[0].proportions.raters == 3


def test_tissue_pieces_are_two_or_three_and_clear_of_the_border():
    for seed in range(8):
        tissue = synthetic._tissue_pieces(np.random.default_rng(seed), (256, 384))
        assert label(tissue, np.ones((3, 3)))[1] in (2, 3)
        assert 0.25 < tissue.mean() < 0.65
        assert not np.concatenate([tissue[0], tissue[-1], tissue[:, 0], tissue[:, -1]]).any()


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide whose sides are no multiples of the tile, and its level 0 before compression."""
    bands = []

    class Painter(synthetic._SlidePainter):
        def __call__(self, top, bottom):
            bands.append(super().__call__(top, bottom))
            return bands[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_SlidePainter", Painter)
        made = write_slide(tmp_path_factory.mktemp("slide") / "s.tif", shape=(2156, 2304), seed=1)
    return made, np.concatenate(bands)


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_slides_open_in_both_readers_with_levels_scale_and_pixels(slide, reader):
    made, source = slide
    assert source.shape == (2156, 2304, 3)
    with open_slide(made.path, reader=reader) as opened:
        assert opened.shape == (2156, 2304)
        assert opened.mpp == pytest.approx(0.5, rel=1e-3)
        assert opened.level_shapes == ((2156, 2304), (1078, 1152), (539, 576))
        pixels = opened.read_at(1800, 1900, 356, 404, downsample=1)
        thumbnail = opened.thumbnail(downsample=8)
    error = pixels.astype(float) - source[1800:, 1900:]
    assert np.abs(error).mean() < 4 and np.abs(error.mean(axis=(0, 1))).max() < 1
    mask = np.array(Image.open(made.mask))
    assert mask.shape == (539, 576) and made.mask_downsample == 4
    glass = mask[1:538:2, 1::2] == 255
    assert thumbnail[:269][glass].mean() > thumbnail[:269][~glass].mean() + 20


def test_the_mask_of_a_slide_is_true_and_gives_its_proportions(slide):
    made, source = slide
    mask = np.array(Image.open(made.mask))
    counts = np.bincount(mask[mask != 255], minlength=5)
    assert len(counts) == 5 and (counts > 0).all()
    np.testing.assert_allclose(made.proportions, counts / counts.sum())
    grey = source.reshape(539, 4, 576, 4, 3).mean(axis=(1, 3, 4))
    assert grey[mask == 255].std() < 5  # nothing but glass and dust
    assert grey[mask == CLASSES.index("tumour")].mean() < grey[mask == CLASSES.index("stroma")].mean()


def test_slides_of_one_seed_are_the_same_bytes(tmp_path):
    digests = {}
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        made = write_slide(tmp_path / f"{name}.tif", shape=(1024, 1024), seed=seed)
        digests[name] = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (made.path, made.mask)]
    assert digests["a"] == digests["b"] != digests["c"]


def test_corners_are_cut_where_a_coarse_map_has_stairs():
    stairs = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    double = synthetic._double(stairs)
    assert double.shape == (6, 6)
    np.testing.assert_array_equal(double[2:4, 2:4], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(synthetic._double(np.eye(2).repeat(2, 0).repeat(2, 1))[::7, ::7], np.eye(2))
