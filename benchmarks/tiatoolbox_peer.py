"""tiatoolbox's semantic segmentor on a slide: run by ``slide_peer.py`` with the Python of another environment.

python tiatoolbox_peer.py JSON    # see the keys below; prints one line of JSON: seconds, unsaved, tiles, peak_gib, version
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

# torchvision of the package index beside a CPU build of torch lacks these operators; nothing here calls them.
try:
    torch.ops.torchvision.nms  # noqa: B018
except AttributeError:
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC


class Peer(ModelABC):
    """A network that gives logits ``[B, C, H, W]``; its probabilities are averaged over blocks of ``down`` px."""

    def __init__(self, network: torch.nn.Module, down: int) -> None:
        super().__init__()
        self.network, self.down, self.calls = network.eval(), down, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(self.network(images).softmax(dim=1), self.down)

    @staticmethod
    def infer_batch(model: Peer, batch_data: torch.Tensor, *, device: str) -> np.ndarray:
        model.calls += len(batch_data)
        with torch.inference_mode():
            images = torch.as_tensor(batch_data).to(device).permute(0, 3, 1, 2).float() / 255
            return model(images).permute(0, 2, 3, 1).cpu().numpy()


class Segmentor(SemanticSegmentor):
    """Notes when all tiles are predicted, so that what saving takes can be told apart."""

    predicted = 0.0

    def save_predictions(self, *args, **kwargs):
        self.predicted = time.perf_counter()
        return super().save_predictions(*args, **kwargs)


def main() -> None:
    task = json.loads(sys.argv[1])
    sys.path.insert(0, task["root"])
    from monai_vslp.networks import ConfidenceNet

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    tile, stride, down = task["tile"], task["stride"], task["down"]
    model = Peer(ConfidenceNet(task["classes"]), down)
    engine = Segmentor(model=model, batch_size=task["batch_size"], num_workers=task["workers"], verbose=False)
    config = IOSegmentorConfig(
        input_resolutions=[{"units": "baseline", "resolution": 1.0}],
        output_resolutions=[{"units": "baseline", "resolution": 1.0 / down}],
        patch_input_shape=(tile, tile),
        patch_output_shape=(tile // down, tile // down),
        stride_shape=(stride, stride),
        save_resolution={"units": "baseline", "resolution": 1.0 / down},
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        engine.run(
            [Path(task["slide"])],
            masks=[np.load(task["mask"])],
            patch_mode=False,
            ioconfig=config,
            save_dir=Path(folder) / "out",
            output_type="zarr",
            return_probabilities=True,
        )
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    unsaved = engine.predicted - started
    found = {"seconds": seconds, "unsaved": unsaved, "tiles": model.calls, "peak_gib": peak}
    print(json.dumps(found | {"version": metadata.version("tiatoolbox")}))


if __name__ == "__main__":
    main()
