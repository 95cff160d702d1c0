"""Names of files and folders to images and slides."""

import numpy as np
import pytest
import zarr
from PIL import Image

from monai_vslp.data.inputs import content_mark, find_images
from monai_vslp.utils.errors import InputError


def save(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)
    return path


def test_folders_are_looked_into_and_each_file_is_found_once(tmp_path):
    a, b = save(tmp_path / "one" / "b.png"), save(tmp_path / "one" / "a.jpg")
    (tmp_path / "one" / "notes.txt").write_text("x")
    (tmp_path / "one" / ".hidden.png").write_text("x")
    (tmp_path / "one" / "s.svs").write_text("x")
    assert find_images(tmp_path / "one") == [b, a, tmp_path / "one" / "s.svs"]
    assert find_images([a, tmp_path / "one"]) == [a, b, tmp_path / "one" / "s.svs"]


def test_folders_that_are_slides_are_not_looked_into(tmp_path):
    image = save(tmp_path / "c.png")
    zarr.create_array(str(tmp_path / "z.ome.zarr" / "0"), shape=(4, 4), chunks=(2, 2), dtype="u1")
    (tmp_path / "other folder").mkdir()
    assert find_images(tmp_path) == [image, tmp_path / "z.ome.zarr"]
    assert find_images(tmp_path / "z.ome.zarr") == [tmp_path / "z.ome.zarr"]


@pytest.mark.parametrize(("name", "message"), [("empty", "no images or slides in .*empty"), ("gone", "gone does not exist")])
def test_nothing_to_find(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_images([save(tmp_path / "a.png"), tmp_path / name])
    with pytest.raises(InputError, match="an empty list"):
        find_images([])


def test_a_mark_changes_with_any_file_below(tmp_path):
    array = zarr.create_array(str(tmp_path / "z.zarr"), shape=(4, 4), chunks=(2, 2), dtype="u1")
    array[:] = 1
    before = content_mark(tmp_path / "z.zarr")
    assert content_mark(tmp_path / "z.zarr") == before
    array[0, 0] = 2
    assert content_mark(tmp_path / "z.zarr") != before
    with pytest.raises(OSError):
        content_mark(tmp_path / "gone")
