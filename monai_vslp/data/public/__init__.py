"""Public data sets as their owners distribute them; importing this registers all of them in ``PUBLIC_SETS``."""

from monai_vslp.data.public import bcss, ebhi, glands, wsss
from monai_vslp.data.public.cohort import (
    PUBLIC_SETS,
    PublicCohort,
    PublicItem,
    PublicSet,
    area_fractions,
    read_public,
    split_by_patient,
)
from monai_vslp.data.public.manifest import check_manifest, write_manifest

__all__ = [
    "PUBLIC_SETS",
    "PublicCohort",
    "PublicItem",
    "PublicSet",
    "area_fractions",
    "bcss",
    "check_manifest",
    "ebhi",
    "glands",
    "read_public",
    "split_by_patient",
    "write_manifest",
    "wsss",
]
