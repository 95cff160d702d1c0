"""The MONAI Label application."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.apps.label.service import LabelService
from monai_vslp.apps.label.tasks import (
    NEEDED,
    ProportionBatch,
    ProportionDatastore,
    ProportionInferTask,
    ProportionStrategy,
    ProportionTrainTask,
)
from monai_vslp.utils.errors import InputError

__all__ = ["ProportionLabelApp"]

MONAILabelApp, _ = optional_import("monailabel.interfaces.app", name="MONAILabelApp", descriptor=NEEDED, as_type="base")
Random, _ = optional_import("monailabel.tasks.activelearning.random", name="Random", descriptor=NEEDED)
settings, _ = optional_import("monailabel.config", name="settings", descriptor=NEEDED)
HTTPException, _ = optional_import("fastapi", name="HTTPException", descriptor=NEEDED, as_type="base")

WRONG_INPUT, NOT_FOUND = 400, 404
FINAL = "final"  # tag of labels that people handed in
WSI_RESULTS = {None: "geojson", "dsa": "dsa", "json": "none"}

logger = logging.getLogger(__name__)


class ProportionLabelApp(MONAILabelApp):
    """Serves bundles of this project.

    Args:
        app_dir: folder of ``main.py``.
        studies: folder of images and slides.
        conf: ``models``, a JSON object of folders by name; ``work``, a folder for what is written; ``views``, a group of
            test-time views (each bundle's own where it is left out).
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        models = json.loads(conf.get("models", "{}"))
        self.service = LabelService(models, conf.get("work") or Path(studies) / ".monai_vslp", conf.get("views"))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="monai_vslp",
            description="Tissue maps from tissue percentages",
            version="0.1",
        )

    def init_datastore(self) -> Any:
        """The folder of images."""
        return ProportionDatastore(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, Any]:
        """A task per model."""
        return {name: ProportionInferTask(self.service, name, self.label_file, self.image_id) for name in self.service.folders}

    def init_trainers(self) -> dict[str, Any]:
        """One per model that learns from proportions."""
        names = [name for name in self.service.folders if not self.service.model(name).takes_confidences]
        return {name: ProportionTrainTask(self.service, name) for name in names}

    def init_strategies(self) -> dict[str, Any]:
        """``proportions``, and MONAI Label's ``random``."""
        return {"proportions": ProportionStrategy(self.service, self.label_file), "random": Random()}

    def init_batch_infer(self) -> Any:
        """Of all images that a model can take."""
        return ProportionBatch(self.service)

    def batch_infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """As MONAI Label's."""
        self._check(request, self._infers, "model")
        return self._answered(lambda: super(ProportionLabelApp, self).batch_infer(request, datastore))

    def image_id(self, path: str) -> str | None:
        """Id of the image at a path, None for one from elsewhere."""
        store, real = self.datastore(), os.path.realpath(path)
        return next((image for image in store.list_images() if store.get_image_uri(image) == real), None)

    def label_file(self, path: str) -> Path | None:
        """Proportions that somebody handed in as the final label of the image at a path, or None."""
        image = self.image_id(path)
        if image is None:
            return None
        found = self.datastore().get_label_uri(image, FINAL)
        return Path(found) if found and Path(found).suffix.lower() in (".csv", ".xlsx", ".json") else None

    def _answered(self, call: Any) -> Any:
        """Run a call; what a person can act on becomes an HTTP error with that text."""
        try:
            return call()
        except InputError as error:
            raise HTTPException(status_code=WRONG_INPUT, detail=str(error)) from error

    def _check(self, request: dict[str, Any], tasks: dict[str, Any], kind: str) -> None:
        name = request.get("model")
        if name not in tasks:
            raise HTTPException(NOT_FOUND, f"there is no {kind} {name!r}; there are {', '.join(tasks) or 'none'}.")

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """As MONAI Label's; wrong input becomes HTTP 400, an unknown image or model 404."""
        self._check(request, self._infers, "model")
        image, store = request["image"], datastore or self.datastore()
        if isinstance(image, str) and not os.path.exists(image) and not store.get_image_uri(image):
            known = sorted(store.list_images())
            shown = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
            raise HTTPException(NOT_FOUND, f"there is no image {image!r}; there are {shown or 'none'}.")
        return self._answered(lambda: super(ProportionLabelApp, self).infer(request, datastore))

    def infer_wsi(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """A region of a slide, by ``location`` and ``size`` or ``region``; all of it for a size of [0, 0].

        MONAI Label's own cuts slides into tiles without overlap at a level of the file; here the slide is read at the
        network's µm/px, and is one problem.
        """
        output = request.get("output")
        if output not in WSI_RESULTS:
            raise HTTPException(WRONG_INPUT, f"output is dsa or json (GeoJSON where it is left out), got {output!r}.")
        return self.infer(request | {"default_result": WSI_RESULTS[output]}, datastore)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """As MONAI Label's."""
        self._check(request, self._trainers, "trainer")
        return self._answered(lambda: super(ProportionLabelApp, self).train(request))

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """As MONAI Label's."""
        request = request | {"strategy": request.get("strategy") or "proportions"}
        if request["strategy"] not in self._strategies:
            known = ", ".join(self._strategies)
            raise HTTPException(NOT_FOUND, f"there is no strategy {request['strategy']!r}; there are {known}.")
        return self._answered(lambda: super(ProportionLabelApp, self).next_sample(request))

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any] | None:
        """Look at proportions that were handed in; what is not understood is taken away again."""
        path = self.datastore().get_image_uri(image_id)
        file = self.label_file(path)
        if file is None:
            return None
        name = next(iter(self._trainers), next(iter(self._infers)))
        try:
            known = self.service.known(name, Path(path), file)
        except InputError as error:
            self.datastore().remove_label(label_id, FINAL)
            self.datastore().refresh()
            raise HTTPException(WRONG_INPUT, f"{error} The label was not kept.") from error
        shares = None if known.label is None else dict(zip(known.label.classes, known.label.mean.tolist()))
        return {"proportions": shares}
