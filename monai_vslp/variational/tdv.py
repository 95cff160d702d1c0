"""Total deep variation: a regularizer that is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.potential import REGULARIZERS
from monai_vslp.variational.windows import MapArray, Window, whole_window

__all__ = ["DeepVariationPotential", "TotalDeepVariation", "convert_published_state_dict"]


def pad_symmetric(x: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror the border about its edge, the edge pixel included, on the last two axes.

    A side shorter than ``width`` is mirrored again until the border is full.
    """
    for axis in (-2, -1):
        length = x.shape[axis]
        if width <= length:
            first, last = x.narrow(axis, 0, width).flip(axis), x.narrow(axis, length - width, width).flip(axis)
            x = torch.cat([first, x, last], dim=axis)
        else:
            position = torch.arange(-width, length + width, device=x.device) % (2 * length)
            x = x.index_select(axis, torch.minimum(position, 2 * length - 1 - position))
    return x


def fold_symmetric(x: torch.Tensor, width: int) -> torch.Tensor:
    """Transpose of :func:`pad_symmetric`: add the mirrored border back to the pixels that it came from."""
    for axis in (-2, -1):
        length = x.shape[axis] - 2 * width
        if width <= length:
            # Added up as whole rows: a runtime may add to scattered places from several threads at once, and lose some.
            rest = list(x.shape)
            rest[axis] = length - width
            nothing = x.new_zeros(rest)
            first, last = x.narrow(axis, 0, width).flip(axis), x.narrow(axis, length + width, width).flip(axis)
            inner = x.narrow(axis, width, length)
            x = inner + torch.cat([first, nothing], dim=axis) + torch.cat([nothing, last], dim=axis)
        else:
            position = torch.arange(-width, length + width, device=x.device) % (2 * length)
            position = torch.minimum(position, 2 * length - 1 - position)
            shape = list(x.shape)
            shape[axis] = length
            x = torch.zeros(shape, dtype=x.dtype, device=x.device).index_add(axis, position, x)
    return x


class _Filter(nn.Module):
    """Convolution without bias, symmetric padding."""

    def __init__(self, channels: int, features: int, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, channels, size, size) / math.sqrt(channels * size**2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.weight.shape[-1] // 2
        return F.conv2d(pad_symmetric(x, width) if width else x, self.weight)

    def adjoint(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at the output to gradient at the input."""
        width = self.weight.shape[-1] // 2
        full = F.conv_transpose2d(gradient, self.weight)
        return fold_symmetric(full, width) if width else full


class _Resampler(nn.Module):
    """Stride-2 convolution smoothed by the 5×5 binomial filter (``down``), and its transpose (``up``)."""

    blur: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features, 3, 3) / math.sqrt(features * 9))
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
        self.register_buffer("blur", torch.outer(row, row)[None, None], persistent=False)

    def _kernel(self) -> torch.Tensor:
        flat = self.weight.reshape(-1, 1, 3, 3)
        return F.conv2d(flat, self.blur.to(flat), padding=4).view(*self.weight.shape[:2], 7, 7)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(pad_symmetric(x, 3), self._kernel(), stride=2)

    def up(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        missing = [want - (have - 1) * 2 - 1 for want, have in zip(size[-2:], x.shape[-2:])]
        return fold_symmetric(F.conv_transpose2d(x, self._kernel(), stride=2, output_padding=missing), 3)


class _MicroBlock(nn.Module):
    r""":math:`\mu(x) = x + K_2\,\varphi(K_1 x)` with :math:`\varphi(t) = \tfrac12\log(1 + t^2)`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = _Filter(features, features)
        self.second = _Filter(features, features)

    def forward(self, x: torch.Tensor, tape: list[torch.Tensor] | None) -> torch.Tensor:
        inner = self.first(x)
        if tape is not None:
            tape.append(inner)
        return x + self.second(0.5 * torch.log1p(inner.square()))

    def adjoint(self, gradient: torch.Tensor, tape: list[torch.Tensor]) -> torch.Tensor:
        inner = tape.pop()
        return gradient + self.first.adjoint(inner / (1.0 + inner.square()) * self.second.adjoint(gradient))


class _MacroBlock(nn.Module):
    """U-shape over the scales: a micro-block on the way down and one on the way up, a single one at the bottom."""

    def __init__(self, features: int, scales: int) -> None:
        super().__init__()
        self.fine_to_coarse = nn.ModuleList(_MicroBlock(features) for _ in range(scales))
        self.coarse_to_fine = nn.ModuleList(_MicroBlock(features) for _ in range(scales - 1))
        self.down = nn.ModuleList(_Resampler(features) for _ in range(scales - 1))
        self.up = nn.ModuleList(_Resampler(features) for _ in range(scales - 1))

    def forward(self, x: list[torch.Tensor | None], tape: list[torch.Tensor] | None) -> list[torch.Tensor | None]:
        for scale in range(len(x) - 1):
            x[scale] = self.fine_to_coarse[scale](x[scale], tape)
            below = self.down[scale].down(x[scale])
            x[scale + 1] = below if x[scale + 1] is None else x[scale + 1] + below
        x[-1] = self.fine_to_coarse[-1](x[-1], tape)
        for scale in reversed(range(len(x) - 1)):
            x[scale] = self.coarse_to_fine[scale](x[scale] + self.up[scale].up(x[scale + 1], x[scale].shape), tape)
        return x

    def adjoint(self, gradients: list[torch.Tensor | None], tape: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """:meth:`forward` backwards; a scale whose output nothing depends on has no gradient yet."""
        for scale in range(len(gradients) - 1):
            gradients[scale] = self.coarse_to_fine[scale].adjoint(gradients[scale], tape)
            below = self.up[scale].down(gradients[scale])
            gradients[scale + 1] = below if gradients[scale + 1] is None else gradients[scale + 1] + below
        gradients[-1] = self.fine_to_coarse[-1].adjoint(gradients[-1], tape)
        for scale in reversed(range(len(gradients) - 1)):
            above = self.down[scale].up(gradients[scale + 1], gradients[scale].shape)
            gradients[scale] = self.fine_to_coarse[scale].adjoint(gradients[scale] + above, tape)
        return gradients


class TotalDeepVariation(nn.Module):
    r"""Total deep variation (TDV).

    .. math:: R(u) = \sum_i a_i r_i, \qquad r = \tfrac1m\, w^\top \mathcal N(K u),

    with a zero-mean 3×3 convolution :math:`K` of :math:`m` features whose filters lie in the unit ball, a network
    :math:`\mathcal N` of U-shaped macro-blocks, and a vector :math:`w`. No biases, symmetric padding. The per-pixel energy
    :math:`r_i` may be negative. It is 0 for a constant map, with several channels only for one that is the same in all of them;
    the gradient need not vanish there.

    Args:
        channels: classes seen together. 1 makes a class-wise regularizer: it may then be applied to maps of any number of
            classes, each seen alone, and the energies are added up.
        features: :math:`m`.
        macro_blocks: number of U-shapes.
        scales: resolutions per U-shape, each half the one above.
        image_channels: channels of an image that :math:`\mathcal N` sees beside ``u`` (0: none). Its filters are added to the
            features of ``u``; :math:`R` remains a function of ``u`` alone.

    The defaults are those published: 387,392 parameters for 1 channel, 387,968 for 3, 388,256 for 4, 388,544 for 5.

    Source:
        E. Kobler, A. Effland, K. Kunisch and T. Pock, "Total deep variation for linear inverse problems", CVPR 2020,
        arXiv 2001.05005; "Total deep variation: a stable regularization method for inverse problems", arXiv 2006.08789.
        The image is ours.
    """

    def __init__(
        self, channels: int, features: int = 32, macro_blocks: int = 3, scales: int = 3, image_channels: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("features", features, 1),
            ("macro_blocks", macro_blocks, 1),
            ("scales", scales, 1),
            ("image_channels", image_channels, 0),
        ):
            if int(value) != value or value < least:
                raise InputError(f"TotalDeepVariation: {name} must be an integer of at least {least}, got {value!r}.")
        self.channels, self.features, self.scales, self.image_channels = channels, features, scales, image_channels
        self.macro_block_count = macro_blocks
        self.analysis = _Filter(channels, features)
        self.image_analysis = _Filter(image_channels, features) if image_channels else None
        self.macro_blocks = nn.ModuleList(_MacroBlock(features, scales) for _ in range(macro_blocks))
        self.readout = nn.Parameter(torch.randn(features) / math.sqrt(features))
        with torch.no_grad():
            for weight in self._constrained():
                weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
                weight /= weight.flatten(1).norm(dim=1)[:, None, None, None]

    @property
    def config(self) -> dict[str, int]:
        """Arguments that build this architecture again."""
        return {
            "channels": self.channels,
            "features": self.features,
            "macro_blocks": self.macro_block_count,
            "scales": self.scales,
            "image_channels": self.image_channels,
        }

    @property
    def radius(self) -> int:
        """px around a pixel that its energy depends on."""
        # Per U-shape and scale of pixel size 2^s: two micro-blocks (one at the bottom) of radius 2, and on the way down and
        # up a 7x7 filter that acts at the finer of its two scales.
        blocks = sum((2 if scale == self.scales - 1 else 4) * 2**scale for scale in range(self.scales))
        resampling = sum(6 * 2**scale for scale in range(self.scales - 1))
        return 1 + self.macro_block_count * (blocks + resampling)

    def _constrained(self) -> list[torch.Tensor]:
        weights = [self.analysis.weight]
        return weights if self.image_analysis is None else [*weights, self.image_analysis.weight]

    @torch.no_grad()
    def project(self) -> None:
        """Bring the filters of :math:`K` back to zero mean and norm of at most 1; call after each optimizer step."""
        for weight in self._constrained():
            weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
            weight /= weight.flatten(1).norm(dim=1).clamp_min(1.0)[:, None, None, None]

    def forward(self, u: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """Per-pixel energy.

        Args:
            u: shape ``[B, C, H, W]``; ``C`` is :attr:`channels`, or anything for a class-wise regularizer.
            image: shape ``[B, image_channels, H, W]``, about zero mean and unit variance; needed where
                :attr:`image_channels` is positive.

        Returns:
            :math:`r`, shape ``[B, H, W]``.

        Raises:
            InputError: another number of classes or image channels.
        """
        return self._energy(u, image, None)

    def energy_and_gradient(
        self, u: torch.Tensor, weight: torch.Tensor, image: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Per-pixel energy, and the gradient of their weighted sum with the chain rule written out.

        No automatic differentiation takes part, so that the result can be traced, exported, and differentiated once more.

        Args:
            u, image: see :meth:`forward`.
            weight: :math:`a`, shape ``[B, H, W]``.

        Returns:
            :math:`r`, shape ``[B, H, W]``, and :math:`\partial_u \sum_i a_i r_i`, shape of ``u``.

        Raises:
            InputError: see :meth:`forward`.
        """
        tape: list[torch.Tensor] = []
        energy = self._energy(u, image, tape)
        start = self.readout[:, None, None] * (weight / self.features)[:, None]
        if self.channels == 1:
            start = start.repeat_interleave(u.shape[1], dim=0)
        gradients: list[torch.Tensor | None] = [start] + [None] * (self.scales - 1)
        for block in reversed(self.macro_blocks):
            gradients = block.adjoint(gradients, tape)
        return energy, self.analysis.adjoint(gradients[0]).view(u.shape)

    def _energy(self, u: torch.Tensor, image: torch.Tensor | None, tape: list[torch.Tensor] | None) -> torch.Tensor:
        """:meth:`forward`; what the chain rule needs is left on a tape."""
        batch, classes = u.shape[:2]
        if self.channels != 1 and classes != self.channels:
            raise InputError(
                f"TotalDeepVariation: this regularizer was made for {self.channels} classes, got {classes}. Train one "
                "for them, or a class-wise one (channels=1), which takes any number."
            )
        if (image is None) != (self.image_analysis is None) or (image is not None and image.shape[1] != self.image_channels):
            got = "none" if image is None else f"an image with {image.shape[1]} channels"
            raise InputError(f"TotalDeepVariation: made for {self.image_channels} image channels, got {got}.")
        if self.channels == 1:
            u = u.reshape(batch * classes, 1, *u.shape[2:])
        x = self.analysis(u)
        if image is not None:
            seen = self.image_analysis(image)
            x = x + (seen.repeat_interleave(classes, dim=0) if self.channels == 1 else seen)
        levels: list[torch.Tensor | None] = [x] + [None] * (self.scales - 1)
        for block in self.macro_blocks:
            levels = block(levels, tape)
        r = torch.einsum("bfhw,f->bhw", levels[0], self.readout) / self.features
        return r.view(batch, classes, *r.shape[1:]).sum(dim=1) if self.channels == 1 else r


def convert_published_state_dict(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Translate weights in the key layout of the TDV authors (``K1.weight``, ``mb.0.mb.1.0.conv1.weight``, ``KN.weight`` …).

    Args:
        state: their state dict; keys of buffers (``mask``, ``blur``) are ignored.

    Returns:
        Arguments for :class:`TotalDeepVariation`, and a state dict that it loads strictly.

    Raises:
        InputError: a key or a shape that does not belong to that layout.
    """
    weights = {key: value for key, value in state.items() if key.rsplit(".", 1)[-1] not in ("mask", "blur")}
    for key in ("K1.weight", "KN.weight"):
        if key not in weights:
            raise InputError(f"convert_published_state_dict: {key!r} is missing; the keys begin {sorted(weights)[:4]}.")
    features, channels = weights["K1.weight"].shape[:2]
    blocks = 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("mb.")), default=-1)
    scales = 1 + max((int(k.split(".")[3]) for k in weights if k.startswith("mb.0.mb.")), default=-1)
    if blocks < 1 or scales < 1:
        raise InputError(f"convert_published_state_dict: no macro-block ('mb.0.mb.0.0.conv1.weight') in {sorted(weights)[:4]}.")
    wanted = {"K1.weight": "analysis.weight", "KN.weight": "readout"}
    for block in range(blocks):
        for scale in range(scales):
            sides = ("fine_to_coarse", "coarse_to_fine") if scale < scales - 1 else ("fine_to_coarse",)
            for index, side in enumerate(sides):
                for theirs, ours in (("conv1", "first"), ("conv2", "second")):
                    wanted[f"mb.{block}.mb.{scale}.{index}.{theirs}.weight"] = (
                        f"macro_blocks.{block}.{side}.{scale}.{ours}.weight"
                    )
        for scale in range(scales - 1):
            wanted[f"mb.{block}.conv_down.{scale}.weight"] = f"macro_blocks.{block}.down.{scale}.weight"
            wanted[f"mb.{block}.conv_up.{scale}.weight"] = f"macro_blocks.{block}.up.{scale}.weight"
    if set(wanted) != set(weights):
        missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
        raise InputError(
            f"convert_published_state_dict: not the layout of a TDV of {blocks} macro-blocks with {scales} scales and "
            f"equal widths; missing {missing[:3]}, unknown {extra[:3]}."
        )
    config = {"channels": channels, "features": features, "macro_blocks": blocks, "scales": scales, "image_channels": 0}
    converted = {wanted[key]: value.detach().clone() for key, value in weights.items()}
    converted["readout"] = converted["readout"].flatten()
    expected = {key: value.shape for key, value in TotalDeepVariation(**config).state_dict().items()}
    for key, value in converted.items():
        if value.shape != expected[key]:
            raise InputError(
                f"convert_published_state_dict: {key} has shape {list(value.shape)}, expected {list(expected[key])}; "
                "networks whose width grows with the scale (multiplier > 1) are not supported."
            )
    return config, converted


@REGULARIZERS.add_def("total_deep_variation", "learned total deep variation; needs a trained network")
class DeepVariationPotential:
    r"""A :class:`TotalDeepVariation` as a potential: :math:`R(u) = \sum_i a_i r_i(u)`.

    Background (mass 0) is seen as a map of zeros and counts nothing. Windows are exact: their margin covers all that an
    energy on the core and its derivative depend on.

    Args:
        network: the regularizer; its weights are not changed.
        mass: :math:`a`, shape ``[H, W]``, sums to 1.
        image: shape ``[image_channels, H, W]`` for a regularizer that sees the image.
    """

    def __init__(self, network: TotalDeepVariation, mass: MapArray, image: MapArray | None = None) -> None:
        self.network, self.mass, self.image = network, mass, image
        self.multiple = 2 ** (network.scales - 1)
        self.halo = -(-2 * network.radius // self.multiple) * self.multiple

    def _seen(
        self, u: torch.Tensor, window: Window | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Window]:
        """What the network sees, the mass, the tissue, and the image on a window with its margin."""
        window = whole_window(self.mass.shape) if window is None else window
        mass = self.mass[window.outer].to(u)
        tissue = (mass > 0).to(u)
        image = None if self.image is None else self.image[(slice(None), *window.outer)][None].to(u)
        return (u * tissue)[None], mass, tissue, image, window

    @torch.no_grad()
    def energy_map(self, u: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """:math:`r_i` on the core, shape ``[h, w]``; 0 at background."""
        seen, _, tissue, image, window = self._seen(u, window)
        return (self.network(seen, image)[0] * tissue)[window.inner]

    @torch.no_grad()
    def value(self, u: torch.Tensor, window: Window | None = None) -> float:
        """:math:`R(u)` over the core, summed in float64."""
        seen, mass, _, image, window = self._seen(u, window)
        return float((self.network(seen, image)[0] * mass)[window.inner].sum(dtype=torch.float64))

    @torch.no_grad()
    def value_and_gradient(self, u: torch.Tensor, window: Window | None = None) -> tuple[float, torch.Tensor]:
        r""":math:`R(u)` and :math:`a_i^{-1}\,\partial R/\partial u_i` on the core."""
        seen, mass, tissue, image, window = self._seen(u, window)
        energy, gradient = self.network.energy_and_gradient(seen, mass[None], image)
        per_mass = torch.where(mass > 0, 1.0 / mass.clamp_min(torch.finfo(u.dtype).tiny), torch.zeros_like(mass))
        value = float((energy[0] * mass)[window.inner].sum(dtype=torch.float64))
        return value, (gradient[0] * tissue * per_mass)[(slice(None), *window.inner)]

    def majorizer(self, u: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, float]:
        """Gradient and a first guess of the curvature; a learned energy has no bound that is worth computing."""
        return self.value_and_gradient(u, window)[1], 1.0
