"""A trained bundle as a model of MLflow: registered by name, loaded by ``mlflow.pyfunc``, served over HTTP.

Example:
    >>> model = mlflow.pyfunc.load_model("models:/tissue/1")  # doctest: +SKIP
    >>> image = Path("a.png").read_bytes()  # doctest: +SKIP
    >>> model.predict(pandas.DataFrame({"image": [image], "proportions": ['{"tumour": 60, "stroma": 40}']}))  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import optional_import

import monai_vslp
from monai_vslp.data.proportions import parse_row
from monai_vslp.handlers.tracked_run import TrackedRun
from monai_vslp.transforms import LoadTissueImage
from monai_vslp.transforms.overlay import EnergyPicture
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.calibration import segment_settings
from monai_vslp.workflows.regularizer import REGULARIZER, has_regularizer

__all__ = ["BundleModel", "register"]

Image, _ = optional_import("PIL.Image")
pandas, _ = optional_import("pandas")
pyfunc, _ = optional_import("mlflow.pyfunc", descriptor="{} is needed to register: pip install 'monai_vslp[tracking]'")
models, _ = optional_import("mlflow.models")
types, _ = optional_import("mlflow.types")
exceptions, _ = optional_import("mlflow.exceptions")

IMAGE, PROPORTIONS = "image", "proportions"  # columns
ARTIFACT = "model"  # folder of the run that holds it
UPLOAD_TIMEOUT = "300"  # s per request: a model is larger than metrics are
PARTS = ("LICENSE", "configs", "docs", "models/model.pt", "models/calibration.json", REGULARIZER)
UNTRACKED = ("mlflow.db", "mlflow_artifacts", "mlflow_run.json", "checkpoint.pt")


def _png(array: np.ndarray) -> str:
    """``[H, W]`` or ``[H, W, 3]`` uint8 as PNG in base64."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


class BundleModel:
    """A bundle folder in memory: images and proportions in, maps out.

    Args:
        run: bundle folder with ``models/model.pt``.

    Raises:
        InputError: the folder is no bundle with a trained network.
    """

    def __init__(self, run: str | Path) -> None:
        run = Path(run)
        config = read_config(run, "inference.json")
        self.classes: list[str] = config["classes"]
        if not (run / "models" / "model.pt").is_file():
            raise InputError(f"{run / 'models' / 'model.pt'} does not exist; has the training of {run} finished an epoch?")
        steps = config["postprocessing"]["transforms"]
        config["postprocessing"]["transforms"] = [s for s in steps if not str(s["_target_"]).endswith("SaveSegmentationd")]
        settings = segment_settings(run, self.classes)
        if has_regularizer(run):
            settings["regularizer"] = str((run / REGULARIZER).absolute())
        parser = ConfigParser(config)
        parser.update({"bundle_root": str(run.absolute()), **settings})
        parser.parse()
        parser.get_parsed_content("initialize")
        self.network = parser.get_parsed_content("network").eval()
        self.inferer = parser.get_parsed_content("inferer")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.device = parser.get_parsed_content("device")

    def segment(self, image: torch.Tensor, proportions: np.ndarray | None = None) -> dict[str, Any]:
        """One image through network, views and refinement.

        Args:
            image: RGB, shape ``[3, H, W]``, float32 in [0, 1].
            proportions: shape ``[C]``, fractions; None leaves them free.

        Returns:
            What the post-processing of the bundle leaves, see :class:`~monai_vslp.transforms.VariationalRefinementd`.
        """
        with torch.inference_mode():
            predicted = self.inferer(image[None].to(self.device), self.network)[0]
        item: dict[str, Any] = {"image": image, "pred": predicted.cpu().clone()}
        if proportions is not None:
            item[PROPORTIONS] = proportions
        return self.postprocessing(item)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """As ``mlflow.pyfunc`` calls it.

        Args:
            model_input: a data frame, or what makes one, with ``image`` (the bytes of a PNG, JPEG or TIFF file; over HTTP in
                base64) and, where known, ``proportions``: JSON text ``{"<class>": entry, …}`` with entries as tables have them.
            params: not used.

        Returns:
            A data frame with a row per image: ``labels`` (PNG of class indices, in base64), ``proportions`` (JSON text,
            fractions of the refined map), ``network`` (those of the network alone), ``fidelity`` and ``regularization`` (PNG
            of the energies, dark to bright, in base64).

        Raises:
            InputError: an image or proportions that cannot be read; names the row.
        """
        frame = pandas.DataFrame(model_input)
        if IMAGE not in frame:
            raise InputError(f"no column {IMAGE!r}; columns are {', '.join(map(str, frame.columns)) or 'none'}.")
        given = frame[PROPORTIONS] if PROPORTIONS in frame else [None] * len(frame)
        return pandas.DataFrame([self._row(number, *pair) for number, pair in enumerate(zip(frame[IMAGE], given))])

    def _row(self, number: int, image: bytes, proportions: str | None) -> dict[str, str]:
        found = self.segment(self._image(image, number), self._proportions(proportions, number))
        energies = {key: np.asarray(found[f"pred_{key}_energy"]) for key in ("fidelity", "regularization")}
        refined = found["pred_refinement"]["proportions_refined"]
        network = found["pred_confidence"].double().mean(dim=(1, 2)).tolist()
        return {
            "labels": _png(np.asarray(found["pred_labels"])[0]),
            "proportions": json.dumps(dict(zip(self.classes, refined))),
            "network": json.dumps(dict(zip(self.classes, network))),
            **{key: _png(np.moveaxis(np.asarray(EnergyPicture()(value)), 0, -1)) for key, value in energies.items()},
        }

    @staticmethod
    def _image(data: bytes, number: int) -> torch.Tensor:
        if not isinstance(data, bytes | bytearray):
            raise InputError(f"row {number}: {IMAGE} must be the bytes of an image file, got {type(data).__name__}.")
        suffix = ".tif" if bytes(data[:4]) in (b"II*\0", b"MM\0*") else ".img"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"row{number}{suffix}"
            path.write_bytes(data)
            return LoadTissueImage()(path)

    def _proportions(self, text: Any, number: int) -> np.ndarray | None:
        if text is None or text == "" or (isinstance(text, float) and math.isnan(text)):
            return None
        try:
            cells = json.loads(text)
        except (TypeError, ValueError) as error:
            raise InputError(
                f'row {number}: {PROPORTIONS} must be JSON text such as {{"tumour": 60}}, got {text!r}.'
            ) from error
        if not isinstance(cells, Mapping):
            raise InputError(f"row {number}: {PROPORTIONS} must be a JSON object of classes and shares, got {text!r}.")
        label = parse_row(cells, self.classes, row=number)
        return None if label is None else label.mean


def _load_pyfunc(path: str) -> BundleModel:
    """What MLflow calls to load the model; ``path`` is the bundle folder in it."""
    return BundleModel(path)


def _signature() -> Any:
    inputs = types.Schema([types.ColSpec("binary", IMAGE), types.ColSpec("string", PROPORTIONS, required=False)])
    names = ("labels", "proportions", "network", "fidelity", "regularization")
    return models.ModelSignature(inputs, types.Schema([types.ColSpec("string", name) for name in names]))


def _requirements() -> list[str]:
    """Given by hand: MLflow would find them by loading the model in another process, and ask the network for versions."""
    return [f"monai_vslp=={monai_vslp.__version__}", f"torch=={torch.__version__.partition('+')[0]}", "pandas", "mlflow"]


def _copy(run: Path, target: Path, parts: Sequence[str] = PARTS) -> None:
    """The bundle as it is used: no checkpoints, no tracking."""
    for part in parts:
        source, copied = run / part, target / part
        if source.is_dir():
            shutil.copytree(source, copied, ignore=shutil.ignore_patterns(*UNTRACKED))
        elif source.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copied)


def register(run: str | Path, name: str, uri: str | None = None) -> str:
    """Add a bundle to its MLflow run and to the model registry, as a new version of ``name``.

    The model holds a copy of the bundle and no pickled code: it is loaded by ``monai_vslp.apps.mlflow_model``, so that
    monai_vslp must be installed where it is used.

    Args:
        run: bundle folder of ``monai-vslp train``.
        name: of the registered model; made if needed.
        uri: MLflow server or database; None for that of the training.

    Returns:
        Address of the version, ``models:/<name>/<version>``.

    Raises:
        InputError: the folder has no trained network, or MLflow fails.
    """
    run = Path(run)
    model = BundleModel(run)  # what cannot be loaded is not registered
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", UPLOAD_TIMEOUT)
    tracked = TrackedRun.of(run, uri, strict=True)
    tracked.open()
    with tempfile.TemporaryDirectory() as folder:
        bundle, saved = Path(folder) / "bundle", Path(folder) / ARTIFACT
        _copy(run, bundle)
        pyfunc.save_model(
            str(saved),
            loader_module=__name__,
            data_path=str(bundle),
            signature=_signature(),
            pip_requirements=_requirements(),
            metadata={"classes": model.classes, "monai_vslp": monai_vslp.__version__},
        )
        client = tracked.client
        try:
            client.log_artifacts(tracked.run_id, str(saved), ARTIFACT)
            try:
                client.create_registered_model(name)
            except exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = client.create_model_version(name, f"runs:/{tracked.run_id}/{ARTIFACT}", tracked.run_id)
        except Exception as error:  # a server raises many kinds
            raise InputError(f"{run} could not be registered with MLflow at {tracked.uri}: {error}") from error
    tracked.close()
    return f"models:/{name}/{version.version}"
