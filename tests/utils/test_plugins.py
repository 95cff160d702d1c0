"""Parts that another package adds: installed into a folder of its own, used by the command line and by a bundle config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.plugins import PluginStore

CODE = """
import json
from pathlib import Path

import numpy as np
from PIL import Image

from monai_vslp.data.readers import SLIDE_READERS, SlideReader
from monai_vslp.io.output import WRITERS
from monai_vslp.networks import SYMMETRIES, TTA_GROUPS
from monai_vslp.variational import FIDELITIES, REGULARIZERS, FusionFidelity, HuberTotalVariation


def soft_edges(mass, weight):
    print("soft_edges was made")
    return HuberTotalVariation(mass, weight, 0.5)


class Rows(SlideReader):
    name = "rows"

    def __init__(self, path):
        if path.suffix != ".rows":
            raise ValueError("no .rows")
        self.pixels = np.load(path, allow_pickle=False)
        self.level_shapes, self.downsamples, self.mpp = (self.pixels.shape[:2],), (1.0,), (1.0, 1.0)

    def read(self, level, row, col, height, width):
        return self.pixels[row : row + height, col : col + width]

    def close(self):
        pass


def note(folder, output):
    (folder / "note.txt").write_text(output.name)
    return [folder / "note.txt"]


def register():
    TTA_GROUPS.add("half_turn", "the image and its half turn", lambda stride: [SYMMETRIES[0], SYMMETRIES[2]])
    REGULARIZERS.add("soft_edges", "total variation with a wide quadratic part", soft_edges)
    FIDELITIES.add("one_view", "fusion of one view", lambda stack, mass, metric: FusionFidelity(stack, mass, metric=metric))
    SLIDE_READERS.add("rows", "arrays of rows", Rows)
    WRITERS.add("note", "a note", note)
"""
CHECK = """
import numpy as np, torch
from pathlib import Path
from monai_vslp.data.slides import open_slide
from monai_vslp.io.output import WRITERS
from monai_vslp.networks import TTA_GROUPS
from monai_vslp.variational import refine
from monai_vslp.utils import plugins
assert "none" in TTA_GROUPS and TTA_GROUPS["none"] and not plugins._loaded, "own parts need no other package"
slide = open_slide(Path("slide.rows"), reader="rows")
print("mpp", slide.mpp, "note" in WRITERS)
q = torch.softmax(torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(0)), dim=0)
plain, soft = refine(q, [0.5, 0.5], alpha=1.0), refine(q, [0.5, 0.5], alpha=1.0, regularizer="soft_edges")
print("differs", float((plain.u - soft.u).abs().max()) > 1e-3, soft.converged)
held = refine(q, [0.5, 0.5], fidelity="one_view", fusion_weight=3.0)
print("closer", float((held.u - q).abs().mean()) < float((plain.u - q).abs().mean()))
"""


def install(folder: Path, name: str, code: str) -> Path:
    """What ``pip install --target`` leaves of a package with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[monai_vslp.plugins]\n{name} = {name}:register\n")
    return folder


def run(site, command, cwd):
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=400)


def test_parts_of_every_kind_by_name(tmp_path):
    install(tmp_path, "hospital_parts", CODE)
    with open(tmp_path / "slide.rows", "wb") as file:
        np.save(file, np.full((300, 400, 3), 200, dtype=np.uint8))
    done = run(tmp_path, [sys.executable, "-c", CHECK], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mpp 1.0 True" in done.stdout and "differs True True" in done.stdout and "closer True" in done.stdout


@pytest.mark.slow
def test_the_command_line_and_a_bundle_config(tmp_path):
    """``monai-vslp segment`` with the shipped weights, then the bundle's own inference with the same names."""
    from bundle_rules import BUNDLES, ROOT

    site = install(tmp_path, "hospital_parts", CODE)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(120, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    bundle = ROOT / BUNDLES[0]
    command = [sys.executable, "-m", "monai_vslp", "segment", "images", "--model", str(bundle), "--output", "out"]
    done = run(site, [*command, "--tta", "half_turn", "--regularizer", "soft_edges"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "soft_edges was made" in done.stdout
    options = json.loads((tmp_path / "out" / "a" / "summary.json").read_text())["options"]
    assert options["views"] == "half_turn" and options["regularizer"] == "soft_edges"
    config = ["--config_file", str(bundle / "configs" / "inference.json"), "--bundle_root", str(bundle)]
    config += ["--meta_file", str(bundle / "configs" / "metadata.json"), "--dataset_dir", "images", "--output_dir", "eval"]
    config += ["--views", "half_turn", "--regularizer", "soft_edges"]
    done = run(site, [sys.executable, "-m", "monai.bundle", "run", *config], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "soft_edges was made" in done.stdout
    one, other = ((tmp_path / name / "a" / "labels.tif").read_bytes() for name in ("out", "eval"))
    assert one == other


def test_a_package_that_fails_is_named_and_takes_nothing_else_away(tmp_path):
    install(tmp_path, "hospital_parts", CODE)
    install(tmp_path, "broken_parts", "def register():\n    raise RuntimeError('no licence found')\n")
    program = (
        "from monai_vslp.networks import tta_views\nprint(len(tta_views('half_turn')), len(tta_views('none')))\n"
        "try:\n    tta_views('thirds')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = run(tmp_path, [sys.executable, "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 1" in done.stdout
    assert "PluginError" in done.stdout and "broken_parts (RuntimeError: no licence found)" in done.stdout
    assert done.stderr.count("could not be loaded") == 1, "said once"


def test_a_name_that_is_taken_is_refused():
    store = PluginStore("things", "for a test")
    store.add("one", "the first", 1)
    store.add("one", "the same again", 1)
    with pytest.raises(InputError, match="have 'one' already"):
        store.add("one", "another", 2)
    with pytest.raises(ValueError, match="one"):
        store.find("onne")
