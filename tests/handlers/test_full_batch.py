import pytest
import torch
from monai.engines import SupervisedTrainer
from scipy.optimize import minimize

from monai_vslp.handlers import FullBatchUpdate
from monai_vslp.losses import BagObjective
from monai_vslp.networks import AdditiveHead
from monai_vslp.utils.errors import InputError

CLASSES, CHANNELS = 3, 4


def bags(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(CLASSES, CHANNELS, generator=g)
    items = []
    for _ in range(count):
        x = torch.randn(CHANNELS, 6, 7, generator=g) + torch.randn(CHANNELS, 1, 1, generator=g)
        labels = torch.einsum("cf,fhw->chw", truth, x).argmax(dim=0)
        p = torch.bincount(labels.flatten(), minlength=CLASSES) / labels.numel()
        items.append({"features": x[None].half(), "mass": torch.ones(1, 6, 7), "proportions": p.float()})
    return items


def fit(items, iterations, ridge=6e-2, entropy=0.0):
    head = AdditiveHead(CHANNELS, CLASSES, 5)
    optimizer = torch.optim.LBFGS(list(head.linear.parameters()), max_iter=5, line_search_fn="strong_wolfe")
    update = FullBatchUpdate(items, head, ridge)
    losses = []

    def step(engine, batch):
        output = update(engine, batch)
        losses.append(output["loss"])
        return output

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=iterations,
        train_data_loader=[0],
        network=head,
        optimizer=optimizer,
        loss_function=BagObjective(entropy=entropy, consistency=0.0),
        iteration_update=step,
        decollate=False,
    )
    trainer.run()
    return head, losses


def test_the_minimum_is_that_of_a_reference_solver():
    items = bags()
    head, losses = fit(items, 40)

    def objective(w):
        weight = torch.tensor(w[: CLASSES * CHANNELS].reshape(CLASSES, CHANNELS))
        bias = torch.tensor(w[CLASSES * CHANNELS :])
        total = 6e-2 / len(items) * float(weight.square().sum())
        for item in items:
            z = torch.einsum("cf,fhw->chw", weight, item["features"][0].double()) + bias[:, None, None]
            q = z.softmax(dim=0).mean(dim=(1, 2))
            p = item["proportions"].double()
            total += float((torch.xlogy(p, p) - p * q.log()).sum()) / len(items)
        return total

    reference = minimize(objective, torch.zeros(CLASSES * (CHANNELS + 1)).double().numpy(), method="BFGS")
    assert losses[-1] == pytest.approx(reference.fun, abs=2e-5)
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:]))
    assert float(head.correction[-1].weight.abs().max()) == 0.0


def test_no_draw_enters():
    items = bags()
    torch.manual_seed(1)
    first, _ = fit(items, 5, entropy=0.1)
    torch.manual_seed(2)
    second, _ = fit(items, 5, entropy=0.1)
    assert torch.equal(first.linear.weight, second.linear.weight)


def test_pixels_are_recovered_from_proportions_alone():
    items = bags(40)
    head, _ = fit(items, 20, ridge=4e-2, entropy=0.05)
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(CLASSES, CHANNELS, generator=g)
    with torch.no_grad():
        x = torch.cat([item["features"].float() for item in items])
        agree = head(x).argmax(dim=1) == torch.einsum("cf,bfhw->bchw", truth, x).argmax(dim=1)
    assert float(agree.float().mean()) > 0.9


def test_bad_options():
    with pytest.raises(InputError, match="no bags"):
        FullBatchUpdate([], AdditiveHead(4, 3))
    with pytest.raises(InputError, match="ridge"):
        FullBatchUpdate(bags(1), AdditiveHead(4, 3), -1.0)
