"""Views only where the network is in doubt."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from cases import SMALL_BACKBONE

from monai_vslp.data.slides import open_slide
from monai_vslp.inferers import AdaptiveTTAInferer, TTAInferer, infer_slide, network_predictor
from monai_vslp.networks import ConfidenceNet
from monai_vslp.networks.tta import SYMMETRIES
from monai_vslp.utils.errors import InputError

WINDOW = 32


class Windowed(torch.nn.Module):
    """Logits of a pixel's colour and of its place in its window: sees windows apart, and views disagree."""

    stride, window = 8, WINDOW

    def __init__(self, pattern=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.pattern = pattern * torch.randn(3, WINDOW, WINDOW, generator=generator)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        rows, cols = torch.arange(x.shape[-2]) % WINDOW, torch.arange(x.shape[-1]) % WINDOW
        return 12 * x + self.pattern[:, rows[:, None], cols]


def adaptive_views(views="shifted_symmetries", **options):
    """One view everywhere, then as many as there are."""
    return AdaptiveTTAInferer(views, **({"first": 1, "most": None} | options))


def images(count=2, size=(64, 96), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 0.2 * torch.rand(count, 3, *size, generator=generator)


def half_sure(count=2):
    """Red on the left, where the network is sure, grey on the right: windows 32 px wide, 4 sure and 2 in doubt."""
    x = images(count)
    x[..., :64] = torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1)
    return x


def test_everything_in_doubt_gives_plain_augmentation():
    x, network = images(), Windowed()
    adaptive = adaptive_views("symmetries", threshold=2, share=0)
    torch.testing.assert_close(adaptive(x, network), TTAInferer("symmetries", "mean_spread")(x, network))
    assert adaptive.spent.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("group", ["shifted_symmetries", "full"])
@pytest.mark.parametrize("size", [(64, 96), (75, 50), (20, 33)])
def test_views_are_mapped_back(group, size):
    """A network that does not know its place gives the same in each part of each view; a rim has fewer views."""
    x, network = images(size=size), Windowed(pattern=0)
    found = adaptive_views(group, threshold=2, share=0)(x, network)
    full = TTAInferer(group, "mean_spread")(x, network)
    inside = np.s_[..., 8:-8, 8:-8]  # rests thinner than a token are left out
    torch.testing.assert_close(found[inside], full[inside], rtol=0, atol=1e-5)


def test_nothing_in_doubt_costs_one_view():
    x, network = images(), Windowed()
    adaptive = adaptive_views(threshold=0)
    found = adaptive(x, network)
    torch.testing.assert_close(found[:, :3], network(x).softmax(dim=1))
    assert (found[:, 3] == 0).all() and adaptive.spent.tolist() == [1.0, 1.0]
    assert network.seen == [(2, 3, 64, 96)] * 2


def test_views_go_where_doubt_is():
    x, network = half_sure(), Windowed()
    adaptive = adaptive_views("symmetries", threshold=0.9, share=0.5)
    found = adaptive(x, network)
    full = TTAInferer("symmetries", "mean_spread")(x, network)
    torch.testing.assert_close(found[..., :64], torch.cat([Windowed()(x).softmax(1), torch.zeros(2, 1, 64, 96)], 1)[..., :64])
    assert (found[:, 3, :, 64:] > 0).all()
    assert adaptive.spent.tolist() == pytest.approx([1 + 7 * 2 / 6] * 2)
    torch.testing.assert_close(found[..., 64:], full[..., 64:])
    # After the first view only windows, those of both images together.
    assert network.seen[0] == (2, 3, 64, 96) and network.seen[1] == (4, 3, WINDOW, WINDOW)


def test_doubt_that_is_settled_costs_no_more():
    """One half of the window is in doubt in the first view, other halves in the next ones, none in the mean of three."""
    network = Windowed()
    network.pattern = torch.zeros(3, WINDOW, WINDOW)
    network.pattern[0, :, WINDOW // 2 :] = 4.0
    x = torch.tensor([0.42, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, WINDOW, WINDOW)
    adaptive = adaptive_views("symmetries", threshold=0.3, share=0.2)
    adaptive(x, network)
    assert adaptive.spent.item() == 3.0


def test_first_and_most_bound_the_views():
    x, network = half_sure(), Windowed()
    found = AdaptiveTTAInferer("symmetries", threshold=0, first=3)(x, network)
    torch.testing.assert_close(found, TTAInferer(SYMMETRIES[:3], "mean_spread")(x, network))
    adaptive = AdaptiveTTAInferer("symmetries", threshold=0.9, share=0.5, first=2, most=4)
    found = adaptive(x, network)
    assert adaptive.spent.tolist() == pytest.approx([2 + 2 * 2 / 6] * 2)
    for part, count in ((np.s_[..., :64], 2), (np.s_[..., 64:], 4)):
        full = TTAInferer(SYMMETRIES[:count], "mean_spread")(x, network)
        torch.testing.assert_close(found[part], full[part])


def test_an_image_does_not_depend_on_its_batch():
    x, network = (
        torch.cat([half_sure(1), images(1, seed=1), images(1).roll(1, -1), torch.full((1, 3, 64, 96), 0.95)]),
        Windowed(),
    )
    x[2, ..., :32] = x[0, ..., :32]  # a third is sure
    adaptive = adaptive_views(threshold=0.5, share=0.3)
    together = adaptive(x, network)
    spent = adaptive.spent.tolist()
    for index in range(len(x)):
        torch.testing.assert_close(adaptive(x[index : index + 1], network)[0], together[index], rtol=0, atol=1e-6)
        assert adaptive.spent.item() == spent[index]
    assert len(set(spent)) == 4 and spent[-1] == 1.0  # glass is never in doubt


def test_shifted_views_do_not_pay_for_their_rim():
    """Moved by half a token the image is 4 px longer; that rest has no windows of its own."""
    x, network = images(), Windowed()
    adaptive = adaptive_views("shifts", threshold=2, share=0)
    found = adaptive(x, network)
    assert adaptive.spent.tolist() == [4.0, 4.0]
    full = TTAInferer("shifts", "mean_spread")(x, network)
    torch.testing.assert_close(found[..., :-4, :-4], full[..., :-4, :-4])
    unshifted = network(x).softmax(dim=1)
    torch.testing.assert_close(found[:, :3, -4:, -4:], unshifted[..., -4:, -4:])  # no other view has been here


def test_batches_of_windows_are_bounded():
    x, network = images(), Windowed()
    whole = adaptive_views(threshold=2, share=0)(x, network)
    network.seen.clear()
    torch.testing.assert_close(adaptive_views(threshold=2, share=0, batch=5)(x, network), whole)
    assert {shape[0] for shape in network.seen[1:]} == {5, 2}


BEYOND = ({"head": "additive", "context": [1, 5]}, {"subtypes": {"classes": [1, 2], "edge": 5}})


@pytest.mark.parametrize("beyond", [{}, *BEYOND], ids=["windows", "context", "subtypes"])
def test_confidence_network(beyond):
    """A network that sees windows apart is asked for those; one whose head looks beyond them, for whole images."""
    torch.manual_seed(0)
    network = ConfidenceNet(
        3, backbone_kwargs=SMALL_BACKBONE | {"img_size": WINDOW}, blocks=[0, 1], window=WINDOW, **beyond
    ).eval()
    x = images()
    with torch.inference_mode():
        full = TTAInferer("symmetries", "mean_spread")(x, network)
        adaptive = adaptive_views("symmetries", threshold=2, share=0)
        found = adaptive(x, network)
    difference = (found - full).abs().amax(dim=(0, 1))
    assert adaptive.spent.tolist() == [8.0, 8.0]
    if beyond:
        shifted = adaptive_views("shifts", threshold=2, share=0)
        seen = []
        handle = network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
        shifted(x, network)
        handle.remove()
        assert set(seen) == {(64, 96)}  # no further row of windows for half a token
        assert difference.max() < 1e-5
        return
    # Logits are interpolated between token centres: across borders of windows only in the whole image.
    border = torch.zeros(64, 96, dtype=torch.bool)
    for place in (32,):
        border[place - 4 : place + 4] = True
    for place in (32, 64):
        border[:, place - 4 : place + 4] = True
    assert difference[~border].max() < 1e-5


def test_a_slide_is_the_same_however_interrupted(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 150, (256, 320, 3), dtype=np.uint8)
    pixels[:, :128] = (210, 40, 40)
    tifffile.imwrite(tmp_path / "s.tif", pixels, tile=(256, 256), photometric="rgb")
    network = Windowed()
    calls = []

    def segment(work, stop=None, **options):
        predict = network_predictor(network, adaptive_views("shifted_symmetries", threshold=0.6, share=0.3))

        def interrupted(images):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return predict(images)

        calls.clear()
        with open_slide(tmp_path / "s.tif", mpp=0.5) as slide:
            return infer_slide(
                slide, interrupted, 3, mpp=0.5, work_dir=tmp_path / work, fingerprint="", tile=64, batch_size=3,
                tissue=(np.ones((256, 320), bool), 1), progress=False,
            )  # fmt: skip

    whole = segment("whole")
    with pytest.raises(KeyboardInterrupt):
        segment("work", stop=4)
    again = segment("work")
    assert again.reused == 9
    for name in ("confidence", "spread"):
        np.testing.assert_array_equal(getattr(whole, name)[:], getattr(again, name)[:])
    assert whole.views == again.views
    assert 1.5 < whole.views["mean"] < whole.views["max"] <= 8
    assert whole.spread[:, :20].max() == 0 < whole.spread[:, 60:].min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"share": 1.5}, "share"),
        ({"first": 0}, "first=0"),
        ({"first": 3, "most": 2}, "most=2"),
        ({"window": 0}, "window"),
        ({"window": "all"}, "window"),
        ({"batch": 0}, "batch"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdaptiveTTAInferer(**options)
