import json
import os

import numpy as np
import pytest
import torch

from monai_vslp.utils.atomic import atomic_path, write_json


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("in the middle")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_replaces_and_makes_folders_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "new" / "a.json"
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("1")
    assert path.read_text() == "1"
    assert os.stat(path).st_mode & 0o044, "others may read results"


def test_json_takes_arrays_and_refuses_the_rest(tmp_path):
    path = write_json(tmp_path / "a.json", {"a": np.arange(2), "b": torch.ones(1), "c": np.float32(0.5), "d": tmp_path})
    assert json.loads(path.read_text()) == {"a": [0, 1], "b": [1.0], "c": 0.5, "d": str(tmp_path)}
    with pytest.raises(TypeError, match="cannot be written"):
        write_json(path, object())
