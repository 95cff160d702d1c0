import pytest
import torch
from scipy.optimize import minimize

from monai_vslp.networks import (
    ActivationMapHead,
    ClusterHead,
    ConfidenceNet,
    MaskedHead,
    fit_clusters,
    mark_background,
)
from monai_vslp.networks.confidence import HEADS
from monai_vslp.utils.errors import InputError


def bags(proportions):
    return [{"proportions": torch.tensor(p)} for p in proportions]


def test_activation_maps_by_hand():
    head = ActivationMapHead(2, 3)
    mark_background(head, bags([[0.5, 0.5, 0.0], [0.4, 0.0, 0.6], [0.9, 0.1, 0.0]]))
    assert head.background.tolist() == [True, False, False]
    with torch.no_grad():
        head.linear.weight[1, 0] = 1.0
        head.linear.weight[2, 1] = 1.0
    x = torch.tensor([[[[4.0, 2.0, -1.0, -1.0]], [[-2.0, -2.0, -2.0, -2.0]]]])
    s = head(x).exp()[0, :, 0]
    present = torch.tensor(1.0).sigmoid()  # mean activation of class 1: (4 + 2 - 1 - 1) / 4
    torch.testing.assert_close(s[1], torch.stack([present, present / 2, torch.tensor(1e-3), torch.tensor(1e-3)]))
    torch.testing.assert_close(s[2], torch.full((4,), 1e-3))
    torch.testing.assert_close(s[0], torch.stack([1 - present, 1 - present / 2, torch.tensor(1.0), torch.tensor(1.0)]))


def test_no_background_where_every_class_is_everywhere():
    head = ActivationMapHead(2, 2)
    mark_background(head, bags([[0.5, 0.5], [0.1, 0.9]]))
    assert not head.background.any()
    assert bool(head(torch.randn(1, 2, 3, 3)).isfinite().all())


def test_masked_branches_join():
    head = MaskedHead(4, 3)
    torch.manual_seed(0)
    with torch.no_grad():
        head.linear.weight.normal_()
    x = torch.randn(2, 4, 3, 5)
    u, v = head.linear_logits(x).chunk(2, dim=1)
    q = u.sigmoid() * v.exp()
    torch.testing.assert_close(head(x).softmax(dim=1), q / q.sum(dim=1, keepdim=True))


def test_clusters_are_found_and_saved(tmp_path):
    torch.manual_seed(0)
    truth = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]])
    labels = torch.randint(3, (2, 6, 7))
    items = [{"features": (truth[one].permute(2, 0, 1) + 0.1 * torch.randn(2, 6, 7))[None], "mass": torch.ones(1, 6, 7)}
             for one in labels]  # fmt: skip
    head = ClusterHead(2, 2, 3)
    fit_clusters(head, items, tokens=30, seed=1)
    distance = torch.cdist(truth, head.centres)
    assert float(distance.min(dim=1).values.max()) < 0.2
    members = head.members(items[0]["features"])
    assert torch.equal(members.sum(dim=1), torch.ones(1, 6, 7))
    assert torch.equal(members[0].argmax(dim=0), distance.argmin(dim=1)[labels[0]])
    again = ClusterHead(2, 2, 3)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    again.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    torch.testing.assert_close(again(items[1]["features"]), head(items[1]["features"]))


def test_matching_clusters_reaches_the_minimum_of_a_reference_solver():
    from monai.engines import SupervisedTrainer

    from monai_vslp.handlers import FullBatchUpdate
    from monai_vslp.losses import BagObjective

    torch.manual_seed(0)
    clusters, n = 4, 7
    head = ClusterHead(1, 2, clusters)
    head.centres.copy_(torch.arange(clusters).float()[:, None])
    shares, items = [], []
    for p in torch.rand(n):
        labels = torch.multinomial(torch.rand(clusters), 64, replacement=True)
        shares.append(torch.bincount(labels, minlength=clusters) / 64)
        items.append(
            {"features": labels.view(1, 1, 8, 8).float(), "mass": torch.ones(1, 8, 8), "proportions": torch.stack([p, 1 - p])}
        )
    a, p = torch.stack(shares).double(), torch.stack([item["proportions"] for item in items]).double()

    def objective(w):
        q = a @ torch.tensor(w).view(clusters, 2).softmax(dim=1)
        return float((p * (p.log() - q.log())).sum(dim=1).mean())

    reference = min(minimize(objective, torch.randn(2 * clusters).double().numpy(), method="BFGS").fun for _ in range(3))
    losses = []
    update = FullBatchUpdate(items, head.linear_logits, ridge=0.0)

    def step(engine, batch):
        losses.append(update(engine, batch)["loss"])
        return {"loss": losses[-1]}

    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=25,
        train_data_loader=[0],
        network=head,
        optimizer=torch.optim.LBFGS(list(head.linear.parameters()), max_iter=5, line_search_fn="strong_wolfe"),
        loss_function=BagObjective(entropy=0.0, consistency=0.0),
        iteration_update=step,
        decollate=False,
    ).run()
    assert losses[-1] == pytest.approx(reference, abs=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_a_choice_of_the_network(head):
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    net = ConfidenceNet(3, blocks=[0], head=head, hidden=4, window=32, backbone_kwargs=small).eval()
    assert net(torch.rand(1, 3, 40, 24)).shape == (1, 3, 40, 24)


def test_impossible_options():
    with pytest.raises(InputError, match="clusters"):
        ClusterHead(4, 2, 1)
    with pytest.raises(InputError, match="got 4"):
        fit_clusters(ClusterHead(1, 2, 9), [{"features": torch.rand(1, 1, 2, 2), "mass": torch.ones(1, 2, 2)}])
    with pytest.raises(InputError, match="head must be one of"):
        ConfidenceNet(2, head="cam")
