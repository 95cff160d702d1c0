"""The command that starts the server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.utils import optional_import

from monai_vslp.apps.label.bundle_model import BundleModel
from monai_vslp.data.images import IMAGE_SUFFIXES
from monai_vslp.data.proportion_file import PROPORTION_FILES
from monai_vslp.data.slides import SLIDE_SUFFIXES
from monai_vslp.networks.tta import TTA_GROUPS
from monai_vslp.utils.errors import InputError

__all__ = ["label_command", "start_label"]

WORK = ".monai_vslp"  # folder in the studies
_, has_monailabel = optional_import("monailabel")


def _models(models: Sequence[str | Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in map(str, models):
        name, separator, folder = text.partition("=")
        path = Path(folder if separator else text)
        name = name if separator else path.resolve().name
        if name in found:
            raise InputError(f"two models are named {name!r}; give them names: --model one={path}.")
        BundleModel(path)
        found[name] = str(path.absolute())
    return found


def label_command(
    models: Sequence[str | Path],
    studies: str | Path,
    *,
    work: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    views: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """What starts the server, without starting it; the app's folder is written.

    Args:
        models: bundle folders, or ``name=folder``; a folder's own name otherwise.
        studies: folder of images and slides; made where it is not there.
        work: folder for what the app writes; ``.monai_vslp`` in the studies by default.
        host: address to listen at; others than this machine's own need an address of the network.
        port: to listen at.
        views: group of test-time views; None for each bundle's own.

    Returns:
        The command, and variables of the environment beside those that are set.

    Raises:
        InputError: a model that cannot be served, two of one name, or unknown views.
    """
    named = _models(models)
    if not named:
        raise InputError("no model to serve; give --model with the folder that 'monai-vslp train' wrote.")
    if views is not None and views not in TTA_GROUPS.names:
        raise InputError(f"views are one of {', '.join(TTA_GROUPS.names)}, got {views!r}.")
    studies = Path(studies).absolute()
    work = studies / WORK if work is None else Path(work).absolute()
    app = work / "app"
    app.mkdir(parents=True, exist_ok=True)
    studies.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("main.py"), app / "main.py")  # MONAI Label writes into the app's folder
    suffixes = [*IMAGE_SUFFIXES, *SLIDE_SUFFIXES, ".npy", *(Path(name).suffix for name in PROPORTION_FILES), ".geojson"]
    conf = {"models": json.dumps(named), "work": str(work)} | ({} if views is None else {"views": views})
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", host, "--port", str(port)]
    for key, value in conf.items():
        command += ["--conf", key, value]
    environment = {
        "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps([f"*{suffix}" for suffix in dict.fromkeys(suffixes)]),
        "MONAI_LABEL_SESSION_PATH": str(work / "sessions"),
        "MONAI_LABEL_TRACKING_ENABLED": "false",
    }
    return command, environment


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as a person would type it."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in environment.items()), shlex.join(command)])


def start_label(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Become the server; does not return.

    Raises:
        InputError: MONAI Label is not installed in this environment.
    """
    if not has_monailabel:
        raise InputError(
            "MONAI Label is not in this environment; it needs one of its own: bash scripts/setup_label.sh, then "
            ".venv-label/bin/monai-vslp label …"
        )
    sys.stdout.flush()
    # MONAI Label appends to PYTHONPATH and expects it to be there.
    os.execve(command[0], list(command), os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | dict(environment))
