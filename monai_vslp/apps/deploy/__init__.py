"""MONAI Deploy: an operator that segments one whole slide, and an application around it."""

from monai_vslp.apps.deploy.slide_job import FORMATS, SlideJob, find_model, find_slide, prepare, run_job
from monai_vslp.apps.deploy.slide_operator import SlideSegmentationOperator, SlideSourceOperator

__all__ = [
    "FORMATS",
    "SlideJob",
    "SlideSegmentationOperator",
    "SlideSourceOperator",
    "find_model",
    "find_slide",
    "prepare",
    "run_job",
]
