"""The package imports with monai, torch and numpy alone."""

import subprocess
import sys
from pathlib import Path

import monai_vslp

OPTIONAL = (
    "timm", "torchvision", "ot", "cucim", "openslide", "mlflow", "ignite", "tifffile", "imagecodecs", "skimage", "scipy", "PIL",
    "pandas", "matplotlib", "tqdm", "safetensors", "fire", "zarr", "dask", "einops", "nibabel", "sklearn", "yaml",
    "highdicom", "pydicom", "wsidicom", "distributed", "psutil",
)  # fmt: skip

PROGRAM = f"""
import importlib, importlib.abc, pkgutil, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ImportError("blocked: " + name)
        return None

sys.meta_path.insert(0, Blocked())
import monai_vslp
names = [m.name for m in pkgutil.walk_packages(monai_vslp.__path__, "monai_vslp.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print("REPORT")
print(len(names))
import torch
print(monai_vslp.variational.refine(torch.full((2, 4, 4), 0.5), [0.3, 0.7]).converged)
try:
    monai_vslp.networks.ConfidenceNet(2)
except Exception as error:
    print("said:", error)
"""


def test_every_module_imports_without_optional_packages():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    number, converged, said = done.stdout.split("REPORT\n")[1].strip().split("\n", 2)  # MONAI's imports print, too
    assert int(number) >= 40
    assert converged == "True"
    assert "timm" in said


def test_arrows_run_downwards():
    """The variational core knows torch and errors only; no layer imports one above it."""
    floors = ["utils", "metrics", "variational", "data", "networks", "losses", "io", "transforms", "inferers", "handlers"]
    package = Path(monai_vslp.__file__).parent
    for path in (package / "variational").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from monai_vslp."):
                assert line.split()[1].split(".")[1] in ("utils", "variational"), f"{path.name}: {line}"
    for floor in floors:
        for path in (package / floor).glob("*.py"):
            assert "monai_vslp.workflows" not in path.read_text(), path
            assert "monai_vslp.cli" not in path.read_text(), path
