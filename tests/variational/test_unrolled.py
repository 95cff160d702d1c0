import math

import pytest
import torch
from cases import noisy_confidence

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import TotalDeepVariation, UnrolledRefinement


def model(channels=3, steps=3, **options):
    torch.manual_seed(0)
    regularizer = TotalDeepVariation(channels, features=4, macro_blocks=1, scales=2, **options)
    return UnrolledRefinement(regularizer, steps=steps, stopping_time=1.5).double()


def batch(size=(14, 17)):
    (q, p), (r, s) = (noisy_confidence(size, seed) for seed in (0, 1))
    q, p = torch.stack([q, r]).double(), torch.stack([p, s]).double()
    q, p = q / q.sum(dim=1, keepdim=True), p.clamp_min(0.02)
    return q, p / p.sum(dim=1, keepdim=True)


def test_simplex_and_proportions_hold():
    q, p = batch()
    result = model()(q, p)
    u = result.log_u.exp()
    torch.testing.assert_close(u.sum(dim=1), torch.ones_like(u[:, 0]), atol=1e-9, rtol=0)
    torch.testing.assert_close(u.mean(dim=(2, 3)), p, atol=1e-4, rtol=0)
    assert result.energies.shape == (2, 3) and result.psi.shape == (2, 3)
    free = model()(q)
    assert free.psi is None
    soft, softer = (model()(q, p, trust).log_u.detach().exp().mean(dim=(2, 3)) for trust in (5.0, 0.1))
    assert float((soft - p).abs().sum()) < float((softer - p).abs().sum())


@pytest.mark.parametrize("trust", [math.inf, 1.0])
def test_gradients_of_all_parameters_against_finite_differences(trust):
    q, p = batch()
    network = model()
    target = torch.nn.functional.one_hot(q.argmax(dim=1), 3).permute(0, 3, 1, 2).double()

    def loss():
        return -(target * network(q, p, trust).log_u).sum(dim=1).mean()

    loss().backward()
    g = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        d = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * d
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter -= sign * 1e-5 * d
        expected = float((parameter.grad * d).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=2e-3, abs=2e-6), name


def test_background_does_not_reach_tissue():
    q, p = batch()
    mass = torch.ones(2, 14, 17, dtype=torch.float64)
    mass[:, :5] = 0
    changed = q.clone()
    changed[:, :, :5] = 1 / 3
    network = model()
    with torch.no_grad():
        one, two = (network(x, p, mass=mass).log_u[:, :, 5:] for x in (q, changed))
    torch.testing.assert_close(one, two)


def test_batch_is_each_map_by_itself():
    q, p = batch()
    network = model()
    with torch.no_grad():
        both = network(q, p).log_u
        each = torch.cat([network(q[i : i + 1], p[i : i + 1]).log_u for i in range(2)])
    torch.testing.assert_close(both, each, atol=1e-4, rtol=0)


def test_more_steps_go_on_from_where_the_others_stopped():
    q, p = batch()
    network = model()
    with torch.no_grad():
        short, long = network(q, p), network(q, p, steps=6)
    torch.testing.assert_close(long.energies[:, :3], short.energies)
    assert long.energies.shape == (2, 6)
    with pytest.raises(InputError, match="steps"):
        UnrolledRefinement(TotalDeepVariation(3, 2, 1), steps=0)
