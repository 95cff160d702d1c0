"""Random tissue tiles: from where, how much tissue, the same again."""

import logging

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from monai_vslp.data.tiles import TissueTiles, prepare_tiles
from monai_vslp.transforms import RandStainJitter, TissueMask
from monai_vslp.utils.errors import ImageReadError, InputError

PLAIN = {"scale": (1, 1), "progress": False}


class Dark:
    """Tissue is what is dark; sees the image at ``mpp``."""

    def __init__(self, mpp=4.0):
        self.mpp = mpp

    def __call__(self, image):
        return image.mean(axis=0, keepdims=True) < 128


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def half_dark(size=(128, 256)):
    """White, dark in the right half."""
    image = np.full((*size, 3), 255)
    image[:, size[1] // 2 :] = 30
    return image


def addressed(size=(200, 240)):
    """Each pixel's colour tells its place: R is the row, G the column."""
    image = np.zeros((*size, 3))
    image[..., 0], image[..., 1] = np.mgrid[: size[0], : size[1]]
    return image


def write_slide(path, image, mpp=0.25):
    """A tiled TIFF of two levels."""
    with tifffile.TiffWriter(path) as writer:
        for index, d in enumerate((1, 2)):
            blocks = image.reshape(image.shape[0] // d, d, image.shape[1] // d, d, 3).mean(axis=(1, 3))
            writer.write(
                blocks.round().astype(np.uint8), tile=(128, 128), compression="zlib", photometric="rgb",
                subfiletype=int(index > 0), resolution=(1e4 / mpp / d, 1e4 / mpp / d), resolutionunit=3,
            )  # fmt: skip
    return path


def test_tiles_have_enough_tissue(tmp_path):
    save(tmp_path / "a.png", half_dark())
    tiles = TissueTiles(tmp_path, 32, length=300, tissue=Dark(), min_tissue=0.75, **PLAIN)
    shares = torch.stack([(tiles[i]["image"] < 0.5).all(dim=0).float().mean() for i in range(300)])
    # A cell is 8 px, a quarter of a tile: that is how exact a share can be.
    assert shares.min() >= 0.75 - 0.25 and shares.max() == 1
    assert (shares > 0.99).float().mean() > 0.5
    assert (shares < 0.99).any(), "tiles at the border of tissue are taken, too"


def test_all_of_the_tissue_is_visited(tmp_path):
    """Each pixel is addressed by its colour: tiles cover the image evenly apart from its border."""
    save(tmp_path / "a.png", addressed())
    tiles = TissueTiles(tmp_path, 40, length=600, **PLAIN)
    hits = np.zeros((200, 240))
    for i in range(len(tiles)):
        row, col = (tiles[i]["image"][:2].amin(dim=(1, 2)) * 255).round().int().tolist()
        top = (tiles[i]["image"][:2].amax(dim=(1, 2)) * 255).round().int().tolist()
        assert top == [row + 39, col + 39]
        hits[row : row + 40, col : col + 40] += 1
    assert hits.max(axis=0).min() >= 1 and hits.max(axis=1).min() >= 1, "tiles reach all four borders"
    inner = hits[40:-40, 40:-40]
    assert inner.min() > 0.4 * inner.mean() and inner.max() < 1.8 * inner.mean()


def test_files_are_chosen_by_their_tissue(tmp_path):
    for name, value, side in (("a", 60, 240), ("b", 100, 120)):
        save(tmp_path / f"{name}.png", np.full((side, side, 3), value))
    save(tmp_path / "white.png", np.full((400, 400, 3), 255))
    tiles = TissueTiles(tmp_path, 40, length=500, tissue=Dark(), **PLAIN)
    assert [path.name for path in tiles.files] == ["a.png", "b.png"]
    share = np.mean([float(tiles[i]["image"].mean()) < 80 / 255 for i in range(500)])
    assert share == pytest.approx(0.8, abs=0.06)
    assert tiles.area == 240**2 + 120**2
    assert len(TissueTiles(tmp_path, 40, tissue=Dark(), **PLAIN)) == 45  # (240² + 120²) / 40²


def test_turned_and_mirrored_all_eight_ways(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    save(tmp_path / "a.png", image)
    tiles = TissueTiles(tmp_path, 32, length=200, **PLAIN)
    wanted = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    views = [torch.rot90(v, turns, (-2, -1)) for v in (wanted, wanted.flip(-1)) for turns in range(4)]
    found = [[torch.allclose(tiles[i]["image"], view) for view in views].index(True) for i in range(200)]
    counts = np.bincount(found, minlength=8)
    assert counts.min() > 10


def test_scale_changes_what_a_tile_covers(tmp_path):
    save(tmp_path / "a.png", addressed())
    tiles = TissueTiles(tmp_path, 64, length=200, scale=(0.5, 2.0), progress=False)
    spans = []
    for i in range(200):
        x = tiles[i]["image"]
        assert x.shape == (3, 64, 64) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        spans.append(float((x[0].max() - x[0].min()) * 255))
    assert min(spans) < 36 and max(spans) > 110
    assert np.median(np.log(np.array(spans) / 63)) == pytest.approx(0, abs=0.15)


def test_a_tile_depends_on_seed_epoch_and_index_alone(tmp_path):
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (100, 90, 3)))

    def make(seed=0, **options):
        transform = RandStainJitter(prob=1.0)
        return TissueTiles(tmp_path, 32, length=6, seed=seed, transform=transform, progress=False, **options)

    one, two, small = make(), make(), make(memory=0)
    backwards = [two[i]["image"] for i in reversed(range(6))][::-1]
    for i in range(6):
        assert torch.equal(one[i]["image"], backwards[i])
        assert torch.equal(one[i]["image"], small[i]["image"])
    assert not torch.equal(one[0]["image"], one[1]["image"])
    assert not torch.equal(one[0]["image"], make(seed=1)[0]["image"])
    first = one[0]["image"]
    still = one.picture(0)
    one.set_epoch(2)
    assert not torch.equal(first, one[0]["image"])
    assert torch.equal(still, one.picture(0))
    workers = DataLoader(one, batch_size=3, num_workers=1)
    straight = DataLoader(one, batch_size=3)
    for a, b in zip(workers, straight):
        assert torch.equal(a["image"], b["image"])
    with pytest.raises(IndexError):
        one[6]


def test_stain_is_changed_and_glass_stays_white(tmp_path):
    image = np.full((64, 64, 3), 255)
    image[:, 32:] = (200, 90, 160)
    save(tmp_path / "a.png", image)
    tiles = TissueTiles(tmp_path, 64, length=20, transform=RandStainJitter(prob=1.0), **PLAIN)
    drawn = torch.stack([tiles[i]["image"] for i in range(20)])
    bright = drawn.amin(dim=1) > 0.98
    assert bright.float().mean() == pytest.approx(0.5, abs=0.01)
    tissue = torch.stack([x[:, ~b].mean(dim=1) for x, b in zip(drawn, bright)])
    assert tissue.std(dim=0).min() > 0.01


def test_slides_are_read_at_the_scale_asked_for(tmp_path):
    """Each 2 x 2 block of the slide has one colour, its address at twice the µm/px."""
    image = np.repeat(np.repeat(addressed((160, 192)), 2, axis=0), 2, axis=1)
    write_slide(tmp_path / "s.tif", image, mpp=0.25)
    tiles = TissueTiles(tmp_path / "s.tif", 40, length=40, mpp=0.5, **PLAIN)
    assert tiles.area == 160 * 192
    for i in range(40):
        x = (tiles[i]["image"][:2] * 255).round().int()
        assert (x.amax(dim=(1, 2)) - x.amin(dim=(1, 2))).tolist() == [39, 39]
    other = TissueTiles(tmp_path / "s.tif", 40, length=20, mpp=0.5, scale=(0.5, 1.5), progress=False)
    assert all(other[i]["image"].shape == (3, 40, 40) for i in range(20))


def test_tissue_of_slides_is_found(tmp_path):
    image = half_dark((512, 1024))
    image[:, 512:] = (190, 90, 160)
    write_slide(tmp_path / "s.tif", image, mpp=0.5)
    detector = TissueMask(mpp=8.0, smooth=4.0, min_size=100.0, max_hole=100.0)
    tiles = TissueTiles([tmp_path / "s.tif"], 64, length=60, mpp=0.5, tissue=detector, min_tissue=0.9, **PLAIN)
    assert tiles.area == pytest.approx(512 * 512, rel=0.15)
    shares = [float((tiles[i]["image"][1] < 0.6).float().mean()) for i in range(60)]
    assert np.mean(shares) > 0.93 and min(shares) > 0.5


def test_what_cannot_be_used_is_left_out_or_refused(tmp_path, caplog):
    save(tmp_path / "ok.png", np.full((64, 64, 3), 20))
    save(tmp_path / "tiny.png", np.full((20, 64, 3), 20))
    with caplog.at_level(logging.WARNING):
        tiles = TissueTiles(tmp_path, 32, tissue=Dark(), **PLAIN)
    assert [path.name for path in tiles.files] == ["ok.png"]
    assert "1 of 2 files" in caplog.text and "tiny.png" in caplog.text
    with pytest.raises(InputError, match=r"none of 2 files has a tile of 128 px \(64 µm\)"):
        TissueTiles(tmp_path, 128, tissue=Dark(), **PLAIN)
    (tmp_path / "bad.png").write_bytes((tmp_path / "ok.png").read_bytes()[:60])
    with pytest.raises(ImageReadError, match=r"bad\.png"):
        TissueTiles(tmp_path, 32, **PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "at least 1"),
        ({"length": 0}, "at least 1"),
        ({"mpp": 0.0}, "positive"),
        ({"min_tissue": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"scale": (1.2, 0.8)}, "smaller first"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    save(tmp_path / "a.png", np.zeros((64, 64, 3)))
    with pytest.raises(InputError, match=message):
        TissueTiles(tmp_path, **{"tile": 32, **options}, progress=False)


def test_fingerprint_and_batches(tmp_path):
    save(tmp_path / "a.png", half_dark())
    tiles = TissueTiles(tmp_path, 32, length=2, **PLAIN)
    before = tiles.fingerprint
    assert before == TissueTiles(tmp_path, 32, **PLAIN).fingerprint
    save(tmp_path / "b.png", half_dark())
    assert before != TissueTiles(tmp_path, 32, **PLAIN).fingerprint
    batch = next(iter(DataLoader(tiles, batch_size=2)))
    x, target = prepare_tiles(batch, "cpu")
    assert x is target and x.shape == (2, 3, 32, 32)
