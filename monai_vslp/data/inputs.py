"""Which images and slides a person means who names files and folders, and whether one has changed since."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from monai_vslp.data.images import IMAGE_SUFFIXES, list_images
from monai_vslp.data.readers import is_dicom, is_dicom_series
from monai_vslp.data.slides import SLIDE_SUFFIXES, is_slide
from monai_vslp.utils.errors import InputError

__all__ = ["content_mark", "find_images"]


def _is_slide_in_folder(path: Path) -> bool:
    """Whether something that lies in a folder is a slide, where pyramidal TIFFs are found as images already."""
    if path.name.startswith("."):
        return False
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    return is_dicom_series(path) if path.is_dir() else path.suffix == "" and is_dicom(path)


def find_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Images and slides named, and those directly in folders named, each once.

    A folder may be a slide itself: an OME-Zarr, or the DICOM instances of one whole slide.

    Raises:
        InputError: a name that does not exist, or a folder without images.
    """
    names = [sources] if isinstance(sources, (str, Path)) else list(sources)
    files: dict[Path, None] = {}
    for name in map(Path, names):
        if not name.exists():
            raise InputError(f"{name} does not exist; give image files, slides, or folders that hold them.")
        if name.is_file() or is_slide(name):
            files[name] = None
            continue
        found = sorted({*list_images(name), *filter(_is_slide_in_folder, name.iterdir())})
        if not found:
            raise InputError(f"no images or slides in {name}; expected {', '.join((*IMAGE_SUFFIXES, *SLIDE_SUFFIXES))}.")
        files |= dict.fromkeys(found)
    if not files:
        raise InputError("no images or slides in an empty list; give image files, slides, or folders that hold them.")
    return list(files)


def content_mark(path: str | Path) -> tuple[int, int]:
    """Bytes and newest time of change (ns) of a file, or of all files below a folder: another mark, another content.

    Raises:
        OSError: it is gone.
    """
    path = Path(path)
    states = [path.stat()]
    if path.is_dir():
        states += [below.stat() for below in path.rglob("*")]
    return sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
