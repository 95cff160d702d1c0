"""The learned refinement as a network like any other: confidences in, a segmentation out."""

from __future__ import annotations

import torch

from monai_vslp.variational.unrolled import UnrolledRefinement

__all__ = ["RefinementNetwork"]


class RefinementNetwork(UnrolledRefinement):
    """:class:`~monai_vslp.variational.UnrolledRefinement` whose forward pass takes and gives one tensor.

    Tools that check, export or serve networks call them so. No proportions take part; who has some uses
    :meth:`UnrolledRefinement.unroll` or :class:`~monai_vslp.variational.LearnedRefinement`. The state dictionary is the same.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """
        Args:
            image: confidences on the simplex, shape ``[B, C, H, W]``, on cells of the size that was trained at.

        Returns:
            The segmentation on the simplex, same shape and dtype.
        """
        return self.unroll(image).log_u.exp()
