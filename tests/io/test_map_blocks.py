"""What writers of large maps have in common."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from monai_vslp.io.map_blocks import BLOCK_VALUES, aligned_windows, check_classes, halve_block, number_labels
from monai_vslp.utils.errors import InputError


class Chunked:
    def __init__(self, shape, chunks=None):
        self.shape, self.chunks = shape, chunks


@pytest.mark.parametrize(
    ("array", "sides"),
    [
        (np.zeros((3, 100, 70)), (16, 16)),
        (Chunked((3, 100, 70), (3, 20, 40)), (32, 48)),  # whole chunks, in multiples of 16
        (Chunked((100, 70), (16, 16)), (16, 16)),
        (Chunked((100, 70), ((50, 50), (70,))), (16, 16)),  # as Dask gives them
        (Chunked((3, 100, 70), (3, 100, BLOCK_VALUES)), (16, 16)),  # too much at once
    ],
)
def test_windows_cover_the_map_once(array, sides):
    covered = np.zeros(array.shape[-2:], int)
    for window in aligned_windows(array, 16):
        covered[window.core] += 1
        assert all(part.start % side == 0 for part, side in zip(window.core, sides))
        assert all(part.stop - part.start <= side for part, side in zip(window.core, sides))
    assert (covered == 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_numbers_of_labels(dtype):
    block = np.array([[0, 253, 255], [1, 7, 255]], dtype=dtype)
    found = number_labels(block, 254)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [[1, 254, 0], [2, 8, 0]])
    with pytest.raises(InputError, match="got 253"):
        number_labels(block, 8)


@pytest.mark.parametrize("wrong", [-1, 256, 300])
def test_labels_that_do_not_fit_8_bits_do_not_wrap(wrong):
    with pytest.raises(InputError, match=f"got {wrong}"):
        number_labels(np.array([0, wrong]), 3)


def test_majority_of_every_block():
    labels = np.random.default_rng(1).integers(0, 4, (1, 40, 40), dtype=np.uint8)
    half = halve_block(labels, labels=True)
    for row, col in np.ndindex(20, 20):
        counts = Counter(labels[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist())
        assert counts[int(half[0, row, col])] == max(counts.values())


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_means(dtype):
    block = (np.random.default_rng(1).random((2, 6, 8)) * 255).astype(dtype)
    mean = block.astype(np.float64).reshape(2, 3, 2, 4, 2).mean(axis=(2, 4))
    found = halve_block(block, labels=False)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.round(mean) if dtype == np.uint8 else mean, rtol=1e-3 if dtype == np.float16 else 1e-6)


def test_blocks_that_begin_at_even_pixels_give_the_whole():
    rng = np.random.default_rng(3)
    for labels, level in ((True, rng.integers(0, 4, (1, 13, 11)).astype(np.uint8)), (False, rng.random((2, 13, 11)))):
        whole = halve_block(level, labels)
        for rows, cols in ((slice(0, 4), slice(2, 11)), (slice(8, 13), slice(0, 6)), (slice(12, 13), slice(10, 11))):
            part = whole[:, rows.start // 2 : -(-rows.stop // 2), cols.start // 2 : -(-cols.stop // 2)]
            np.testing.assert_array_equal(halve_block(level[:, rows, cols], labels), part)


@pytest.mark.parametrize(
    ("classes", "colors", "said"),
    [
        ([], [], "1 to 254"),
        (["a"] * 2, [[0, 0, 0]] * 2, "different names"),
        (["a", " "], [[0, 0, 0]] * 2, "not empty"),
        ([str(n) for n in range(255)], [[0, 0, 0]] * 255, "1 to 254"),
        (["a", "b"], [[0, 0, 0]], "as many colours"),
        (["a"], [[0, 0, 256]], "0 to 255"),
        (["a"], [[0, 0]], "red, green and blue"),
    ],
)
def test_wrong_classes_are_refused(classes, colors, said):
    with pytest.raises(InputError, match=said):
        check_classes(classes, colors)
