"""Checksums of what was written."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import zarr

from monai_vslp.io.manifest import MANIFEST_NAME, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "slide"
    for name in ("b.txt", "a/z.bin", ".hidden", ".summary-x.json", "tiles/0.npz", "work/q", "new.tmp", "viewer/0_0.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    for version in (2, 3):
        group = zarr.open_group(str(folder / f"maps{version}.ome.zarr"), mode="w", zarr_format=version)
        group.create_array("tiles", shape=(4, 4), chunks=(2, 2), dtype="uint8")[:] = np.arange(16).reshape(4, 4)
    return folder


def test_every_kept_file_is_listed_once_with_its_digest(folder):
    path = write_manifest(folder)
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    assert list(files) == sorted(files)
    assert [name for name in files if "zarr" not in name] == ["a/z.bin", "b.txt", "viewer/0_0.jpg"]
    stored = {name for name in files if "zarr" in name}
    written = {
        file.relative_to(folder).as_posix() for store in folder.glob("*.zarr") for file in store.rglob("*") if file.is_file()
    }
    assert stored == written and len(stored) >= 10  # with chunks, and the hidden metadata of version 2
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert check_manifest(folder) == []


def test_bytes_are_the_same_in_any_order_of_writing(folder, tmp_path):
    before = write_manifest(folder).read_bytes()
    assert write_manifest(folder).read_bytes() == before  # it does not list itself
    other = tmp_path / "other"
    for name in reversed(list(json.loads(before)["files"])):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes((folder / name).read_bytes())
    assert write_manifest(other).read_bytes() == before


def test_each_problem_is_named(folder):
    write_manifest(folder)
    chunk = sorted(path for path in (folder / "maps3.ome.zarr").rglob("*") if path.is_file() and path.name != "zarr.json")[0]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (folder / "a" / "z.bin").unlink()
    data = bytearray((folder / "b.txt").read_bytes())
    data[7] ^= 1
    (folder / "b.txt").write_bytes(data)
    with open(folder / "viewer" / "0_0.jpg", "ab") as file:
        file.write(b"more")
    (folder / "later.txt").write_text("came later")
    (folder / "tiles" / "0.npz").unlink()
    problems = check_manifest(folder)
    assert len(problems) == 4
    assert problems[0] == "a/z.bin is missing" and problems[1] == "b.txt was changed"
    assert chunk.name in problems[2] and "cut short" in problems[2]
    assert "viewer/0_0.jpg was changed" in problems[3]


def test_missing_and_damaged_manifests_are_problems(folder):
    assert check_manifest(folder) == [f"{MANIFEST_NAME} is missing"]
    for text in ("{", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "x"}}}'):
        (folder / MANIFEST_NAME).write_text(text)
        (problem,) = check_manifest(folder)
        assert "damaged" in problem


def test_paths_out_of_the_folder_are_not_read(folder):
    outside = folder.parent / "secret"
    outside.write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": {"../secret": entry, str(outside): entry}}))
    assert ["outside" in problem for problem in check_manifest(folder)] == [True, True]


def test_links_are_left_out(folder):
    os.symlink(folder.parent, folder / "up")
    os.symlink(folder / "b.txt", folder / "link.txt")
    assert not {"link.txt", "up"} & {name.split("/")[0] for name in json.loads(write_manifest(folder).read_text())["files"]}


def test_a_full_disk_leaves_the_old_manifest(folder, monkeypatch):
    before = write_manifest(folder).read_bytes()
    (folder / "b.txt").write_text("new")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == before and check_manifest(folder) != []
