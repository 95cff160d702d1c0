"""The file that says the proportions of one image or slide: a table or JSON that lies beside it, or that somebody handed in."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_vslp.data.cohort import Record, read_cohort, write_table
from monai_vslp.utils.errors import InputError

__all__ = ["PROPORTION_FILES", "find_proportion_file", "read_proportion_file", "read_proportion_json"]

PROPORTION_FILES = ("proportions.csv", "proportions.xlsx", "proportions.json")
KEYS = ("proportions", "mpp", "slide")  # of the JSON


def find_proportion_file(image: str | Path) -> Path | None:
    """The file with the proportions of an image, beside it or, of a slide that is a folder, in it; None where there is none.

    Args:
        image: its file or folder. The other is named ``proportions``, or as the image, with ``.csv``, ``.xlsx`` or ``.json``.

    Raises:
        InputError: there are several.
    """
    image = Path(image)
    folders = [image.parent, *([image] if image.is_dir() else [])]
    names = [*PROPORTION_FILES, *(f"{image.stem}{Path(name).suffix}" for name in PROPORTION_FILES)]
    found = [folder / name for folder in folders for name in dict.fromkeys(names) if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"several files give proportions of {image.name}: {', '.join(map(str, found))}; leave one.")
    return found[0] if found else None


def read_proportion_json(path: str | Path, image: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    """A row of a table from ``{"proportions": {class: 60}, "mpp": 0.25, "slide": "name"}``, all of it but one optional.

    Args:
        path: the JSON.
        image: what it is about.
        classes: known names.

    Raises:
        InputError: it is no such JSON, about another image, or names another class.
    """
    path, image = Path(path), Path(image)
    shape = f'{{"proportions": {{"{classes[0]}": 60, …}}, "mpp": 0.25}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no JSON ({error}); expected {shape}.") from error
    if not isinstance(content, dict) or not content or (unknown := set(content) - set(KEYS)):
        unknown = f" (unknown: {', '.join(sorted(unknown))})" if isinstance(content, dict) and content else ""
        raise InputError(f"{path} must hold an object of {', '.join(KEYS)}{unknown}; expected {shape}.")
    named = content.get("slide")
    if named is not None and named not in (image.name, image.stem):
        raise InputError(f"{path} is about the slide {named!r}, but the slide is {image.name!r}; which of them is wrong?")
    shares = content.get("proportions") or {}
    if not isinstance(shares, dict) or (unknown := sorted(set(shares) - set(classes))):
        wrong = f"{', '.join(unknown)} not among them" if isinstance(shares, dict) else f"got {shares!r}"
        raise InputError(f"{path}: proportions are an object of the classes {', '.join(classes)}; {wrong}.")
    return {"image": image.name, "split": "test", "mpp": content.get("mpp"), **shares}


def read_proportion_file(path: str | Path, image: str | Path, classes: Sequence[str]) -> Record:
    """What a file says of an image.

    Args:
        path: table as :func:`~monai_vslp.data.cohort.read_cohort` takes it, with a row for the image; or JSON.
        image: what it is about.
        classes: names, in the order wanted.

    Returns:
        The record; its ``proportions`` are None where the row is blank.

    Raises:
        InputError: something is not understood, or there is no row for the image.
    """
    path, image = Path(path), Path(image)
    if path.suffix.lower() == ".json":
        row = read_proportion_json(path, image, classes)
        with tempfile.TemporaryDirectory() as folder:
            table = write_table(Path(folder) / PROPORTION_FILES[0], [row], classes)
            cohort = read_cohort(table, image.parent, classes, check_files=False, warn=False, training=False)
    else:
        cohort = read_cohort(path, image.parent, classes, check_files=False, warn=False, training=False)
    label = cohort.lookup(image)
    same = (record for record in cohort.records if record.proportions is label and record.stem == image.stem)
    return next(same)
