import numpy as np
import pytest
import torch
from cases import noisy_confidence
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from monai_vslp.handlers import VariationalRefinementHandler
from monai_vslp.transforms import (
    VariationalRefinement,
    VariationalRefinementD,
    VariationalRefinementd,
    VariationalRefinementDict,
)
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, MetaTensor])
def test_array_transform_is_the_core(kind):
    q, p = noisy_confidence()
    result = VariationalRefinement(alpha=2.0)(kind(q), kind(p))
    expected = refine(torch.as_tensor(q), torch.as_tensor(p), alpha=2.0)
    torch.testing.assert_close(result.u, expected.u)


def test_alpha_is_given_in_pixels_of_size_one():
    q, p = noisy_confidence()
    coarse = VariationalRefinement(pixel_size=4.0, alpha=8.0)(q, p)
    torch.testing.assert_close(coarse.u, refine(q, p, alpha=2.0).u)


@pytest.mark.parametrize("mass_shape", [(48, 56), (1, 48, 56)])
def test_mass_may_be_a_mask_with_or_without_channel(mass_shape):
    q, p = noisy_confidence()
    mass = torch.ones(mass_shape, dtype=torch.bool)
    mass[..., :10] = False
    result = VariationalRefinement()(q, p, mass)
    torch.testing.assert_close(result.u, refine(q, p, mass.reshape(48, 56).float()).u)


def test_dictionary_twin_adds_maps_and_status():
    q, p = noisy_confidence()
    data = {"pred": MetaTensor(q, meta={"name": "x"}), "proportions": p, "other": 1}
    out = VariationalRefinementd("pred")(data)
    assert isinstance(out["pred"], MetaTensor) and out["pred"].meta["name"] == "x"
    assert data["pred"] is out["pred_confidence"], "the input dictionary is not changed"
    assert out["pred_labels"].shape == (1, 48, 56) and out["pred_labels"].dtype == torch.uint8
    assert out["pred_fidelity_energy"].shape == out["pred_regularization_energy"].shape == (1, 48, 56)
    status = out["pred_refinement"]
    np.testing.assert_allclose(status["proportions_refined"], p, atol=1e-5)
    np.testing.assert_allclose(status["proportions_given"], p, atol=1e-6)
    assert status["converged"] and len(status["energies"]) > 1 and len(status["psi"]) == 3
    assert out["other"] == 1


def test_without_proportions_they_stay_free():
    q, _ = noisy_confidence()
    out = VariationalRefinementd("pred")({"pred": q})
    assert out["pred_refinement"]["proportions_given"] is None
    assert out["pred_refinement"]["residual"] is None


def test_missing_keys_and_options_are_refused():
    with pytest.raises(KeyError):
        VariationalRefinementd("pred")({})
    assert VariationalRefinementd("pred", allow_missing_keys=True)({}) == {}
    with pytest.raises(InputError, match="alpha"):
        VariationalRefinement(alpha=-1.0)
    assert VariationalRefinementD is VariationalRefinementDict is VariationalRefinementd


class _Logits(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("way", ["handler", "transform"])
def test_handler_and_transform_do_the_same_on_an_evaluator(way):
    q, p = noisy_confidence()
    data = [{"image": q.log(), "proportions": p}, {"image": q.flip(-1).log(), "proportions": p}]
    seen = []
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(data), batch_size=1),
        network=_Logits(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"], None),
        inferer=lambda x, network: network(x).softmax(dim=1),
        postprocessing=Compose([VariationalRefinementd("pred", alpha=2.0)]) if way == "transform" else None,
        val_handlers=[VariationalRefinementHandler("pred", alpha=2.0)] if way == "handler" else [],
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output[0]))
    evaluator.run()
    assert len(seen) == 2
    for output, confidence in zip(seen, (q, q.flip(-1))):
        torch.testing.assert_close(torch.as_tensor(output["pred"]), refine(confidence, p, alpha=2.0).u, atol=2e-3, rtol=0)
        assert output["pred_refinement"]["converged"]


def test_bounds_hold_and_the_inside_is_free():
    q, p = noisy_confidence()
    free = VariationalRefinement(alpha=1.0)(q).proportions
    low, high = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.6, 1.0, 1.0])
    held = VariationalRefinement(alpha=1.0, trust="bounds")(q, p, bounds=(low, high)).proportions
    assert float(free[0]) < 0.5 and float(held[0]) == pytest.approx(0.5, abs=1e-5)
    wide = VariationalRefinement(alpha=1.0, trust="bounds")(q, p, bounds=(torch.zeros(3), torch.ones(3))).proportions
    torch.testing.assert_close(wide, free, atol=1e-4, rtol=0)


def test_raters_who_agree_are_trusted_more():
    q, p = noisy_confidence()
    given = torch.tensor([0.6, 0.2, 0.2])
    gaps = []
    for spread in (0.01, 0.1, 0.3):
        result = VariationalRefinement(alpha=1.0, trust="raters")(q, given, spread=torch.full((3,), spread))
        gaps.append(float((result.proportions - given).abs().sum()))
    assert gaps[0] < gaps[1] < gaps[2]
    one = VariationalRefinement(alpha=1.0, trust="raters")(q, given, spread=torch.zeros(3))
    torch.testing.assert_close(one.u, VariationalRefinement(alpha=1.0, trust=3.0)(q, given).u)


def test_own_proportions_pull_gently_where_none_are_given():
    q, _ = noisy_confidence()
    own = q.mean(dim=(1, 2)).double()
    found = [VariationalRefinement(alpha=2.0, own_trust=trust)(q).proportions for trust in (0.0, 0.5, 50.0)]
    gaps = [float((proportions - own).abs().sum()) for proportions in found]
    assert gaps[0] > gaps[1] > gaps[2]


def test_dictionary_twin_passes_spread_and_bounds():
    q, p = noisy_confidence()
    item = {"pred": q, "proportions": p, "proportion_spread": torch.full((3,), 0.1)}
    item["proportion_bounds"] = [[0.5, 0, 0], [0.6, 1, 1]]
    direct = VariationalRefinement(alpha=1.0, trust="bounds")(q, p, bounds=item["proportion_bounds"]).u
    torch.testing.assert_close(torch.as_tensor(VariationalRefinementd("pred", alpha=1.0, trust="bounds")(item)["pred"]), direct)
    direct = VariationalRefinement(alpha=1.0, trust="raters")(q, p, spread=item["proportion_spread"]).u
    torch.testing.assert_close(torch.as_tensor(VariationalRefinementd("pred", alpha=1.0, trust="raters")(item)["pred"]), direct)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"trust": "people"}, {}, "raters, bounds"),
        ({"own_trust": -1.0}, {}, "own_trust"),
        ({"trust": "raters"}, {"proportions": [0.5, 0.3, 0.2]}, "spread"),
        ({"trust": "bounds"}, {"proportions": [0.5, 0.3, 0.2]}, "lower and upper"),
        ({"trust": "bounds"}, {"proportions": [0.5, 0.3, 0.2], "bounds": ([0.5] * 3, [0.6] * 3)}, "widen a range"),
    ],
)
def test_impossible_rules_of_trust_are_refused(options, call, message):
    q, _ = noisy_confidence()
    with pytest.raises(InputError, match=message):
        VariationalRefinement(**options)(q, **call)
