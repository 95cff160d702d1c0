import json

import numpy as np
import pytest
import tifffile
import torch
from cases import write_two_class_cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monai_vslp.data import read_cohort
from monai_vslp.transforms import DenseCRFd, dense_crf
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import segment, train

OPTIONS = {"spatial_sigma": 1.5, "spatial_weight": 1.0, "bilateral_sigma": 4.0, "color_sigma": 0.2, "bilateral_weight": 2.0}


def picture(height, width, seed=0):
    """Two smooth colours with an edge, and a confidence that is noisy."""
    g = torch.Generator().manual_seed(seed)
    truth = (torch.arange(width)[None] > width // 2).expand(height, width).long()
    image = torch.where(truth == 1, 0.75, 0.3) + 0.02 * torch.randn(3, height, width, generator=g)
    logits = 1.5 * (torch.nn.functional.one_hot(truth, 2).permute(2, 0, 1) - 0.5) + 1.5 * torch.randn(
        2, height, width, generator=g
    )
    return truth, image.clamp(0, 1), logits.softmax(dim=0)


def reference(q, image, spatial_sigma, spatial_weight, bilateral_sigma, color_sigma, bilateral_weight, iterations=5):
    """The same mean field over all pairs of pixels, in float64."""
    classes, height, width = q.shape
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1).T.double()
    color = image.flatten(1).T.double()
    near = torch.cdist(place, place).square()
    kernels = [
        (spatial_weight, (-near / (2 * spatial_sigma**2)).exp()),
        (
            bilateral_weight,
            (-near / (2 * bilateral_sigma**2) - torch.cdist(color, color).square() / (2 * color_sigma**2)).exp(),
        ),
    ]
    unary = q.flatten(1).double().clamp_min(1e-6).log()
    u = unary.softmax(dim=0)
    for _ in range(iterations):
        message = torch.zeros_like(unary)
        for weight, kernel in kernels:
            norm = kernel.sum(dim=1).rsqrt()
            message += weight * (u * norm) @ kernel * norm
        u = (unary + message).softmax(dim=0)
    return u.view(classes, height, width).float()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_all_pairs(seed):
    _, image, q = picture(12, 14, seed)
    found, expected = dense_crf(q, image, **OPTIONS), reference(q, image, **OPTIONS)
    assert float((found - expected).abs().mean()) < 0.01
    assert float((found - expected).abs().max()) < 0.06
    alone = OPTIONS | {"bilateral_weight": 0.0}
    torch.testing.assert_close(dense_crf(q, image, **alone), reference(q, image, **alone), atol=1e-4, rtol=0)


def test_edges_of_the_image_are_found_again():
    truth, image, q = picture(40, 50)
    strong = OPTIONS | {"color_sigma": 0.1, "bilateral_weight": 8.0}
    before = float((q.argmax(dim=0) == truth).float().mean())
    after = float((dense_crf(q, image, **strong).argmax(dim=0) == truth).float().mean())
    blind = float((dense_crf(q, torch.full_like(image, 0.5), **strong).argmax(dim=0) == truth).float().mean())
    assert before < 0.85 and after > 0.99 and blind < after


def test_no_weights_change_nothing():
    _, image, q = picture(9, 8)
    torch.testing.assert_close(dense_crf(q, image, spatial_weight=0.0, bilateral_weight=0.0), q)
    torch.testing.assert_close(dense_crf(q, image, iterations=0), q)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_marginals_and_order_of_classes(classes, height, width, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(classes, height, width, generator=g).softmax(dim=0)
    image = torch.rand(3, height, width, generator=g)
    found = dense_crf(q, image, **OPTIONS)
    assert bool((found >= 0).all()) and float((found.sum(dim=0) - 1).abs().max()) < 1e-5
    order = torch.randperm(classes, generator=g)
    torch.testing.assert_close(dense_crf(q[order], image, **OPTIONS), found[order], atol=1e-5, rtol=1e-4)


def test_transform_keeps_the_rest():
    _, image, q = picture(8, 9)
    item = {"pred": q, "image": image, "name": "x"}
    found = DenseCRFd("pred", "image", **OPTIONS)(item)
    torch.testing.assert_close(found["pred"], dense_crf(q, image, **OPTIONS))
    assert found["name"] == "x" and item["pred"] is q


def test_impossible_input():
    _, image, q = picture(8, 9)
    with pytest.raises(InputError, match=r"\[2, 8, 9\] and \[1, 8, 9\]"):
        dense_crf(q, image[:1])
    with pytest.raises(InputError, match="color_sigma"):
        dense_crf(q, image, color_sigma=0.0)
    with pytest.raises(InputError, match="at least 0"):
        dense_crf(q, image, iterations=-1)


def test_segment_with_a_dense_crf(tmp_path):
    cohort = write_two_class_cohort(tmp_path / "cohort", train=3, val=1)
    run = train(cohort, cohort.parent / "images", tmp_path / "run", epochs=1, progress=False)
    image = cohort.parent / "images" / "i3.png"

    def confidence(name, **options):
        assert segment([image], run, tmp_path / name, alpha=0.0, progress=False, **options) == {}
        return torch.from_numpy(tifffile.imread(tmp_path / name / "i3" / "confidence.tif")).float() / 255

    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1).float() / 255
    plain, found = confidence("plain"), confidence("crf", dense_crf=True)
    # Stored in steps of 1/255, before and after.
    assert float((found - dense_crf(plain, pixels)).abs().mean()) < 0.01 < float((found - plain).abs().mean())
    confidence("given", dense_crf=True, proportions=cohort)
    summary = json.loads((tmp_path / "given" / "i3" / "summary.json").read_text())
    given = read_cohort(cohort, image.parent).lookup(image).mean
    assert np.abs(np.array([summary["proportions"]["refined"][c] for c in ("pink", "purple")]) - given).max() < 0.01


def test_slides_are_refused_before_anything_is_computed(tmp_path):
    cohort = write_two_class_cohort(tmp_path / "cohort", train=3, val=1)
    run = train(cohort, cohort.parent / "images", tmp_path / "run", epochs=1, progress=False)
    slide = tmp_path / "slide.tif"
    tifffile.imwrite(slide, np.full((256, 4352, 3), 200, np.uint8), tile=(256, 256), photometric="rgb")
    with pytest.raises(InputError, match="images alone, slide.tif"):
        segment([slide], run, tmp_path / "out", mpp=0.5, dense_crf=True, progress=False)
    assert not (tmp_path / "out").exists()
