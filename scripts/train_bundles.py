"""Make the weights that the two bundles ship: trained from proportions of the synthetic cohort, on any machine.

    python scripts/train_bundles.py WORK

``WORK`` takes the cohort, the trained run and the scores; what is there already is used again, so an interrupted call goes on.
Then the weights, without optimizer or history, go to ``bundles/*/models``, their SHA-256 and scores into ``metadata.json``.
No mask is read before the scores. The figures of the model cards are those of ``WORK/scores.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from monai_vslp.data.synthetic import CLASSES, VAL_VARIANTS, synthetic_image, write_cohort
from monai_vslp.utils.atomic import atomic_path, write_json, write_text
from monai_vslp.workflows import evaluate, segment, train, train_regularizer
from monai_vslp.workflows.regularizer import has_regularizer

ROOT = Path(__file__).parents[1] / "bundles"
NETWORK, REFINEMENT = "pathology_tissue_proportion_segmentation", "pathology_segmentation_refinement"
TRAIN, VAL, SIDE, EPOCHS, SEED = 160, 24, 128, 12, 0
REGULARIZER_EPOCHS = 2
TEST_SEED = 900_000  # images that neither the training nor the choice of weights saw
TEST, TEST_SIDE = 12, 256


def write_test_images(folder: Path) -> Path:
    """Fresh images with their own drawings of each tissue, masks and exact proportions; returns the table."""
    rows = ["image,split," + ",".join(CLASSES)]
    for index in range(TEST):
        tissue = synthetic_image((TEST_SIDE, TEST_SIDE), seed=TEST_SEED + index, variants=VAL_VARIANTS)
        name = f"test_{index:02d}.png"
        for kind, array in (("images", tissue.image), ("masks", tissue.mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / name)
        rows.append(f"{name},test," + ",".join(f"{value:.8f}" for value in tissue.proportions))
    table = folder / "proportions.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def scored(run: Path, test: Path, name: str, **options: object) -> dict[str, float]:
    """Mean IoU of the network alone and of the refined map, over the pixels of all test images."""
    out = run.parent / f"segmented-{name}"
    segment([test / "images"], run, out, progress=False, **options)
    found = evaluate(out, test / "masks")
    rows = {row["map"]: row for row in found["blocks"][0]["rows"]}
    return {"network": rows["argmax"]["miou"], "refined": rows["refined"]["miou"]}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ship(source: Path, bundle: str, scores: dict[str, float]) -> None:
    """Copy a state dictionary as plain float32 tensors, and say in the metadata what it is."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    state = {key: value.detach().clone() for key, value in state.items()}
    target = ROOT / bundle / "models" / "model.pt"
    with atomic_path(target) as temporary:
        torch.save(state, temporary)
    path = ROOT / bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["eval_metrics"] = scores
    metadata["weights"] = {"file": "models/model.pt", "sha256": digest(target), "bytes": target.stat().st_size}
    write_text(path, json.dumps(metadata, indent=4, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    cohort, run, test = work / "cohort", work / "run", work / "test"
    if not (cohort / "proportions_rater_low.csv").exists():
        write_cohort(cohort, train=TRAIN, val=VAL, size=SIDE, seed=SEED)
    table = cohort / "proportions_rater_low.csv"
    train(table, cohort / "images", run, seed=SEED, epochs=EPOCHS, progress=False)
    if not (test / "proportions.csv").exists():
        write_test_images(test)
    # One energy for all classes alike, which looks at maps alone: it serves anyone's confidences of any number of classes.
    if not has_regularizer(run):
        options = {"class_wise": True, "see_image": False, "epochs": REGULARIZER_EPOCHS, "seed": SEED}
        options |= {"pictures": False, "views": "flips"}
        train_regularizer(run, progress=False, **options)
    given = {"proportions": test / "proportions.csv"}
    scores = {
        "tv": scored(run, test, "tv", regularizer="tv"),
        "tv_given": scored(run, test, "tv-given", regularizer="tv", **given),
        "learned": scored(run, test, "learned", regularizer="learned"),
        "learned_given": scored(run, test, "learned-given", regularizer="learned", **given),
    }
    write_json(work / "scores.json", scores)
    ship(
        run / "models" / "model.pt",
        NETWORK,
        {
            "miou_network": round(scores["tv"]["network"], 4),
            "miou_refined": round(scores["tv"]["refined"], 4),
            "miou_refined_exact_proportions": round(scores["tv_given"]["refined"], 4),
        },
    )
    ship(
        run / "regularizer" / "model.pt",
        REFINEMENT,
        {
            "miou_before": round(scores["learned"]["network"], 4),
            "miou_refined": round(scores["learned"]["refined"], 4),
            "miou_refined_exact_proportions": round(scores["learned_given"]["refined"], 4),
        },
    )
    print(json.dumps(scores, indent=2), np.__version__, torch.__version__)


if __name__ == "__main__":
    main()
