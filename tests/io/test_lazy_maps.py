"""Maps that are computed when read, or wait on disk."""

from __future__ import annotations

import numpy as np
import pytest

from monai_vslp.io.lazy_maps import Derived, TileFile, halve_labels
from monai_vslp.io.map_blocks import halve_block


@pytest.mark.parametrize(
    "key",
    [
        (),
        (1,),
        ...,
        (slice(1, 3), slice(2, 9), slice(None, None, 3)),
        (..., slice(5, 2), slice(None)),
        (0, ..., -1),
        (slice(None), 4, slice(8, None, -2)),
        (np.array([2, 0]), slice(3, 5), slice(1, 4)),
    ],
)
def test_derived_maps_are_sliced_as_arrays(key):
    values = np.random.default_rng(0).integers(0, 100, (3, 11, 17))
    mass = np.random.default_rng(1).integers(0, 2, (11, 17))
    derived = Derived(lambda v, m, none: (v + m).astype(np.int64), values, mass, None, dtype=np.int64, leading=(3,))
    np.testing.assert_array_equal(derived[key], (values + mass)[key])
    np.testing.assert_array_equal(np.asarray(derived), values + mass)
    assert derived.shape == (3, 11, 17) and len(derived) == 3
    with pytest.raises(IndexError):
        derived[0, 0, 0, 0]


def test_derived_maps_read_no_more_than_the_window():
    asked = []

    class Source:
        shape, dtype = (100, 100), np.dtype(np.uint8)

        def __getitem__(self, key):
            asked.append(key)
            return np.zeros((100, 100), np.uint8)[key]

    Derived(lambda v: v, Source(), dtype=np.uint8)[10:20:4, 7]
    assert asked == [(slice(10, 19), slice(7, 8))]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_tile_files_keep_and_halve_as_arrays(tmp_path, labels, dtype):
    values = (np.random.default_rng(0).random((2, 75, 49)) * 5).astype(dtype)
    with TileFile(tmp_path, values.shape, dtype, 16) as file:
        for channel in (1, 0):
            for row in range(5):
                for col in range(4):
                    file.write(channel, row, col, values[channel, 16 * row :, 16 * col :][:16, :16])
        np.testing.assert_array_equal(file.read(1, 4, 3), values[1, 64:, 48:])
        assert [tile.shape for tile in file.tiles()][3::17] == [(16, 1), (16, 16), (11, 16)]
        half, expected = file.halved(tmp_path, labels), halve_block(values, labels)
        with half:
            again = halve_block(expected, labels)
            for level, wanted in ((half, expected), (half.halved(tmp_path, labels), again)):
                assert level.shape == wanted.shape
                found = np.zeros(wanted.shape, dtype)
                for channel in range(2):
                    for row in range(level.rows):
                        for col in range(level.cols):
                            found[channel, 16 * row :, 16 * col :][:16, :16] = level.read(channel, row, col)
                np.testing.assert_array_equal(found, wanted)
        with pytest.raises(ValueError, match="cannot be"):
            file.write(0, 4, 3, np.zeros((16, 16), dtype))
        assert not list(tmp_path.iterdir())  # the files have no names


@pytest.mark.parametrize("times", [0, 1, 4])
def test_halved_labels_are_the_levels_of_a_pyramid(times):
    labels = np.random.default_rng(0).integers(0, 4, (1037, 2071), dtype=np.uint8)
    level = labels[None]
    for _ in range(times):
        level = halve_block(level, labels=True)
    np.testing.assert_array_equal(halve_labels(labels, times), level[0])
