"""Labels of a whole slide as a DICOM Segmentation."""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

import monai_vslp
from monai_vslp.io.lazy_maps import halve_labels
from monai_vslp.io.map_blocks import check_classes, number_labels
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError

__all__ = ["CODES", "SCHEME", "is_dicom", "write_dicom_seg"]

highdicom, _ = optional_import("highdicom", descriptor="{} is needed for DICOM Segmentation: pip install highdicom")
hd_seg, _ = optional_import("highdicom.seg", descriptor="{} is needed for DICOM Segmentation: pip install highdicom")
hd_schemes, _ = optional_import(
    "highdicom.coding_schemes", descriptor="{} is needed for DICOM Segmentation: pip install highdicom"
)
hd_color, _ = optional_import("highdicom.color", descriptor="{} is needed for DICOM Segmentation: pip install highdicom")
pydicom, _ = optional_import("pydicom", descriptor="{} is needed for DICOM: pip install pydicom")
pydicom_codes, _ = optional_import(
    "pydicom.sr.codedict", name="codes", descriptor="{} is needed for DICOM: pip install pydicom"
)
coding, _ = optional_import("pydicom.sr.coding", descriptor="{} is needed for DICOM: pip install pydicom")

logger = logging.getLogger(__name__)

SCHEME = "99VSLP"  # DICOM: private coding schemes begin with 99
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
SERIES_NUMBER = 100  # far from those of scanners
TEXT_LENGTH = 64  # characters, of labels and meanings in DICOM
SPACING_DIFFERENCE = 0.02  # between what source and caller say about the pixel size
SAMPLE = 2**20  # bytes that are read at the beginning, middle and end of a slide to know it by
NUMBER_ROWS = 512  # of the map that are numbered at once
ASSUMED_THICKNESS = 0.004  # mm; sections are cut at 3 to 5 µm, and DICOM asks for a number above 0
TISSUE, ABNORMAL, SUBSTANCE, STRUCTURE = "Tissue", "MorphologicallyAbnormalStructure", "BodySubstance", "AnatomicalStructure"

#: Category and type of classes with these names, as pydicom's dictionary of SNOMED CT spells its codes.
CODES = {
    "adenocarcinoma": (ABNORMAL, "Adenocarcinoma"),
    "adipose": (TISSUE, "AdiposeTissue"),
    "adipose tissue": (TISSUE, "AdiposeTissue"),
    "blood": (SUBSTANCE, "Blood"),
    "blood vessel": (STRUCTURE, "BloodVessel"),
    "carcinoma": (ABNORMAL, "Carcinoma"),
    "cartilage": (TISSUE, "Cartilage"),
    "connective tissue": (TISSUE, "ConnectiveTissue"),
    "fat": (TISSUE, "AdiposeTissue"),
    "fibrosis": (ABNORMAL, "Fibrosis"),
    "haemorrhage": (ABNORMAL, "Hemorrhage"),
    "hemorrhage": (ABNORMAL, "Hemorrhage"),
    "inflammation": (ABNORMAL, "InflammationMorphologic"),
    "lymphoid tissue": (TISSUE, "LymphoidTissue"),
    "muscle": (TISSUE, "MuscleTissue"),
    "necrosis": (ABNORMAL, "Necrosis"),
    "neoplasm": (ABNORMAL, "Neoplasm"),
    "nerve": (STRUCTURE, "Nerve"),
    "tissue": (TISSUE, "Tissue"),
    "tumor": (ABNORMAL, "Neoplasm"),
    "tumour": (ABNORMAL, "Neoplasm"),
}


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def write_dicom_seg(
    path: str | Path,
    labels: Any,
    *,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    mpp: float,
    level0_shape: tuple[int, int],
    downsample: float,
    source: str | Path | Sequence[str | Path] | None = None,
    patient_id: str = "unknown",
    algorithm: str = "monai_vslp",
    parameters: Mapping[str, Any] | None = None,
    codes: Mapping[str, tuple[str, str, str]] | None = None,
    max_pixels: int = 2**26,
    tile: int = 512,
    created: datetime.datetime | None = None,
) -> Path:
    """Write a label map as a tiled DICOM Segmentation, one segment per class.

    Segment ``k + 1`` is class ``k``; pixels without tissue are in none. The segmentation is BINARY rather than LABELMAP
    (Supplement 243 of 2024): viewers of slides do not all read the newer kind yet, and a bit per pixel and segment, without
    the tiles that hold nothing of a segment (TILED_SPARSE), takes little more space.

    Of a DICOM slide the segmentation takes patient, study, specimen, frame of reference and place, and refers to its
    instance of the highest resolution. The first pixel of the segmentation gets the place of the first pixel of the slide,
    as the levels of slides share theirs. For any other slide the same identifiers are made from its contents, so that all
    results of one slide and patient meet in one study; the slide instance that it refers to then exists nowhere, and the
    date of the study is unknown. All UIDs follow from slide, labels and options (UUID5 below ``2.25``): the same input
    gives the same.

    Memory holds a byte per written pixel (64 MiB by default), the packed segments twice (together up to as much again) and
    what the slide's instances say beside their pixels.

    Args:
        path: ends in ``.dcm``.
        labels: class indices, shape ``[H, W]``, uint8, 255 = no tissue; a NumPy array or anything with ``shape``, ``dtype``
            and slicing (a Zarr array).
        classes: names in the order of the indices, at most 64 characters each.
        colors: RGB 0 … 255 per class, recommended to viewers as CIELab.
        mpp: µm/px of ``labels``. A DICOM slide's own pixel size counts; where they differ by more than 2 % that is logged.
        level0_shape: ``(H, W)`` of the slide, px.
        downsample: level-0 px per px of ``labels``.
        source: the slide: a file, the folder or the files of a DICOM slide, or None where there is none.
        patient_id: where the slide is not DICOM.
        algorithm: its name; the version is that of this package.
        parameters: of the algorithm, recorded as text.
        codes: type of a class as (value, scheme, meaning), such as
            ``{"parotid": ("45289007", "SCT", "Parotid gland")}``. Classes without one are looked up by name in ``CODES``,
            else get a code of the private scheme ``99VSLP`` with their name as its meaning; their category is then Tissue.
        max_pixels: larger maps are halved by majorities of 2×2 px until they have no more; that is logged, and the pixel
            size and ``DerivationDescription`` of the file say it.
        tile: side of the frames, px, a multiple of 8.
        created: date and time of the file, now by default.

    Returns:
        ``path``.

    Raises:
        InputError: sizes, values, names or the source do not fit each other.
        OSError: the file cannot be written; one that was there stays.
    """
    names, rgb = check_classes(classes, colors)
    _check_texts([*names, algorithm, patient_id])
    shape = tuple(int(n) for n in labels.shape)
    times = _check_sizes(shape, np.dtype(labels.dtype), level0_shape, downsample, mpp, max_pixels, tile)
    files = _files(source)
    numbers = halve_labels(labels, times)
    for start in range(0, len(numbers), NUMBER_ROWS):
        numbers[start : start + NUMBER_ROWS] = number_labels(numbers[start : start + NUMBER_ROWS], len(names))
    digest = hashlib.blake2b(numbers, digest_size=32).hexdigest()
    dicom = [file for file in files if is_dicom(file)]
    if dicom:
        slide = _dicom_slide(dicom, level0_shape)
    else:
        known = f"{_identity(files) if files else digest} {patient_id}"
        slide = _minimal_slide(known, level0_shape, mpp / downsample, tile, patient_id)

    measures = slide.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    scale = downsample * 2**times
    spacing = [float(value) * scale for value in measures.PixelSpacing]
    stated = sum(spacing) / 2 / 2**times * 1e3
    if abs(stated / mpp - 1) > SPACING_DIFFERENCE:
        logger.warning("%s: the slide says %.4g µm/px for the labels, which is written; %.4g was given.", path, stated, mpp)
    made = f"class indices of {shape[0]} x {shape[1]} px, {downsample:g} level-0 px per px"
    if times:
        made += f", halved {times} times by majorities of 2 x 2 px"
        logger.warning(
            "%s: labels of %d x %d px are more than %d; written at %d x %d, %.4g µm/px, by majorities.",
            *(path, *shape, max_pixels, *numbers.shape, sum(spacing) / 2 * 1e3),
        )
    version = monai_vslp.__version__
    settings = {str(key): str(value) for key, value in (parameters or {}).items()}
    described = [names, rgb, algorithm, version, settings, dict(codes or {}), spacing, numbers.shape, tile]
    key = f"{slide.SOPInstanceUID} {described!r} {digest}"
    created = created or datetime.datetime.now()
    segmentation = hd_seg.Segmentation(
        source_images=[slide],
        pixel_array=numbers[None],
        segmentation_type="BINARY",
        segment_descriptions=_segments(names, rgb, codes or {}, algorithm, version, settings),
        series_instance_uid=_uid("series", key),
        series_number=SERIES_NUMBER,
        sop_instance_uid=_uid("instance", key),
        instance_number=1,
        manufacturer="monai_vslp",
        manufacturer_model_name="monai_vslp",
        software_versions=version,
        device_serial_number="none",
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=spacing, slice_thickness=measures.get("SliceThickness", ASSUMED_THICKNESS)
        ),
        tile_pixel_array=True,
        tile_size=(tile, tile),
        omit_empty_frames=True,
        dimension_organization_type="TILED_SPARSE",
        content_label="TISSUE_CLASSES",
        content_description="Tissue classes of a whole slide",
        series_description=f"Tissue classes ({algorithm})"[:TEXT_LENGTH],
        coding_schemes=[
            hd_schemes.CodingSchemeIdentificationItem(
                SCHEME, name="Class names of monai_vslp", responsible_organization="monai_vslp"
            )
        ],
        content_date=created.date(),
        content_time=created.time(),
        series_date=created.date(),
        series_time=created.time(),
        specific_character_set="ISO_IR 192",  # names in any script
    )
    segmentation.DerivationDescription = made
    segmentation.InstanceCreationDate, segmentation.InstanceCreationTime = created.date(), created.time()
    for item in segmentation.ContributingEquipmentSequence:
        if item.ManufacturerModelName == "highdicom":
            item.ContributionDateTime = created
    dimensions = _uid("dimensions", key)  # highdicom draws it by lot
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary, enforce_file_format=True)
    return Path(path)


def _check_texts(texts: Iterable[str]) -> None:
    for text in texts:
        if not text or len(text) > TEXT_LENGTH or "\\" in text or not text.isprintable():
            raise InputError(f"DICOM holds names of 1 to {TEXT_LENGTH} printable characters without backslash, got {text!r}.")


def _check_sizes(
    shape: tuple[int, ...],
    dtype: np.dtype,
    level0_shape: tuple[int, int],
    downsample: float,
    mpp: float,
    max_pixels: int,
    tile: int,
) -> int:
    """How often the labels are halved."""
    if len(shape) != 2 or 0 in shape or dtype != np.uint8:
        raise InputError(f"labels must be uint8 of shape [H, W], got {dtype} of {list(shape)}.")
    if not all(math.isfinite(value) and value > 0 for value in (mpp, downsample)):
        raise InputError(f"mpp (µm/px) and downsample (level-0 px per px) must be above 0, got {mpp} and {downsample}.")
    if tile < 8 or tile % 8 or max_pixels < 1:
        raise InputError(f"frames need a side that is a multiple of 8 px, and max_pixels at least 1; got {tile}, {max_pixels}.")
    # Maps are rounded up, down or to nearest; at level 0 there is nothing to round.
    if any(abs(side * downsample - full) > (0 if downsample == 1 else downsample) for side, full in zip(shape, level0_shape)):
        raise InputError(
            f"labels of {list(shape)} px with {downsample:g} level-0 px each do not cover a slide of {list(level0_shape)} px."
        )
    times = 0
    while math.prod(-(-side // 2**times) for side in shape) > max_pixels:
        times += 1
    return times


def _uid(kind: str, text: str) -> str:
    """A UID that follows from a text; in DICOM those below 2.25 are UUIDs."""
    return f"2.25.{uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_OID, 'monai_vslp DICOM'), f'{kind} {text}').int}"


def _segments(
    names: Sequence[str],
    colors: Sequence[Sequence[int]],
    codes: Mapping[str, tuple[str, str, str]],
    algorithm: str,
    version: str,
    parameters: dict[str, str],
) -> list[Any]:
    unknown = set(codes) - set(names)
    if unknown:
        raise InputError(f"codes name classes that are not there: {sorted(unknown)}; the classes are {list(names)}.")
    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm,
        family=pydicom_codes.DCM.ArtificialIntelligence,
        version=version,
        source="monai_vslp",
        parameters=parameters or None,
    )
    found = []
    for number, (name, rgb) in enumerate(zip(names, colors), start=1):
        category, kind = _coded(name, codes.get(name))
        found.append(
            hd_seg.SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type="AUTOMATIC",
                algorithm_identification=identification,
                display_color=hd_color.CIELabColor.from_rgb(*rgb),
            )
        )
    return found


def _coded(name: str, given: tuple[str, str, str] | None) -> tuple[Any, Any]:
    """Category and type of a class."""
    sct = pydicom_codes.SCT
    if given is not None:
        if len(given) != 3 or not all(isinstance(part, str) and 0 < len(part) <= TEXT_LENGTH for part in given):
            raise InputError(f"the code of {name!r} is (value, scheme, meaning), three texts; got {given!r}.")
        return sct.Tissue, coding.Code(*given)
    known = CODES.get(name.casefold().strip())
    if known is not None:
        return getattr(sct, known[0]), getattr(sct, known[1])
    # At most 16 characters, and the same for this name in every cohort.
    value = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return sct.Tissue, coding.Code(value, SCHEME, name)


def _files(source: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """The files of a slide."""
    given = [] if source is None else [source] if isinstance(source, (str, Path)) else list(source)
    files = [file for name in given for file in (sorted(Path(name).iterdir()) if Path(name).is_dir() else [Path(name)])]
    missing = [file for file in files if not file.exists()]
    files = [file for file in files if file.is_file()]
    if missing or (given and not files):
        raise InputError(f"the slide {', '.join(map(str, missing or given))} does not exist or has no files.")
    return files


def _identity(files: Sequence[Path]) -> str:
    """Names, sizes and digests of samples of a slide's files, which are too large to read them whole for this."""
    found = []
    for file in files:
        size, digest = file.stat().st_size, hashlib.blake2b(digest_size=32)
        with open(file, "rb") as opened:
            for start in sorted({0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)}):
                opened.seek(start)
                digest.update(opened.read(SAMPLE))
        found.append(f"{file.name} {size} {digest.hexdigest()}")
    return "; ".join(found)


def _dicom_slide(files: Sequence[Path], level0_shape: tuple[int, int]) -> Any:
    """The instance of the highest resolution among the files of a DICOM slide."""
    found = []
    for file in files:
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
        except Exception as error:  # pydicom raises many kinds for damaged files
            raise InputError(f"DICOM file {file} cannot be read ({error}); copy it again from its source.") from error
        kind = list(dataset.get("ImageType", []))
        # Labels, overviews and thumbnails lie beside the slide.
        if dataset.get("SOPClassUID") == WHOLE_SLIDE and (len(kind) < 3 or kind[2] == "VOLUME"):
            found.append(dataset)
    if not found:
        raise InputError(
            f"none of {', '.join(file.name for file in files[:5])} is a VL Whole Slide Microscopy image of a slide."
        )
    needed = (
        "FrameOfReferenceUID", "ImageOrientationSlide", "TotalPixelMatrixOriginSequence", "SharedFunctionalGroupsSequence",
        "TotalPixelMatrixRows", "TotalPixelMatrixColumns",
    )  # fmt: skip
    dataset = max(found, key=lambda one: one.get("TotalPixelMatrixRows", 0) * one.get("TotalPixelMatrixColumns", 0))
    missing = [name for name in needed if name not in dataset]
    if not missing and "PixelMeasuresSequence" not in dataset.SharedFunctionalGroupsSequence[0]:
        missing.append("PixelMeasuresSequence")
    if missing:
        raise InputError(f"DICOM slide {dataset.filename} lacks {', '.join(missing)}, so results cannot be placed on it.")
    size = (dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns)
    if size != tuple(level0_shape):
        raise InputError(
            f"the labels are of a slide of {list(level0_shape)} px, but {dataset.filename} has {list(size)} px; give the "
            "instance of the highest resolution of this slide, or its folder."
        )
    # These may be empty in DICOM; some files leave them out, which highdicom does not expect.
    for name in (
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    ):  # fmt: skip
        if name not in dataset:
            setattr(dataset, name, None)
    return dataset


def _minimal_slide(known: str, level0_shape: tuple[int, int], level0_mpp: float, tile: int, patient_id: str) -> Any:
    """What a slide would say of itself as DICOM, as far as a segmentation needs it; in memory only.

    ``known`` stands for slide and patient.
    """
    own = f"{known} {tuple(level0_shape)} {level0_mpp!r}"
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = WHOLE_SLIDE, _uid("slide instance", own)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = _uid("study", known), _uid("slide series", own)
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = _uid("frame of reference", own), "SLIDE_CORNER"
    dataset.Modality = "SM"
    dataset.PatientID = patient_id
    for name in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(dataset, name, None)
    dataset.ContainerIdentifier = _uid("container", known)
    dataset.SpecimenDescriptionSequence = [specimen := pydicom.Dataset()]
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "unknown", _uid("specimen", known)
    # Required, and empty where unknown (type 2).
    dataset.IssuerOfTheContainerIdentifierSequence, dataset.ContainerTypeCodeSequence = [], []
    specimen.IssuerOfTheSpecimenIdentifierSequence, specimen.SpecimenPreparationSequence = [], []
    dataset.Rows = dataset.Columns = tile
    dataset.NumberOfFrames = math.prod(-(-side // tile) for side in level0_shape)
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = (int(side) for side in level0_shape)
    dataset.DimensionOrganizationType = "TILED_FULL"
    # Along rows x grows and along columns y: the frame of reference is the image itself.
    dataset.ImageOrientationSlide = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    dataset.TotalPixelMatrixOriginSequence = [origin := pydicom.Dataset()]
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0.0
    dataset.SharedFunctionalGroupsSequence = [shared := pydicom.Dataset()]
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence([level0_mpp / 1e3] * 2, ASSUMED_THICKNESS)
    return dataset
