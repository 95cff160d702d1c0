"""``monai-vslp check``: what is wrong with a table and its images, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.utils import optional_import

from monai_vslp.data.checks import CohortCheck, check_cohort
from monai_vslp.data.images import list_images
from monai_vslp.io.table_template import EXAMPLE_CLASSES, write_table_template
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError

__all__ = ["check", "make_template"]

tqdm, _ = optional_import("tqdm", name="tqdm")


def check(
    table: str | Path, images: str | Path | None = None, *, json: str | Path | None = None, progress: bool = True
) -> CohortCheck:
    """Find all that may be wrong with a cohort, see :func:`~monai_vslp.data.checks.check_cohort`.

    Args:
        table: ``image,split,patient,<one column per class>``, CSV or XLSX.
        images: folder that image names are relative to; the table's own folder by default.
        json: file to write the findings to, as :meth:`~monai_vslp.data.checks.CohortCheck.to_dict` has them.
        progress: show a progress bar over the images.

    Returns:
        The findings; ``count("error")`` is 0 where training may begin.

    Raises:
        InputError: there is no such table or folder, or nothing in it can be read as one.
    """
    with tqdm(desc="images", unit="image", disable=not progress, leave=False) as bar:
        found = check_cohort(table, images, seen=bar.update)
    if json is not None:
        write_json(json, found.to_dict())
    return found


def make_template(path: str | Path, classes: Sequence[str] | None = None, images: str | Path | None = None) -> Path:
    """Write an empty table, with a row for each image of a folder where one is given.

    Args:
        path: ``.csv`` or ``.xlsx``.
        classes: names of the class columns; None for examples.
        images: folder of images.

    Raises:
        InputError: the file exists, has another suffix, or the folder does not exist.
    """
    if images is not None and not Path(images).is_dir():
        raise InputError(f"image folder {images} does not exist.")
    names = [] if images is None else [image.name for image in list_images(images)]
    return write_table_template(path, classes or EXAMPLE_CLASSES, names)
