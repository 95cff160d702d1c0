"""Writers and readers of results."""

from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.ome_tiff import read_map_tiff, to_uint8, write_ome_tiff
from monai_vslp.io.output import NO_TISSUE, SegmentationOutput, read_summary, write_output
from monai_vslp.io.report import write_index, write_report

__all__ = [
    "NO_TISSUE",
    "SegmentationOutput",
    "labels_to_geojson",
    "read_map_tiff",
    "read_summary",
    "to_uint8",
    "write_geojson",
    "write_index",
    "write_ome_tiff",
    "write_output",
    "write_report",
]
