"""Readers of whole slides by name, in the order in which ``auto`` tries them."""

from monai_vslp.data.readers.base import SLIDE_READERS, SlideReader
from monai_vslp.data.readers.cucim import CucimReader
from monai_vslp.data.readers.dicom import DicomReader, is_dicom, is_dicom_series
from monai_vslp.data.readers.ome import OmeReader
from monai_vslp.data.readers.openslide import OpenSlideReader
from monai_vslp.data.readers.plain import PlainReader

__all__ = [
    "SLIDE_READERS",
    "CucimReader",
    "DicomReader",
    "OmeReader",
    "OpenSlideReader",
    "PlainReader",
    "SlideReader",
    "is_dicom",
    "is_dicom_series",
]

SLIDE_READERS.add("cucim", "SVS and tiled TIFF through cuCIM; the fastest, with batches.", CucimReader)
# Before OpenSlide, which reads DICOM too, but neither single levels nor files with gaps in their headers.
SLIDE_READERS.add("wsidicom", "DICOM whole slides through wsidicom.", DicomReader)
SLIDE_READERS.add("openslide", "NDPI, MRXS, SCN, BIF and others through OpenSlide.", OpenSlideReader)
SLIDE_READERS.add("ome", "OME-TIFF, TIFF of any compression, and OME-Zarr through tifffile and zarr.", OmeReader)
SLIDE_READERS.add("plain", "PNG, JPEG, BMP and TIFF of one level, held in memory.", PlainReader)
