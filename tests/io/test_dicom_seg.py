"""Labels as DICOM Segmentation."""

from __future__ import annotations

import datetime
import subprocess
import sys

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

from monai_vslp.io.dicom_seg import CODES, SCHEME, is_dicom, write_dicom_seg
from monai_vslp.io.map_blocks import halve_block
from monai_vslp.utils.errors import InputError

NAMES, COLORS = ["Tumor", "stroma", "Drüse, groß"], [[200, 0, 17], [4, 250, 6], [90, 90, 255]]
OPTIONS = {"classes": NAMES, "colors": COLORS, "mpp": 2.0, "level0_shape": (800, 1191), "downsample": 4.0, "tile": 64}


def make_labels(seed=0):
    """Class indices ``[200, 298]``; the upper left is empty, the lower half has two classes."""
    labels = np.random.default_rng(seed).integers(0, 3, (200, 298)).astype(np.uint8)
    labels[:90, :200] = 255
    labels[100:] = np.where(labels[100:] == 2, 255, labels[100:])
    return labels


def numbers(labels):
    return np.where(labels == 255, 0, labels + 1)


def write_slide(path, rows=800, columns=1191, spacing=0.0005, kind="VOLUME", uid="1.2.3.4", **changed):
    """A synthetic DICOM slide with pixels of one colour; orientation and place as scanners give them."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = VLWholeSlideMicroscopyImageStorage, uid
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, uid
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.1", "1.2.3.9"
    dataset.PositionReferenceIndicator = "SLIDE_CORNER"
    dataset.PatientID, dataset.PatientName, dataset.PatientSex = "P-17", "Müller^Anna", "F"
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = "20260203", "101112", "A9", "S1"
    dataset.Modality, dataset.ImageType = "SM", ["ORIGINAL", "PRIMARY", kind, "NONE"]
    dataset.ContainerIdentifier = "box 7"
    dataset.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    dataset.TotalPixelMatrixOriginSequence = [origin := pydicom.Dataset()]
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 12.5, 30.25
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = rows, columns
    dataset.Rows = dataset.Columns = 256
    dataset.NumberOfFrames = -(-rows // 256) * -(-columns // 256)
    dataset.DimensionOrganizationType = "TILED_FULL"
    dataset.SharedFunctionalGroupsSequence = [shared := pydicom.Dataset()]
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence([spacing, spacing], slice_thickness=0.004)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = bytes(dataset.NumberOfFrames * 256 * 256)
    for name, value in changed.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def read(path):
    """The segmentation and its numbers ``[H, W]``, put together by highdicom."""
    seg = highdicom.seg.segread(path)
    return seg, seg.get_total_pixel_matrix(combine_segments=True)


def by_hand(path):
    """The numbers ``[H, W]`` by pydicom alone, from the positions of the frames."""
    dataset = pydicom.dcmread(path)
    frames = dataset.pixel_array
    result = np.zeros((dataset.TotalPixelMatrixRows + 64, dataset.TotalPixelMatrixColumns + 64), np.int64)
    for frame, described in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        place = described.PlanePositionSlideSequence[0]
        row, column = place.RowPositionInTotalImagePixelMatrix - 1, place.ColumnPositionInTotalImagePixelMatrix - 1
        number = described.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        result[row : row + 64, column : column + 64] += frame * number
    return result[: dataset.TotalPixelMatrixRows, : dataset.TotalPixelMatrixColumns]


def test_labels_come_back_without_empty_tiles(tmp_path):
    labels = make_labels()
    path = write_dicom_seg(tmp_path / "labels.dcm", labels, **OPTIONS)
    assert is_dicom(path) and list(tmp_path.iterdir()) == [path]
    seg, found = read(path)
    np.testing.assert_array_equal(found, numbers(labels))
    np.testing.assert_array_equal(by_hand(path), numbers(labels))
    assert seg.SegmentationType == "BINARY" and seg.SegmentsOverlap == "NO" and seg.DimensionOrganizationType == "TILED_SPARSE"
    # A frame where a segment has a pixel, and only there.
    tiles = [labels[row : row + 64, col : col + 64] for row in range(0, 200, 64) for col in range(0, 298, 64)]
    assert seg.NumberOfFrames == sum(bool((part == index).any()) for part in tiles for index in range(3)) < 60
    assert (seg.Rows, seg.Columns) == (64, 64)
    assert (seg.TotalPixelMatrixRows, seg.TotalPixelMatrixColumns) == (200, 298)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.002, 0.002]


def test_segments_are_described(tmp_path):
    codes = {"stroma": ("21793004", "SCT", "Connective tissue")}
    settings = {"alpha": 2.0, "regularizer": "tv"}
    path = write_dicom_seg(tmp_path / "s.dcm", make_labels(), **OPTIONS, parameters=settings, codes=codes)
    seg, _ = read(path)
    assert seg.Manufacturer == "monai_vslp" and seg.SoftwareVersions
    described = list(seg.SegmentSequence)
    assert [item.SegmentNumber for item in described] == [1, 2, 3]
    assert [item.SegmentLabel for item in described] == NAMES
    types = [item.SegmentedPropertyTypeCodeSequence[0] for item in described]
    assert (types[0].CodeValue, types[0].CodingSchemeDesignator) == ("108369006", "SCT")  # neoplasm
    assert (types[1].CodeValue, types[1].CodeMeaning) == ("21793004", "Connective tissue")
    assert (types[2].CodingSchemeDesignator, types[2].CodeMeaning) == (SCHEME, "Drüse, groß")
    assert [item.SegmentedPropertyCategoryCodeSequence[0].CodeValue for item in described] == [
        "49755003",
        "85756007",
        "85756007",
    ]
    assert [item.CodingSchemeDesignator for item in seg.CodingSchemeIdentificationSequence] == [SCHEME]
    for item, rgb in zip(described, COLORS):
        color = highdicom.color.CIELabColor.from_dicom_value(item.RecommendedDisplayCIELabValue)
        np.testing.assert_allclose(color.to_rgb(clip=True), rgb, atol=1)
        assert item.SegmentAlgorithmType == "AUTOMATIC" and item.SegmentAlgorithmName == "monai_vslp"
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert (
            algorithm.AlgorithmVersion == seg.SoftwareVersions and algorithm.AlgorithmParameters == "alpha=2.0,regularizer=tv"
        )


def test_known_codes_are_in_the_dictionary():
    from pydicom.sr.codedict import codes

    for category, kind in CODES.values():
        assert getattr(codes.SCT, category).scheme_designator == getattr(codes.SCT, kind).scheme_designator == "SCT"
    assert all(name == name.casefold() for name in CODES)


@pytest.mark.parametrize("given", ["file", "folder", "list"])
def test_a_dicom_slide_is_referred_to(tmp_path, given):
    folder = tmp_path / "slide"
    base = write_slide(folder / "0.dcm", uid="1.2.3.4")
    other = write_slide(folder / "1.dcm", 200, 298, 0.002, uid="1.2.3.5")
    label = write_slide(folder / "2.dcm", 9000, 9000, 0.01, kind="LABEL", uid="1.2.3.6")
    (folder / "readme.txt").write_text("no DICOM")
    source = {"file": base, "folder": folder, "list": [label, other, base]}[given]
    labels = make_labels()
    path = write_dicom_seg(tmp_path / "s.dcm", labels, source=source, **OPTIONS)
    seg, found = read(path)
    np.testing.assert_array_equal(found, numbers(labels))
    assert (seg.PatientID, str(seg.PatientName), seg.PatientSex, seg.AccessionNumber) == ("P-17", "Müller^Anna", "F", "A9")
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID, seg.ContainerIdentifier) == ("1.2.3", "1.2.3.9", "box 7")
    assert seg.SeriesInstanceUID != "1.2.3.1"
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3.1"
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == ["1.2.3.4"]
    assert [item.ReferencedSOPInstanceUID for item in seg.SourceImageSequence] == ["1.2.3.4"]
    # The place is that of the slide: the same first pixel and directions, pixels four times as large.
    assert seg.ImageOrientationSlide == [0, -1, 0, -1, 0, 0]
    origin = seg.TotalPixelMatrixOriginSequence[0]
    assert (origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem) == (12.5, 30.25)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.002, 0.002]
    place = next(
        group.PlanePositionSlideSequence[0]
        for group in seg.PerFrameFunctionalGroupsSequence
        if group.PlanePositionSlideSequence[0].RowPositionInTotalImagePixelMatrix == 129
    )
    assert float(place.XOffsetInSlideCoordinateSystem) == pytest.approx(12.5 - 128 * 0.002)  # rows go against x


def test_pixels_of_level_0(tmp_path):
    slide = write_slide(tmp_path / "0.dcm", 200, 298, 0.002)
    labels = make_labels()
    options = OPTIONS | {"level0_shape": (200, 298), "downsample": 1.0}
    seg, found = read(write_dicom_seg(tmp_path / "s.dcm", labels, source=slide, **options))
    np.testing.assert_array_equal(found, numbers(labels))
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.002, 0.002]


def test_the_slide_says_how_large_its_pixels_are(tmp_path, caplog):
    slide = write_slide(tmp_path / "0.dcm", spacing=0.001)
    seg, _ = read(write_dicom_seg(tmp_path / "s.dcm", make_labels(), source=slide, **OPTIONS))
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.004, 0.004]
    assert "the slide says 4 µm/px" in caplog.text


def test_large_maps_are_halved(tmp_path, caplog):
    labels = make_labels()
    path = write_dicom_seg(tmp_path / "s.dcm", labels, max_pixels=5000, **OPTIONS)
    seg, found = read(path)
    expected = halve_block(halve_block(labels[None], True), True)[0]
    assert expected.shape == (50, 75)  # 100 x 149 px are still too many
    np.testing.assert_array_equal(found, numbers(expected))
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.008, 0.008]
    assert "halved 2 times" in seg.DerivationDescription and "written at 50 x 75" in caplog.text


def test_same_input_gives_the_same_bytes(tmp_path):
    zarr = pytest.importorskip("zarr")
    (tmp_path / "slide.svs").write_bytes(b"slide" * 1000)
    when = datetime.datetime(2026, 11, 25, 12, 0)
    labels = make_labels()
    stored = zarr.create_array(tmp_path / "labels.zarr", data=labels, chunks=(70, 90))
    options = OPTIONS | {"source": tmp_path / "slide.svs", "patient_id": "P1"}
    a = write_dicom_seg(tmp_path / "a.dcm", labels, created=when, **options)
    b = write_dicom_seg(tmp_path / "b.dcm", stored, created=when, **options)
    assert a.read_bytes() == b.read_bytes()
    first, later = read(a)[0], read(write_dicom_seg(tmp_path / "c.dcm", labels, **options))[0]
    names = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
    assert [first[name].value for name in names] == [later[name].value for name in names]
    assert (first.ContentDate, str(first.ContentTime)) == ("20261125", "120000")
    assert first.PatientID == "P1" and all(str(first[name].value).startswith("2.25.") for name in names)
    for name in names:
        pydicom.uid.UID(first[name].value)
        assert pydicom.uid.UID(first[name].value).is_valid


def test_other_input_gives_other_identifiers(tmp_path):
    (tmp_path / "slide.svs").write_bytes(b"slide" * 1000)
    (tmp_path / "other.svs").write_bytes(b"other" * 1000)
    options = OPTIONS | {"source": tmp_path / "slide.svs"}
    first = read(write_dicom_seg(tmp_path / "a.dcm", make_labels(), **options))[0]
    again = read(write_dicom_seg(tmp_path / "b.dcm", make_labels(1), **options))[0]
    assert first.PatientID == "unknown"
    assert first.StudyInstanceUID == again.StudyInstanceUID and first.FrameOfReferenceUID == again.FrameOfReferenceUID
    assert first.SOPInstanceUID != again.SOPInstanceUID and first.SeriesInstanceUID != again.SeriesInstanceUID
    for changed in ({"source": tmp_path / "other.svs"}, {"patient_id": "P2"}, {"source": None}):
        one = read(write_dicom_seg(tmp_path / "c.dcm", make_labels(), **(options | changed)))[0]
        assert one.StudyInstanceUID != first.StudyInstanceUID and one.SOPInstanceUID != first.SOPInstanceUID


def test_what_is_required_and_unknown_is_there_and_empty(tmp_path):
    dataset = pydicom.dcmread(write_dicom_seg(tmp_path / "s.dcm", make_labels(), **OPTIONS))
    (specimen,) = dataset.SpecimenDescriptionSequence
    for holder, name in (
        (dataset, "IssuerOfTheContainerIdentifierSequence"),
        (dataset, "ContainerTypeCodeSequence"),
        (specimen, "IssuerOfTheSpecimenIdentifierSequence"),
        (specimen, "SpecimenPreparationSequence"),
    ):
        assert name in holder and len(holder[name].value) == 0, name


def test_no_tissue_and_one_class(tmp_path):
    empty = np.full((70, 70), 255, np.uint8)
    options = {"mpp": 1.0, "level0_shape": (70, 70), "downsample": 1.0, "tile": 64}
    _, found = read(write_dicom_seg(tmp_path / "e.dcm", empty, classes=NAMES, colors=COLORS, **options))
    assert found.shape == (70, 70) and not found.any()
    empty[3, 4] = 0
    _, found = read(write_dicom_seg(tmp_path / "o.dcm", empty, classes=["a"], colors=[[1, 2, 3]], **options))
    np.testing.assert_array_equal(found, numbers(empty))


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_dicom_seg(tmp_path / "s.dcm", make_labels(), **OPTIONS)
    before = path.read_bytes()

    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", full)
    with pytest.raises(OSError, match="No space"):
        write_dicom_seg(path, make_labels(1), **OPTIONS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": np.full((200, 298), 3, np.uint8)}, "class indices 0 to 2"),
        ({"labels": np.zeros((200, 298), np.int64)}, "must be uint8"),
        ({"labels": np.zeros((150, 298), np.uint8)}, "do not cover"),
        ({"level0_shape": (1191, 800)}, "do not cover"),
        ({"mpp": 0.0}, "above 0"),
        ({"tile": 60}, "multiple of 8"),
        ({"classes": ["a", "b", "c" * 65]}, "64 printable"),
        ({"classes": ["a", "b", "c\\d"]}, "without backslash"),
        ({"codes": {"mucus": ("1", "SCT", "x")}}, "not there"),
        ({"codes": {"stroma": ("1", "SCT")}}, "three texts"),
        ({"source": "missing.svs"}, "does not exist"),
    ],
)
def test_wrong_input_is_refused(tmp_path, changed, said):
    options = OPTIONS | {"labels": make_labels()} | changed
    with pytest.raises(InputError, match=said):
        write_dicom_seg(tmp_path / "s.dcm", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_slides_are_refused(tmp_path):
    labels = make_labels()
    cases = {
        "has \\[100, 298\\] px": write_slide(tmp_path / "small.dcm", rows=100, columns=298),
        "lacks FrameOfReferenceUID": write_slide(tmp_path / "placeless.dcm", FrameOfReferenceUID=None),
        "VL Whole Slide": write_slide(tmp_path / "overview.dcm", kind="OVERVIEW"),
    }
    for said, slide in cases.items():
        with pytest.raises(InputError, match=said):
            write_dicom_seg(tmp_path / "s.dcm", labels, source=slide, **OPTIONS)
    sparse = write_slide(tmp_path / "bare.dcm", PatientSex=None, StudyTime=None)  # which may be left out in damaged files
    _, found = read(write_dicom_seg(tmp_path / "s.dcm", labels, source=sparse, **OPTIONS))
    np.testing.assert_array_equal(found, numbers(labels))


LARGE = """
import re, sys
from pathlib import Path
import numpy as np
from monai_vslp.io.dicom_seg import write_dicom_seg

class Made:
    shape, dtype = (6000, 8000), np.dtype(np.uint8)
    def __getitem__(self, key):
        rows, cols = (np.arange(part.start, part.stop) for part in key)
        return ((rows[:, None] // 1000 + cols // 1000) % 4).astype(np.uint8)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

options = {"mpp": 1.0, "classes": list("abcd"), "colors": [[9, 9, 9]] * 4, "downsample": 1.0}
write_dicom_seg(sys.argv[1] + "/small.dcm", np.zeros((64, 64), np.uint8), level0_shape=(64, 64), **options)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
write_dicom_seg(sys.argv[1] + "/large.dcm", Made(), level0_shape=Made.shape, max_pixels=2**23, **options)
print("GREW", peak() - before)
"""


def test_memory_is_that_of_the_written_pixels(tmp_path):
    """48 MB of labels; 3 million px are written."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("GREW")[1]) < 30
    seg, found = read(tmp_path / "large.dcm")
    assert found.shape == (1500, 2000) and np.unique(found).tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(found[::250, ::250], np.add.outer(np.arange(6), np.arange(8)) % 4 + 1)
