"""A fully connected conditional random field, as a peer of the variational refinement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

from monai_vslp.utils.errors import InputError

__all__ = ["DenseCRFD", "DenseCRFDict", "DenseCRFd", "dense_crf"]

# A linear splat and a linear slice each add a sixth of a cell² to the variance of a grid filter; the blur does the rest.
BLUR = math.sqrt(1.0 - 2.0 / 6.0)
REACH = 3  # cells, more than three standard deviations


def _kernel(sigma: float, reach: int, like: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    weight = (-0.5 * (offsets / sigma).square()).exp()
    return weight / weight.sum()


def _along(x: torch.Tensor, axis: int, kernel: torch.Tensor) -> torch.Tensor:
    """Convolve one axis of ``[C, ...]``; what lies outside counts as 0."""
    moved = x.movedim(axis, -1)
    flat = F.conv1d(moved.reshape(-1, 1, moved.shape[-1]), kernel.view(1, 1, -1), padding=len(kernel) // 2)
    return flat.view(moved.shape).movedim(-1, axis)


class _Grid:
    """Gaussian filter over points in few dimensions, by a grid with cells as wide as the standard deviation [1]_.

    Args:
        points: shape ``[n, d]``, in standard deviations.

    References:
        .. [1] S. Paris, F. Durand: A fast approximation of the bilateral filter using a signal processing approach. ECCV 2006.
    """

    def __init__(self, points: torch.Tensor) -> None:
        points = points - points.amin(dim=0)
        low = points.floor()
        self.shape = [int(n) + 2 for n in low.amax(dim=0)]
        share = points - low
        corners, weights = [], []
        for corner in itertools.product((0, 1), repeat=points.shape[1]):
            place = torch.zeros(len(points), dtype=torch.long, device=points.device)
            weight = torch.ones_like(points[:, 0])
            for axis, side in enumerate(corner):
                place = place * self.shape[axis] + low[:, axis].long() + side
                weight = weight * (share[:, axis] if side else 1 - share[:, axis])
            corners.append(place)
            weights.append(weight)
        self.corners, self.weights = corners, weights
        self.kernel = _kernel(BLUR, REACH, points)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Filter values ``[C, n]``, up to a constant factor."""
        grid = values.new_zeros(len(values), math.prod(self.shape))
        for place, weight in zip(self.corners, self.weights):
            grid.index_add_(1, place, values * weight)
        grid = grid.view(len(values), *self.shape)
        for axis in range(1, grid.ndim):
            grid = _along(grid, axis, self.kernel)
        grid = grid.flatten(1)
        return sum(grid[:, place] * weight for place, weight in zip(self.corners, self.weights))


def dense_crf(
    confidence: torch.Tensor,
    image: torch.Tensor,
    *,
    spatial_sigma: float = 3.0,
    spatial_weight: float = 3.0,
    bilateral_sigma: float = 80.0,
    color_sigma: float = 13.0 / 255.0,
    bilateral_weight: float = 10.0,
    iterations: int = 5,
    floor: float = 1e-6,
) -> torch.Tensor:
    r"""Mean field of a fully connected conditional random field with Potts costs [1]_,

    .. math::
        E(x) = \sum_i -\log q_{i x_i} + \sum_{i<j} [x_i \ne x_j]
        \Bigl(w_s\,e^{-\frac{|s_i - s_j|^2}{2\sigma_s^2}}
        + w_b\,e^{-\frac{|s_i - s_j|^2}{2\sigma_b^2} - \frac{|I_i - I_j|^2}{2\sigma_c^2}}\Bigr),

    with symmetrically normalised kernels, :math:`k_{ij} \to k_{ij} / \sqrt{\sum_j k_{ij} \sum_i k_{ij}}`, whose diagonal is
    kept, as is usual. The bilateral kernel is filtered on a grid over position and colour.

    Args:
        confidence: shape ``[C, H, W]``, on the simplex.
        image: shape ``[3, H, W]``, float in [0, 1].
        spatial_sigma, spatial_weight: :math:`\sigma_s` in px and :math:`w_s`.
        bilateral_sigma, color_sigma, bilateral_weight: :math:`\sigma_b` in px, :math:`\sigma_c` in units of the image, and
            :math:`w_b`.
        iterations: of the mean field.
        floor: least confidence before the logarithm.

    Returns:
        Marginals ``[C, H, W]``, float32, on the simplex.

    Raises:
        InputError: shapes that do not fit, or a value out of its range.

    References:
        .. [1] P. Krähenbühl, V. Koltun: Efficient inference in fully connected CRFs with Gaussian edge potentials. NIPS 2011.
    """
    if confidence.ndim != 3 or image.ndim != 3 or len(image) != 3 or confidence.shape[1:] != image.shape[1:]:
        raise InputError(
            f"dense_crf takes confidences [C, H, W] and an RGB image [3, H, W] of one size, got {list(confidence.shape)} and "
            f"{list(image.shape)}."
        )
    widths = {"spatial_sigma": spatial_sigma, "bilateral_sigma": bilateral_sigma, "color_sigma": color_sigma, "floor": floor}
    for name, value in widths.items():
        if not value > 0:
            raise InputError(f"{name} must be above 0, got {value}.")
    if not spatial_weight >= 0 or not bilateral_weight >= 0 or iterations < 0:
        raise InputError(
            f"weights and iterations must be at least 0, got {spatial_weight}, {bilateral_weight} and {iterations}."
        )
    size = confidence.shape[1:]
    unary = confidence.float().clamp_min(floor).log()
    rows, columns = (torch.arange(n, device=unary.device, dtype=torch.float32) for n in size)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) / bilateral_sigma
    grid = _Grid(torch.cat([place, image.float() / color_sigma]).flatten(1).T)
    kernel = _kernel(spatial_sigma, math.ceil(4 * spatial_sigma), unary)

    def spatial(x: torch.Tensor) -> torch.Tensor:
        return _along(_along(x, 1, kernel), 2, kernel)

    def bilateral(x: torch.Tensor) -> torch.Tensor:
        return grid(x.flatten(1)).view(x.shape)

    one = torch.ones_like(unary[:1])
    terms = [
        (weight, blur, blur(one).clamp_min(1e-20).rsqrt())
        for weight, blur in ((spatial_weight, spatial), (bilateral_weight, bilateral))
        if weight > 0
    ]
    q = unary.softmax(dim=0)
    for _ in range(iterations):
        message = torch.zeros_like(unary)
        for weight, blur, norm in terms:
            message += weight * norm * blur(norm * q)
        q = (unary + message).softmax(dim=0)
    return q


class DenseCRFd(MapTransform):
    """Replace confidences by the marginals of a dense CRF over the image; see :func:`dense_crf`.

    Before :class:`~monai_vslp.transforms.VariationalRefinementd` without regularizer (``alpha`` 0) the CRF takes its place:
    without proportions the labels are the CRF's, with them its marginals are moved to meet them.

    Args:
        keys: keys of confidence maps ``[C, H, W]``.
        image_key: key of the image ``[3, H, W]``.
        allow_missing_keys: skip keys that are absent.
        **options: of :func:`dense_crf`.
    """

    def __init__(
        self, keys: KeysCollection = "pred", image_key: str = "image", allow_missing_keys: bool = False, **options: Any
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key, self.options = image_key, options

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, Any]:
        d = dict(data)
        image = convert_to_tensor(d[self.image_key], track_meta=False)
        for key in self.key_iterator(d):
            q = convert_to_tensor(d[key], track_meta=False)
            d[key] = convert_to_dst_type(dense_crf(q, image.to(q.device), **self.options), d[key])[0]
        return d


DenseCRFD = DenseCRFDict = DenseCRFd
