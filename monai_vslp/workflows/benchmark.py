"""``monai-vslp benchmark``: data sets × tables of proportions × methods × seeds, trained, segmented, scored, tabled."""

from __future__ import annotations

import contextlib
import copy
import csv
import difflib
import fnmatch
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

import monai_vslp
from monai_vslp.data.cohort import SPLITS, Cohort, read_cohort
from monai_vslp.data.folds import assign_folds, patient_of
from monai_vslp.data.images import check_images, image_size
from monai_vslp.data.slides import is_slide
from monai_vslp.handlers.tracked_run import TrackedRun
from monai_vslp.io.benchmark_tables import NONE, Row, aggregate, plot, write_csv, write_markdown
from monai_vslp.networks.tta import TTA_GROUPS
from monai_vslp.transforms.refinement import TRUST_RULES
from monai_vslp.utils.atomic import write_json, write_text
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bound import fit_to_masks
from monai_vslp.workflows.bundle import CONFIGS, read_config, template
from monai_vslp.workflows.evaluate import evaluate, find_mask, group_classes, true_labels
from monai_vslp.workflows.jobs import worker_pool
from monai_vslp.workflows.regularizer import CONFIG as REGULARIZER_CONFIG
from monai_vslp.workflows.regularizer import train_regularizer
from monai_vslp.workflows.segment import segment
from monai_vslp.workflows.train import train

__all__ = ["TABLE_NAME", "Task", "plan_benchmark", "run_benchmark"]

TABLE_NAME = "benchmark.md"
SCORES, STATE, FAILED = "scores.json", "task.json", "failed.csv"
RUN = "run"
SEGMENTED = "segmented-{}"
BULKY = ("models/bags", "models/checkpoint.pt", "regularizer/checkpoint.pt", "regularizer/stacks", "regularizer/tokens")
KEYS = ("data", "noise", "seeds", "methods", "shared", "keep", "tracking")
DATA_KEYS = ("images", "masks", "tables", "groups", "mpp", "score_split", "ignore_index")
METHOD_KEYS = ("title", "train", "segment", "regularizer", "fit", "masks", "given")
PATHS = ("weights", "feature_cache", "bag_dir")  # values that are files or folders, relative to the config
FILES = ("weights",)  # those among them that a result depends on
NEUTRAL = ("feature_cache", "bag_dir", "tracking_uri")  # no result depends on them
SET = ("table", "images", "seed", "progress")  # of every function called here, by the task
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
EXPERIMENT = "monai_vslp_benchmark"
HARD = ("inf", "hard")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One network of a benchmark: trained once, then used once for each table given at segmentation.

    Attributes:
        data, noise, method, seed: where in the benchmark.
        title: of the method, for people.
        folder: of everything that is written.
        table, images, mpp: what it is trained with; µm/px or None.
        inputs: images that are scored.
        masks, groups, ignore_index: what :func:`~monai_vslp.workflows.evaluate` gets, and nothing else does.
        given: by name the table given at segmentation, None for none.
        train: arguments of :func:`~monai_vslp.workflows.train`; None where ``fit`` does everything.
        segment: arguments of :func:`~monai_vslp.workflows.segment`.
        regularizer: arguments of :func:`~monai_vslp.workflows.train_regularizer`; None for none.
        fit: ``_target_`` and arguments of a function that writes the network; None for none.
        supervised: folds and arguments of :func:`~monai_vslp.workflows.fit_to_masks`; None to learn from proportions alone.
        folds: fold of each input, where masks are learned from.
        trained: digest of all that the trained network depends on.
        digest: digest of all that the scores depend on.
        keep: leave the maps where they are.
    """

    data: str
    noise: str
    method: str
    seed: int
    title: str
    folder: Path
    table: Path
    images: Path
    mpp: float | None
    inputs: tuple[Path, ...]
    masks: Path
    groups: dict[str, list[str]] | None
    ignore_index: int
    given: dict[str, Path | None]
    train: dict[str, Any] | None
    segment: dict[str, Any]
    regularizer: dict[str, Any] | None
    fit: dict[str, Any] | None
    supervised: dict[str, Any] | None
    folds: tuple[int, ...]
    trained: str
    digest: str
    keep: bool

    @property
    def name(self) -> str:
        """``<data>/<noise>/<method>/seed<k>``."""
        return f"{self.data}/{self.noise}/{self.method}/seed{self.seed}"


# ---- the config ---------------------------------------------------------------------------------------------------------


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check_keys(values: Any, known: Sequence[str], where: str, required: Sequence[str] = ()) -> Mapping[str, Any]:
    """A mapping with known keys.

    Raises:
        InputError: it is no mapping, or has other keys, or lacks one.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be an object with some of the keys {', '.join(known)}, got {values!r}.")
    for key in values:
        if key not in known:
            listed = ", ".join(known) if len(known) <= 20 else "the arguments and the configs' top-level values"
            raise InputError(f"{where} has the unknown key {key!r}.{_hint(key, known)} Allowed are {listed}.")
    for key in required:
        if key not in values:
            raise InputError(f"{where} lacks {key!r}; it needs {', '.join(required)}.")
    return values


def _check_names(values: Any, where: str) -> Mapping[str, Any]:
    """A mapping that is not empty, whose keys can name folders."""
    if not isinstance(values, Mapping) or not values:
        raise InputError(f"{where} must be an object with at least one entry, by name, got {values!r}.")
    for name in values:
        if not NAME.fullmatch(name):
            raise InputError(
                f"{where} has the name {name!r}; names become folders: letters, digits and . _ + -, beginning with a letter "
                "or digit. A title for people goes into 'title'."
            )
    return values


def _arguments(function: Callable[..., Any], without: Sequence[str]) -> list[str]:
    """Keyword arguments of a workflow that a config may set."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.name not in without]


def _known() -> dict[str, list[str]]:
    """What may stand under ``train``, ``segment`` and ``regularizer``: arguments, and top-level values of the configs."""
    own = {"table", "images", "dataset_dir", "output", "model", "seed", "mpp", "restart", "progress", "classes", "bundle_root"}
    own |= {"output_dir", "ckpt_dir", "checkpoint", "checkpoint_file", "datalist", "inputs", "proportions", "overwrite", "band"}
    configs = {name: read_config(template(), name) for name in CONFIGS}
    training = [key for name in CONFIGS if name != REGULARIZER_CONFIG for key in configs[name]]
    return {
        "train": [key for key in dict.fromkeys(_arguments(train, own) + training) if key not in own],
        "segment": [key for key in dict.fromkeys(_arguments(segment, own) + list(configs["inference.json"])) if key not in own],
        "regularizer": [
            key
            for key in dict.fromkeys(_arguments(train_regularizer, own) + list(configs[REGULARIZER_CONFIG]))
            if key not in own
        ],
    }


def _read(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The config and the folder that its paths are relative to."""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config)), Path.cwd()
    path = Path(config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"config {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"config {path} is no JSON: {error}.") from error
    return values, path.absolute().parent


def _list(value: Any, where: str, kind: type = str) -> list[Any]:
    good = isinstance(value, list | tuple) and value and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    if not good or len(set(value)) < len(value):
        noun = "names" if kind is str else "whole numbers"
        raise InputError(f"{where} must be a list of different {noun}, at least one, got {value!r}.")
    return list(value)


def _resolved(values: Mapping[str, Any], base: Path, where: str) -> dict[str, Any]:
    """Arguments with absolute paths; weights must exist."""
    result = dict(values)
    for key in PATHS:
        if result.get(key) is not None:
            result[key] = str((base / str(result[key])).absolute())
            if key in FILES and not Path(result[key]).is_file():
                raise InputError(f"{where}: {key} {result[key]} does not exist.")
    return result


def _locate(fit: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """The function of a ``fit``.

    Raises:
        InputError: there is none of that name, or it does not take the arguments.
    """
    target = fit.get("_target_")
    module, _, name = str(target).rpartition(".")
    function, found = optional_import(module, name=name) if module and name else (None, False)
    if not found or not callable(function):
        raise InputError(
            f"{where}: _target_ must be the dotted name of a function that can be imported, got {target!r}; it is called as "
            "fit(run=, table=, images=, seed=, progress=, and the other values here)."
        )
    arguments = {key: value for key, value in fit.items() if key != "_target_"}
    try:
        inspect.signature(function).bind(run=None, table=None, images=None, seed=0, progress=False, **arguments)
    except TypeError as error:
        raise InputError(f"{where}: {target} cannot be called with run, table, images, seed, progress and {sorted(arguments)}: "
                         f"{error}.") from error  # fmt: skip
    return function


@dataclass(frozen=True)
class _Method:
    title: str
    train: dict[str, Any] | None
    segment: dict[str, Any]
    regularizer: dict[str, Any] | None
    fit: dict[str, Any] | None
    supervised: dict[str, Any] | None
    given: list[str] | None
    entry: dict[str, Any]  # as written, shared values included: what results depend on


def _methods(config: Mapping[str, Any], base: Path) -> dict[str, _Method]:
    known = _known()
    shared = _check_keys(config.get("shared", {}), ("train", "segment"), "'shared'")
    for part in ("train", "segment"):
        _check_keys(shared.get(part, {}), known[part], f"'shared': {part!r}")
    result = {}
    for name, entry in _check_names(config["methods"], "'methods'").items():
        where = f"method {name!r}"
        _check_keys(entry, METHOD_KEYS, where)
        fit = entry.get("fit")
        if fit is not None:
            _check_keys(fit, list(fit) if isinstance(fit, Mapping) else (), f"{where}: 'fit'", ["_target_"])
            _locate(fit, f"{where}: 'fit'")
        training = entry.get("train", None if fit is not None else {})
        if training is not None:
            training = {**shared.get("train", {}), **_check_keys(training, known["train"], f"{where}: 'train'")}
        elif fit is None:
            raise InputError(f"{where} has 'train': null and no 'fit', so nothing would make its network.")
        own = _check_keys(entry.get("segment", {}), known["segment"], f"{where}: 'segment'")
        segmenting = _check_segment({**shared.get("segment", {}), **own}, f"{where}: 'segment'")
        regularizer = entry.get("regularizer", False)
        regularizer = {} if regularizer is True else regularizer
        if regularizer is False or regularizer is None:
            regularizer = None
        else:
            _check_keys(regularizer, known["regularizer"], f"{where}: 'regularizer'")
        if segmenting.get("regularizer") == "learned" and regularizer is None:
            raise InputError(f"{where} segments with a learned regularizer but trains none; set its 'regularizer' to true.")
        supervised = entry.get("masks")
        if supervised is not None:
            allowed = ["folds", *_arguments(fit_to_masks, (*SET, "run", "output", "masks", "ignore_index"))]
            folds = _check_keys(supervised, allowed, f"{where}: 'masks'", ["folds"])["folds"]
            if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
                raise InputError(f"{where}: folds must be a whole number from 2, got {folds!r}.")
            if regularizer is not None:
                raise InputError(f"{where} learns from masks; its bound has no learned regularizer.")
        given = entry.get("given")
        written = {"train": training, "segment": segmenting, "regularizer": regularizer, "fit": fit, "masks": supervised}
        result[name] = _Method(
            title=str(entry.get("title", name)),
            train=None if training is None else _resolved(training, base, where),
            segment=segmenting,
            regularizer=None if regularizer is None else _resolved(regularizer, base, where),
            fit=None if fit is None else _resolved(fit, base, where),
            supervised=supervised,
            given=None if given is None else _list(given, f"{where}: 'given'"),
            entry=written,
        )
    return result


def _check_segment(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of segmentation that can be judged now; ``inf`` may be written as text."""
    result = dict(values)
    trust, views = result.get("trust"), result.get("views")
    if isinstance(trust, str) and trust.lower() in HARD:
        result["trust"] = math.inf
    elif isinstance(trust, str) and trust.lower() not in TRUST_RULES or isinstance(trust, int | float) and not trust > 0:
        raise InputError(f"{where}: trust must be positive, 'inf', {' or '.join(map(repr, TRUST_RULES))}, got {trust!r}.")
    if views is not None and views not in TTA_GROUPS.names:
        names = TTA_GROUPS.names
        raise InputError(f"{where}: views {views!r} is unknown.{_hint(views, names)} There are {', '.join(names)}.")
    if result.get("regularizer") not in (None, "tv", "learned"):
        raise InputError(f"{where}: regularizer is 'tv' or 'learned', got {result['regularizer']!r}.")
    return result


# ---- the data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    images: Path
    masks: Path
    tables: dict[str, Path]
    groups: dict[str, list[str]] | None
    mpp: float | None
    ignore_index: int
    inputs: dict[str, tuple[Path, ...]]  # by table of the training
    cohort: Cohort  # of the first table
    split: str
    trained: dict[str, Any]  # what training depends on, by table
    scored: Any  # what scores depend on further
    contents: dict[str, str]  # digests of tables


def _stat(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _data(name: str, entry: Any, base: Path, needed: Sequence[str], trained_with: Sequence[str]) -> _Data:
    """One data set, checked: tables, images, masks and groups.

    Args:
        name: of the data set.
        entry: of the config.
        base: folder of its paths.
        needed: names of all tables that are used.
        trained_with: those among them that networks are trained with.
    """
    where = f"data set {name!r}"
    _check_keys(entry, DATA_KEYS, where, ("images", "masks", "tables"))
    images, masks = (base / str(entry[key]) for key in ("images", "masks"))
    for key, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise InputError(f"{where}: folder {key!r} {folder} does not exist.")
    if images.resolve() == masks.resolve():
        raise InputError(f"{where}: images and masks are the same folder {images}; keep masks apart from what is trained with.")
    tables = {key: base / str(path) for key, path in _check_names(entry["tables"], f"{where}: 'tables'").items()}
    if missing := [key for key in needed if key not in tables]:
        raise InputError(f"{where} has no table {missing[0]!r}.{_hint(missing[0], list(tables))} It has {', '.join(tables)}.")
    split, mpp = entry.get("score_split", "val"), entry.get("mpp")
    if split not in SPLITS:
        raise InputError(f"{where}: score_split {split!r} is none of {', '.join(SPLITS)}.{_hint(split, SPLITS)}")
    if mpp is not None and (isinstance(mpp, bool) or not isinstance(mpp, int | float) or not 0 < mpp < math.inf):
        raise InputError(f"{where}: mpp must be a positive number, µm/px, got {mpp!r}.")
    cohorts: dict[str, Any] = {}
    classes: tuple[str, ...] | None = None
    for key in needed:
        cohorts[key] = read_cohort(tables[key], images, classes)
        classes = classes or cohorts[key].classes
        # A network has its classes in the order of its table, and masks are numbered in one order.
        if key in trained_with and tuple(read_cohort(tables[key], images).classes) != tuple(classes):
            raise InputError(
                f"{where}: table {tables[key]} has its classes in another order than {tables[needed[0]]} "
                f"({', '.join(classes)}); masks are numbered in the order of the columns, so put them in one order."
            )
        inside = [record.image for record in cohorts[key].records if masks.resolve() in record.image.resolve().parents]
        if inside:
            raise InputError(f"{where}: table {tables[key]} names {inside[0]}, which lies in the folder of masks {masks}.")
    first = next(iter(cohorts.values()))
    scored = {key: tuple(record.image for record in cohort.split(split).records) for key, cohort in cohorts.items()}
    for key in trained_with:
        if not len(cohorts[key].split("train")):
            raise InputError(f"{where}: table {tables[key]} has no rows of split 'train'.")
        if not scored[key]:
            raise InputError(f"{where}: table {tables[key]} has no rows of split {split!r}, which is scored (score_split).")
        if set(scored[key]) != set(scored[trained_with[0]]):
            raise InputError(
                f"{where}: tables {tables[key]} and {tables[trained_with[0]]} have different images of split {split!r}."
            )
    inputs = scored[trained_with[0]]
    stems = [path.stem for path in inputs]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise InputError(
            f"{where}: several images are named {twice[0]!r} but for folder or suffix; their maps are named by it."
        )
    ignore_index = entry.get("ignore_index", 255)
    groups = entry.get("groups") or None
    group_classes(groups, first.classes)
    found = {path: find_mask(masks, path.stem) for path in inputs}
    if without := [path.name for path, mask in found.items() if mask is None]:
        raise InputError(
            f"{where}: {masks} has no mask for {len(without)} of {len(inputs)} images of split {split!r}: "
            f"{', '.join(without[:5])}."
        )
    check_images(p for p in dict.fromkeys(r.image for c in cohorts.values() for r in c.records) if not is_slide(p))
    for path, mask in found.items():
        shape = true_labels(mask, first.classes, ignore_index).shape
        if not is_slide(path) and shape != image_size(path):
            raise InputError(f"{where}: mask {mask} has {shape[1]} x {shape[0]} px, image {path} has "
                             f"{image_size(path)[1]} x {image_size(path)[0]} px; they must have one size.")  # fmt: skip
    contents = {key: hashlib.sha256(tables[key].read_bytes()).hexdigest() for key in needed}
    seen = {
        key: [contents[key], *(_stat(r.image) for s in ("train", "val") for r in cohorts[key].split(s).records)]
        for key in trained_with
    }
    return _Data(
        images=images.absolute(),
        masks=masks.absolute(),
        tables={key: path.absolute() for key, path in tables.items()},
        groups=groups,
        mpp=mpp,
        ignore_index=ignore_index,
        inputs=dict.fromkeys(trained_with, inputs),
        cohort=cohorts[trained_with[0]],
        split=split,
        trained=seen,
        scored=[groups, split, ignore_index, [_stat(path) for path in inputs], [_stat(mask) for mask in found.values()]],
        contents=contents,
    )


def _check_given(data: _Data, name: str, where: str) -> None:
    """A table given at segmentation has proportions of every image that is scored."""
    cohort = read_cohort(data.tables[name], data.images, check_files=False)
    inputs = next(iter(data.inputs.values()))
    blank = [path.name for path in inputs if cohort.lookup(path) is None]
    if blank:
        raise InputError(
            f"{where}: table {data.tables[name]} is given at segmentation, but has no proportions of {len(blank)} images that "
            f"are scored: {', '.join(blank[:5])}. Fill them in, or leave {name!r} out of 'given'."
        )


def _folds(data: _Data, folds: int, where: str) -> tuple[int, ...]:
    """Fold of each input, patients kept whole; the same for all methods and seeds."""
    records = data.cohort.split(data.split).records
    patients = [patient_of(record) for record in records]
    if len(set(patients)) < folds:
        raise InputError(f"{where}: {folds} folds need as many patients, got {len(set(patients))}.")
    classes = len(data.cohort.classes)
    even = np.full(classes, 1 / classes)
    given = [even if record.proportions is None else record.proportions.mean for record in records]
    found = dict(zip((record.image for record in records), assign_folds(patients, np.stack(given), folds).tolist()))
    return tuple(found[path] for path in next(iter(data.inputs.values())))


def _no_masks(values: Any, masks: Path, where: str) -> None:
    """Raises InputError where a value of a training lies in the folder of masks."""
    if isinstance(values, Mapping):
        for value in values.values():
            _no_masks(value, masks, where)
    elif isinstance(values, list | tuple):
        for value in values:
            _no_masks(value, masks, where)
    elif isinstance(values, str) and Path(values).is_absolute():
        path = Path(os.path.abspath(values))
        if masks == path or masks in path.parents:
            raise InputError(f"{where}: {values} lies in the folder of masks {masks}; masks serve to score, never to train.")


def _without(values: Mapping[str, Any] | None, keys: Sequence[str]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan_benchmark(config: str | Path | Mapping[str, Any], output: str | Path) -> list[Task]:
    """All tasks of a benchmark, after everything that can be wrong with its config and files has been looked at.

    Args:
        config: see :func:`run_benchmark`.
        output: folder to write.

    Raises:
        InputError: names the place in the config, or the file.
    """
    values, base = _read(config)
    _check_keys(values, KEYS, "the config", ("data", "noise", "seeds", "methods"))
    noises, seeds = _list(values["noise"], "'noise'"), _list(values["seeds"], "'seeds'", int)
    if not isinstance(values.get("keep", False), bool):
        raise InputError(f"'keep' must be true or false, got {values['keep']!r}.")
    if not isinstance(values.get("tracking", False), bool | str):
        raise InputError(f"'tracking' must be true, false or the URI of an MLflow server or store, got {values['tracking']!r}.")
    methods = _methods(values, base)
    all_given = [g for method in methods.values() for g in method.given or () if g != NONE]
    needed = list(dict.fromkeys([*noises, *all_given]))
    tasks = []
    for data_name, entry in _check_names(values["data"], "'data'").items():
        data = _data(data_name, entry, base, needed, noises)
        for name in dict.fromkeys([*all_given, *(noises if any(m.given is None for m in methods.values()) else ())]):
            _check_given(data, name, f"data set {data_name!r}")
        for noise in noises:
            for method_name, method in methods.items():
                for part in (method.train, method.regularizer, method.fit):
                    _no_masks(part, data.masks, f"method {method_name!r}")
                given = method.given if method.given is not None else [NONE, noise]
                folds = _folds(data, method.supervised["folds"], f"method {method_name!r}") if method.supervised else ()
                weights = [_stat(Path(p[key])) for p in (method.train, method.fit) if p for key in FILES if p.get(key)]
                learned = {key: _without(method.entry[key], NEUTRAL) for key in ("train", "regularizer", "fit")}
                for seed in seeds:
                    what = [monai_vslp.__version__, learned, weights, data.trained[noise], data.mpp, seed]
                    trained = _digest(what)
                    scored = [
                        trained,
                        method.entry["segment"],
                        method.supervised,
                        {g: data.contents.get(g) for g in given},
                        data.scored,
                    ]
                    tasks.append(
                        Task(
                            data=data_name,
                            noise=noise,
                            method=method_name,
                            seed=seed,
                            title=method.title,
                            folder=Path(output).absolute() / "runs" / data_name / noise / method_name / f"seed{seed}",
                            table=data.tables[noise],
                            images=data.images,
                            mpp=data.mpp,
                            inputs=data.inputs[noise],
                            masks=data.masks,
                            groups=data.groups,
                            ignore_index=data.ignore_index,
                            given={g: None if g == NONE else data.tables[g] for g in given},
                            train=method.train,
                            segment=method.segment,
                            regularizer=method.regularizer,
                            fit=method.fit,
                            supervised=method.supervised,
                            folds=folds,
                            trained=trained,
                            digest=_digest(scored),
                            keep=values.get("keep", False),
                        )
                    )
    return tasks


# ---- one task -----------------------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _scores(task: Task) -> dict[str, Any] | None:
    """The scores of a task where they are there and still hold."""
    scores = _json(task.folder / SCORES)
    return scores if scores.get("digest") == task.digest else None


def _twin(task: Task) -> Path | None:
    """The folder of another method whose network is the same one, and is trained."""
    for state in sorted(task.folder.parents[1].glob(f"*/{task.folder.name}/{STATE}")):
        values = _json(state)
        if state.parent != task.folder and values.get("trained") == task.trained and values.get("complete"):
            return state.parent
    return None


def _train(task: Task, progress: bool) -> float:
    """Train what is not trained yet; seconds spent on it, those before an interruption included."""
    run, state = task.folder / RUN, _json(task.folder / STATE)
    if state.get("trained") != task.trained:
        shutil.rmtree(task.folder, ignore_errors=True)  # of other settings
        state = {"trained": task.trained, "seconds": 0.0, "complete": False}
        write_json(task.folder / STATE, state)
    if state["complete"]:
        return state["seconds"]
    started = time.perf_counter()
    try:
        if (twin := _twin(task)) is not None:
            shutil.copytree(twin / RUN, run, dirs_exist_ok=True)
            state = _json(twin / STATE)
            return state["seconds"]
        if task.train is not None:
            train(task.table, task.images, run, seed=task.seed, mpp=task.mpp, progress=progress, **copy.deepcopy(task.train))
        if task.fit is not None:
            arguments = {key: value for key, value in copy.deepcopy(task.fit).items() if key != "_target_"}
            fit = _locate(task.fit, f"method {task.method!r}: 'fit'")
            fit(run=run, table=task.table, images=task.images, seed=task.seed, progress=progress, **arguments)
        for name in ("configs/inference.json", "models/model.pt"):
            if not (run / name).is_file():
                raise InputError(f"{run / name} is missing; the training or fit of method {task.method!r} must write it.")
        if task.regularizer is not None:
            train_regularizer(run, seed=task.seed, progress=progress, **copy.deepcopy(task.regularizer))
        state["complete"] = True
    finally:
        state["seconds"] += time.perf_counter() - started
        write_json(task.folder / STATE, state)
    return state["seconds"]


def _bounds(task: Task, progress: bool) -> list[tuple[Path, list[Path]]]:
    """A run for each fold of the inputs, fitted to the masks of the others."""
    options = {key: value for key, value in task.supervised.items() if key != "folds"}
    result = []
    for fold in sorted(set(task.folds)):
        run = task.folder / f"fold{fold}"
        seen = [path for path, its in zip(task.inputs, task.folds) if its != fold]
        fit_to_masks(
            task.folder / RUN,
            run,
            seen,
            task.masks,
            ignore_index=task.ignore_index,
            seed=task.seed,
            progress=progress,
            **options,
        )
        result.append((run, [path for path, its in zip(task.inputs, task.folds) if its == fold]))
    return result


def _perform(task: Task, progress: bool) -> dict[str, Any]:
    """Train, segment, score one task; ``scores.json`` is written last."""
    train_seconds = _train(task, progress)
    results, segment_seconds = {}, {}
    options = copy.deepcopy(task.segment) | ({} if progress or "handlers" in task.segment else {"handlers": []})
    parts = [(task.folder / RUN, list(task.inputs))]
    if task.supervised is not None:
        started = time.perf_counter()
        parts = _bounds(task, progress)
        train_seconds += time.perf_counter() - started
    for given, table in task.given.items():
        folder = task.folder / SEGMENTED.format(given)
        started = time.perf_counter()
        failures = {}
        for run, inputs in parts:
            failures |= segment(inputs, run, folder, proportions=table, mpp=task.mpp, progress=progress, **options)
        if failures:
            reasons = "; ".join(f"{stem}: {reason}" for stem, reason in failures.items())
            raise InputError(f"{len(failures)} of {len(task.inputs)} inputs could not be segmented: {reasons}")
        segment_seconds[given] = time.perf_counter() - started
        with contextlib.redirect_stdout(io.StringIO()):  # its table; the benchmark makes one of all
            results[given] = evaluate(folder, task.masks, groups=task.groups, ignore_index=task.ignore_index)
    scores = {
        "digest": task.digest,
        "data": task.data,
        "noise": task.noise,
        "method": task.method,
        "title": task.title,
        "seed": task.seed,
        "train_seconds": train_seconds,
        "segment_seconds": segment_seconds,
        "given": results,
    }
    write_json(task.folder / SCORES, scores)
    if not task.keep:
        for folder in task.folder.glob(SEGMENTED.format("*")):
            shutil.rmtree(folder, ignore_errors=True)
        for name in BULKY:
            path = task.folder / RUN / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return scores


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; MONAI wraps what is raised inside a config."""
    while error.__cause__ is not None and not isinstance(error, (InputError, OSError)):
        error = error.__cause__
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _attempt(task: Task, progress: bool) -> tuple[dict[str, Any] | None, str]:
    """Scores, or None and the reason why there are none; the whole traceback goes into ``error.txt``."""
    error_file = task.folder / "error.txt"
    try:
        scores = _perform(task, progress)
    except Exception as error:  # whatever a method raises, the others go on
        with contextlib.suppress(OSError):
            write_text(error_file, "".join(traceback.format_exception(error)))
        return None, _reason(error)
    error_file.unlink(missing_ok=True)
    return scores, ""


def _in_turn(tasks: Sequence[Task], progress: bool) -> Iterator[tuple[Task, dict[str, Any] | None, str]]:
    for task in tasks:
        yield (task, *_attempt(task, progress))


def _in_parallel(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, dict[str, Any] | None, str]]:
    """Results as they come. A task whose process dies fails alone: those that went down with it are done again, apart."""
    torn: list[Task] = []
    with worker_pool(jobs) as pool:
        futures = {pool.submit(_attempt, task, False): task for task in tasks}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                torn.append(futures[future])
                continue
            yield (futures[future], *result)
    for task in torn:
        with worker_pool(1) as pool:
            try:
                result = pool.submit(_attempt, task, False).result()
            except BrokenProcessPool:
                result = None, "the process died, most often for want of memory; try fewer jobs."
        yield (task, *result)


# ---- tracking -----------------------------------------------------------------------------------------------------------


def _track_task(parent: TrackedRun, task: Task, scores: Mapping[str, Any] | None, reason: str) -> None:
    """Log a finished task as a run nested under that of the benchmark."""
    nested = TrackedRun(task.folder, parent.uri, EXPERIMENT, task.name, parent.run_id)
    nested.open()
    parts = {key: getattr(task, key) for key in ("data", "noise", "method", "seed", "title", "segment")}
    more = {"train": task.train or {}, "fit": task.fit or {}, "regularizer": task.regularizer or {}}
    nested.parameters({**parts, **more, "given": list(task.given)})
    if scores is None:
        nested.tag("reason", reason)
    else:
        for row in aggregate([scores]):
            nested.metrics({f"{row.given}/{row.map}/{name}": s.mean for name, s in row.values.items() if s.mean is not None})
    nested.close("FAILED" if scores is None else "FINISHED")


# ---- the whole ----------------------------------------------------------------------------------------------------------


def _selected(tasks: Sequence[Task], only: Sequence[str] | None) -> list[Task]:
    """Tasks that a pattern names."""
    if only is None:
        return list(tasks)
    patterns = [only] if isinstance(only, str) else list(only)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {t.name for t in tasks if fnmatch.fnmatchcase(t.name, pattern) or pattern in t.name.split("/")}
        if not found:
            parts = list(dict.fromkeys(part for task in tasks for part in (*task.name.split("/"), task.name)))
            raise InputError(
                f"only: {pattern!r} names no task.{_hint(pattern, parts)} Tasks are named <data>/<noise>/<method>/seed<k>; "
                "give one of these parts, or a pattern of the whole such as 'glas/*/seed0'."
            )
        chosen |= found
    return [task for task in tasks if task.name in chosen]


def _read_failures(path: Path) -> dict[tuple[str, ...], str]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {(r["data"], r["noise"], r["method"], r["seed"]): r["reason"] for r in csv.DictReader(file)}
    except (OSError, KeyError, ValueError):
        return {}


def _key(task: Task) -> tuple[str, ...]:
    return task.data, task.noise, task.method, str(task.seed)


def _write_failures(path: Path, failures: Mapping[tuple[str, ...], str]) -> None:
    """The table of what failed; no file where nothing did."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["data", "noise", "method", "seed", "reason"])
    writer.writerows([*key, reason] for key, reason in failures.items())
    write_text(path, stream.getvalue())


def _tables(tasks: Sequence[Task], output: Path) -> list[Row]:
    """Write the tables and the plot of everything that is scored."""
    scored = [(task, scores) for task in tasks if (scores := _scores(task)) is not None]
    # The title may have been changed since.
    rows = aggregate(scores | {"title": task.title} for task, scores in scored)
    write_markdown(rows, output / TABLE_NAME)
    write_csv(rows, output / "benchmark.csv")
    _, has_matplotlib = optional_import("matplotlib")
    if rows and has_matplotlib:
        plot(rows, output / "benchmark.png")
    elif rows:
        logger.warning("There is no plot: install matplotlib to have one.")
    return rows


def run_benchmark(
    config: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    only: Sequence[str] | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> Path:
    """Train, segment and score every data set with every table, method and seed, and make tables of means and spreads.

    The config, its paths relative to its own file (to the current folder where it is a mapping):

    - ``data``, by name: ``images`` and ``masks``, folders; ``tables``, by name of the noise, each a table with the same images;
      optional ``groups`` (see :func:`~monai_vslp.workflows.evaluate`), ``mpp`` (µm/px), ``score_split`` (``val``) and
      ``ignore_index`` (255). Masks are needed of the split that is scored alone; nothing but the evaluation sees them, and
      methods that say ``masks``.
    - ``noise``: names of the tables to train with. ``seeds``: whole numbers.
    - ``methods``, by name: ``title``; ``train``, arguments of :func:`~monai_vslp.workflows.train` and top-level values of the
      bundle's configs; ``segment``, likewise of :func:`~monai_vslp.workflows.segment`; ``regularizer``, true or arguments of
      :func:`~monai_vslp.workflows.train_regularizer`, false for none; ``fit``, ``{"_target_": dotted name, …}`` of a function
      called as ``fit(run=, table=, images=, seed=, progress=, …)`` after training, or in its place where the method has no
      ``train``: it then writes the whole bundle folder, at least ``configs/inference.json`` and ``models/model.pt``;
      ``masks``, ``{"folds": k, …}``, for the supervised bound of the network that ``train`` gives: of the images that are
      scored, each fold of patients is segmented by a head fitted to the masks of the others
      (:func:`~monai_vslp.workflows.fit_to_masks`, which takes the other values); and
      ``given``, names of the tables given at segmentation, ``none`` for none (by default none, and that of the training).
    - ``shared``: ``train`` and ``segment`` of all methods; a method's own values come first.
    - ``keep``: keep the segmented maps, which are removed after scoring otherwise.
    - ``tracking``: true for MLflow in ``output`` (or at ``MLFLOW_TRACKING_URI``), or a URI; one run for the benchmark, a
      nested one per task, and the tables as artifacts. False by default. Failures of tracking stop tracking alone.

    Everything is checked before anything is trained. Each task has a folder ``runs/<data>/<noise>/<method>/seed<k>``; its
    ``scores.json`` comes last and holds a digest of all that the scores depend on, so that the same call, after an interrupt
    or a change of the config, does what is missing and nothing else. Tasks that fail are listed in ``failed.csv``, with the
    traceback in ``error.txt`` of their folder, and tried again by the next call; the others go on.

    Args:
        config: JSON file, or its content.
        output: folder to write or continue.
        only: do these tasks alone: names of data sets, tables, methods or ``seed<k>``, or patterns of whole names such as
            ``glas/*/seed0``; a task is done if any of them fits. The tables have all that is scored.
        jobs: tasks at once, each in a process with one thread. 1 for none but this process.
        progress: show progress bars, where ``jobs`` is 1.

    Returns:
        ``benchmark.md`` in ``output``; beside it are ``benchmark.csv``, ``benchmark.png`` and, where tasks failed,
        ``failed.csv``.

    Raises:
        InputError: what is wrong with the config or its files, before any computing.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs must be a whole number from 1, got {jobs!r}.")
    output = Path(output)
    tasks = plan_benchmark(config, output)
    chosen = _selected(tasks, only)
    values, _ = _read(config)
    write_json(output / "config.json", values)
    todo = [task for task in chosen if _scores(task) is None]
    scored = {_key(task) for task in tasks} - {_key(task) for task in tasks if _scores(task) is None}
    failures = {k: v for k, v in _read_failures(output / FAILED).items() if k in {_key(t) for t in tasks} - scored}
    logger.info("%d tasks, %d of them to be done.", len(chosen), len(todo))
    tracking = None
    if values.get("tracking"):
        tracking = TrackedRun(output, values["tracking"] if isinstance(values["tracking"], str) else None, EXPERIMENT)
        tracking.open()
        tracking.parameters({key: values[key] for key in ("noise", "seeds", "methods", "shared") if key in values})
    results = _in_turn(todo, progress) if jobs == 1 else _in_parallel(todo, jobs)
    status = "FAILED"
    try:
        with contextlib.closing(results):
            for number, (task, scores, reason) in enumerate(results, start=1):
                if scores is None:
                    failures[_key(task)] = reason
                    logger.warning("[%d/%d] %s failed: %s", number, len(todo), task.name, reason)
                else:
                    failures.pop(_key(task), None)
                    logger.info("[%d/%d] %s: %s", number, len(todo), task.name, _short(scores))
                _write_failures(output / FAILED, failures)
                if tracking is not None:
                    _track_task(tracking, task, scores, reason)
        status = "FINISHED"
    finally:
        _write_failures(output / FAILED, failures)
        _tables(tasks, output)
        if tracking is not None:
            for path in (output / name for name in (TABLE_NAME, "benchmark.csv", "benchmark.png", FAILED, "config.json")):
                if path.is_file():
                    tracking.file(path, "benchmark")
            tracking.close(status)
    return output / TABLE_NAME


def _short(scores: Mapping[str, Any]) -> str:
    """The mean IoU of each refined map, for the log."""
    found = {}
    for given, result in scores["given"].items():
        value = next(row["miou"] for row in result["blocks"][0]["rows"] if row["map"] == "refined")
        found[given] = "–" if value is None else f"{value:.3f}"
    return "mIoU " + ", ".join(f"{value} ({given} given)" for given, value in found.items())
