import json
import math

import pytest
import torch
from cases import noisy_confidence

from monai_vslp.transforms import VariationalRefinement, VariationalRefinementd
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import LearnedRefinement, TotalDeepVariation, UnrolledRefinement


def saved(folder, channels=3, cell=4, image_channels=0):
    torch.manual_seed(0)
    described = {
        "cell": cell,
        "regularizer": {
            "channels": channels, "features": 4, "macro_blocks": 1, "scales": 2, "image_channels": image_channels,
        },
        "unrolled": {"steps": 3},
    }  # fmt: skip
    model = UnrolledRefinement(TotalDeepVariation(**described["regularizer"]), steps=3)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "architecture.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("pixel_size", [1.0, 2.0, 4.0])
def test_proportions_hold_at_the_resolution_of_the_map(tmp_path, pixel_size):
    q, p = noisy_confidence(size=(50, 61))
    result = LearnedRefinement.load(saved(tmp_path))(q, p, pixel_size=pixel_size)
    assert result.u.shape == q.shape and result.regularization_energy.shape == q.shape[1:]
    torch.testing.assert_close(result.u.sum(dim=0), torch.ones(50, 61))
    assert float((result.proportions - p.double() / p.double().sum()).abs().sum()) < 1e-5
    assert result.residual < 1e-5 and len(result.energies) == 3 and bool(torch.isfinite(result.psi).all())


def test_background_and_empty_maps(tmp_path):
    q, p = noisy_confidence(size=(48, 56))
    refinement = LearnedRefinement.load(saved(tmp_path))
    mass = torch.ones(48, 56)
    mass[:, :16] = 0
    result = refinement(q, p, mass)
    inside = (result.u[:, :, 16:]).mean(dim=(1, 2)).double()
    torch.testing.assert_close(inside, p.double() / p.double().sum(), atol=1e-4, rtol=0)
    changed = q.clone()
    changed[:, :, :16] = 1 / 3
    torch.testing.assert_close(refinement(changed, p, mass).u[:, :, 16:], result.u[:, :, 16:], atol=1e-4, rtol=0)
    assert "no tissue" in refinement(q, p, torch.zeros(48, 56)).reason


def test_soft_trust_and_no_proportions(tmp_path):
    q, p = noisy_confidence(size=(48, 56))
    refinement = LearnedRefinement.load(saved(tmp_path))
    free = refinement(q)
    assert bool(torch.isnan(free.psi).all()) and free.residual is None
    hard, soft = (refinement(q, p, trust=trust) for trust in (math.inf, 0.5))
    gap = [float((r.proportions - p).abs().sum()) for r in (hard, soft, free)]
    assert gap[0] < gap[1] < gap[2]


def test_a_class_with_proportion_zero_does_not_occur(tmp_path):
    q, _ = noisy_confidence(size=(48, 56))
    result = LearnedRefinement.load(saved(tmp_path))(q, torch.tensor([0.6, 0.0, 0.4]))
    assert float(result.u[1].max()) == 0.0 and bool(torch.isfinite(result.fidelity_energy).all())


def test_class_wise_serves_any_number_of_classes(tmp_path):
    refinement = LearnedRefinement.load(saved(tmp_path, channels=1))
    for classes in (2, 5):
        q = torch.softmax(torch.randn(classes, 32, 32), dim=0)
        assert refinement(q, torch.full((classes,), 1 / classes)).u.shape == q.shape


def test_one_that_sees_the_image_needs_it(tmp_path):
    q, p = noisy_confidence(size=(48, 56))
    refinement = LearnedRefinement.load(saved(tmp_path, image_channels=3))
    with pytest.raises(InputError, match="sees the image"):
        refinement(q, p)
    first, second = (refinement(q, p, image=torch.rand(3, 48, 56)).u for _ in range(2))
    assert float((first - second).abs().max()) > 1e-4


def test_transforms_use_it(tmp_path):
    q, p = noisy_confidence(size=(48, 56))
    folder = saved(tmp_path)
    direct = LearnedRefinement.load(folder)(q, p, pixel_size=2.0)
    torch.testing.assert_close(VariationalRefinement(2.0, folder)(q, p).u, direct.u)
    out = VariationalRefinementd("pred", pixel_size=2.0, regularizer=folder)({"pred": q, "proportions": p})
    torch.testing.assert_close(torch.as_tensor(out["pred"]), direct.u)
    assert "learned" in out["pred_refinement"]["reason"]


def test_what_does_not_fit_is_refused(tmp_path):
    q, p = noisy_confidence()
    with pytest.raises(InputError, match="train-regularizer"):
        LearnedRefinement.load(tmp_path / "missing")
    folder = saved(tmp_path / "r")
    with pytest.raises(InputError, match="do not divide"):
        LearnedRefinement.load(folder)(q, p, pixel_size=3.0)
    described = json.loads((folder / "architecture.json").read_text())
    described["regularizer"]["features"] = 5
    (folder / "architecture.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="no regularizer of this version"):
        LearnedRefinement.load(folder)
