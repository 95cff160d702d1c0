"""Writers and readers of results."""

from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.ome_tiff import read_label_tiff, read_map_tiff, to_uint8, write_ome_tiff
from monai_vslp.io.output import NO_TISSUE, SegmentationOutput, write_output
from monai_vslp.io.report import write_index, write_report
from monai_vslp.io.summary import build_summary, read_summary, validate_summary

__all__ = [
    "NO_TISSUE",
    "SegmentationOutput",
    "build_summary",
    "labels_to_geojson",
    "read_label_tiff",
    "read_map_tiff",
    "read_summary",
    "to_uint8",
    "validate_summary",
    "write_geojson",
    "write_index",
    "write_ome_tiff",
    "write_output",
    "write_report",
]
