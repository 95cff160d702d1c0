"""``monai-vslp cross-validate``: how well proportions of patients that were not trained on are predicted, without masks."""

from __future__ import annotations

import csv
import difflib
import inspect
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.utils import optional_import

import monai_vslp
from monai_vslp.data.bags import collate_bags, prepare_bags
from monai_vslp.data.cohort import Cohort, Record, read_cohort
from monai_vslp.data.folds import divide, patient_of, write_fold_table
from monai_vslp.data.images import check_images
from monai_vslp.handlers.tracked_run import TrackedRun
from monai_vslp.inferers.bags import ProportionInferer
from monai_vslp.transforms import LoadTissueImaged
from monai_vslp.utils.atomic import atomic_path, write_json, write_text
from monai_vslp.utils.digest import state_digest
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import read_config, template
from monai_vslp.workflows.jobs import worker_pool
from monai_vslp.workflows.train import train

__all__ = ["cross_validate", "predict_proportions", "score_predictions"]

bootstrap, _ = optional_import("scipy.stats", name="bootstrap")
figure_module, has_matplotlib = optional_import("matplotlib.figure")
agg, _ = optional_import("matplotlib.backends.backend_agg")

REPORT, RESULT, PLOT = (f"cross_validation{suffix}" for suffix in (".md", ".json", ".png"))
PREDICTIONS = "predictions.csv"
FOLD = "fold{}"  # run folder; its table and its state lie beside it, with the suffixes .csv and .json
FEATURES = "features"
EXPERIMENT = "monai_vslp_cross_validation"
RESAMPLES = 2000
CONFIDENCE = 0.95
WORST = 20  # images in the report
# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CHOSEN = (
    "The images of a fold took no part in fitting its network, but chose its best epoch, and whether a round of self-training "
    "counts: errors are a little too small. With --nested the next fold chooses."
)
NESTED = "The best epoch of each network was chosen by the next fold, so its own fold is wholly unseen."
NEUTRAL = ("feature_cache", "tracking_uri", "tracking_experiment", "tracking_parent")  # no result depends on them
# Arguments of ``train`` and values of the configs that are set here.
OWN = ("table", "images", "output", "seed", "progress", "restart", *NEUTRAL)
FIXED = ("bundle_root", "output_dir", "ckpt_dir", "dataset_dir", "classes", "round", "teacher", "checkpoint")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fold:
    """One network to be trained.

    Attributes:
        number: from 1.
        run: its folder.
        images: folder of the images.
        held_out: paths that are predicted, in the order of the table.
        options: arguments of :func:`~monai_vslp.workflows.train`.
        digest: of all that the predictions depend on.
    """

    number: int
    run: Path
    images: Path
    held_out: tuple[Path, ...]
    options: dict[str, Any]
    digest: str

    @property
    def table(self) -> Path:
        return self.run.with_suffix(".csv")

    @property
    def state(self) -> Path:
        return self.run.with_suffix(".json")

    def read(self) -> dict[str, Any]:
        """The state, as far as it belongs to these settings."""
        state = _json(self.state)
        return state if state.get("digest") == self.digest else {}


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- options ------------------------------------------------------------------------------------------------------------


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that differ from the defaults of the training, with absolute paths.

    Raises:
        InputError: an option that the training does not have.
    """
    arguments = inspect.signature(train).parameters
    names = [name for name, p in arguments.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    values = [
        key for config in ("train.json", "train_head.json", "self_training.json") for key in read_config(template(), config)
    ]
    known = [name for name in dict.fromkeys([*names, *values]) if name not in (*OWN, *FIXED)]
    result = {}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else " It takes the options of 'train'."
            raise InputError(f"cross-validation has no option {name!r}.{hint}")
        if name in arguments and (value is None or value is False or value == [] or value == ()):
            continue
        result[name] = value
    if result.get("weights") is not None:
        result["weights"] = str(Path(result["weights"]).absolute())
    return result


def _stat(path: str | Path) -> tuple[str, int, int]:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist or is a folder; give the path of a file.")
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


# ---- one fold -----------------------------------------------------------------------------------------------------------


def predict_proportions(run: str | Path, images: Sequence[str | Path], progress: bool = True) -> np.ndarray:
    r"""Proportions that a trained network sees in images, :math:`\hat p_k = \sum_i a_i \operatorname{softmax}(f(I))_{ik}`.

    One view, as in the validation of a training; see :class:`~monai_vslp.inferers.ProportionInferer`.

    Args:
        run: bundle folder of ``monai-vslp train``.
        images: paths.
        progress: show a progress bar.

    Returns:
        Shape ``[n, C]``, float64, fractions.

    Raises:
        InputError: the folder has no trained network, or an image cannot be read.
    """
    run = Path(run)
    config, trained = read_config(run, "inference.json"), read_config(run, "train.json")
    checkpoint = run / "models" / "model.pt"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} does not exist; has the training of {run} finished an epoch?")
    if not trained["freeze_backbone"]:
        config["feature_cache"] = None  # nobody will ask for features of this backbone again
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    network = network.to(device).eval()
    infer, items = ProportionInferer(), Dataset([{"image": str(path)} for path in images], LoadTissueImaged(keys="image"))
    tqdm, _ = optional_import("tqdm", name="tqdm")
    unknown = torch.zeros(network.num_classes)
    result = np.empty((len(items), network.num_classes))
    for index in tqdm(range(len(items)), desc="predicting", unit="image", disable=not progress):
        batch = collate_bags([{**items[index], "proportions": unknown}], stride=network.stride)
        inputs, _, _, options = prepare_bags(batch, device)
        with torch.inference_mode():
            result[index] = infer(inputs, network, **options)[0].double().cpu().numpy()
    return result


def _perform(fold: _Fold, progress: bool) -> None:
    """Train the network of a fold and predict; ``predictions`` in its state say that it is done."""
    state = fold.read()
    if not state:
        if fold.run.exists():
            logger.warning("%s is of other settings or data; it is trained anew.", fold.run)
        shutil.rmtree(fold.run, ignore_errors=True)
        state = {"digest": fold.digest, "seconds": 0.0, "trained": False}
        write_json(fold.state, state)
    if not state["trained"]:
        started = time.perf_counter()
        try:
            train(fold.table, fold.images, fold.run, progress=progress, **fold.options)
            state["trained"] = True
        finally:
            state["seconds"] += time.perf_counter() - started
            write_json(fold.state, state)
    state["predictions"] = predict_proportions(fold.run, fold.held_out, progress)
    write_json(fold.state, state)


def _run(folds: Sequence[_Fold], jobs: int, progress: bool) -> Iterator[_Fold]:
    """Folds as they are done; the first failure stops the rest."""
    if jobs == 1 or len(folds) < 2:
        for fold in folds:
            _perform(fold, progress)
            yield fold
        return
    try:
        with worker_pool(jobs) as pool:
            futures = {pool.submit(_perform, fold, False): fold for fold in folds}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
    except BrokenProcessPool as error:
        raise InputError("a process died, most often for want of memory; the same command with fewer jobs goes on.") from error


# ---- scores -------------------------------------------------------------------------------------------------------------


def _interval(errors: np.ndarray, group: np.ndarray, seed: int) -> np.ndarray:
    r"""Percentile bootstrap of means over images, with patients drawn: :math:`\sum_g E_g / \sum_g n_g` over drawn g.

    Args:
        errors: one row per quantity, ``[Q, n]``.
        group: number of the patient of each image, ``[n]``.
        seed: of the draws.

    Returns:
        Lower and upper bound of each quantity, ``[Q, 2]``.
    """
    counts = np.bincount(group).astype(np.float64)
    sums = np.stack([np.bincount(group, weights=row) for row in errors])

    def mean(total: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return total.sum(axis=axis) / count.sum(axis=axis)

    found = bootstrap(
        (sums, np.broadcast_to(counts, sums.shape)),
        mean,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return np.stack([found.low, found.high], axis=-1)


def _correlation(given: np.ndarray, predicted: np.ndarray) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if min(given.std(), predicted.std()) < 1e-9:
        return None
    return float(np.corrcoef(given, predicted)[0, 1])


def score_predictions(
    given: np.ndarray,
    predicted: np.ndarray,
    baseline: np.ndarray,
    patients: Sequence[Any],
    folds: Sequence[int],
    classes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    r"""Errors of predicted proportions, :math:`\frac1n \sum_I |\hat p_{Ik} - p_{Ik}|` per class k and their mean over classes.

    Intervals are percentile bootstraps (95 %, 2000 draws) over patients [1]: images of one patient are alike, so n images tell
    less than n patients would. They do not tell what other divisions or seeds of the training would give.

    Args:
        given, predicted: shape ``[n, C]``, fractions.
        baseline: what the mean of the training images predicts for each image, shape ``[n, C]``.
        patients: of each image.
        folds: of each image.
        classes: names of the C classes.
        seed: of the bootstrap.

    Returns:
        ``overall`` and, by name, ``classes``, each with ``error``, its ``interval`` (lower, upper), ``baseline`` (its error)
        and, of classes, ``correlation`` (Pearson, None where nothing varies); ``folds``, per fold ``fold``, ``images``,
        ``patients``, ``error``, ``baseline`` and ``classes`` (errors by name). All are fractions.

    References:
        [1] Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    given, predicted = np.asarray(given, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    error, plain = np.abs(predicted - given), np.abs(np.asarray(baseline, dtype=np.float64) - given)
    numbers: dict[Any, int] = {}
    group = np.array([numbers.setdefault(name, len(numbers)) for name in patients])
    interval = _interval(np.concatenate([error.mean(axis=1)[None], error.T]), group, seed)
    folds = np.asarray(folds)
    per_fold = [
        {
            "fold": int(number),
            "images": int((folds == number).sum()),
            "patients": len(set(group[folds == number].tolist())),
            "error": float(error[folds == number].mean()),
            "baseline": float(plain[folds == number].mean()),
            "classes": dict(zip(classes, error[folds == number].mean(axis=0).tolist())),
        }
        for number in np.unique(folds)
    ]
    return {
        "overall": {"error": float(error.mean()), "interval": interval[0].tolist(), "baseline": float(plain.mean())},
        "classes": {
            name: {
                "error": float(error[:, k].mean()),
                "interval": interval[k + 1].tolist(),
                "baseline": float(plain[:, k].mean()),
                "correlation": _correlation(given[:, k], predicted[:, k]),
            }
            for k, name in enumerate(classes)
        },
        "folds": per_fold,
    }


# ---- reports ------------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown(result: Mapping[str, Any]) -> str:
    """The report for people; all errors in percentage points."""
    classes = list(result["classes"])
    text = [
        "# Cross-validation\n",
        f"{len(result['images'])} images of {result['patients']} patients in {len(result['folds'])} folds: the proportions of "
        "each image are predicted by a network trained on other patients. Mean absolute errors in percentage points; interval: "
        "95 %, bootstrap over patients; baseline: predicting the mean of the training images. "
        f"{NESTED if result['nested'] else CHOSEN}\n",
        _line(["class", "error", "interval", "baseline", "correlation"]),
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in {"**all**": result["overall"], **result["classes"]}.items():
        correlation = row.get("correlation")
        interval = " to ".join(map(_percent, row["interval"]))
        shown = "–" if correlation is None else f"{correlation:.2f}"
        text.append(_line([name, _percent(row["error"]), interval, _percent(row["baseline"]), shown]))
    text += [
        "\n## Folds\n",
        _line(["fold", "images", "patients", "error", "baseline", *classes, "minutes"]),
        "|---:" * (6 + len(classes)) + "|",
    ]
    for row in result["folds"]:
        errors = [row["error"], row["baseline"], *(row["classes"][name] for name in classes)]
        text.append(_line([row["fold"], row["images"], row["patients"], *map(_percent, errors), f"{row['seconds'] / 60:.1f}"]))
    text += [
        f"\n## Worst images\n\nThe {min(WORST, len(result['images']))} with the largest errors: given, then predicted, in %. "
        "Look for slips in these rows of the table, too.\n",
        _line(["image", "patient", "fold", "error", *classes]),
        "|---|---|---:|---:" + "|---:" * len(classes) + "|",
    ]
    for row in result["images"][:WORST]:
        pairs = [f"{_percent(row['given'][name])} → {_percent(row['predicted'][name])}" for name in classes]
        text.append(_line([row["image"], row["patient"], row["fold"], _percent(row["error"]), *pairs]))
    return "\n".join(text) + "\n"


def _csv(images: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{kind} {name}" for kind in ("given", "predicted") for name in classes]
    writer.writerow(["image", "patient", "fold", "error", *columns])
    for row in images:
        values = [row[kind][name] for kind in ("given", "predicted") for name in classes]
        writer.writerow([row["image"], row["patient"], row["fold"], *(f"{value:.6f}" for value in (row["error"], *values))])
    return stream.getvalue()


def _plot(images: Sequence[Mapping[str, Any]], scores: Mapping[str, Any], path: Path) -> None:
    """Predicted against given proportions in %, a panel per class and a colour per fold."""
    classes = list(scores)
    columns = min(len(classes), 3)
    rows = -(-len(classes) // columns)
    figure = figure_module.Figure(figsize=(3.4 * columns, 0.4 + 3.8 * rows), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis, name in zip(axes, classes):
        axis.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
        for number in sorted({row["fold"] for row in images}):
            mine = [row for row in images if row["fold"] == number]
            x, y = ([100 * row[kind][name] for row in mine] for kind in ("given", "predicted"))
            color = COLORS[(number - 1) % len(COLORS)]
            axis.plot(x, y, ".", color=color, alpha=0.7, label=f"fold {number}")
        axis.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal", xlabel="given, %", ylabel="predicted, %")
        axis.set_title(f"{name}: error {_percent(scores[name]['error'])}", fontsize=10)
    for axis in axes[len(classes) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _result(cohort: Cohort, folds: Sequence[_Fold], place: Mapping[Path, int], images: Path, nested: bool, seed: int) -> dict:
    """Everything of ``cross_validation.json``, the images with the largest errors first."""
    records = {record.image: record for record in cohort.records if record.image in place}
    given = {path: record.proportions.mean for path, record in records.items()}
    predicted, baseline = {}, {}
    for index, fold in enumerate(folds):
        apart = {index, (index + 1) % len(folds)} if nested else {index}
        mean = np.mean([given[path] for path in given if place[path] not in apart], axis=0)
        for path, values in zip(fold.held_out, fold.read()["predictions"]):
            predicted[path], baseline[path] = np.array(values), mean
    tables = [np.stack([table[path] for path in records]) for table in (given, predicted, baseline)]
    patients = [patient_of(record) for record in records.values()]
    numbers = [place[path] + 1 for path in records]
    result = score_predictions(*tables, patients, numbers, cohort.classes, seed)
    for row, fold in zip(result["folds"], folds):
        row |= {"seconds": fold.read()["seconds"], "run": fold.run.name}
    rows = [_row(record, place[path] + 1, predicted[path], images) for path, record in records.items()]
    return {
        "version": monai_vslp.__version__,
        "table": str(cohort.source.absolute()),
        "seed": seed,
        "nested": nested,
        "options": {key: value for key, value in folds[0].options.items() if not key.startswith("tracking_")},
        "patients": len(set(patients)),
        **result,
        "images": sorted(rows, key=lambda row: -row["error"]),
    }


def _write(result: Mapping[str, Any], place: Mapping[Path, int], images: Path, output: Path) -> list[Path]:
    """All files about the whole."""
    rows = {row["image"]: row for row in result["images"]}
    in_order = [rows[_name(path, images)] for path in place]
    files = [
        write_text(output / PREDICTIONS, _csv(in_order, list(result["classes"]))),
        write_json(output / RESULT, result),
        write_text(output / REPORT, _markdown(result)),
    ]
    if has_matplotlib:
        _plot(in_order, result["classes"], output / PLOT)
        return [*files, output / PLOT]
    logger.warning("There is no plot: install matplotlib to have one.")
    return files


def _name(path: Path, images: Path) -> str:
    """An image's path in the folder of images, or its whole path where it lies elsewhere."""
    folder = images.absolute()
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _row(record: Record, fold: int, predicted: np.ndarray, images: Path) -> dict[str, Any]:
    given, classes = record.proportions.mean, record.proportions.classes
    return {
        "image": _name(record.image, images),
        "patient": record.patient,
        "fold": fold,
        "error": float(np.abs(predicted - given).mean()),
        "given": dict(zip(classes, given.tolist())),
        "predicted": dict(zip(classes, predicted.tolist())),
    }


# ---- tracking -----------------------------------------------------------------------------------------------------------


def _track(
    parent: TrackedRun,
    folds: Sequence[_Fold],
    result: Mapping[str, Any] | None,
    files: Sequence[Path],
) -> None:
    """End the run of a cross-validation: its scores and files, and those of the folds in the runs of their trainings."""
    if result is not None:
        for fold, row in zip(folds, result["folds"]):
            nested = TrackedRun(fold.run, parent.uri, EXPERIMENT, parent=parent.run_id)
            nested.open()
            nested.parameters({"fold": fold.number, "images": row["images"], "patients": row["patients"]})
            nested.metrics({f"fold/{name}": value for name, value in _metrics(row).items()})
            nested.close()
        parent.metrics(_metrics({**result["overall"], "classes": result["classes"]}))
    for path in files:
        parent.file(path, "cross_validation")
    parent.close("FAILED" if result is None else "FINISHED")


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Error and baseline, and the error of each class."""
    errors = {f"error {name}": value["error"] if isinstance(value, dict) else value for name, value in row["classes"].items()}
    return {"error": row["error"], "baseline": row["baseline"], **errors}


# ---- the whole ----------------------------------------------------------------------------------------------------------


def _plan(
    cohort: Cohort, place: Mapping[Path, int], images: Path, output: Path, options: dict[str, Any], folds: int, nested: bool
) -> list[_Fold]:
    """Write the tables of all folds, and say what each one's predictions depend on."""
    weights = _stat(options["weights"]) if options.get("weights") else None
    learned = {name: value for name, value in sorted(options.items()) if name not in (*NEUTRAL, "weights")}
    stats = [_stat(path) for path in place]
    planned = []
    for index in range(folds):
        names = {index: "test", (index + 1) % folds: "val"} if nested else {index: "val"}
        splits = {path: names.get(fold, "train") for path, fold in place.items()}
        run = output.absolute() / FOLD.format(index + 1)
        table = write_fold_table(run.with_suffix(".csv"), cohort, images, splits)
        known = json.dumps([monai_vslp.__version__, learned, weights, table.read_text(encoding="utf-8"), stats], default=str)
        held_out = tuple(path for path, fold in place.items() if fold == index)
        planned.append(_Fold(index + 1, run, images.absolute(), held_out, options, state_digest({}, known)))
    return planned


def cross_validate(
    table: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    folds: int = 5,
    seed: int = 0,
    nested: bool = False,
    jobs: int = 1,
    feature_cache: str | Path | None = None,
    restart: bool = False,
    tracking: bool = False,
    tracking_uri: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Predict the proportions of every image by a network trained on other patients, and say how well.

    Images of the splits ``train`` and ``val`` are divided into folds by patient (:func:`~monai_vslp.data.folds.divide`); those
    of ``test`` and those without proportions are left out. For each fold a network is trained by
    :func:`~monai_vslp.workflows.train` on the other folds. The fold itself is its split ``val``, so it chooses the best epoch
    and whether a round of self-training counts, which makes errors a little too small; with ``nested`` the next fold is
    ``val`` instead, for training on one fold less. To compare settings, compare ``cross_validation.md`` of two outputs with the
    same seed: they have the same folds.

    ``output`` gets ``fold<k>``, a bundle folder each, with its table ``fold<k>.csv`` and its state ``fold<k>.json``;
    ``predictions.csv`` (image, patient, fold, error, and per class what is given and predicted, fractions);
    ``cross_validation.json`` and ``.md``; and, with matplotlib, ``cross_validation.png``. The same call goes on after an
    interrupt, and trains again only what other settings or data have changed.

    Args:
        table: ``image,split,patient,<one column per class>``; see :func:`monai_vslp.data.read_cohort`.
        images: folder that image names are relative to.
        output: folder to write or continue.
        folds: how many.
        seed: of the folds, of every training, and of the bootstrap.
        nested: let the next fold choose the best epoch; needs three folds.
        jobs: folds at once, each in a process with one thread. 1 for none but this process.
        feature_cache: folder where features of a frozen backbone are kept; None for ``features`` in ``output``.
        restart: train all folds anew.
        tracking: log to MLflow, one run for the whole and the trainings of the folds nested under it, in ``output`` (or at
            ``MLFLOW_TRACKING_URI``).
        tracking_uri: log to this MLflow server or store. A server that fails stops nothing, see
            :class:`~monai_vslp.handlers.tracked_run.TrackedRun`.
        progress: show progress bars, where ``jobs`` is 1.
        **options: further ones of :func:`~monai_vslp.workflows.train`.

    Returns:
        ``cross_validation.md`` in ``output``.

    Raises:
        InputError: a table, image or option that cannot be used, before any computing.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs must be a whole number from 1, got {jobs!r}.")
    given = _given(options)
    output, images = Path(output), Path(images)
    cohort = read_cohort(table, images)
    place = divide(cohort, folds, seed)
    if nested and folds < 3:
        raise InputError(f"nested cross-validation needs 3 folds at least (to train, to choose, to predict), got {folds}.")
    check_images(place)
    frozen = given.get("freeze_backbone", "weights" in given and not given.get("finetune", False))
    if feature_cache is not None or frozen:
        given["feature_cache"] = str(Path(feature_cache or output / FEATURES).absolute())
    for run in (output / FOLD.format(index + 1) for index in range(folds)):
        if run.exists() and not run.with_suffix(".json").exists():
            raise InputError(f"{run} was not written by a cross-validation; choose another output folder.")
    given["seed"] = seed
    planned = _plan(cohort, place, images, output, given, folds, nested)
    if restart:
        for fold in planned:
            write_json(fold.state, {})
    for path in output.absolute().glob(FOLD.format("*[0-9].json")):
        if path not in [fold.state for fold in planned]:
            logger.warning("%s is of an earlier division into more folds, and is not used any more.", path.with_suffix(""))
    todo = [fold for fold in planned if "predictions" not in fold.read()]
    if todo:
        for name in (REPORT, RESULT, PLOT, PREDICTIONS):  # of other settings, if there are any
            (output / name).unlink(missing_ok=True)
    logger.info("%d images of %d folds, %d folds to be done.", len(place), folds, len(todo))
    tracker = None
    if tracking or tracking_uri is not None:
        tracker = TrackedRun(output, tracking_uri, EXPERIMENT)
        tracker.open()
        tracker.parameters({"folds": folds, "nested": nested, "table": cohort.source, "images": len(place), **given})
        for fold in planned:
            places = {"tracking_uri": tracker.uri, "tracking_experiment": EXPERIMENT, "tracking_parent": tracker.run_id}
            fold.options.update(places)
    result, files = None, ()
    try:
        for fold in _run(todo, jobs, progress):
            logger.info("Fold %d of %d is done.", fold.number, folds)
        result = _result(cohort, planned, place, images, nested, seed)
        files = _write(result, place, images, output)
    finally:
        if tracker is not None:
            _track(tracker, planned, result, files)
    return output / REPORT
