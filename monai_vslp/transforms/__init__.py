"""MONAI transforms of this project: array and dictionary pairs."""

from monai_vslp.transforms.confidence import *  # noqa: F403
from monai_vslp.transforms.crf import *  # noqa: F403
from monai_vslp.transforms.image import *  # noqa: F403
from monai_vslp.transforms.labels import *  # noqa: F403
from monai_vslp.transforms.overlay import *  # noqa: F403
from monai_vslp.transforms.refinement import *  # noqa: F403
from monai_vslp.transforms.save import *  # noqa: F403
from monai_vslp.transforms.tissue import *  # noqa: F403
