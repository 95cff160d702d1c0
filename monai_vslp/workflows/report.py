"""``monai-vslp report``: make the reports of an output folder again."""

from __future__ import annotations

import logging
from pathlib import Path

from monai_vslp.io.cohort_report import write_index
from monai_vslp.io.report import write_report
from monai_vslp.io.summary import SUMMARY_NAME
from monai_vslp.utils.errors import InputError

__all__ = ["report"]

logger = logging.getLogger(__name__)


def report(output: str | Path) -> Path:
    """Write all reports of an output folder anew, and the report over all inputs.

    An input whose files are damaged is logged and left out; the report over all inputs names it.

    Args:
        output: output folder of ``monai-vslp segment``, or the folder of one input in it.

    Returns:
        Path of the report over all inputs, or of the one report.

    Raises:
        InputError: there is no segmented input.
    """
    output = Path(output)
    if (output / SUMMARY_NAME).exists():
        return write_report(output)
    for path in sorted(output.glob(f"*/{SUMMARY_NAME}")):
        try:
            write_report(path.parent)
        except InputError as error:
            logger.warning("%s has no new report: %s", path.parent, error)
    return write_index(output)
