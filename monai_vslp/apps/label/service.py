"""What the app does, without MONAI Label: models, sessions, answers. One object per server."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.apps.label.answer import describe, write_result
from monai_vslp.apps.label.bundle_model import BundleModel
from monai_vslp.apps.label.ranking import Fit, FitStore
from monai_vslp.apps.label.request import LabelRequest, move_proportion, parse_request
from monai_vslp.apps.label.session import Session, SessionCache, adjusted
from monai_vslp.apps.label.strokes import paint_strokes
from monai_vslp.data.images import IMAGE_SUFFIXES, image_size
from monai_vslp.data.inputs import content_mark
from monai_vslp.data.proportion_file import find_proportion_file, read_proportion_file
from monai_vslp.data.proportions import ProportionLabel
from monai_vslp.data.slides import is_slide
from monai_vslp.io.summary import SUMMARY_NAME, read_summary
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock

__all__ = ["LabelService"]

SERVED = "served.json"  # in the folder of a model: which trained bundle is used
SLIDE_FORMATS = ("ome_tiff", "geojson", "dsa", "table", "energies")
SLIDE_FILES = {"labels": "labels.tif", "geojson": "segmentation.geojson", "dsa": "annotation.json", "layers": "energies.tif"}
SUMMARY_SHARES = {"given": "given", "network": "confidence", "refined": "refined", "labels": "labels"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """What a file says of an image; ``source`` is ``label`` (handed in), ``file`` (beside it), or ``none``."""

    label: ProportionLabel | None
    mpp: float | None
    source: str


class LabelService:
    """Serves bundles: images, regions and slides, with corrections.

    Args:
        models: bundle folder by name.
        work: folder for results of slides, trained bundles and what is known of images; made where it is not there.
        views: group of test-time views for all models; None for each bundle's own.

    Raises:
        InputError: no model, or one that is no bundle of this project.
    """

    def __init__(self, models: Mapping[str, str | Path], work: str | Path, views: str | None = None) -> None:
        if not models:
            raise InputError("no model to serve; give the folder that 'monai-vslp train' wrote, or a bundle of this project.")
        self.work, self.views = Path(work), views
        self.folders = {name: Path(folder) for name, folder in models.items()}
        self.sessions = SessionCache()
        self._models: dict[str, tuple[str, BundleModel]] = {}
        for name in self.folders:
            self.model(name)

    def folder(self, name: str) -> Path:
        """Where a model's own files are kept."""
        return self.work / re.sub(r"[^A-Za-z0-9._-]", "_", name)

    def served(self, name: str) -> Path:
        """The bundle folder that is in use: the last that was trained here, else the one that was given.

        Raises:
            InputError: there is no model of that name.
        """
        if name not in self.folders:
            raise InputError(f"there is no model {name!r}; there are {', '.join(self.folders)}.")
        try:
            found = Path(json.loads((self.folder(name) / SERVED).read_text(encoding="utf-8"))["folder"])
        except FileNotFoundError:
            return self.folders[name]
        return found if found.is_dir() else self.folders[name]

    def serve(self, name: str, folder: Path) -> None:
        """Use another bundle folder from now on, also in processes that run already."""
        write_json(self.folder(name) / SERVED, {"folder": str(folder.absolute())})

    def model(self, name: str) -> BundleModel:
        """A model, loaded anew where its files have changed.

        Raises:
            InputError: it is no bundle, or damaged.
        """
        folder = self.served(name)
        known = self._models.get(name)
        if known is None or known[1].folder != folder or known[1].mark() != known[0]:
            model = BundleModel(folder, self.views)
            self._models[name] = (model.mark(), model)
        return self._models[name][1]

    def _mark(self, name: str, path: Path) -> str:
        text = json.dumps([self.model(name).mark(), str(path.absolute()), content_mark(path)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def known(self, name: str, path: Path, label_file: Path | None) -> _Known:
        """Proportions that were handed in as the image's label, or lie beside it.

        Raises:
            InputError: the file is not understood, or has no row for the image.
        """
        classes = self.model(name).classes
        file, source = label_file, "label"
        if file is None:
            file, source = find_proportion_file(path), "file"
        if file is None:
            return _Known(None, None, "none")
        record = read_proportion_file(file, path, classes)
        return _Known(record.proportions, record.mpp, source if record.proportions is not None else "none")

    def fits(self, name: str) -> FitStore:
        """What is known of images, see :meth:`fit`."""
        return FitStore(self.folder(name) / "fits")

    def fit(self, name: str, image: str, path: Path, label_file: Path | None, compute: bool) -> Fit | None:
        """How an image's proportions fit.

        Args:
            name: of the model.
            image: id.
            path: file.
            label_file: proportions that were handed in, or None.
            compute: run the network where it has not seen the image yet; never for slides, which take minutes.

        Returns:
            None where no proportions are known, or the network has not seen it.
        """
        known = self.known(name, path, label_file)
        if known.label is None:
            return None
        mark = self._mark(name, path)
        network = self.fits(name).get(image, mark)
        if network is None:
            if not compute or is_slide(path):
                return None
            session, _ = self._session(name, path, LabelRequest(), known.mpp)
            network = session.network_proportions()
            self.fits(name).put(image, mark, network)
        return Fit(image, known.label.mean.tolist(), network, self.model(name).classes)

    def _session(self, name: str, path: Path, request: LabelRequest, mpp: float | None) -> tuple[Session, bool]:
        model = self.model(name)
        mpp = request.mpp if request.mpp is not None else mpp
        key = (name, self._mark(name, path), json.dumps(request.region), mpp)
        return self.sessions.get(key, lambda: Session(model.view(path, request.region, mpp), model.refinement))

    def answer(
        self,
        name: str,
        path: str | Path,
        request: Mapping[str, Any],
        image: str | None = None,
        label_file: Path | None = None,
        default_result: str = "labels",
    ) -> tuple[Path | None, dict[str, Any]]:
        """Segment an image, a region, or a whole slide, or correct what was segmented before.

        Args:
            name: of the model.
            path: image, slide, or file of confidences.
            request: see :func:`~monai_vslp.apps.label.parse_request`.
            image: id in the datastore, for active learning; None for a file from elsewhere.
            label_file: proportions that were handed in as the image's label.
            default_result: what is sent back where the request does not say.

        Returns:
            A temporary file, or None; and the numbers, JSON-like.

        Raises:
            InputError: something in the request, the image, or the proportions beside it cannot be used.
        """
        path, model = Path(path), self.model(name)
        asked = parse_request(request, model.classes, default_result)
        if asked.regularizer == "learned" and model.refinement.learned is None:
            raise InputError(f"{name} has no learned regularizer; make one with 'monai-vslp train-regularizer {model.folder}'.")
        if asked.region is not None and self._covered(path, asked.region):
            asked = replace(asked, region=None)
        whole = asked.region is None
        known = self.known(name, path, label_file) if whole else _Known(None, None, "none")
        if whole and not model.takes_confidences and is_slide(path):
            file, numbers = self._slide(name, path, asked, known)
        else:
            file, numbers = self._image(name, path, asked, known)
        if whole and image is not None:
            self.fits(name).put(image, self._mark(name, path), [numbers["proportions"]["network"][c] for c in model.classes])
        return file, {"model": name, "image": image or path.name} | numbers

    def _covered(self, path: Path, region: list[Any]) -> bool:
        """Whether a rectangle leaves nothing of an image out; MONAI Label always names one."""
        if path.suffix.lower() not in IMAGE_SUFFIXES or is_slide(path) or len(region) != 1 or len(region[0]) != 1:
            return False
        height, width = image_size(path)
        corners = {(float(x), float(y)) for x, y, *_ in region[0][0]}
        x, y = zip(*corners)
        box = {(a, b) for a in (min(x), max(x)) for b in (min(y), max(y))}
        return corners == box and min(x) <= 0 and min(y) <= 0 and max(x) >= width and max(y) >= height

    def _given(
        self, asked: LabelRequest, known: _Known, last: list[float] | None, network: list[float], classes: tuple[str, ...]
    ) -> tuple[ProportionLabel | None, str]:
        """Proportions to meet, and where they come from."""
        if asked.proportions is not None:
            return asked.proportions, "request"
        if asked.unknown:
            return None, "none"
        if asked.move is not None:
            start = last if last is not None else known.label.mean.tolist() if known.label is not None else network
            return ProportionLabel.exact(
                classes, move_proportion(start, classes.index(asked.move[0]), asked.move[1])
            ), "request"
        return known.label, known.source

    def _image(self, name: str, path: Path, asked: LabelRequest, known: _Known) -> tuple[Path | None, dict[str, Any]]:
        model = self.model(name)
        with self.sessions.lock:
            session, cached = self._session(name, path, asked, known.mpp)
            view, network = session.view, session.network_proportions()
            last = None if session.last is None else session.last.given
            label, source = self._given(asked, known, last, network, model.classes)
            painted = None
            if asked.strokes is not None:
                shape = tuple(view.confidence.shape[-2:])
                painted = paint_strokes(asked.strokes, model.classes, shape, view.origin, view.downsample)
            solution = session.solve(
                None if label is None else label.mean.tolist(),
                spread=None if label is None else label.spread.tolist(),
                bounds=None if label is None else [label.lower.tolist(), label.upper.tolist()],
                painted=painted,
                refinement=adjusted(session.refinement, asked.trust, asked.alpha, asked.regularizer),
                cold=asked.cold,
                energy_maps=asked.result == "layers",
            )
        numbers = describe(view, solution, network, model.colors)
        attributes = {"proportions": numbers["proportions"]}
        file = write_result(asked.result, view, solution, model.colors, path.stem, attributes)
        kind = "image" if asked.region is None else "region"
        seconds = {"solver": round(solution.seconds, 4)}
        return file, {"kind": kind, "source": source, "cached": cached, "seconds": seconds} | numbers

    def _slide(self, name: str, path: Path, asked: LabelRequest, known: _Known) -> tuple[Path | None, dict[str, Any]]:
        if asked.strokes is not None:
            raise InputError("strokes correct a region of a slide; give region, or location and size, around them.")
        model, folder = self.model(name), self.folder(name) / "slides" / path.stem
        pipeline = copy.copy(model.pipeline)
        pipeline.refinement = adjusted(pipeline.refinement, asked.trust, asked.alpha, asked.regularizer)
        pipeline.formats = SLIDE_FORMATS
        pipeline.options = pipeline.options | {
            key: str(value) for key, value in (("trust", asked.trust), ("alpha", asked.alpha)) if value is not None
        }
        with FolderLock(folder):
            last, network = None, None
            if (folder / SUMMARY_NAME).is_file():
                summary = read_summary(folder)
                shares = summary["proportions"]
                if summary["options"].get("fingerprint") == self._mark(name, path):
                    last = None if shares["given"] is None else [shares["given"][c] for c in model.classes]
                    network = [shares["confidence"][c] for c in model.classes]
            if asked.move is not None and network is None:
                raise InputError(f"move changes the proportions of an answer; ask for {path.name} without it first.")
            label, source = self._given(asked, known, last, network or [], model.classes)
            pipeline(
                path,
                folder,
                proportions=None if label is None else label.mean.tolist(),
                given_spread=None if label is None else label.spread.tolist(),
                given_bounds=None if label is None else [label.lower.tolist(), label.upper.tolist()],
                source_mpp=asked.mpp if asked.mpp is not None else known.mpp,
                fingerprint=self._mark(name, path),
                keep_maps=True,
            )
            summary = read_summary(folder)
            file = None
            if asked.result != "none":
                origin = folder / SLIDE_FILES[asked.result]
                with tempfile.NamedTemporaryFile(prefix=f"{path.stem}_", suffix=origin.suffix, delete=False) as target:
                    file = Path(target.name)
                shutil.copyfile(origin, file)
        shares = summary["proportions"]
        numbers = {key: summary[key] for key in ("classes", "mpp", "downsample", "residual", "converged", "reason", "seconds")}
        numbers["proportions"] = {ours: shares[key] for ours, key in SUMMARY_SHARES.items()}
        numbers |= {"kind": "slide", "source": source, "folder": str(folder), "colors": np.asarray(model.colors).tolist()}
        return file, numbers
