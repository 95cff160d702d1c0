"""``monai-vslp train``: from a table of proportions to a bundle folder with a trained network."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.data.bags import fingerprint
from monai_vslp.data.cohort import Cohort, read_cohort
from monai_vslp.data.images import check_images
from monai_vslp.networks.backbone import load_weights
from monai_vslp.networks.hub import is_folder, open_backbone
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import NETWORK, create_run, read_config, run_config, template
from monai_vslp.workflows.processes import check_processes, run_processes
from monai_vslp.workflows.subtypes import find_subtypes

__all__ = ["FROM_SCRATCH", "RECIPES", "train"]

logger = logging.getLogger(__name__)

# Without weights there is nothing to freeze: a small transformer learns from the cohort alone.
FROM_SCRATCH: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "blocks": [1, 3],
    "window": 64,
    "freeze_backbone": False,
    "cache_features": False,
    "learning_rate": 1e-3,
    "batch_size": 8,
    "consistency_weight": 0.0,  # views under random symmetries, one at a time: half the cost of comparing two
    "mean": [0.7, 0.55, 0.7],
    "std": [0.2, 0.2, 0.2],
}
# Of a frozen backbone a head is fitted: linear on principal components, then corrected by what its refined maps teach.
FROZEN: dict[str, Any] = {
    "freeze_backbone": True,
    "cache_features": True,
    "magnifications": [1, 2],
    "training_views": 3,
    "rank": 256,
    "head": "additive",
    "hidden": 128,
    "epochs": 12,
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "entropy_weight": 0.1,
    "consistency_weight": 0.0,
    "average_decay": 0.0,
}
# Of a backbone that knows images already: its head learns first, and early layers change least.
PRETRAINED: dict[str, Any] = {"layer_decay": 0.75}
HEAD_SHARE = 0.1  # of the epochs, in which the head learns alone
DEFAULT_BACKBONE = "vit_tiny_patch16_224"
GATE = 1.0  # a round may not meet held-out proportions worse,
ESTIMATED_GATE = 1.05  # or by no more than this where they are estimates, whose own errors hide small differences
# Fits that are tried in turn where images are held out, each against the one before: edges of squares of tokens whose mean the
# head sees too, and a ridge so many times as large. The first that does not meet held-out proportions better ends the search.
FITS: tuple[dict[str, Any], ...] = ({}, {"context": [1, 9, 31]}, {"context": [1, 9, 31], "ridge": 0.25})
# Of estimates: means over squares average out less of what is wrong in single images than decided tokens do.
ESTIMATED_FITS: tuple[dict[str, Any], ...] = ({}, {"context": [1, 9, 31], "entropy_weight": 0.6})
BETTER = 0.95  # of the error before; a smaller gain is chance,
ESTIMATED_BETTER = 0.98  # but errors of estimates enter both sides and make true gains look smaller
# Of proportions that people estimated: decided tokens average out errors of single images, and pseudo-labels doubt them too.
ESTIMATED: dict[str, Any] = {"entropy_weight": 0.3, "target_trust": 3.0}
RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.json")))
RECIPE = "recipe.json"  # its copy in a run
FINETUNE = "finetune.json"  # overlay for a network that was trained before
STEP = 0.05  # people estimate in multiples of it
ROUND = "round{}"  # folders in models/; 0 is the fit to the proportions
FIT = "fit{}"  # folders in models/ of the fits that were tried
NO_SETTINGS = (
    "bag_dir",
    "table",
    "dataset_dir",
    "weights",
    "feature_cache",
    "rounds",
    "enclosing",
    "subtypes",
    "mpp",
)  # of the fit
ASSUMED_MPP = 0.5  # µm/px (20x to 40x scanners), recorded where neither the table nor the user says


def _mpp(cohort, stated: float | None) -> float | None:
    """µm/px of the training images: said by hand, or the one value of the table."""
    values = {record.mpp for record in cohort.split("train").records if record.mpp is not None}
    if stated is not None:
        return stated
    if len(values) > 1:
        raise InputError(
            f"the training images have different µm/px ({sorted(values)}); bring them to one scale first, a network learns "
            "tissue at one scale."
        )
    return values.pop() if values else None


def train(
    table: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    start: str | Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
    mpp: float | None = None,
    finetune: bool = False,
    rounds: int | None = None,
    enclosing: Sequence[str] = (),
    subtypes: Sequence[str] | None = None,
    recipe: str | Path | None = None,
    feature_cache: str | Path | None = None,
    restart: bool = False,
    tracking_uri: str | None = None,
    tracking_experiment: str | None = None,
    tracking_parent: str | None = None,
    processes: int = 1,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Train on the rows of split ``train``, watch those of ``val``, and leave a usable bundle folder.

    With weights the backbone is frozen, its features are kept, and a head is fitted to the proportions of all images together.
    Where the proportions of held-out images (split ``val``) are met better by 5 % if the head sees the surroundings of tokens
    too, it does. Otherwise rounds of self-training follow, in which a more flexible head learns the maps that the first one
    and the proportions agree on; a round counts unless held-out proportions are met worse after it (by 5 % if estimated).
    Classes that are subtypes of one tissue are told apart by all of it nearby where held-out proportions are met better so.
    Proportions that people estimated (raters disagree, or all entries are multiples of 5 %) get a stronger entropy term and
    pseudo-labels that doubt them.
    ``finetune`` trains the backbone too: of one with weights the head learns alone in the first tenth of the epochs, and rates
    fall off towards the input (``head_epochs``, ``layer_decay``); with ``adapters`` it learns through low-rank corrections,
    which are added to its weights in ``model.pt``. Without weights and backbone a small transformer is trained from scratch.
    Interrupted runs continue with the same command.

    Args:
        table: ``image,split,patient,<one column per class>``; see :func:`monai_vslp.data.read_cohort`.
        images: folder that image names are relative to.
        output: the bundle folder to write.
        backbone: name of a timm model; or ``local-dir:<folder>``, ``hf-hub:<organisation>/<model>``, which brings its weights.
        weights: local file with its weights.
        start: bundle folder with a trained network to go on from, which brings its backbone: all of it is trained, its head is
            kept where the classes are the same ones in the same order.
        seed: seed of all random draws.
        epochs: passes over the bags; None for the default.
        mpp: µm/px of the images, needed for slides; None takes the table's column ``mpp``.
        finetune: train the backbone too.
        rounds: of self-training at most, with a frozen backbone and images of split ``val``; then the head sees tokens alone.
            None for 1 unless it sees their surroundings.
        enclosing: names of classes without holes, such as glands with their lumens: self-training learns the holes too, so
            that ``rounds`` is at least 1 unless it is given.
        subtypes: names of the classes that are subtypes of one tissue, such as benign and malignant glands, for a frozen
            backbone and images of split ``val``. None to find them by the proportions of these (:mod:`.subtypes`); empty for
            none.
        recipe: another way to fit a head to the same bags: one of :data:`RECIPES`, or a JSON file of the same kind, an overlay
            of ``train.json`` and ``train_head.json``. No surroundings and no rounds then. None for the way above.
        feature_cache: folder where features of frozen backbones are kept for other runs too; None to keep none.
        restart: throw away an earlier run in ``output``.
        tracking_uri: MLflow server or store; SQLite in ``output`` by default. A server that fails ends no training.
        tracking_experiment: name of the experiment there; ``monai_vslp`` by default.
        tracking_parent: id of the run that this one is nested under.
        processes: of this machine that share each batch, one GPU each or all on its CPUs; not where a head is fitted to a
            frozen backbone.
        progress: show progress bars.
        **overrides: top-level values of the bundle's ``train.json``, such as ``adapters={"rank": 8}``, ``layer_decay``,
            ``head_epochs``, ``grad_checkpointing``, ``amp``, ``accumulation``, ``patience``, ``teacher_weight``.

    Returns:
        The bundle folder.

    Raises:
        InputError: a table, image or option that cannot be used, before any computing.
    """
    run = Path(output)
    cohort = read_cohort(table, images)
    training = cohort.split("train")
    if len(training) == 0:
        raise InputError(f"table {table} has no rows of split 'train'.")
    if len(cohort.classes) < 2:
        raise InputError(f"table {table} has the one class {cohort.classes[0]!r}; give at least two columns of proportions.")
    if unknown := [name for name in enclosing if name not in cohort.classes]:
        raise InputError(f"enclosing names {unknown[0]!r}, which is no class of {table}; it has {', '.join(cohort.classes)}.")
    if unknown := [name for name in subtypes or () if name not in cohort.classes]:
        raise InputError(f"subtypes names {unknown[0]!r}, which is no class of {table}; it has {', '.join(cohort.classes)}.")
    if subtypes and len(set(subtypes)) < 2:
        raise InputError(f"subtypes must name two classes of {table} at least, got {', '.join(subtypes)}.")
    if rounds is not None and rounds < 0:
        raise InputError(f"rounds of self-training must be at least 0, got {rounds}.")
    folder = open_backbone(backbone) if is_folder(backbone) else None
    if folder is not None:
        backbone, weights = folder.architecture, folder.weights if weights is None else weights
        found = {"mean": folder.mean, "std": folder.std}
        overrides = {key: value for key, value in found.items() if value is not None} | overrides
        overrides["backbone_kwargs"] = folder.options | (overrides.get("backbone_kwargs") or {})
    overlay = {} if recipe is None else _recipe(recipe, weights is not None and not finetune)
    overlay = {key: overrides.get(key, value) for key, value in overlay.items()}
    if weights is not None:
        load_weights(weights)  # a damaged file is found before the images are read
    begun = {} if start is None else _start(start, cohort, weights is None and backbone is None and recipe is None)
    overrides = begun | overrides
    fitted = weights is not None and not finetune
    scratch = weights is None and backbone is None and start is None
    defaults = read_config(template(), "train.json") | (FROM_SCRATCH if scratch else {})
    defaults |= {} if start is None else {"epochs": read_config(template(), FINETUNE)["epochs"]}
    asked = defaults | ({} if epochs is None else {"epochs": epochs}) | overrides
    if subtypes and not (fitted and len(cohort.split("val")) > 0):
        raise InputError(
            "how far subtypes look is chosen by held-out proportions, with a frozen backbone: give weights, no finetune, and "
            "some rows of the table the split 'val'; or leave subtypes out."
        )
    if processes != 1 and fitted:
        raise InputError("heads of frozen backbones are fitted by one process: leave out processes, or give finetune.")
    check_processes(processes, asked["batch_size"])
    if not fitted:
        overrides = _finetuning(asked, weights is not None or start is not None, len(cohort.split("val")) > 0) | overrides
    elif overrides.get("adapters"):
        raise InputError("adapters train a backbone, and this one is frozen: give finetune (--finetune), or leave them out.")
    if (run / "configs").exists() and restart:
        for name in ("configs", "models"):
            shutil.rmtree(run / name, ignore_errors=True)
    elif run.exists() and not (run / "configs").exists() and any(run.iterdir()):
        raise InputError(f"output folder {run} holds other files; choose an empty one.")
    check_images(record.image for record in (*training.records, *cohort.split("val").records))
    scale = _mpp(cohort, mpp)
    if scale is None:
        logger.warning("No µm/px known for the images (--mpp or a column mpp): slides will be read at %g µm/px.", ASSUMED_MPP)
    frozen = weights is not None and not finetune
    values: dict[str, Any] = dict(FROM_SCRATCH) if scratch else {}
    if backbone is not None or weights is not None:
        values = {
            "backbone": backbone or DEFAULT_BACKBONE,
            "weights": None if weights is None else str(Path(weights).absolute()),
            **(
                FROZEN | (ESTIMATED if _estimated(training) else {})
                if frozen
                else {"freeze_backbone": False, "cache_features": False, "learning_rate": 1e-4}
            ),
        }
    values |= {
        "table": str(Path(table).absolute()),
        "dataset_dir": str(Path(images).absolute()),
        "classes": list(cohort.classes),
        "seed": seed,
        "enclosing": list(enclosing),
        "feature_cache": None if feature_cache is None else str(Path(feature_cache).absolute()),
        "mpp": scale if scale is not None else ASSUMED_MPP,
        **({} if epochs is None else {"epochs": epochs}),
        **{key: value for key, value in overlay.items() if value is None or not isinstance(value, dict | list | tuple)},
        **overrides,
    }
    if overlay:
        values["rounds"] = 0
    elif rounds is not None:
        values["rounds"] = rounds
    # Precision of training only: an inference config has a switch of this name too, and maps are to be those of the network.
    create_run(run, {key: value for key, value in values.items() if key != "amp"}, cohort.classes)
    places = {
        "tracking_uri": tracking_uri,
        "tracking_experiment": tracking_experiment,
        "tracking_parent": tracking_parent,
    }
    tracked = {key: value for key, value in places.items() if value is not None}
    if not frozen:
        if values.get("amp"):
            write_json(run / "configs" / "train.json", read_config(run, "train.json") | {"amp": True})
        names = ["train.json"] if start is None else ["train.json", FINETUNE]
        if processes > 1:
            run_processes(run, processes, names, progress=progress, ckpt_dir=str(run / "models"), **tracked)
        else:
            run_config(run, names, track=True, progress=progress, ckpt_dir=str(run / "models"), **tracked)
        return run
    held_out = len(cohort.split("val")) > 0
    # Self-training draws single tokens: its head knows nothing of their surroundings.
    alone = not held_out or rounds or enclosing or "context" in values or overlay
    settings = {key: value for key, value in values.items() if key not in NO_SETTINGS}
    settings["table"] = fingerprint(training.datalist())
    configs = ["train.json", "train_head.json"]
    if overlay:
        configs.append(RECIPE)
        write_json(run / "configs" / RECIPE, overlay)
        settings["recipe"] = overlay
    estimated = _estimated(training)
    fits, better = (ESTIMATED_FITS, ESTIMATED_BETTER) if estimated else (FITS, BETTER)
    chosen = _fit_head(run, configs, fits[:1] if alone else fits, better, settings, progress, tracked)
    if chosen:
        create_run(run, values | chosen | {"rounds": 0}, cohort.classes)
    _self_training(run, held_out, ESTIMATED_GATE if estimated else GATE, progress, tracked)
    searched = subtypes is None and len(cohort.classes) > 2 and not overlay
    if held_out and (searched or subtypes):
        named = None if subtypes is None else [cohort.classes.index(name) for name in subtypes]
        bag_dir = values.get("bag_dir", run / "models" / "bags")
        if found := find_subtypes(run, cohort, named, bag_dir, progress):
            create_run(run, values | chosen | ({"rounds": 0} if chosen else {}) | {"subtypes": found}, cohort.classes)
    shutil.rmtree(run / "models" / "bags", ignore_errors=True)  # they served all fits and rounds, and may be large
    return run


def _start(start: str | Path, cohort: Cohort, alone: bool) -> dict[str, Any]:
    """Values of the configs that make a trained network the start.

    Raises:
        InputError: the folder has no trained network, or another start was given too.
    """
    start = Path(start)
    config = read_config(start, "inference.json")
    model = start / "models" / "model.pt"
    load_weights(model)
    if not alone:
        raise InputError(f"{start} brings its backbone and weights: leave out backbone, weights and recipe, or the start.")
    values = {key: config[key] for key in NETWORK if key in config}
    same = list(config["classes"]) == list(cohort.classes)
    if not same:
        logger.info("%s knows the classes %s: the head is learned anew.", start, ", ".join(config["classes"]))
    values |= {"freeze_backbone": False, "cache_features": False, "consistency_weight": 0.0}
    if not same:
        values["subtypes"] = None  # indices of other classes
    return values | {
        "learning_rate": read_config(template(), FINETUNE)["learning_rate"],
        "start": str(model.absolute()),
        "keep_head": same,
    }


def _finetuning(asked: dict[str, Any], pretrained: bool, held_out: bool) -> dict[str, Any]:
    """Defaults of training a backbone that has weights.

    Args:
        asked: top-level values of ``train.json``.
        pretrained: the backbone has weights.
        held_out: there are images of split ``val``.

    Raises:
        InputError: options that cannot go together.
    """
    epochs, alone = asked["epochs"], asked["head_epochs"]
    if asked["adapters"] and not pretrained:
        raise InputError("adapters correct a backbone that knows images already: give its weights (--weights, or local-dir:).")
    if asked["patience"] is not None and not held_out:
        raise InputError("patience watches the proportions of held-out images: give some rows of the table the split 'val'.")
    if alone and alone >= epochs:
        raise InputError(f"head_epochs must be less than the {epochs} epochs, or the backbone never learns, got {alone}.")
    if isinstance(asked["accumulation"], bool) or not isinstance(asked["accumulation"], int) or asked["accumulation"] < 1:
        raise InputError(f"accumulation is a whole number of batches per step from 1, got {asked['accumulation']!r}.")
    return PRETRAINED | {"head_epochs": int(HEAD_SHARE * epochs)} if pretrained else {}


def _recipe(recipe: str | Path, frozen: bool) -> dict[str, Any]:
    """The content of a recipe.

    Raises:
        InputError: there is none of that name, it cannot be read, or there is no frozen backbone to fit a head to.
    """
    path = RECIPE_FOLDER / f"{recipe}.json" if str(recipe) in RECIPES else Path(recipe)
    if not frozen:
        raise InputError(f"recipe {recipe} fits a head to a frozen backbone: give its weights, and no finetune.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"recipe {recipe} is neither a file nor one of {', '.join(RECIPES)}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} must be an object, an overlay of train.json and train_head.json.")
    return values


def _fit_head(
    run: Path,
    configs: Sequence[str],
    fits: Sequence[dict[str, Any]],
    better: float,
    settings: dict[str, Any],
    progress: bool,
    tracked: dict[str, str],
) -> dict[str, Any]:
    """Fit heads in turn as long as held-out proportions are met better; ``models/round0`` holds the last that did so.

    Returns:
        Values of the configs that this head differs in.

    Raises:
        InputError: it was fitted before, with other settings.
    """
    models, first = run / "models", run / "models" / ROUND.format(0)
    done = first / "fit.json"
    if done.is_file():
        found = json.loads(done.read_text(encoding="utf-8"))
        changed = [k for k in {*settings, *found["settings"]} if settings.get(k) != found["settings"].get(k)]
        if changed:
            raise InputError(
                f"{run} was trained with other settings ({', '.join(sorted(changed))}): continue with the same ones, choose "
                "another output folder, or start afresh with --restart."
            )
        return found["chosen"]
    ridge = read_config(run, "train_head.json")["ridge"]
    chosen, folder, best = {}, None, None
    for number, fit in enumerate(fits):
        values = fit | ({"ridge": fit["ridge"] * ridge} if "ridge" in fit else {})
        candidate = models / FIT.format(number)
        stage = FIT.format(number) if len(fits) > 1 else None
        place = {"ckpt_dir": str(candidate), "tracking_stage": stage, **tracked}
        run_config(run, configs, track=True, progress=progress, **place, **values)
        error = _best_error(candidate) if len(fits) > 1 else None
        if number:
            text = ", ".join(f"{key} {value}" for key, value in values.items())
            logger.info("%s: mean error of held-out proportions %.4f, before %.4f.", text, error, best)
            if error > better * best:
                break
        chosen, folder, best = values, candidate, error
    for name in ("history.json", "model.pt"):
        for target in (models, first):
            with atomic_path(target / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    write_json(done, {"chosen": chosen, "settings": settings})
    return chosen


def _estimated(cohort: Cohort) -> bool:
    """Whether people estimated the proportions: raters disagree, or all entries are round."""
    labels = [record.proportions for record in cohort.records if record.proportions is not None]
    values = np.concatenate([label.mean for label in labels])
    return any(label.spread.any() for label in labels) or bool(np.allclose(values / STEP, np.round(values / STEP), atol=1e-3))


def _self_training(run: Path, held_out: bool, gate: float, progress: bool, tracked: dict[str, str]) -> None:
    """Rounds of self-training as long as held-out proportions are met as well; ``models/model.pt`` is the last such network.

    Args:
        run: bundle folder.
        held_out: there are images of split ``val``.
        gate: a round counts up to so many times the error before.
        progress: show progress bars.
        tracked: where the run is tracked.
    """
    models = run / "models"
    rounds = read_config(run, "self_training.json")["rounds"]
    if rounds == 0:
        return
    if not held_out:
        logger.warning("No images of split 'val': rounds of self-training could not be judged, and are left out.")
        return
    error = _best_error(models / ROUND.format(0))
    for number in range(1, rounds + 1):
        folder = models / ROUND.format(number)
        run_config(run, "self_training.json", track=True, round=number, progress=progress, **tracked)
        found = _best_error(folder)
        logger.info("Round %d: mean error of held-out proportions %.4f, before %.4f.", number, found, error)
        if found > gate * error:
            return
        error = min(error, found)
        with atomic_path(models / "model.pt") as temporary:
            shutil.copyfile(folder / "model.pt", temporary)


def _best_error(folder: Path) -> float:
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return min(entry["proportion_error"] for entry in history)
