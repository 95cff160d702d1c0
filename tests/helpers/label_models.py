"""A tiny bundle with weights by lot, for tests of the MONAI Label app: the path is tested, not the accuracy."""

from pathlib import Path

import torch
from monai.bundle import ConfigParser
from tiny_slides import FAST, TINY

from monai_vslp.data.synthetic import CLASSES
from monai_vslp.workflows.bundle import create_run


def make_bundle(folder: Path, **values) -> Path:
    """A bundle of the synthetic classes, as ``monai-vslp train`` would leave it."""
    create_run(folder, TINY | FAST | {"classes": list(CLASSES), "mpp": 1.0} | values, CLASSES)
    torch.manual_seed(0)
    parser = ConfigParser(ConfigParser.load_config_file(folder / "configs" / "slide_inference.json"))
    (folder / "models").mkdir(exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "models" / "model.pt")
    return folder
