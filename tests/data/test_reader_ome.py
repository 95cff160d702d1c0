"""OME-TIFF and OME-Zarr: every order of axes, compression and version against known pixels."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile

from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.utils.errors import SlideError

zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")


@pytest.fixture(scope="module")
def levels():
    rng = np.random.default_rng(0)
    full = rng.integers(0, 256, (301, 403, 3), dtype=np.uint8)
    half = np.round(full[:300, :402].reshape(150, 2, 201, 2, 3).mean(axis=(1, 3))).astype(np.uint8)
    return [full, half]


def arrange(image, axes):
    """``[H, W, 3]`` in the order of ``axes``, all others of length 1."""
    letters = "YXC" if "C" in axes else "YXS"
    order = [letters.index(axis) for axis in axes if axis in letters]
    return image.transpose(order).reshape([image.shape[letters.index(axis)] if axis in letters else 1 for axis in axes])


def write_tiff(path, levels, axes="YXS", compression="zlib", size=0.5, unit="µm", ome=True):
    metadata = {"axes": axes}
    if size is not None:
        metadata |= {f"PhysicalSize{a}": size for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
    options = {"tile": (64, 64), "compression": compression, "photometric": "rgb" if "S" in axes else "minisblack"}
    if axes.index("X") < len(axes) - 1 or "S" not in axes:
        options["planarconfig"] = None if "S" not in axes else "contig"
    else:
        options["planarconfig"] = "separate"
    with tifffile.TiffWriter(path, ome=ome) as writer:
        for index, level in enumerate(levels):
            extra = {"subifds": len(levels) - 1, "metadata": metadata} if index == 0 else {"subfiletype": 1, "metadata": None}
            writer.write(arrange(level, axes), **options, **extra)


def write_zarr(path, levels, axes="cyx", version="0.5", unit="micrometer", scale=0.5, layout=False, blosc=False):
    group = root = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    if layout:
        root.attrs.update({"bioformats2raw.layout": 3} if version == "0.4" else {"ome": {"bioformats2raw.layout": 3}})
        group = root.create_group("0")
    options = {}
    if blosc:
        options["compressors"] = numcodecs.Blosc() if version == "0.4" else zarr.codecs.BloscCodec()
    datasets = []
    for index, level in enumerate(levels):
        pixels = arrange(level, axes.upper())
        chunks = tuple(64 if axis in "yx" else 1 for axis in axes)
        array = group.create_array(str(index), shape=pixels.shape, dtype="uint8", chunks=chunks, **options)
        array[...] = pixels
        steps = [scale * 2**index if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(index), "coordinateTransformations": [{"type": "scale", "scale": steps}]})
    kinds = {"t": "time", "c": "channel"}
    described = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    for axis in described:
        if axis["name"] in "yx" and unit:
            axis["unit"] = unit
    image = {"multiscales": [{"version": version, "axes": described, "datasets": datasets}]}
    group.attrs.update(image if version == "0.4" else {"ome": image | {"version": version}})


def check_pixels(slide, levels):
    assert slide.level_shapes == tuple(level.shape[:2] for level in levels)
    assert slide.level_downsamples == tuple(2.0**i for i in range(len(levels)))
    for index, level in enumerate(levels):
        down = 2**index
        region = slide.read(index, 50 * down, 60 * down, 90, 80)
        assert region.dtype == np.uint8
        np.testing.assert_array_equal(region, level[50:140, 60:140])
        last = slide.read(index, (level.shape[0] - 4) * down, (level.shape[1] - 3) * down, 6, 6)
        np.testing.assert_array_equal(last[:4, :3], level[-4:, -3:])
        assert (last[4:] == 255).all() and (last[:, 3:] == 255).all()


@pytest.mark.parametrize("axes", ["YXS", "CYX", "TCZYX", "ZYXS"])
def test_axes_of_tiff(tmp_path, levels, axes):
    path = tmp_path / "x.ome.tif"
    write_tiff(path, levels, axes)
    assert is_slide(path)
    with open_slide(path) as slide:  # neither cuCIM nor OpenSlide sees these levels
        assert slide.reader == "ome" and slide.mpp == pytest.approx(0.5)
        check_pixels(slide, levels)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "jpeg2000", "packbits", "webp"])
def test_compressions_of_tiff(tmp_path, levels, compression):
    path = tmp_path / "x.ome.tif"
    lossless = {"jpeg2000": {"level": 0}, "webp": {"lossless": True}}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(
            levels[0],
            tile=(64, 64),
            photometric="rgb",
            compression=compression,
            compressionargs=lossless.get(compression),
            metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
        )
    for reader in ("auto", "ome"):  # each states the size that is in the XML only, cuCIM and OpenSlide too
        with open_slide(path, reader) as slide:
            assert slide.mpp == pytest.approx(0.5)
            check_pixels(slide, levels[:1])


def test_readers_that_would_miss_levels_or_channels_say_so(tmp_path, levels):
    write_tiff(tmp_path / "x.tif", levels)
    write_tiff(tmp_path / "y.tif", levels[:1], "CYX")
    for reader in ("cucim", "openslide"):
        with pytest.raises(SlideError, match="sees 1 of 2 levels"):
            open_slide(tmp_path / "x.tif", reader)
        with pytest.raises(SlideError, match=f"{reader}: "):
            open_slide(tmp_path / "y.tif", reader)


@pytest.mark.parametrize(("size", "unit", "mpp"), [(250, "nm", 0.25), (5e-4, "mm", 0.5), (0.3, "µm", 0.3), (1, "pixel", None)])
def test_physical_sizes(tmp_path, levels, size, unit, mpp):
    write_tiff(tmp_path / "x.ome.tif", levels, size=size, unit=unit)
    names = {"nm": "nanometer", "mm": "millimeter", "µm": "micrometer", "pixel": None}
    write_zarr(tmp_path / "x.zarr", levels, scale=size, unit=names[unit])
    for name in ("x.ome.tif", "x.zarr"):
        if mpp is None:
            with pytest.raises(SlideError, match="does not say.*--mpp 0.5"):
                open_slide(tmp_path / name)
        with open_slide(tmp_path / name, mpp=0.7 if mpp is None else None) as slide:
            assert slide.mpp == pytest.approx(0.7 if mpp is None else mpp)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx", "yxc", "zcyx"])
def test_zarr(tmp_path, levels, version, axes):
    write_zarr(tmp_path / "x.zarr", levels, axes, version)
    assert is_slide(tmp_path / "x.zarr")
    with open_slide(tmp_path / "x.zarr") as slide:
        assert slide.reader == "ome" and slide.mpp == pytest.approx(0.5)
        check_pixels(slide, levels)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_first_image_of_bioformats2raw(tmp_path, levels, version):
    write_zarr(tmp_path / "x.zarr", levels, version=version, layout=True)
    with open_slide(tmp_path / "x.zarr") as slide:
        check_pixels(slide, levels)


def test_what_is_no_colour_image_is_refused(tmp_path, levels):
    grey = np.zeros((4, 70, 70), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "four.ome.tif", grey, ome=True, tile=(64, 64), photometric="minisblack", metadata={"axes": "CYX"}
    )
    tifffile.imwrite(
        tmp_path / "deep.ome.tif", grey, ome=True, tile=(64, 64), photometric="minisblack", metadata={"axes": "ZYX"}
    )
    wide = levels[0].astype(np.uint16)
    tifffile.imwrite(tmp_path / "wide.ome.tif", wide, ome=True, tile=(64, 64), photometric="rgb", metadata={"axes": "YXS"})
    for name, reason in (("four", "expected three colours"), ("deep", "expected three colours"), ("wide", "uint16")):
        with pytest.raises(SlideError, match=reason):
            open_slide(tmp_path / f"{name}.ome.tif", "ome", mpp=0.5)
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    with pytest.raises(SlideError, match="no multiscales"):
        open_slide(tmp_path / "empty.zarr", mpp=0.5)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("axes", ["YXS", "CYX"])
def test_truncated_tiff(tmp_path, levels, share, axes):
    path = tmp_path / "x.ome.tif"
    write_tiff(path, levels, axes)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SlideError, match="cannot be read"):
        open_slide(path, mpp=0.5)


def test_damage_in_the_middle_of_a_tiff(tmp_path, levels):
    path = tmp_path / "x.ome.tif"
    write_tiff(path, levels)
    with tifffile.TiffFile(path) as file:
        start, count = file.pages[0].dataoffsets[9], file.pages[0].databytecounts[9]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 60, 60), levels[0][:60, :60])
        with pytest.raises(SlideError, match="cannot be read at level 0.*damaged"):
            slide.read(0, 0, 0, 300, 400)


@pytest.mark.parametrize("blosc", [False, True])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_damage_of_zarr(tmp_path, levels, version, blosc):
    path = tmp_path / "x.zarr"
    write_zarr(path, levels, version=version, blosc=blosc)
    chunk = path / "0" / ("1.1.2" if version == "0.4" else "c/1/1/2")  # of green, rows 64 …, columns 128 …
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 60, 60), levels[0][:60, :60])
        with pytest.raises(SlideError, match="cannot be read at level 0.*damaged"):
            slide.read(0, 64, 128, 10, 10)
    chunk.unlink()  # legal: such a chunk has the fill value
    with open_slide(path) as slide:
        expected = levels[0][64:128, 128:192].copy()
        expected[..., 1] = 0
        np.testing.assert_array_equal(slide.read(0, 64, 128, 64, 64), expected)
    shutil.rmtree(path / "1")
    with pytest.raises(SlideError, match="cannot be read.*ome:"):
        open_slide(path)


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_threads_share_a_slide(tmp_path, levels, kind):
    if kind == "tiff":
        write_tiff(tmp_path / "x.tif", levels)
    else:
        write_zarr(tmp_path / "x.zarr", levels)
    corners = [(row, col) for row in range(0, 240, 31) for col in range(0, 340, 47)]
    with open_slide(next(tmp_path.iterdir())) as slide, ThreadPoolExecutor(4) as pool:
        for (row, col), region in zip(corners, pool.map(lambda corner: slide.read(0, *corner, 60, 60), corners)):
            np.testing.assert_array_equal(region, levels[0][row : row + 60, col : col + 60])
