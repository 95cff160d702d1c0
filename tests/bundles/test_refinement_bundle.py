"""Stage 2 alone, over confidences that someone else left in files, with MONAI's own command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from bundle_rules import BUNDLES, ROOT
from cases import noisy_confidence
from monai.bundle import ConfigWorkflow

from monai_vslp.data.confidences import confidence_items, on_simplex, open_confidence
from monai_vslp.io.summary import read_summary
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.variational import LearnedRefinement, refine

zarr = pytest.importorskip("zarr")

BUNDLE = ROOT / BUNDLES[1]
CLASSES = ["a", "b", "c"]


@pytest.fixture
def maps(tmp_path):
    """The same map as probabilities, logits and bytes with background, and the true proportions."""
    q, p = noisy_confidence((48, 56), seed=3)
    folder = tmp_path / "maps"
    folder.mkdir()
    np.save(folder / "plain.npy", q.numpy())
    tifffile.imwrite(folder / "scores.tif", q.log().numpy())
    coded = (q * 255).round().byte().numpy()
    coded[:, :8] = 0
    array = zarr.create_array(str(folder / "coded.zarr"), shape=coded.shape, chunks=(3, 16, 16), dtype="uint8")
    array[...] = coded
    rows = ["image,a,b,c", *(f"{name},{','.join(f'{v:.6f}' for v in p)}" for name in ("plain.npy", "scores.tif", "coded.zarr"))]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return folder, tmp_path / "table.csv", q, p


def workflow(name, **overrides):
    done = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / name),
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        **overrides,
    )
    done.initialize()
    done.run()
    return done


def test_three_kinds_of_files_are_the_same_map(maps):
    folder, table, q, p = maps
    plain, mass = on_simplex(open_confidence(folder / "plain.npy"))
    assert torch.allclose(plain, q, atol=1e-6) and mass.shape == (1, 48, 56) and mass.min() == 1
    assert torch.allclose(on_simplex(open_confidence(folder / "scores.tif"))[0], q, atol=1e-5)
    coded, mass = on_simplex(open_confidence(folder / "coded.zarr")[...])
    assert torch.allclose(coded[:, 8:], q[:, 8:], atol=6e-3) and torch.allclose(coded[:, :8], torch.full((3, 8, 56), 1 / 3))
    assert not mass[:, :8].any() and mass[:, 8:].all()
    items = confidence_items(folder, table, CLASSES)
    assert [item["stem"] for item in items] == ["coded", "plain", "scores"]
    assert np.allclose(items[1]["proportions"], p, atol=1e-4)


@pytest.mark.parametrize("regularizer", ["learned", "tv"])
def test_inference_from_files_with_proportions(maps, tmp_path, regularizer):
    folder, table, q, p = maps
    given = {"dataset_dir": str(folder), "proportions": str(table), "classes": CLASSES, "colors": None, "alpha": 2.0}
    workflow("inference.json", output_dir=str(tmp_path / "out"), regularizer=regularizer, **given)
    for stem in ("plain", "scores", "coded"):
        assert read_summary(tmp_path / "out" / stem)["converged"]
        labels = tifffile.imread(tmp_path / "out" / stem / "labels.tif")
        assert (labels == 255).any() == (stem == "coded")
        u = tifffile.imread(tmp_path / "out" / stem / "segmentation.tif") / 255.0
        inside = labels != 255
        assert np.allclose(u[:, inside].mean(axis=1), p, atol=5e-3), stem
    if regularizer == "tv":
        expected = refine(q, p, alpha=2.0).labels.numpy()
        assert (tifffile.imread(tmp_path / "out" / "plain" / "labels.tif") == expected).mean() > 0.999
    else:
        network = workflow("inference.json", output_dir=str(tmp_path / "again"), **given).parser.get_parsed_content("network")
        expected = LearnedRefinement(network, 4)(q, p).labels.numpy()
        assert (tifffile.imread(tmp_path / "out" / "plain" / "labels.tif") == expected).mean() > 0.999
        assert (expected != q.argmax(dim=0).numpy()).any()


@pytest.mark.slow
def test_a_slide_out_of_core_by_monais_command(maps, tmp_path):
    folder, _, _, p = maps
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(BUNDLE / "configs" / "slide_inference.json")]
    command += ["--meta_file", str(BUNDLE / "configs" / "metadata.json"), "--bundle_root", str(tmp_path)]
    command += ["--confidence", str(folder / "coded.zarr"), "--classes", str(CLASSES), "--colors", "None", "--alpha", "2.0"]
    command += ["--proportions", str([float(v) for v in p]), "--mpp", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "eval" / "refinement.json").read_text())
    assert np.allclose(summary["proportions_refined"], p, atol=1e-4) and summary["converged"]
    labels = tifffile.imread(tmp_path / "eval" / "labels.tif")
    assert labels.shape == (48, 56) and (labels[:8] == 255).all() and (labels[8:] < 3).all()
    assert not (tmp_path / "eval" / "mass.zarr").exists()


def test_what_cannot_be_used_is_said(maps, tmp_path):
    folder, table, q, _ = maps
    (folder / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ImageReadError, match="bad.npy"):
        open_confidence(folder / "bad.npy")
    with pytest.raises(InputError, match="logits"):
        on_simplex(q.log().numpy(), "probabilities")
    with pytest.raises(InputError, match="finite"):
        on_simplex(np.full((2, 4, 4), np.nan))
    with pytest.raises(InputError, match="no confidences"):
        (tmp_path / "empty").mkdir()
        confidence_items(tmp_path / "empty", None, CLASSES)
    with pytest.raises(RuntimeError) as raised:
        workflow("slide_inference.json", confidence=str(folder / "coded.zarr"), output_dir=str(tmp_path / "o"))
    assert "shape [5, H, W]" in str(raised.value.__cause__ or raised.value)
