"""Operators of the MONAI Deploy App SDK: one that finds the slide, one that segments it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.apps.deploy.slide_job import prepare, run_job

__all__ = ["SlideSegmentationOperator", "SlideSourceOperator"]

NEEDED = "{} is needed for MONAI Deploy: pip install monai-deploy-app-sdk"
Operator, _ = optional_import("monai.deploy.core", name="Operator", descriptor=NEEDED, as_type="base")
ConditionType, _ = optional_import("monai.deploy.core", name="ConditionType", descriptor=NEEDED)

logger = logging.getLogger(__name__)


class SlideSourceOperator(Operator):
    """Gives the path of the slide that the platform handed over, once.

    Output ``slide``: :class:`pathlib.Path`.

    Args:
        fragment: the application.
        *args: conditions of the SDK; ``CountCondition(application, 1)`` makes it run once.
        source: a slide, or a folder with one slide.
        **kwargs: of the SDK, such as ``name``.
    """

    def __init__(self, fragment: Any, *args: Any, source: str | Path, **kwargs: Any) -> None:
        self.source = Path(source)
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: Any) -> None:
        """Name the port."""
        spec.output("slide")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Send the path on."""
        op_output.emit(self.source, "slide")


class SlideSegmentationOperator(Operator):
    """Segments a whole slide and writes DICOM Segmentation, GeoJSON, tables and the report.

    Input ``slide``: path of a slide, or of a folder with one, as :func:`~monai_vslp.apps.deploy.slide_job.prepare` takes it
    (proportions beside the slide are used). Output ``summary``: :class:`pathlib.Path` of ``summary.json``, beside which the
    results are; it may be left unconnected.

    Args:
        fragment: the application.
        *args: conditions of the SDK.
        model: bundle folder, or a folder with one.
        output: gets a folder of the slide's name.
        progress: show a bar over tiles.
        **kwargs: of the SDK, such as ``name``.
    """

    def __init__(
        self, fragment: Any, *args: Any, model: str | Path, output: str | Path, progress: bool = False, **kwargs: Any
    ) -> None:
        self.model, self.output, self.progress = Path(model), Path(output), progress
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: Any) -> None:
        """Name the ports."""
        spec.input("slide")
        spec.output("summary").condition(ConditionType.NONE)  # nobody need listen

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Segment the slide.

        Raises:
            InputError: something is missing, twice there, or not understood; the slide cannot be read.
            OSError: a full disk.
        """
        summary = run_job(prepare(op_input.receive("slide"), self.model), self.output, self.progress)
        logger.info("results are in %s", summary.parent)
        op_output.emit(summary, "summary")
