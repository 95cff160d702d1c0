"""The shipped network at work: on tissue it has not seen, in every format it is exported to."""

import json

import numpy as np
import pytest
import torch
from bundle_rules import BUNDLES, ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export
from PIL import Image

from monai_vslp.data import write_table
from monai_vslp.data.synthetic import CLASSES, VAL_VARIANTS, synthetic_image
from monai_vslp.workflows import evaluate, segment

BUNDLE = ROOT / BUNDLES[0]
IMAGES = 4


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Images of other seeds than those of the training and of the card's figures."""
    folder = tmp_path_factory.mktemp("fresh")
    rows = []
    for index in range(IMAGES):
        tissue = synthetic_image((192, 192), seed=77_000 + index, variants=VAL_VARIANTS)
        for kind, array in (("images", tissue.image), ("masks", tissue.mask)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"t{index}.png")
        shares = {name: f"{100 * p:.4f}" for name, p in zip(CLASSES, tissue.proportions)}
        rows.append({"image": f"t{index}.png", "split": "test", **shares})
    write_table(folder / "proportions.csv", rows, CLASSES)
    return folder


def test_it_does_on_fresh_tissue_what_the_card_says(fresh, tmp_path):
    assert not segment([fresh / "images"], BUNDLE, tmp_path, proportions=fresh / "proportions.csv", progress=False)
    found = evaluate(tmp_path, fresh / "masks")["blocks"][0]["rows"]
    rows = {row["map"]: row for row in found}
    card = json.loads((BUNDLE / "configs" / "metadata.json").read_text())["eval_metrics"]
    masks = np.concatenate([np.asarray(Image.open(p)).ravel() for p in (fresh / "masks").iterdir()])
    chance = np.bincount(masks, minlength=5).max() / masks.size / 5  # of always naming the most frequent class
    network, refined = rows["argmax"]["miou"], rows["refined"]["miou"]
    assert network > 2 * chance and refined > 3 * chance
    assert network == pytest.approx(card["miou_network"], abs=0.15)  # four images instead of the card's
    assert refined == pytest.approx(card["miou_refined_exact_proportions"], abs=0.15)
    assert refined > network


@pytest.mark.parametrize("bundle", BUNDLES)
def test_export_by_the_config_of_the_bundle(bundle, tmp_path):
    root = ROOT / bundle
    size = [64, 64] if bundle == BUNDLES[1] else [96, 64]
    formats = ["torchscript", "torch_export"]
    offered = json.loads((root / "configs" / "export.json").read_text())["formats"]
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        pass
    else:
        formats = offered
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "export.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=None,
        bundle_root=str(root),
        export_dir=str(tmp_path),
        formats=formats,
        size=size,
    )
    workflow.initialize()
    workflow.run()
    found = json.loads((tmp_path / "export.json").read_text())
    assert set(found) == set(formats) >= {"torchscript", "torch_export"}
    assert all(
        entry["largest_difference"] <= 1e-3 and (tmp_path / entry["file"]).stat().st_size > 1e4 for entry in found.values()
    )


@pytest.mark.parametrize("bundle", BUNDLES)
def test_monais_own_export(bundle, tmp_path):
    """``ckpt_export`` as the zoo's check calls it, by tracing."""
    root = ROOT / bundle
    parser = ConfigParser(json.loads((root / "configs" / "inference.json").read_text()))
    classes = len(parser["classes"])
    shape = (1, 3 if bundle == BUNDLES[0] else classes, 64, 64)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(root / "models" / "model.pt"),
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=str(root / "configs" / "inference.json"),
        bundle_root=str(root),
        use_trace=True,
        input_shape=shape,
    )
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(root / "models" / "model.pt", weights_only=True))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    x = x if bundle == BUNDLES[0] else x.softmax(dim=1)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(str(tmp_path / "model.ts"))(x), network(x), atol=1e-4)
