"""Where a refinement on disk works: scratch files that go with their arrays, folders that go with the call."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock
from monai_vslp.variational.windows import DiskArray

__all__ = ["ScratchArrays", "working_folders"]

logger = logging.getLogger(__name__)

MARK = "output"  # a file in a working folder that names the output it belongs to


class ScratchArrays:
    """Makes arrays in files of a folder; a file goes with its array.

    Args:
        folder: where they lie.
        block: rows and columns of their blocks, those of the windows that are written: each window owns its block.
    """

    def __init__(self, folder: Path, block: tuple[int, int]) -> None:
        self.folder, self.block, self.made = folder, block, 0

    def __call__(self, shape: Sequence[int]) -> DiskArray:
        self.made += 1
        array = DiskArray(self.folder / f"{self.made}.f32", shape, self.block)
        weakref.finalize(array, array.path.unlink, missing_ok=True)
        return array


@contextmanager
def working_folders(
    output: str | os.PathLike[str], scratch: str | os.PathLike[str] | None, needed: int, of_result: int
) -> Iterator[tuple[Path, Path]]:
    """Yield paths for the result and for scratch files; afterwards name the result, or remove it on an error.

    Until then the output is locked. What earlier calls for it left in the same folders, killed as they were, is removed.

    Args:
        output: the folder to make, local.
        scratch: folder for scratch files; that of ``output`` if None.
        needed, of_result: space for scratch files and for the result, bytes.

    Raises:
        InputError: an output that exists or is not local, or too little space.
        LockedError: another process makes this output.
    """
    if "://" in str(output):
        raise InputError(f"refine_store: output is written to a local folder and copied from there, got {str(output)!r}.")
    output = Path(output).absolute()
    if output.exists():
        raise InputError(f"refine_store: {output} exists; remove it or choose another output.")
    place = output.parent if scratch is None else Path(scratch).absolute()
    for folder in (output.parent, place):
        folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(output) as lock, ExitStack() as made:
        for folder in {output.parent, place}:
            _remove_leftovers(folder, output)
        _check_space(output.parent, place, needed, of_result)
        result, files = (made.enter_context(_folder(output, parent)) for parent in (output.parent, place))
        yield result / output.name, files
        lock.check()
        os.rename(result / output.name, output)


@contextmanager
def _folder(output: Path, parent: Path) -> Iterator[Path]:
    """A working folder for an output; it is marked before anything else is written there."""
    path = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent))
    try:
        (path / MARK).write_text(str(output), encoding="utf-8")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(parent: Path, output: Path) -> None:
    """Remove the working folders of an output whose lock is ours: who made them is gone."""
    for path in parent.glob(f".{glob.escape(output.name)}-*/{MARK}"):
        try:
            mine = path.read_text(encoding="utf-8") == str(output)
        except FileNotFoundError:  # of an output of that name elsewhere, which is complete now
            continue
        if mine:
            logger.warning("refine_store: %s was left by a process that is gone; it is removed.", path.parent)
            shutil.rmtree(path.parent, ignore_errors=True)


def _check_space(result: Path, scratch: Path, needed: int, of_result: int) -> None:
    logger.info("refine_store: scratch files of up to %s in %s, result of up to %s", _size(needed), scratch, _size(of_result))
    shared = os.stat(result).st_dev == os.stat(scratch).st_dev
    for place, wanted in ((scratch, needed + of_result if shared else needed), (result, 0 if shared else of_result)):
        free = shutil.disk_usage(place).free
        if wanted > free:
            raise InputError(
                f"refine_store: up to {_size(wanted)} are needed on the disk of {place} ({_size(needed)} for scratch files, "
                f"{_size(of_result)} for the result), {_size(free)} are free; free some, or name a folder on another disk as "
                "scratch."
            )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
