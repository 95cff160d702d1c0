"""Tasks of MONAI Label: inference, training, active learning, batches of them, and the datastore."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.apps.label.ranking import rank_fits
from monai_vslp.apps.label.request import RESULTS
from monai_vslp.apps.label.service import LabelService
from monai_vslp.apps.label.training import train_items, training_stats
from monai_vslp.data.proportion_file import PROPORTION_FILES

__all__ = ["ProportionBatch", "ProportionDatastore", "ProportionInferTask", "ProportionStrategy", "ProportionTrainTask"]

NEEDED = "{} is needed for the MONAI Label app: bash scripts/setup_label.sh"
InferTask, _ = optional_import("monailabel.interfaces.tasks.infer_v2", name="InferTask", descriptor=NEEDED, as_type="base")
TrainTask, _ = optional_import("monailabel.interfaces.tasks.train", name="TrainTask", descriptor=NEEDED, as_type="base")
HTTPException, _ = optional_import("fastapi", name="HTTPException", descriptor=NEEDED, as_type="base")
Strategy, _ = optional_import("monailabel.interfaces.tasks.strategy", name="Strategy", descriptor=NEEDED, as_type="base")
LocalDatastore, _ = optional_import("monailabel.datastore.local", name="LocalDatastore", descriptor=NEEDED, as_type="base")

BatchInferTask, _ = optional_import(
    "monailabel.interfaces.tasks.batch_infer", name="BatchInferTask", descriptor=NEEDED, as_type="base"
)

TABLES = {Path(name).suffix for name in PROPORTION_FILES}
MOST_COMPUTED = 16  # images that one request for the next sample runs through the network

logger = logging.getLogger(__name__)


class ProportionDatastore(LocalDatastore):
    """A folder of images with their proportions: tables and JSON are labels, never images."""

    def _list_files(self, path: str, patterns: Any) -> dict[str, str]:
        found = super()._list_files(path, patterns)
        if Path(path).resolve() != Path(self._datastore.image_path()).resolve():
            return found
        return {name: file for name, file in found.items() if Path(name).suffix.lower() not in {*TABLES, ".geojson"}}


class ProportionInferTask(InferTask):
    """One model of a :class:`~monai_vslp.apps.label.service.LabelService`.

    Args:
        service: that serves it.
        name: of the model.
        label_file: gives the proportions that were handed in for the image at a path, or None.
        image_id: gives the id of the image at a path, or None.
    """

    def __init__(
        self,
        service: LabelService,
        name: str,
        label_file: Callable[[str], Path | None],
        image_id: Callable[[str], str | None],
    ) -> None:
        model = service.model(name)
        super().__init__(
            type="segmentation",
            labels={label: index + 1 for index, label in enumerate(model.classes)},
            dimension=2,
            description=f"Tissue map of {model.folder.name}, drawn with proportions",
            config={"result": list(RESULTS)},
        )
        self.service, self.name, self.label_file, self.image_id = service, name, label_file, image_id

    def is_valid(self) -> bool:
        """Whether the model's weights are there."""
        return self.service.model(self.name).weights.is_file()

    def get_path(self, validate: bool = True) -> str:
        """File of the weights."""
        return str(self.service.model(self.name).weights)

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        path = request["image"]
        # The list of choices that info() shows comes back from clients as it is.
        asked = {key: value for key, value in request.items() if not (key == "result" and isinstance(value, list))}
        file, numbers = self.service.answer(
            self.name, path, asked, self.image_id(path), self.label_file(path), request.get("default_result", "labels")
        )
        return None if file is None else str(file), numbers


class ProportionBatch(BatchInferTask):
    """Inference of many images; those that the model cannot take are left out, those that fail are told and passed over.

    Args:
        service: that serves the models.
    """

    def __init__(self, service: LabelService) -> None:
        super().__init__()
        self.service = service

    def get_images(self, request: dict[str, Any], datastore: Any) -> list[str]:
        """Images that the request means and the model can take."""
        takes = self.service.model(request["model"]).takes
        return [image for image in super().get_images(request, datastore) if takes(datastore.get_image_uri(image))]

    def __call__(self, request: dict[str, Any], datastore: Any, infer: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        def attempt(one: dict[str, Any], store: Any) -> dict[str, Any]:
            try:
                return infer(one, store)
            except HTTPException as error:
                logger.warning("%s: %s", one["image"], error.detail)
                return {"error": error.detail}

        # The models choose their device; asked for several GPUs, MONAI Label divides by their number, which may be 0.
        return super().__call__(request | {"multi_gpu": False}, datastore, attempt)


class ProportionTrainTask(TrainTask):
    """Training of one model from the final labels of the datastore."""

    def __init__(self, service: LabelService, name: str) -> None:
        super().__init__(f"Trains {name} further from files of proportions")
        self.service, self.name = service, name

    def config(self) -> dict[str, Any]:
        """What a request may say."""
        return {"epochs": None, "val_split": 0.2, "start": ["model", "scratch"], "seed": 0}

    def stats(self) -> dict[str, Any]:
        """Of the bundle in use."""
        return training_stats(self.service.served(self.name))

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        options = {key: request[key] for key in ("epochs", "val_split", "seed", "batch_size") if request.get(key) is not None}
        if "epochs" not in options and request.get("max_epochs") is not None:
            options["epochs"] = request["max_epochs"]
        start = request.get("start", "model")
        options["start"] = start[0] if isinstance(start, list) else start
        return train_items(self.service, self.name, datastore.datalist(), **options)


class ProportionStrategy(Strategy):
    """Proposes the image whose given proportions the network meets worst.

    Args:
        service: that serves the models.
        label_file: gives the proportions that were handed in for the image at a path, or None.
    """

    def __init__(self, service: LabelService, label_file: Callable[[str], Path | None]) -> None:
        super().__init__("The image or slide whose proportions fit worst")
        self.service, self.label_file = service, label_file

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any] | None:
        name = request.get("model") or next(iter(self.service.folders))
        skipped = set(request.get("skip") or ())
        images = datastore.list_images() if request.get("images") == "all" else datastore.get_unlabeled_images()
        fits, unseen, computed = [], 0, 0
        for image in sorted(set(images) - skipped):
            path = datastore.get_image_uri(image)
            label = self.label_file(path)
            fit = self.service.fit(name, image, Path(path), label, compute=False)
            if fit is None and computed < MOST_COMPUTED:
                fit = self.service.fit(name, image, Path(path), label, compute=True)
                computed += fit is not None
            if fit is not None:
                fits.append(fit)
            elif self.service.known(name, Path(path), label).label is not None:
                unseen += 1
        if not fits:
            return None
        ranked = rank_fits(fits)
        first = ranked[0]
        return {
            "id": first.image,
            "weight": first.difference,
            "class": first.worst,
            "given": dict(zip(first.classes, first.given)),
            "network": dict(zip(first.classes, first.network)),
            "ranking": [{"id": fit.image, "difference": fit.difference, "class": fit.worst} for fit in ranked],
            "not_segmented": unseen,
        }
