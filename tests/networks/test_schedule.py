import math

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn

from monai_vslp.handlers import RunCheckpoint, WeightAverage
from monai_vslp.networks import ConfidenceNet
from monai_vslp.networks.schedule import HeadFirst, parameter_groups
from monai_vslp.utils.errors import InputError

VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 4, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.2},
    "blocks": [0, 2],
    "window": 32,
}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_kwargs": {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)},
    "window": 64,
}
CONVNEXT = {"backbone": "test_convnext", "window": 64}


def network(options=VIT, **more):
    torch.manual_seed(0)
    return ConfidenceNet(2, **{**options, **more})


def by_name(net, groups):
    where = {id(p): group for group in groups for p in group["params"]}
    return {name: where[id(p)] for name, p in net.named_parameters() if id(p) in where}


def test_rates_of_a_vit_by_layer():
    net = network()
    found = by_name(net, parameter_groups(net, 0.1, 0.05, 0.5))
    assert set(found) == {name for name, _ in net.named_parameters()}
    for name, group in found.items():
        part = name.split(".")
        if part[0] == "head":
            exponent = 0
        elif part[2] == "blocks":
            exponent = 3 - int(part[3])  # blocks 0 to 2 are left: 1/8, 1/4, 1/2
        else:
            exponent = 4  # class token, positions, patches
        assert math.isclose(group["lr"], 0.1 * 0.5**exponent), name


@pytest.mark.parametrize("options", [VIT, SWIN, CONVNEXT])
def test_every_trained_parameter_once_and_rates_rise_towards_the_head(options):
    net = network(options)
    groups = parameter_groups(net, 1e-3, 0.05, 0.7)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())
    rates = [group["lr"] for group in groups]
    assert rates == sorted(rates) and rates[-1] == 1e-3 and rates[0] < 0.6e-3
    head = {id(p) for p in net.head.parameters()}
    assert all((group["lr"] == 1e-3) == (id(p) in head) for group in groups for p in group["params"])
    torch.optim.AdamW(groups, lr=1.0)


@pytest.mark.parametrize("options", [VIT, SWIN, CONVNEXT])
def test_norms_biases_and_positions_have_no_weight_decay(options):
    net = network(options)
    found = by_name(net, parameter_groups(net, 1e-3, 0.05, 0.9))
    norms = {
        f"{name}.{key}"
        for name, module in net.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) or "Norm" in type(module).__name__
        for key, _ in module.named_parameters(recurse=False)
    }
    assert norms
    for name, group in found.items():
        exempt = name in norms or name.endswith((".bias", "pos_embed", "cls_token", "relative_position_bias_table", "gamma"))
        assert group["weight_decay"] == (0.0 if exempt else 0.05), name


def test_one_rate_without_layer_decay():
    groups = parameter_groups(network(), 1e-3, 0.0)
    assert {group["lr"] for group in groups} == {1e-3} and {group["weight_decay"] for group in groups} == {0.0}


def test_frozen_parameters_are_left_out():
    net = network(freeze_backbone=True, rank=4)
    assert set(by_name(net, parameter_groups(net, 1e-3))) == {"head.0.weight", "head.0.bias"}
    net = network(adapters={"rank": 2})
    found = by_name(net, parameter_groups(net, 1.0, 0.1, 0.5))
    assert {name for name in found if name.startswith("backbone")} == {n for n, _ in net.named_parameters() if "lora_" in n}
    assert found["backbone.model.blocks.2.attn.qkv.lora_a"]["lr"] == 0.5
    net.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        parameter_groups(net, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1.0, "weight_decay": -1.0}, "weight_decay"),
        ({"learning_rate": 1.0, "layer_decay": 0.0}, "layer_decay"),
        ({"learning_rate": 1.0, "layer_decay": 1.5}, "layer_decay"),
    ],
)
def test_impossible_rates(options, message):
    with pytest.raises(InputError, match=message):
        parameter_groups(network(), **options)


def test_networks_without_backbone():
    with pytest.raises(InputError, match="backbone"):
        parameter_groups(nn.Linear(2, 2), 1e-3)
    with pytest.raises(InputError, match="backbone"):
        HeadFirst(nn.Linear(2, 2), 1)
    for epochs in (-1, 1.5, True):
        with pytest.raises(InputError, match="whole number"):
            HeadFirst(network(), epochs)


def trainer(folder, epochs, stop_after=None, head_epochs=2, watch=None):
    """Four epochs' worth of schedule, as ``train.json`` puts it together; ``stop_after`` breaks off within the next epoch."""
    net = network()
    groups = parameter_groups(net, 3e-3, 0.1, 0.7)
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=4 * 2 + 1)
    average = WeightAverage(net, 0.9)
    generator = torch.Generator().manual_seed(7)
    data = [
        {"image": torch.rand(2, 3, 32, 32, generator=generator), "label": torch.randint(0, 2, (2, 32, 32), generator=generator)}
        for _ in range(2)
    ]
    checkpoint = RunCheckpoint(folder, net, optimizer, scheduler, average=average)
    engine = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=data,
        network=net,
        optimizer=optimizer,
        loss_function=nn.CrossEntropyLoss(),
        decollate=False,
        train_handlers=[average, HeadFirst(net, head_epochs), checkpoint],
    )
    from ignite.engine import Events

    @engine.on(Events.EPOCH_STARTED)
    def seed(engine):
        torch.manual_seed(engine.state.epoch)

    @engine.on(Events.ITERATION_COMPLETED)
    def step(engine):
        if watch is not None:
            watch(engine, net)
        if stop_after is not None and engine.state.epoch > stop_after:
            raise RuntimeError("power cut")
        scheduler.step()

    return engine, net


def test_backbone_rests_while_the_head_learns(tmp_path):
    start = {name: value.clone() for name, value in network().state_dict().items()}
    moved = {}

    def watch(engine, net):
        state = net.state_dict()
        changed = {name.partition(".")[0] for name, value in state.items() if not torch.equal(value, start[name])}
        moved[engine.state.epoch] = changed
        assert net.backbone.training is (engine.state.epoch > 2)

    engine, net = trainer(tmp_path, 4, watch=watch)
    engine.run()
    assert moved == {1: {"head"}, 2: {"head"}, 3: {"head", "backbone"}, 4: {"head", "backbone"}}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, after):
    trainer(tmp_path / "whole", 4)[0].run()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "cut", 4, stop_after=after)[0].run()
    trainer(tmp_path / "cut", 4)[0].run()
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["epoch"] == cut["epoch"] == 4 and whole["average"]["steps"] == cut["average"]["steps"] == 8
    for part in ("network", "average"):
        first, second = (run["average"]["average"] if part == "average" else run[part] for run in (whole, cut))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_the_end_of_a_run_releases_what_it_froze(tmp_path):
    engine, net = trainer(tmp_path, 1, head_epochs=5)
    engine.run()
    assert all(p.requires_grad for p in net.parameters()) and not net.freeze_backbone


def test_what_was_frozen_before_stays_frozen():
    net = network(freeze_backbone=True, adapters={"rank": 2})
    handler = HeadFirst(net, 1)
    engine = type("Engine", (), {"state": type("State", (), {"epoch": 1})()})()
    trained = []
    for epoch in (1, 2):
        engine.state.epoch = epoch
        handler(engine)
        trained.append({name for name, p in net.named_parameters() if p.requires_grad})
        assert net.freeze_backbone
    assert trained[0] == {"head.0.weight", "head.0.bias"}
    assert trained[1] - trained[0] == {name for name, _ in net.named_parameters() if "lora_" in name}
