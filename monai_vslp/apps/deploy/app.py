"""MONAI Deploy application: ``python app.py -i SLIDE_OR_FOLDER -o OUTPUT -m MODEL``."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence

from monai.utils import optional_import

from monai_vslp.apps.deploy.slide_job import prepare
from monai_vslp.apps.deploy.slide_operator import NEEDED, SlideSegmentationOperator, SlideSourceOperator
from monai_vslp.utils.errors import InputError, SlideError

__all__ = ["SlideSegmentationApp", "main"]

Application, _ = optional_import("monai.deploy.core", name="Application", descriptor=NEEDED, as_type="base")
CountCondition, _ = optional_import("monai.deploy.conditions", name="CountCondition", descriptor=NEEDED)

DONE, SLIDE_FAILED, WRONG_INPUT, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


class SlideSegmentationApp(Application):
    """One slide in, DICOM Segmentation, GeoJSON, tables and report out.

    Args:
        argv: command line with the program first; None for the process's own.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.paths = Application.init_app_context(list(sys.argv if argv is None else argv))
        super().__init__()

    def compose(self) -> None:
        """Source → segmentation."""
        source = SlideSourceOperator(self, CountCondition(self, 1), source=self.paths.input_path, name="slide")
        segmentation = SlideSegmentationOperator(
            self, model=self.paths.model_path, output=self.paths.output_path, name="segmentation"
        )
        self.add_flow(source, segmentation, {("slide", "slide")})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the application.

    Args:
        argv: command line with the program first; None for the process's own. Paths that are not given come from the
            environment: ``HOLOSCAN_INPUT_PATH``, ``HOLOSCAN_OUTPUT_PATH``, ``HOLOSCAN_MODEL_PATH``.

    Returns:
        0 for success, 1 where the slide failed, 2 for wrong input, 3 for a full disk, 130 after Ctrl-C before the graph
        runs; then Holoscan ends the program itself.
    """
    try:
        app = SlideSegmentationApp(argv)
        prepare(app.paths.input_path, app.paths.model_path)  # said before the graph starts, whose errors are wordy
        app.run()
    except SlideError as error:
        return _failed(SLIDE_FAILED, str(error))
    except InputError as error:
        return _failed(WRONG_INPUT, str(error))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return _failed(DISK_FULL, f"no space left: {error}. What was finished is kept; the same command goes on.")
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, "interrupted. The same command goes on where it stopped.")
    return DONE


def _failed(code: int, reason: str) -> int:
    print(f"monai-vslp deploy: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
