"""Manifests of a data set's files: SHA-256 per file, in the format of ``sha256sum``."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from monai_vslp.utils.atomic import write_text
from monai_vslp.utils.errors import InputError

__all__ = ["MANIFEST", "check_manifest", "write_manifest"]

MANIFEST = "SHA256SUMS"  # file name, beside the data
CHUNK = 1 << 20  # bytes read at once

_LINE = re.compile(r"^(\\?)([0-9a-fA-F]{64}) [ *](.+)$")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {written: character for character, written in _ESCAPES.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _line(digest: str, name: str) -> str:
    # sha256sum marks lines whose names are escaped with a leading backslash.
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def write_manifest(root: str | Path, path: str | Path | None = None) -> Path:
    """Write SHA-256 of every file below a folder; ``sha256sum -c SHA256SUMS`` in that folder checks it as well.

    Hidden files (``.DS_Store`` and the like) and the manifest itself are left out.

    Args:
        root: folder of the data.
        path: where to; ``SHA256SUMS`` in ``root`` by default.

    Returns:
        Path of the manifest.

    Raises:
        InputError: the folder does not exist or holds no files.
    """
    root = Path(root)
    path = root / MANIFEST if path is None else Path(path)
    names = (file.relative_to(root) for file in root.rglob("*") if file.is_file() and file.absolute() != path.absolute())
    names = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    if not names:
        raise InputError(f"folder {root} does not exist or holds no files; give the folder of the data.")
    return write_text(path, "".join(_line(_sha256(root / name), name) for name in names))


def check_manifest(root: str | Path, path: str | Path | None = None) -> list[str]:
    """Compare files with a manifest of :func:`write_manifest` or ``sha256sum``.

    Args:
        root: folder that the manifest's names are relative to.
        path: the manifest; ``SHA256SUMS`` in ``root`` by default.

    Returns:
        One line per file that is missing or differs; empty where all is well. Files without an entry are not looked at.

    Raises:
        InputError: the manifest does not exist, is empty or has a line that is none of ``sha256sum``'s.
    """
    root = Path(root)
    path = root / MANIFEST if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"manifest {path} does not exist; write one with write_manifest, or get that of the owners.")
    problems, entries = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise InputError(f"manifest {path}, line {number}: {line!r} is not '<64 hexadecimal digits>  <file>' (sha256sum).")
        entries += 1
        name = re.sub(r"\\[\\nr]", lambda m: _ESCAPED[m[0]], match[3]) if match[1] else match[3]
        file = root / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif (found := _sha256(file)) != match[2].lower():
            problems.append(f"{name}: SHA-256 is {found[:12]}…, the manifest says {match[2].lower()[:12]}…")
    if not entries:
        raise InputError(f"manifest {path} is empty; write one with write_manifest.")
    return problems
