"""Variational refinement on an ignite evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monai.handlers import PostProcessing
from monai.utils import CommonKeys

from monai_vslp.transforms.refinement import VariationalRefinementd

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["VariationalRefinementHandler"]


class VariationalRefinementHandler:
    """Refine the evaluator's confidences after each iteration.

    A thin face over :class:`~monai_vslp.transforms.VariationalRefinementd`, for workflows that hold their
    post-processing in handlers; MONAI Label and MONAI Deploy ignore handlers and take the transform. The evaluator's
    output must hold a confidence ``[C, H, W]`` on the simplex (decollated), its batch the proportions.

    Args:
        keys: keys of the confidences in the evaluator's output.
        event: the ignite event, MONAI's ``MODEL_COMPLETED`` by default, so that metrics see the refined map.
        **options: arguments of :class:`~monai_vslp.transforms.VariationalRefinementd`.
    """

    def __init__(self, keys: str | list[str] = CommonKeys.PRED, event: str = "MODEL_COMPLETED", **options: Any) -> None:
        self._handler = PostProcessing(VariationalRefinementd(keys=keys, **options), event=event)

    def attach(self, engine: Engine) -> None:
        """Register on ``engine``, an evaluator of MONAI."""
        self._handler.attach(engine)
