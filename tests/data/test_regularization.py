import math

import pytest
import torch
from cases import noisy_confidence

from monai_vslp.data import ConfidenceStacks, HeldOutMaps, RegularizerBatches, prepare_refinement, stack_keys
from monai_vslp.data.regularization import Degradation
from monai_vslp.networks import TTAConfidence
from monai_vslp.utils.errors import InputError


class TwoTone(torch.nn.Module):
    """Class 1 where an image is dark; counts its calls."""

    stride = 8
    calls = 0

    def forward(self, x):
        self.calls += 1
        dark = 4 * (0.5 - x.mean(dim=1, keepdim=True))
        return torch.cat([-dark, dark], dim=1)


def bags(count=3, side=64):
    items = []
    for index in range(count):
        image = torch.ones(3, side, side)
        image[:, :, : 16 + 8 * index] = 0.1
        share = (16 + 8 * index) / side
        items.append({"image": image, "proportions": torch.tensor([1 - share, share])})
    return items


def stacks(**options):
    views = TTAConfidence("flips", "stack", stride=8)
    return ConfidenceStacks(bags(), options.pop("network", TwoTone()), views, cell=4, progress=False, **options)


def test_stacks_hold_every_view_on_the_grid_of_cells():
    entry = stacks()[1]
    assert entry["stack"].shape == (4, 2, 16, 16) and entry["mass"].shape == (16, 16) and entry["image"].shape == (3, 16, 16)
    torch.testing.assert_close(entry["stack"].sum(dim=1), torch.ones(4, 16, 16))
    assert bool((entry["stack"][:, 1, :, :6] > 0.9).all()) and bool((entry["stack"][:, 1, :, 6:] < 0.1).all())


def test_stacks_are_kept_and_not_computed_twice(tmp_path):
    network = TwoTone()
    first = stacks(network=network, cache=tmp_path, keys=["a", "b", "c"])
    calls = network.calls
    again = stacks(network=network, cache=tmp_path, keys=["a", "b", "c"])
    assert network.calls == calls
    torch.testing.assert_close(first[2]["stack"], again[2]["stack"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_keys_change_with_what_a_stack_depends_on(tmp_path):
    image, model = tmp_path / "i.png", tmp_path / "model.pt"
    image.write_bytes(b"1")
    model.write_bytes(b"1")
    item = {"image": str(image), "proportions": [0.5, 0.5]}
    base = stack_keys([item], model, "flips", 4)
    assert base == stack_keys([item], model, "flips", 4) and base[0].startswith("i-")
    assert base != stack_keys([item], model, "flips", 8)
    assert base != stack_keys([item], model, "none", 4)
    assert base != stack_keys([item | {"proportions": [0.4, 0.6]}], model, "flips", 4)
    model.write_bytes(b"22")
    assert base != stack_keys([item], model, "flips", 4)


def test_degradation_has_the_confusion_and_noise_that_were_measured():
    """Degrading the very labels that it was measured on, with their own field, gives the confidences back."""
    q, _ = noisy_confidence(size=(40, 44))
    labels = q.argmax(dim=0)
    degradation = Degradation([q], [labels])
    again = degradation(labels, degradation.fields[0])
    # The logits are of q + 1e-3, hence the tolerance.
    torch.testing.assert_close(again, (q + 1e-3) / (q + 1e-3).sum(dim=0), atol=1e-5, rtol=1e-4)
    assert bool((degradation.confusion.argmax(dim=1) == torch.arange(3)).all())
    torch.testing.assert_close(
        torch.stack([degradation.fields[0][:, labels == k].mean(dim=1) for k in range(3)]), torch.zeros(3, 3), atol=1e-5, rtol=0
    )


def test_a_class_that_never_occurs_is_drawn_as_a_confident_one():
    q, _ = noisy_confidence()
    labels = q[:2].argmax(dim=0)
    assert int(Degradation([q], [labels]).confusion[2].argmax()) == 2


@pytest.mark.parametrize("maps", [0.0, 1.0])
def test_batches_are_on_the_simplex_and_repeatable(maps):
    batches = RegularizerBatches(stacks(), size=12, batch_size=3, length=6, maps=maps, seed=4, progress=False)
    assert len(batches) == 6
    batches.set_epoch(2)
    batch = batches[3]
    assert batch["image"].shape == batch["label"].shape == batch["reference"].shape == (3, 2, 12, 12)
    for key in ("image", "label", "reference"):
        torch.testing.assert_close(batch[key].sum(dim=1), torch.ones(3, 12, 12), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch["proportions"].sum(dim=1), torch.ones(3))
    assert bool(batch["from_maps"]) == (maps == 1.0)
    assert not maps or torch.equal(batch["label"], batch["reference"])
    again = RegularizerBatches(stacks(), size=12, batch_size=3, length=6, maps=maps, seed=4, progress=False)
    again.set_epoch(2)
    assert all(torch.equal(batch[key], again[3][key]) for key in batch)
    again.set_epoch(3)
    assert not torch.equal(batch["image"], again[3]["image"])
    with pytest.raises(IndexError):
        batches[6]


def test_exact_proportions_are_a_constraint_and_a_raters_are_not():
    batches = RegularizerBatches(stacks(), size=12, length=40, maps=0.0, trust=3.0, progress=False)
    trusts = set()
    for index in range(40):
        batch = batches[index]
        trust = float(batch["trust"])
        trusts.add(trust)
        truth = batch["label"].mean(dim=(2, 3))
        if math.isinf(trust):
            torch.testing.assert_close(batch["proportions"], truth, atol=1e-3, rtol=0)
    assert trusts == {math.inf, 3.0, 0.0}


def test_targets_meet_the_proportions_of_their_image():
    found = stacks()
    batches = RegularizerBatches(found, size=12, progress=False)
    for index, target in enumerate(batches.targets):
        torch.testing.assert_close(target.mean(dim=(1, 2)), found[index]["proportions"], atol=1e-4, rtol=0)


def test_held_out_maps_fit_the_engines():
    item = HeldOutMaps(stacks())[0]
    inputs, target, arguments, named = prepare_refinement(item)
    assert inputs.shape == (1, 2, 16, 16) and arguments == ()
    assert set(target) == {"label", "reference", "mass", "proportions"} and set(named) == {
        "proportions",
        "trust",
        "mass",
        "guide",
    }


@pytest.mark.parametrize(("options", "message"), [({"maps": 1.5}, r"\[0, 1\]"), ({"rater": "drunk"}, "low, medium, high")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RegularizerBatches(stacks(), progress=False, **options)
