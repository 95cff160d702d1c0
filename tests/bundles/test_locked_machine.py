"""A bundle folder copied to a machine that has the wheels and no network, with this series of MONAI and with the one before."""

import os
import shutil
import subprocess
import sys

import monai
import numpy as np
import pytest
from bundle_rules import BUNDLES, ROOT
from PIL import Image
from wheels import unpack_wheel

from monai_vslp.data import write_table
from monai_vslp.data.synthetic import CLASSES, VAL_VARIANTS, synthetic_image
from monai_vslp.io import read_label_tiff

EARLIER = "1.5.2"  # the last of its series; it takes the same torch
WHERE = "import monai, monai_vslp; print(monai.__version__, monai_vslp.__file__)"
CUT_OFF = ["unshare", "-rn"]  # a process without any network interface but loopback, which is down


def _call(*words, cwd=None, **settings):
    settings = {"PYTHONNOUSERSITE": "1"} | settings
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | settings,
        cwd=cwd,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, unpacked as pip does; it has to hold all that a bundle needs."""
    return unpack_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monai")
    done = _call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"monai=={EARLIER}")
    assert done.returncode == 0, f"MONAI {EARLIER} cannot be had from the package index:\n{done.stderr}"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("series", ["installed", EARLIER])
def test_both_bundles_run_without_a_network(series, site, tmp_path, request):
    path = [str(site)] if series == "installed" else [str(request.getfixturevalue("earlier")), str(site)]
    settings = {"PYTHONPATH": os.pathsep.join(path)}
    cut_off = CUT_OFF if shutil.which("unshare") and _call(*CUT_OFF, "true").returncode == 0 else []
    done = _call(*cut_off, sys.executable, "-c", WHERE, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    where = done.stdout.split()
    assert where[-2] == (monai.__version__ if series == "installed" else EARLIER) and where[-1].startswith(str(site))

    tissue = synthetic_image((128, 128), seed=77_100, variants=VAL_VARIANTS)
    (tmp_path / "images").mkdir()
    Image.fromarray(tissue.image).save(tmp_path / "images" / "t.png")
    shares = {name: f"{100 * share:.4f}" for name, share in zip(CLASSES, tissue.proportions)}
    write_table(tmp_path / "t.csv", [{"image": "t.png", **shares}], ["image", *CLASSES])
    for bundle in BUNDLES:
        shutil.copytree(ROOT / bundle, tmp_path / bundle)

    def run(bundle, *more):
        root = tmp_path / bundle
        words = ["--config_file", root / "configs/inference.json", "--meta_file", root / "configs/metadata.json"]
        words += ["--bundle_root", root, "--proportions", tmp_path / "t.csv", *more]
        done = _call(*cut_off, sys.executable, "-m", "monai.bundle", "run", *words, cwd=tmp_path, **settings)
        assert done.returncode == 0, done.stderr[-3000:]

    run(BUNDLES[0], "--dataset_dir", tmp_path / "images", "--output_dir", tmp_path / "first")
    labels = read_label_tiff(tmp_path / "first" / "t" / "labels.tif")
    accuracy = (labels == tissue.mask).mean()
    assert accuracy > np.bincount(tissue.mask.ravel()).max() / tissue.mask.size, "better than one class for all"

    (tmp_path / "maps").mkdir()
    confidence = np.eye(len(CLASSES))[labels.clip(0, len(CLASSES) - 1)] * 0.5 + 0.5 / len(CLASSES)
    np.save(tmp_path / "maps" / "t.npy", np.moveaxis(confidence, -1, 0).astype(np.float32))
    run(BUNDLES[1], "--dataset_dir", tmp_path / "maps", "--output_dir", tmp_path / "second", "--classes", str(list(CLASSES)))
    again = read_label_tiff(tmp_path / "second" / "t" / "labels.tif")
    found = np.bincount(again[again != 255], minlength=len(CLASSES)) / (again != 255).sum()
    assert np.abs(found - tissue.proportions).max() < 0.08
