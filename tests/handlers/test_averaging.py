import copy

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_vslp.handlers import WeightAverage
from monai_vslp.utils.errors import InputError


def network():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net[0].requires_grad_(False)
    return net


def steps(net, average, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(count):
        with torch.no_grad():
            net[2].weight.copy_(torch.randn(1, 2, generator=generator))
        values.append(net[2].weight.detach().clone())
        average.update()
    return values


def test_average_is_the_weighted_sum_it_says():
    net = network()
    start = net[2].weight.detach().clone()
    average = WeightAverage(net, 0.5)
    values = steps(net, average, 12)
    expected = start
    for n, value in enumerate(values, start=1):
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    torch.testing.assert_close(average.averaged_state()["2.weight"], expected)
    assert set(average.averaged_state()) == set(net.state_dict())
    assert not {"0.weight", "0.bias"} & set(average.average)


def test_decay_of_zero_is_the_last_weights():
    net = network()
    average = WeightAverage(net, 0.0)
    last = steps(net, average, 3)[-1]
    torch.testing.assert_close(average.averaged_state()["2.weight"], last)


@pytest.mark.parametrize("fails", [False, True])
def test_the_evaluator_sees_the_average_and_training_its_own(fails):
    net = network().eval()
    seen = []

    def iteration(engine, batch):
        seen.append(net[2].weight.detach().clone())
        if fails:
            raise RuntimeError("in the middle")
        return {}

    evaluator = SupervisedEvaluator(
        torch.device("cpu"), [{"image": torch.zeros(1, 3)}], net, iteration_update=iteration, decollate=False
    )
    average = WeightAverage(net, 0.9, evaluator)
    trainer = Engine(lambda engine, batch: None)
    average.attach(trainer)
    own = steps(net, average, 5)[-1]
    if fails:
        with pytest.raises(RuntimeError, match="middle"):
            evaluator.run()
    else:
        evaluator.run()
    torch.testing.assert_close(seen[0], average.average["2.weight"])
    assert not torch.equal(seen[0], own)
    assert torch.equal(net[2].weight, own)


def test_a_continued_average_is_an_uninterrupted_one():
    net = network()
    whole = WeightAverage(net, 0.9)
    values = steps(net, whole, 4)
    state = whole.state_dict()
    state = {"steps": state["steps"], "average": {k: v.clone() for k, v in state["average"].items()}}
    other = copy.deepcopy(net)
    continued = WeightAverage(other, 0.9)
    continued.load_state_dict(state)
    for _ in range(2):
        for module, average in ((net, whole), (other, continued)):
            with torch.no_grad():
                module[2].weight.copy_(values[0])
            average.update()
    for name in continued.average:
        torch.testing.assert_close(continued.average[name], whole.average[name])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decay(decay):
    with pytest.raises(InputError, match="decay"):
        WeightAverage(network(), decay)
