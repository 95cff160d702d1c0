import copy

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from monai_vslp.handlers import RunCheckpoint, WeightAverage
from monai_vslp.networks.adapters import LoRALinear, add_lora
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


def test_constant_decay_is_that_of_torch():
    """With d = 0.1 the warm-up, 2/11 at the first step, is never below."""
    net = network()
    reference = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    reference.update_parameters(net)  # torch begins with the first weights it sees
    average = WeightAverage(net, 0.1)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        with torch.no_grad():
            for value in (net[2].weight, net[2].bias, net[1].weight):
                value.add_(torch.randn(value.shape, generator=generator))
        average.update()
        reference.update_parameters(net)
    state = reference.module.state_dict()
    for name, value in average.average.items():
        torch.testing.assert_close(value, state[name])


def test_warm_up_forgets_the_start():
    net = network()
    with torch.no_grad():
        net[2].weight.fill_(100.0)
    slow = WeightAverage(net, 0.999)
    with torch.no_grad():
        net[2].weight.zero_()
    for _ in range(30):
        slow.update()
    # The product of (1 + n) / (10 + n) for n to 30, where a constant 0.999 would leave 97 %.
    left = 100.0
    for n in range(1, 31):
        left *= (1 + n) / (10 + n)
    assert left < 1e-4
    torch.testing.assert_close(slow.average["2.weight"], torch.full((1, 2), left))


def test_the_model_kept_is_the_average_and_the_checkpoint_has_both(tmp_path):
    net = network()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=1.0)
    average = WeightAverage(net, 0.9)
    checkpoint = RunCheckpoint(
        tmp_path, net, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), average=average, settings={}
    )

    def step(engine, batch):
        optimizer.zero_grad()
        net(batch).square().sum().backward()
        optimizer.step()

    trainer = Engine(step)
    average.attach(trainer)
    checkpoint.attach(trainer)
    trainer.run([torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)], max_epochs=2)
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(model) == set(net.state_dict())
    assert torch.equal(model["2.weight"], average.average["2.weight"])
    assert not torch.equal(model["2.weight"], net[2].weight)
    assert torch.equal(stored["network"]["2.weight"], net[2].weight.detach())
    assert stored["average"]["steps"] == 6
    assert torch.equal(model["0.weight"], net[0].weight) and torch.equal(model["1.running_mean"], net[1].running_mean)


def test_an_average_of_other_weights_is_refused():
    net = network()
    state = WeightAverage(net, 0.9).state_dict()
    net[1].requires_grad_(False)
    other = WeightAverage(net, 0.9)
    before = {name: value.clone() for name, value in other.average.items()}
    for wrong, message in ((state, "2 differ, such as 1.bias"), (None, "2 differ, such as 2.bias")):
        with pytest.raises(InputError, match=message):
            other.load_state_dict(wrong)
    with pytest.raises(InputError, match=r"1 differ, such as 2\.weight"):
        other.load_state_dict({"steps": 3, "average": {**before, "2.weight": torch.zeros(2, 2)}})
    assert other.steps == 0 and all(torch.equal(value, before[name]) for name, value in other.average.items())


def test_nothing_trained_is_nothing_averaged():
    net = network().requires_grad_(False)
    average = WeightAverage(net, 0.9)
    average.update()
    assert average.steps == 1 and average.averaged_state().keys() == net.state_dict().keys()


def test_shown_lends_the_average_even_where_it_fails():
    net = network()
    average = WeightAverage(net, 0.9)
    own = steps(net, average, 3)[-1]
    with pytest.raises(RuntimeError, match="middle"), average.shown():
        assert torch.equal(net[2].weight, average.average["2.weight"]) and not torch.equal(net[2].weight, own)
        raise RuntimeError("in the middle")
    assert torch.equal(net[2].weight, own)


def test_of_adapters_the_averaged_state_is_that_of_a_plain_network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net = copy.deepcopy(plain)
    add_lora(net, 2, targets=["0", "2"])
    average = WeightAverage(net, 0.5)
    x = torch.randn(5, 3)
    with torch.no_grad():
        net[0].lora_b.normal_(), net[2].lora_b.normal_()
    average.update()
    state = average.averaged_state()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    with average.shown():
        expected = net(x).detach()
    torch.testing.assert_close(plain(x), expected)
    assert isinstance(net[0], LoRALinear), "training goes on with adapters"
