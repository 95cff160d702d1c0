"""What a command does, one readable page each."""

from monai_vslp.workflows.benchmark import run_benchmark
from monai_vslp.workflows.bound import fit_to_masks
from monai_vslp.workflows.calibration import calibrate, read_calibration
from monai_vslp.workflows.check import check, make_template
from monai_vslp.workflows.cohort import CohortResult, cohort
from monai_vslp.workflows.confidences import refine_confidences
from monai_vslp.workflows.cross_validation import cross_validate, predict_proportions, score_predictions
from monai_vslp.workflows.demo import demo
from monai_vslp.workflows.evaluate import evaluate, format_table
from monai_vslp.workflows.export import export_network
from monai_vslp.workflows.pictures import HeldOutPictures, picture_regularizer
from monai_vslp.workflows.pretrain import pretrain
from monai_vslp.workflows.regularizer import train_regularizer
from monai_vslp.workflows.report import report
from monai_vslp.workflows.segment import datalist, segment
from monai_vslp.workflows.selection import choose, target_strength
from monai_vslp.workflows.slide import SlidePipeline
from monai_vslp.workflows.tracked_evaluation import track_evaluation
from monai_vslp.workflows.train import train

__all__ = [
    "CohortResult",
    "HeldOutPictures",
    "SlidePipeline",
    "calibrate",
    "check",
    "choose",
    "cohort",
    "cross_validate",
    "datalist",
    "demo",
    "evaluate",
    "export_network",
    "fit_to_masks",
    "format_table",
    "make_template",
    "picture_regularizer",
    "predict_proportions",
    "pretrain",
    "read_calibration",
    "refine_confidences",
    "report",
    "run_benchmark",
    "score_predictions",
    "segment",
    "target_strength",
    "track_evaluation",
    "train",
    "train_regularizer",
]
