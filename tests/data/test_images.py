"""Reading images."""

import logging
import struct
import zlib

import numpy as np
import pytest
from monai.utils import optional_import

from monai_vslp.data import images
from monai_vslp.data.images import check_images, image_size, list_images, read_image
from monai_vslp.utils.errors import ImageReadError

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")


@pytest.fixture
def rgb():
    y, x = np.mgrid[:40, :56]
    return np.stack([x * 4, y * 6, (x * y) % 256], axis=-1).astype(np.uint8)


def saved(path, array, mode=None, **kwargs):
    Image.fromarray(array, mode).save(path, **kwargs) if mode else Image.fromarray(array).save(path, **kwargs)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_lossless_formats_are_exact(tmp_path, rgb, suffix):
    path = saved(tmp_path / f"x{suffix}", rgb)
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"] and (image == rgb).all()
    assert image_size(path) == (40, 56)
    assert (read_image(str(path)) == rgb).all()


def test_jpeg(tmp_path):
    flat = np.full((32, 48, 3), (200, 120, 180), np.uint8)
    image = read_image(saved(tmp_path / "x.jpg", flat, quality=95))
    assert image.shape == (32, 48, 3) and np.abs(image.astype(int) - flat).max() <= 3


def test_grey_and_one_bit(tmp_path, rgb):
    grey = read_image(saved(tmp_path / "g.png", rgb[..., 0]))
    assert (grey == rgb[..., :1]).all() and grey.shape == (40, 56, 3)
    bits = rgb[..., 0] > 100
    assert (read_image(saved(tmp_path / "b.png", bits))[..., 2] == bits * 255).all()


def test_transparency_is_laid_on_white(tmp_path, rgb):
    alpha = np.zeros((40, 56, 1), np.uint8)
    alpha[:, 20:] = 255
    alpha[:, 40:] = 128
    image = read_image(saved(tmp_path / "a.png", np.concatenate([rgb, alpha], axis=2)))
    assert (image[:, :20] == 255).all() and (image[:, 20:40] == rgb[:, 20:40]).all()
    assert np.abs(image[:, 40:] - (rgb[:, 40:] / 255 * 128 + 127)).max() <= 1
    grey = read_image(saved(tmp_path / "la.png", np.concatenate([rgb[..., :1], alpha], axis=2), "LA"))
    assert (grey[:, :20] == 255).all() and (grey[:, 20:40] == rgb[:, 20:40, :1]).all()


def test_palettes(tmp_path, rgb):
    index = (rgb[..., 0] // 64).astype(np.uint8)
    colors = np.array([[10, 20, 30], [200, 0, 0], [0, 250, 0], [250, 250, 5]], np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette(colors.reshape(-1).tolist())
    picture.save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == colors[index]).all()
    picture.save(tmp_path / "t.png", transparency=1)
    image = read_image(tmp_path / "t.png")
    assert (image[index == 1] == 255).all() and (image[index == 2] == colors[2]).all()


def test_a_transparent_colour_key(tmp_path, rgb):
    rgb[:10] = (1, 2, 3)
    Image.fromarray(rgb).save(tmp_path / "k.png", transparency=(1, 2, 3))
    image = read_image(tmp_path / "k.png")
    assert (image[:10] == 255).all() and (image[11:] == rgb[11:]).all()


def test_cmyk(tmp_path, rgb):
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "c.tif")
    assert np.abs(read_image(tmp_path / "c.tif").astype(int) - rgb).max() <= 2
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "c.jpg").astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bit_files_are_scaled_by_the_depth_of_their_data(tmp_path, rgb, bits, caplog):
    deep = (rgb.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    deep[0, 0] = 2**bits - 1
    rgb[0, 0] = 255
    tifffile.imwrite(tmp_path / "rgb.tif", deep, photometric="rgb")
    tifffile.imwrite(tmp_path / "tiles.tif", deep, photometric="rgb", compression="zlib", tile=(16, 16))
    tifffile.imwrite(tmp_path / "planar.tif", np.moveaxis(deep, 2, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "grey.tif", deep[..., 0])
    saved(tmp_path / "grey.png", deep[..., 0])
    with caplog.at_level(logging.INFO):
        for name in ("rgb.tif", "tiles.tif", "planar.tif"):
            image = read_image(tmp_path / name)
            assert image.shape == rgb.shape and np.abs(image.astype(int) - rgb).max() <= 1
        for name in ("grey.tif", "grey.png"):
            assert np.abs(read_image(tmp_path / name).astype(int) - rgb[..., :1]).max() <= 1
    assert "scaled to 8 bit" in caplog.text and str(2**bits - 1) in caplog.text


def test_other_tiff_kinds(tmp_path, rgb):
    real = rgb[..., 0].astype(np.float32) / 255
    tifffile.imwrite(tmp_path / "f.tif", real)
    assert (read_image(tmp_path / "f.tif")[..., 0] == rgb[..., 0]).all()
    tifffile.imwrite(tmp_path / "w.tif", rgb[..., 0].astype(np.uint16) * 257, photometric="miniswhite")
    assert (read_image(tmp_path / "w.tif")[..., 1] == 255 - rgb[..., 0]).all()
    wide = np.concatenate([rgb, np.full((40, 56, 1), 255, np.uint8)], axis=2).astype(np.uint16) * 257
    wide[:8, :, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb", extrasamples=["unassalpha"])
    image = read_image(tmp_path / "a.tif")
    assert (image[:8] == 255).all() and (image[8:] == rgb[8:]).all()
    tifffile.imwrite(tmp_path / "x.tif", wide, photometric="rgb", extrasamples=["unspecified"])
    assert (read_image(tmp_path / "x.tif") == rgb).all()
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([rgb, 255 - rgb]), photometric="rgb")
    assert (read_image(tmp_path / "pages.tif") == rgb).all()
    assert image_size(tmp_path / "f.tif") == (40, 56)


def test_values_that_are_no_brightness_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "n.tif", np.full((8, 8), np.nan, np.float32))
    with pytest.raises(ImageReadError, match="NaN"):
        read_image(tmp_path / "n.tif")
    tifffile.imwrite(tmp_path / "m.tif", np.full((8, 8), -3, np.int16))
    with pytest.raises(ImageReadError, match="negative"):
        read_image(tmp_path / "m.tif")
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((8, 8, 4), np.uint16), photometric="separated")
    with pytest.raises(ImageReadError, match="SEPARATED.*Convert it to RGB"):
        read_image(tmp_path / "c.tif")


def test_pixels_stay_as_stored_whatever_exif_says(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.fromarray(rgb).save(tmp_path / "e.png", exif=exif)
    assert (read_image(tmp_path / "e.png") == rgb).all() and image_size(tmp_path / "e.png") == (40, 56)


KINDS = {
    "x.png": {},
    "x.jpg": {},
    "x.bmp": {},
    "plain.tif": {},
    "deflate.tif": {"compression": "zlib", "tile": (16, 16)},
    "jpeg.tif": {"compression": "jpeg", "tile": (16, 16)},
    "planar.tif": {"planarconfig": "separate"},
    "sixteen.tif": {},
}


@pytest.mark.parametrize("part", [0.0, 0.05, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("name", KINDS)
def test_truncated_files_are_refused(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    if path.suffix == ".tif":
        array = noise.astype(np.uint16) * 257 if name == "sixteen.tif" else noise
        array = np.moveaxis(array, 2, 0) if name == "planar.tif" else array
        tifffile.imwrite(path, array, photometric="rgb", **KINDS[name])
    else:
        saved(path, noise)
    assert read_image(path).shape == (64, 64, 3)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ImageReadError, match=rf"{name} cannot be read"):
        read_image(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_files_that_are_no_images(tmp_path):
    for name, content in (("x.png", b"hello"), ("x.tif", b"hello"), ("x.txt", b"hello"), ("y.tif", b"II*\x00\x08\x00\x00\x00")):
        (tmp_path / name).write_bytes(content)
        for function in (read_image, image_size):
            with pytest.raises(ImageReadError, match=rf"{name} cannot be read"):
                function(tmp_path / name)
    with pytest.raises(ImageReadError, match="does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageReadError, match="is a folder"):
        read_image(tmp_path)


def png_header(height, width):
    """A PNG file of that size, whose pixels are missing."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"):
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return chunks


def test_large_images_are_no_bombs(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    big = np.zeros((3000, 4000), np.uint8)
    assert read_image(saved(tmp_path / "big.png", big)).shape == (3000, 4000, 3)
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    assert image_size(tmp_path / "huge.png") == (20_000, 20_000)
    assert not [w for w in recwarn if "bomb" in str(w.message).lower()]


def test_images_beyond_the_limit_are_sent_to_the_slide_reader(tmp_path, monkeypatch, rgb):
    monkeypatch.setattr(images, "LARGEST", 2000)
    saved(tmp_path / "x.png", rgb)
    tifffile.imwrite(tmp_path / "x.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    for name in ("x.png", "x.tif"):
        with pytest.raises(ImageReadError, match="56 x 40 px.*slide"):
            read_image(tmp_path / name)


def test_a_larger_limit_of_the_user_is_kept(tmp_path, monkeypatch, rgb):
    path = saved(tmp_path / "x.png", rgb)
    for limit in (None, 10**12):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        read_image(path)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_all_unreadable_images_are_named_at_once(tmp_path, rgb):
    good = [saved(tmp_path / f"good{i}.png", rgb) for i in range(5)]
    assert check_images(good) is None
    bad = []
    for i in range(25):
        bad.append(tmp_path / f"bad{i:02d}.png")
        bad[-1].write_bytes(good[0].read_bytes()[:60])
    with pytest.raises(ImageReadError) as info:
        check_images([*good, *bad[:2], tmp_path / "absent.png"])
    text = str(info.value)
    assert "3 image(s)" in text and "bad00.png" in text and "bad01.png" in text and "absent.png does not exist" in text
    assert "good" not in text
    with pytest.raises(ImageReadError, match="(?s)25 image.*and 5 more"):
        check_images(bad)


def test_missing_packages_are_named(tmp_path, monkeypatch, rgb):
    path = saved(tmp_path / "x.png", rgb)
    monkeypatch.setattr(images, "Image", optional_import("absent_package")[0])
    with pytest.raises(ImageReadError, match="x.png cannot be read; install what is missing.*absent_package"):
        read_image(path)


def test_images_of_a_folder(tmp_path, rgb):
    for name in ("b.PNG", "a.png", ".hidden.png"):
        saved(tmp_path / name, rgb, format="PNG")
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in list_images(tmp_path)] == ["a.png", "b.PNG"]
