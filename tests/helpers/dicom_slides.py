"""DICOM whole slides of uncompressed tiles, with what a laboratory writes into them."""

import math
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

STUDY, SERIES, FRAME = "1.2.826.0.1.1", "1.2.826.0.1.1.1", "1.2.826.0.1.1.9"


def write_dicom_slide(folder, image, mpp=0.5, levels=(1, 4), tile=256):
    """The levels of one slide as instances of one series; ``image`` is ``[H, W, 3]`` uint8 at ``mpp`` µm/px.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, down in enumerate(levels, start=1):
        _write_level(folder / f"level{number}.dcm", image[::down, ::down], mpp, down, number, tile)
    return folder


def _write_level(path, image, mpp, down, number, tile):
    height, width = image.shape[:2]
    rows, cols = math.ceil(height / tile), math.ceil(width / tile)
    padded = np.full((rows * tile, cols * tile, 3), 255, dtype=np.uint8)
    padded[:height, :width] = image
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.{number}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, SERIES, FRAME
    data.PositionReferenceIndicator = "SLIDE_CORNER"
    data.PatientID, data.PatientName, data.PatientSex, data.PatientBirthDate = "P-17", "Test^Slide", "F", ""
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20260203", "101112", "S1", "A9"
    data.ContainerIdentifier, data.InstanceNumber = "box 7", number
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"] if down == 1 else ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    data.Modality, data.SpecimenLabelInImage = "SM", "NO"
    data.Rows = data.Columns = tile
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.NumberOfFrames, data.DimensionOrganizationType = rows * cols, "TILED_FULL"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.ImagedVolumeHeight, data.ImagedVolumeWidth = height * mpp * down / 1e3, width * mpp * down / 1e3
    data.ImagedVolumeDepth, data.FocusMethod, data.ExtendedDepthOfField = 0.004, "AUTO", "NO"
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    data.TotalPixelMatrixOriginSequence = [origin := Dataset()]
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 12.5, 30.25
    data.SharedFunctionalGroupsSequence = [groups := Dataset()]
    groups.PixelMeasuresSequence = [measures := Dataset()]
    measures.PixelSpacing, measures.SliceThickness = [mpp * down / 1e3] * 2, 0.004
    data.OpticalPathSequence = [optics := Dataset()]
    optics.OpticalPathIdentifier = "0"
    data.PixelData = padded.reshape(rows, tile, cols, tile, 3).swapaxes(1, 2).tobytes()
    data["PixelData"].VR = "OB"
    data.save_as(path, enforce_file_format=True)
