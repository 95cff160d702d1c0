"""Writers and readers of results."""

from monai_vslp.io.cohort_report import write_cohort_report, write_index
from monai_vslp.io.dicom_seg import write_dicom_seg
from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.manifest import check_manifest, write_manifest
from monai_vslp.io.ome_tiff import read_label_tiff, read_map_tiff, to_uint8, write_ome_tiff
from monai_vslp.io.ome_zarr import write_ome_zarr
from monai_vslp.io.output import DEFAULT_FORMATS, NO_TISSUE, WRITERS, SegmentationOutput, write_output
from monai_vslp.io.regions import region_masks
from monai_vslp.io.report import write_report
from monai_vslp.io.summary import build_summary, read_summary, validate_summary
from monai_vslp.io.table import proportion_rows, write_proportions
from monai_vslp.io.viewer import write_viewer

__all__ = [
    "DEFAULT_FORMATS",
    "NO_TISSUE",
    "WRITERS",
    "SegmentationOutput",
    "build_summary",
    "check_manifest",
    "labels_to_geojson",
    "proportion_rows",
    "read_label_tiff",
    "read_map_tiff",
    "read_summary",
    "region_masks",
    "to_uint8",
    "validate_summary",
    "write_cohort_report",
    "write_dicom_seg",
    "write_geojson",
    "write_index",
    "write_manifest",
    "write_ome_tiff",
    "write_ome_zarr",
    "write_output",
    "write_proportions",
    "write_report",
    "write_viewer",
]
