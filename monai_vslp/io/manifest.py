"""A list of checksums by which a folder of outputs can be checked after it was moved or stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from monai_vslp.utils.atomic import write_json

__all__ = ["MANIFEST_NAME", "check_manifest", "write_manifest"]

MANIFEST_NAME = "manifest.json"
SCRATCH = ("work", "tiles")  # folders that hold what a slide needs until it is written
TEMPORARY = (".tmp", ".partial", "~")  # ends of names
ZARR_HIDDEN = (".zarray", ".zattrs", ".zgroup", ".zmetadata")  # of Zarr's second format; they are part of the data


def _is_kept(name: str) -> bool:
    return name in ZARR_HIDDEN or not (name.startswith(".") or name.endswith(TEMPORARY))


def _files(folder: Path) -> Iterator[str]:
    """Files below a folder as ``a/b``, in no order; links are left out, they may lead anywhere."""
    for place, names, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        in_store = any(part.endswith(".zarr") for part in inside.parts)
        names[:] = [name for name in names if _is_kept(name) and (in_store or name not in SCRATCH)]
        for name in files:
            path = inside / name
            if _is_kept(name) and path != Path(MANIFEST_NAME) and not (folder / path).is_symlink():
                yield path.as_posix()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: str | Path) -> Path:
    """Write ``manifest.json``: size (``bytes``) and SHA-256 of every file below a folder, by its path, in the order of paths.

    Left out are the manifest itself, hidden and temporary files, links, and the folders ``work`` and ``tiles`` (but not inside
    of a Zarr folder). To be called when everything else is written.

    Args:
        folder: of the outputs of one image or slide.

    Returns:
        Path of the manifest; the same files give the same bytes.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    folder = Path(folder)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in sorted(_files(folder))
    }
    return write_json(folder / MANIFEST_NAME, {"files": files})


def _problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file, or None."""
    path, wanted = folder / name, entry["bytes"]
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"{name} lies outside of the folder; the manifest was changed"
    try:
        size = path.stat().st_size
        if size < wanted:
            return f"{name} is cut short: it has {size} of {wanted} bytes"
        if size > wanted or _digest(path) != entry["sha256"]:
            return f"{name} was changed" + (f": it has {size} bytes in place of {wanted}" if size > wanted else "")
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None


def check_manifest(folder: str | Path) -> list[str]:
    """Compare the files of a folder with its ``manifest.json``.

    Args:
        folder: of the outputs of one image or slide.

    Returns:
        What is missing, changed, cut short or cannot be read, in words and in the order of the manifest; empty where all is
        as it was written. Files that came later are no problem.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        entries = [(name, {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}) for name, entry in files.items()]
    except FileNotFoundError:
        return [f"{MANIFEST_NAME} is missing"]
    except OSError as error:
        return [f"{MANIFEST_NAME} cannot be read: {error}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_NAME} is damaged: {error!r}"]
    return [problem for name, entry in entries if (problem := _problem(folder, name, entry)) is not None]
