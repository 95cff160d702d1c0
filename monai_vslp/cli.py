"""Command line ``monai-vslp``: parses, calls a workflow, prints."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai_vslp
from monai_vslp.data.public import read_public
from monai_vslp.io.output import WRITERS
from monai_vslp.networks.calibration import VARIANTS
from monai_vslp.networks.tta import TTA_GROUPS
from monai_vslp.transforms.refinement import TRUST_RULES
from monai_vslp.utils.errors import InputError

__all__ = ["main"]

TRUST_HELP = (
    "trust in the proportions: a number, 'inf' (default) to meet them, 'raters' for what the raters' disagreement warrants, "
    "'bounds' to stay within ranges such as 10-20"
)


def _trust(text: str) -> float | str:
    if text.lower() in TRUST_RULES:
        return text.lower()
    value = math.inf if text.lower() in ("inf", "hard") else float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"trust must be positive, 'inf', 'raters' or 'bounds', got {text}.")
    return value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers and commas, such as 40,35,25, got {text!r}.") from error


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _group(text: str) -> tuple[str, list[str]]:
    name, separator, members = text.partition("=")
    if not separator or not name or not members:
        raise argparse.ArgumentTypeError(f"expected NAME=CLASS,CLASS, got {text!r}.")
    return name, members.split(",")


def _training_options(parser: argparse.ArgumentParser) -> None:
    """What ``train`` and ``cross-validate`` have in common."""
    parser.add_argument("--backbone", metavar="NAME", help="timm model (default: a small transformer trained from scratch)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="local weights of the backbone (.safetensors, .pt)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the images")
    parser.add_argument("--mpp", type=float, metavar="X", help="µm/px of the images, needed to segment slides")
    parser.add_argument("--finetune", action="store_true", help="train the backbone too, not the head alone")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of self-training at most (default: 1)")
    parser.add_argument(
        "--enclosing", type=_names, default=[], metavar="CLASS,CLASS", help="classes without holes, such as glands"
    )
    parser.add_argument(
        "--subtypes",
        type=_names,
        metavar="CLASS,CLASS",
        help="classes that are subtypes of one tissue (default: as held-out proportions say; '' for none)",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="fit the head as a method for comparison does, such as llp_vat, or by a JSON file"
    )
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="keep features of frozen backbones for other runs")
    parser.add_argument("--restart", action="store_true", help="throw away an earlier run in RUN")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server or store (default: SQLite in RUN)")


def _slide_options(parser: argparse.ArgumentParser) -> None:
    """What ``segment`` and ``cohort`` have in common for slides."""
    parser.add_argument(
        "--adaptive",
        type=float,
        metavar="D",
        help="slides: more views only where two confidences are within D, such as 0.2",
    )
    parser.add_argument(
        "--formats", type=_names, metavar="NAME,NAME", help=f"slides: what is written, of {', '.join(WRITERS.names)}"
    )
    parser.add_argument("--reader", metavar="NAME", help="slides: what reads them (default: the first that can)")


def _slide_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The values of :func:`_slide_options` that were given."""
    values = {"adaptive": options.adaptive, "formats": options.formats, "reader": options.reader}
    return {key: value for key, value in values.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="monai-vslp", description="Tissue maps from tissue percentages: train, segment, evaluate, report."
    )
    parser.add_argument("--version", action="version", version=f"monai_vslp {monai_vslp.__version__}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, warnings only")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, segment and evaluate on synthetic tissue, a few minutes on two cores")
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder to write (default: demo)")
    demo.add_argument("--seed", type=int, default=0)

    check = commands.add_parser("check", help="find what is wrong with a table and its images before training")
    check.add_argument("table", type=Path, nargs="?", metavar="TABLE", help="as for 'train': CSV or XLSX")
    check.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: the table's)")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    check.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="write an empty table, .csv or .xlsx, a row for each image of --images",
    )
    check.add_argument("--classes", type=_names, default=[], metavar="CLASS,CLASS", help="class columns of the template")

    train = commands.add_parser("train", help="train from a table of proportions")
    train.add_argument("table", type=Path, metavar="TABLE", help="CSV: image,split,patient,<one column per class>")
    train.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder that image names are relative to")
    train.add_argument("--output", type=Path, required=True, metavar="RUN", help="bundle folder to write or continue")
    train.add_argument("--start", type=Path, metavar="RUN", help="bundle folder with a trained network to go on from")
    _training_options(train)
    tuning = train.add_argument_group("training a backbone (--finetune, or from scratch)")
    tuning.add_argument("--adapters", type=int, metavar="RANK", help="train low-rank corrections of the backbone, such as 8")
    tuning.add_argument("--layer-decay", type=float, metavar="D", help="rate of a layer over that of the next (default: 0.75)")
    tuning.add_argument("--head-epochs", type=int, metavar="N", help="epochs of the head alone (default: a tenth)")
    tuning.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without better held-out proportions")
    tuning.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: 8)")
    tuning.add_argument("--accumulation", type=int, metavar="N", help="batches whose gradients make one step (default: 1)")
    tuning.add_argument("--grad-checkpointing", action="store_true", help="less memory, a third more time")
    tuning.add_argument("--amp", action="store_true", help="mixed precision")
    tuning.add_argument("--processes", type=int, default=1, metavar="N", help="share each batch among N processes (GPUs)")

    crossed = commands.add_parser(
        "cross-validate", help="train on all patients but some, in turn, and say how well proportions of the others are met"
    )
    crossed.add_argument("table", type=Path, metavar="TABLE", help="as for 'train'; rows of split 'test' are left out")
    crossed.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder that image names are relative to")
    crossed.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write or continue")
    crossed.add_argument(
        "--folds", type=int, default=5, metavar="N", help="parts that the patients are divided into (default: 5)"
    )
    crossed.add_argument(
        "--nested", action="store_true", help="let the next fold choose the best epoch, so that each fold is wholly unseen"
    )
    crossed.add_argument("--jobs", type=int, default=1, metavar="N", help="folds at a time (default: 1)")
    crossed.add_argument("--tracking", action="store_true", help="log the whole to MLflow, in OUT unless a URI is given")
    _training_options(crossed)

    regularizer = commands.add_parser("train-regularizer", help="learn a regularizer for a trained network, without masks")
    regularizer.add_argument("model", type=Path, metavar="RUN", help="bundle folder of 'train'")
    regularizer.add_argument("--table", type=Path, metavar="TABLE", help="proportions (default: the table of 'train')")
    regularizer.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of 'train')")
    regularizer.add_argument("--seed", type=int, default=0)
    regularizer.add_argument("--epochs", type=int, metavar="N", help="passes of 40 batches (default: 12)")
    regularizer.add_argument("--published", action="store_true", help="the published size: three macro-blocks, ten steps")
    regularizer.add_argument("--class-wise", action="store_true", help="one that serves any number of classes")
    regularizer.add_argument("--no-image", action="store_true", help="do not let it see the image beside the segmentation")
    regularizer.add_argument("--restart", action="store_true", help="throw away an earlier regularizer in RUN")
    regularizer.add_argument("--tracking-uri", metavar="URI", help="MLflow server or store (default: SQLite in RUN)")

    pretrain = commands.add_parser("pretrain", help="learn a backbone from images without labels, for 'train --weights'")
    pretrain.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="images, slides, or folders of them")
    pretrain.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder to write or continue")
    pretrain.add_argument("--backbone", metavar="NAME", help="vision transformer of timm (default: vit_tiny_patch16_224)")
    pretrain.add_argument("--weights", type=Path, metavar="FILE", help="local weights to start from")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument("--epochs", type=int, metavar="N", help="passes (default: 100)")
    pretrain.add_argument("--tile", type=int, metavar="PX", help="edge of the tiles (default: 224)")
    pretrain.add_argument("--batch-size", type=int, metavar="N", help="tiles per step (default: 64)")
    pretrain.add_argument("--mpp", type=float, metavar="X", help="µm/px at which slides are read (default: 0.5)")
    pretrain.add_argument("--restart", action="store_true", help="throw away an earlier run in RUN")
    pretrain.add_argument("--tracking-uri", metavar="URI", help="MLflow server or store (default: SQLite in RUN)")

    public = commands.add_parser(
        "public", help="make a table of proportions from a public data set as its owners distribute it"
    )
    public.add_argument("name", metavar="NAME", help="glas, crag, bcss, bcss_wsss, luad_histoseg or ebhi_seg")
    public.add_argument("root", type=Path, metavar="DIR", help="the set as downloaded and unpacked")
    public.add_argument(
        "--output", type=Path, required=True, metavar="TABLE", help="CSV to write; masks of val and test beside it"
    )
    public.add_argument("--seed", type=int, default=0, help="of the division by patient, where the set has no validation part")

    choose = commands.add_parser("choose", help="choose strength and trust by held-out proportions, without masks")
    choose.add_argument("model", type=Path, metavar="RUN", help="bundle folder of 'train'")
    choose.add_argument("--table", type=Path, metavar="TABLE", help="proportions (default: the table of 'train')")
    choose.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of 'train')")

    calibrate = commands.add_parser(
        "calibrate", help="intervals of predicted proportions, offsets for other sites: from held-out images, no masks"
    )
    calibrate.add_argument("model", type=Path, metavar="RUN", help="bundle folder of 'train'")
    calibrate.add_argument("--table", type=Path, metavar="TABLE", help="proportions (default: split val of that of 'train')")
    calibrate.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of 'train')")
    calibrate.add_argument("--output", type=Path, metavar="OUT", help="folder to write instead of RUN, to look at only")
    calibrate.add_argument(
        "--variant",
        choices=(*VARIANTS, "auto"),
        default="none",
        help="fit confidences to proportions, auto: if patients left out say so (default: none, measure only)",
    )
    calibrate.add_argument("--level", type=float, default=0.9, metavar="L", help="of the intervals (default: 0.9)")
    calibrate.add_argument("--site", type=Path, metavar="DIR", help="images of another hospital, for its mix of classes")
    calibrate.add_argument("--site-table", type=Path, metavar="TABLE", help="proportions of images of the site")
    calibrate.add_argument("--site-mean", type=_numbers, metavar="P,P,...", help="mean proportions of the site's images")

    segment = commands.add_parser("segment", help="segment images, folders or slides")
    segment.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    segment.add_argument("--model", type=Path, required=True, metavar="RUN", help="bundle folder of 'train'")
    segment.add_argument("--output", type=Path, required=True, metavar="OUT")
    segment.add_argument("--proportions", type=Path, metavar="TABLE", help="proportions of the inputs; blank means unknown")
    segment.add_argument("--mpp", type=float, metavar="X", help="µm/px of the inputs, for slides that do not say")
    segment.add_argument("--trust", type=_trust, metavar="RHO", help=TRUST_HELP)
    segment.add_argument("--alpha", type=float, metavar="A", help="strength of the regularizer")
    segment.add_argument(
        "--band",
        type=float,
        metavar="STEP",
        help="also find the labels that hang on one rounding step of the proportions, in %%",
    )
    segment.add_argument(
        "--regularizer",
        metavar="NAME",
        help="'tv' for total variation, 'learned' for what 'train-regularizer' left (default: learned where there is one), "
        "or one that another package adds",
    )
    segment.add_argument("--tta", choices=TTA_GROUPS.names, help="test-time views")
    segment.add_argument("--no-calibration", action="store_true", help="take confidences as the network gives them")
    _slide_options(segment)
    segment.add_argument("--overwrite", action="store_true", help="compute again what is done")

    cohort = commands.add_parser("cohort", help="segment all slides of a table, on this machine or a cluster")
    cohort.add_argument("table", type=Path, metavar="TABLE", help="CSV: image,<one column per class>; also mpp, rater, region")
    cohort.add_argument("--images", type=Path, metavar="DIR", help="folder that names are relative to (default: the table's)")
    cohort.add_argument("--model", type=Path, required=True, metavar="RUN", help="bundle folder of 'train'")
    cohort.add_argument("--output", type=Path, required=True, metavar="OUT")
    cohort.add_argument("--mpp", type=float, metavar="X", help="µm/px of slides of which neither file nor table says it")
    cohort.add_argument("--trust", type=_trust, metavar="RHO", help=TRUST_HELP)
    cohort.add_argument("--alpha", type=float, metavar="A", help="strength of the regularizer")
    cohort.add_argument("--regularizer", metavar="NAME", help="as of 'segment'")
    cohort.add_argument("--tta", choices=TTA_GROUPS.names, help="test-time views")
    cohort.add_argument("--no-calibration", action="store_true", help="take confidences as the network gives them")
    _slide_options(cohort)
    cohort.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core or GPU); 0 for this one")
    cohort.add_argument("--threads", type=int, default=1, metavar="N", help="threads per process (default: 1)")
    cohort.add_argument("--memory", metavar="SIZE", help="limit per process, such as 8GB (default: an even share)")
    cohort.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask scheduler that runs already, such as tcp://host:8786")
    cohort.add_argument("--scheduler-file", type=Path, metavar="FILE", help="that 'dask scheduler --scheduler-file' wrote")
    cohort.add_argument("--retry-failed", action="store_true", help="try again what is in failed.csv")
    cohort.add_argument("--dry-run", action="store_true", help="only say what would be read, how many tiles, disk and time")
    cohort.add_argument("--tiles-per-second", type=float, metavar="X", help="of one process, for the time of a dry run")
    cohort.add_argument("--overwrite", action="store_true", help="compute again what is done")

    evaluate = commands.add_parser("evaluate", help="compare segmentations with masks")
    evaluate.add_argument("output", type=Path, metavar="OUT")
    evaluate.add_argument("--masks", type=Path, required=True, metavar="DIR", help="index masks <stem>.png or .tif")
    evaluate.add_argument(
        "--group",
        type=_group,
        action="append",
        metavar="NAME=CLASS,CLASS",
        help="also score these classes together against the rest",
    )

    evaluate.add_argument("--track", type=Path, metavar="RUN", help="add scores and pictures to the MLflow run of this bundle")

    register = commands.add_parser("register", help="add a trained bundle to MLflow's model registry")
    register.add_argument("model", type=Path, metavar="RUN", help="bundle folder of 'train'")
    register.add_argument("--name", default="monai_vslp", help="of the registered model (default: monai_vslp)")
    register.add_argument("--tracking-uri", metavar="URI", help="MLflow server or store (default: that of the training)")

    send = commands.add_parser("send-tracking", help="send runs to MLflow that were kept here while its server was away")
    send.add_argument("output", type=Path, metavar="OUT", help="folder of 'train', 'cross-validate' or 'benchmark'")

    benchmark = commands.add_parser("benchmark", help="compare methods on data sets, noise levels and seeds, and make tables")
    benchmark.add_argument("config", type=Path, metavar="CONFIG", help="JSON as configs/benchmark_example.json")
    benchmark.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write or continue")
    benchmark.add_argument(
        "--only", action="append", metavar="PATTERN", help="a data set, table, method or seed<k>; repeatable"
    )
    benchmark.add_argument("--jobs", type=int, default=1, metavar="N", help="tasks at a time (default: 1)")

    label = commands.add_parser("label", help="start a MONAI Label server for bundles and a folder of images and slides")
    label.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]RUN",
        help="bundle folder of 'train', or one that ships with the package; repeatable",
    )
    label.add_argument("--studies", type=Path, required=True, metavar="DIR", help="folder of images and slides")
    label.add_argument("--work", type=Path, metavar="DIR", help="what the server writes (default: .monai_vslp in DIR)")
    label.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine's own alone)")
    label.add_argument("--port", type=int, default=8000)
    label.add_argument("--tta", choices=TTA_GROUPS.names, help="test-time views (default: each bundle's)")
    label.add_argument("--print", action="store_true", help="only print the command")

    report = commands.add_parser("report", help="write the HTML reports anew")
    report.add_argument("output", type=Path, metavar="OUT")
    return parser


def _training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The values of :func:`_training_options`."""
    return {
        "backbone": options.backbone,
        "weights": options.weights,
        "seed": options.seed,
        "epochs": options.epochs,
        "mpp": options.mpp,
        "finetune": options.finetune,
        "rounds": options.rounds,
        "enclosing": options.enclosing,
        "subtypes": options.subtypes,
        "recipe": options.recipe,
        "feature_cache": options.feature_cache,
        "restart": options.restart,
        "tracking_uri": options.tracking_uri,
    }


def _tuning_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of training a backbone, as top-level values of ``train.json``."""
    names = ("layer_decay", "head_epochs", "patience", "batch_size", "accumulation")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= {name: True for name in ("grad_checkpointing", "amp") if getattr(options, name)}
    return given | ({} if options.adapters is None else {"adapters": {"rank": options.adapters}})


def _check(options: argparse.Namespace) -> int:
    from monai_vslp import workflows
    from monai_vslp.io.check_report import format_check

    if options.template is not None:
        print(f"Template: {workflows.make_template(options.template, options.classes, options.images)}")
        return 0
    if options.table is None:
        raise InputError("check takes a table, or --template FILE for an empty one.")
    found = workflows.check(options.table, options.images, json=options.json, progress=not options.quiet)
    print(format_check(found))
    return 1 if found.count("error") else 0


def _run(options: argparse.Namespace) -> int:
    from monai_vslp import workflows

    progress = not options.quiet
    if options.command == "demo":
        workflows.demo(options.output, seed=options.seed, progress=progress)
    elif options.command == "check":
        return _check(options)
    elif options.command == "train":
        run = workflows.train(
            options.table,
            options.images,
            options.output,
            start=options.start,
            processes=options.processes,
            progress=progress,
            **_training_arguments(options),
            **_tuning_arguments(options),
        )
        print(f"Trained. Segment with: monai-vslp segment INPUT --model {run} --output OUT")
    elif options.command == "cross-validate":
        report = workflows.cross_validate(
            options.table,
            options.images,
            options.output,
            folds=options.folds,
            nested=options.nested,
            jobs=options.jobs,
            tracking=options.tracking,
            progress=progress,
            **_training_arguments(options),
        )
        print(f"Report: {report}")
    elif options.command == "train-regularizer":
        folder = workflows.train_regularizer(
            options.model,
            table=options.table,
            images=options.images,
            seed=options.seed,
            epochs=options.epochs,
            published=options.published,
            class_wise=options.class_wise,
            see_image=not options.no_image,
            restart=options.restart,
            tracking_uri=options.tracking_uri,
            progress=progress,
        )
        print(f"Learned: {folder}. 'monai-vslp segment INPUT --model {options.model} --output OUT' uses it.")
    elif options.command == "benchmark":
        print(workflows.run_benchmark(options.config, options.output, only=options.only, jobs=options.jobs, progress=progress))
        return 1 if (options.output / "failed.csv").exists() else 0
    elif options.command == "public":
        cohort = read_public(options.name, options.root, seed=options.seed)
        for line in cohort.verify().items():
            print(*line, sep=": ")
        print(f"Table: {cohort.to_table(options.output)}")
    elif options.command == "pretrain":
        learned = workflows.pretrain(
            options.images,
            options.output,
            backbone=options.backbone,
            weights=options.weights,
            seed=options.seed,
            epochs=options.epochs,
            tile=options.tile,
            batch_size=options.batch_size,
            restart=options.restart,
            tracking_uri=options.tracking_uri,
            progress=progress,
            **({} if options.mpp is None else {"mpp": options.mpp}),
        )
        name = f" --backbone {options.backbone}" if options.backbone else ""
        print(f"Learned: {learned}. Use it with: monai-vslp train TABLE --images DIR --output RUN --weights {learned}{name}")
    elif options.command == "choose":
        for name, choice in workflows.choose(options.model, options.table, options.images, progress=progress).items():
            print(f"--{name} {choice}")
    elif options.command == "calibrate":
        written = workflows.calibrate(
            options.model,
            options.table,
            options.images,
            output=options.output,
            variant=options.variant,
            level=options.level,
            site=options.site,
            site_table=options.site_table,
            site_mean=options.site_mean,
            progress=progress,
        )
        print(f"Calibration: {written}, report: {(options.output or options.model) / 'calibration.md'}")
    elif options.command == "segment":
        failures = workflows.segment(
            options.inputs,
            options.model,
            options.output,
            proportions=options.proportions,
            mpp=options.mpp,
            trust=options.trust,
            alpha=options.alpha,
            views=options.tta,
            band=options.band,
            regularizer=options.regularizer,
            calibration=not options.no_calibration,
            overwrite=options.overwrite,
            progress=progress,
            **_slide_arguments(options),
        )
        for stem, reason in failures.items():
            print(f"monai-vslp: {stem} failed: {reason}", file=sys.stderr)
        print(f"Report: {options.output / 'report.html'}")
        return 1 if failures else 0
    elif options.command == "cohort":
        result = workflows.cohort(
            options.table,
            options.output,
            model=options.model,
            images=options.images,
            scheduler=options.scheduler,
            scheduler_file=options.scheduler_file,
            workers=options.workers,
            threads=options.threads,
            memory=options.memory,
            retry_failed=options.retry_failed,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            tiles_per_second=options.tiles_per_second,
            mpp=options.mpp,
            trust=options.trust,
            alpha=options.alpha,
            views=options.tta,
            regularizer=options.regularizer,
            calibration=not options.no_calibration,
            progress=progress,
            **_slide_arguments(options),
        )
        for stem, reason in result.failures.items():
            print(f"monai-vslp: {stem} failed: {reason}", file=sys.stderr)
        if result.table is not None:
            print(f"Done: {len(result.done)}, failed: {len(result.failures)}. Table: {result.table}, report beside it.")
        return 1 if result.failures else 0
    elif options.command == "evaluate":
        result = workflows.evaluate(options.output, options.masks, groups=dict(options.group) if options.group else None)
        if options.track is not None:
            print(f"Tracked: {workflows.track_evaluation(options.output, result, options.track)}")
    elif options.command == "register":
        from monai_vslp.apps.mlflow_model import register

        print(f"Registered: {register(options.model, options.name, options.tracking_uri)}")
    elif options.command == "label":
        from monai_vslp.apps.label.start import label_command, shell_line, start_label

        command, environment = label_command(
            options.model, options.studies, work=options.work, host=options.host, port=options.port, views=options.tta
        )
        print(shell_line(command, environment))
        if not options.print:
            start_label(command, environment)
    elif options.command == "send-tracking":
        from monai_vslp.handlers.tracked_run import send_kept

        print("\n".join(send_kept(options.output)) or f"Nothing is kept in {options.output}.")
    else:
        print(workflows.report(options.output))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: words of the command line; None for the process's own.

    Returns:
        0 for success, 1 where inputs failed or a check found errors, 2 for wrong input, 3 for a full disk, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(levelname)s %(message)s")
    for noisy in ("ignite", "alembic", "mlflow", "monai", "BundleWorkflow", "matplotlib", "PIL", "tifffile"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return _run(options)
    except InputError as error:
        print(f"monai-vslp {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"monai-vslp {options.command}: no space left: {error}. What was finished is kept.", file=sys.stderr)
            return 3
        raise
    except KeyboardInterrupt:
        print(f"\nmonai-vslp {options.command}: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
