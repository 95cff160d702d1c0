"""``python -m monai_vslp``."""

import sys

from monai_vslp.cli import main

sys.exit(main())
