import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.windows import DiskArray, split_windows, whole_window

SIDE = st.integers(1, 60)


@given(shape=st.tuples(SIDE, SIDE), size=st.tuples(SIDE, SIDE), halo=st.integers(0, 20), multiple=st.sampled_from([1, 2, 4, 8]))
def test_cores_cover_each_pixel_once_and_margins_suffice(shape, size, halo, multiple):
    windows = split_windows(shape, size, halo, multiple)
    count, number = np.zeros(shape, int), np.arange(shape[0] * shape[1]).reshape(shape)
    for window in windows:
        count[window.core] += 1
        np.testing.assert_array_equal(number[window.outer][window.inner], number[window.core])
        for core, outer, length, step in zip(window.core, window.outer, shape, size):
            assert core.stop - core.start == step or core.stop == length  # only those at the end are smaller
            assert outer.start % multiple == 0
            # The margin is there, or the border of the map is, and no more is read than the multiple asks for.
            assert max(0, core.start - halo) - multiple < outer.start <= max(0, core.start - halo)
            assert outer.stop == min(length, core.stop + halo)
    assert (count == 1).all()
    assert len({window.key for window in windows}) == len(windows)
    corners = [(window.core[0].start, window.core[1].start) for window in windows]
    assert corners == sorted(corners)  # row by row


def test_the_whole_map_is_one_window():
    window = whole_window((5, 7))
    assert window.core == window.outer == window.inner == (slice(0, 5), slice(0, 7))
    assert split_windows((5, 7), (5, 7), 3, 4) == [window] == split_windows((5, 7), (99, 99))
    assert window.key == (0, 5, 0, 7, 0, 5, 0, 7)


@pytest.mark.parametrize(("size", "halo", "multiple"), [((0, 5), 0, 1), ((5, -1), 0, 1), ((5, 5), -1, 1), ((5, 5), 0, 0)])
def test_windows_that_cannot_be_are_refused(size, halo, multiple):
    with pytest.raises(InputError, match="at least 1 x 1 px"):
        split_windows((9, 9), size, halo, multiple)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 25), st.integers(1, 25)),
    block=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
)
def test_a_map_goes_to_disk_and_back_by_windows(tmp_path_factory, shape, block, size):
    """Written in windows, read in others, whatever the blocks of the file are."""
    values = torch.arange(float(np.prod(shape))).view(shape)
    path = tmp_path_factory.mktemp("map") / "a.f32"
    array = DiskArray(path, shape, block)
    for window in split_windows(shape[1:], size):
        array[(slice(None), *window.core)] = values[(slice(None), *window.core)]
    assert torch.equal(array[:, :, :], values)
    again = DiskArray(path, shape, block)
    for window in split_windows(shape[1:], size[::-1], halo=2):
        assert torch.equal(again[(slice(None), *window.outer)], values[(slice(None), *window.outer)])


def test_a_new_file_is_zero_and_float32(tmp_path):
    array = DiskArray(tmp_path / "a.f32", (2, 300, 10))
    assert array.shape == (2, 300, 10) and not bool(array[:, :, :].any())
    exact = torch.full((2, 3, 4), 1 / 3, dtype=torch.float64, requires_grad=True)
    array[:, 290:293, -4:] = exact
    assert array[:, -10:-7, 6:].dtype == torch.float32
    assert torch.equal(array[:, -10:-7, 6:], exact.detach().float())
    assert array[:, 5:5, :].shape == (2, 0, 10)


def test_what_is_read_is_a_copy(tmp_path):
    array = DiskArray(tmp_path / "a.f32", (4, 4))
    array[:, :].add_(1)
    assert not bool(array[:, :].any())


def test_another_file_or_key_is_refused(tmp_path):
    path = tmp_path / "a.f32"
    array = DiskArray(path, (2, 6, 8))
    assert path.stat().st_size == 2 * 6 * 8 * 4
    with pytest.raises(InputError, match="holds 384 bytes, 576 are needed"):
        DiskArray(path, (3, 6, 8))
    with pytest.raises(InputError, match="last two axes only"):
        array[0:1, :, :]
    with pytest.raises(InputError, match="last two axes only"):
        array[:, :]
    with pytest.raises(InputError, match="without steps"):
        array[:, ::2, :]
    with pytest.raises(OSError):
        DiskArray(tmp_path / "missing" / "a.f32", (2, 2))
    os.truncate(path, 10)
    with pytest.raises(OSError, match="cut while in use"):
        array[:, :, :]
