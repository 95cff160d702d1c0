"""Masked autoencoding: a vision transformer learns tissue from images without any label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import optional_import
from torch import nn

from monai_vslp.networks.backbone import _create, load_weights
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

__all__ = [
    "MaskedAutoencoder",
    "MaskedReconstructionLoss",
    "ReconstructedPatches",
    "ReconstructionPicture",
    "normalized_patches",
    "patchify",
    "save_backbone",
    "unpatchify",
]

Image, _ = optional_import("PIL.Image", descriptor="{} is needed for pictures: pip install pillow")
save_safetensors, _ = optional_import(
    "safetensors.torch", name="save_file", descriptor="{} is needed to save weights: pip install safetensors"
)

HEAD_WIDTH = 32  # channels per attention head of the decoder
# A patch of bare glass differs from grey by noise of a few levels of 255, which nobody can predict. Added to the variance,
# (2.5 / 255)² keeps that noise from being blown up to unit variance.
GLASS_VARIANCE = 1e-4


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut images into patches.

    Args:
        images: shape ``[B, 3, H, W]``; ``H`` and ``W`` are multiples of ``patch``.
        patch: edge of a patch, px.

    Returns:
        Shape ``[B, N, 3 patch²]``: patches row by row, in each all pixels of R, then of G, then of B.
    """
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def unpatchify(patches: torch.Tensor, size: Sequence[int], patch: int) -> torch.Tensor:
    """Inverse of :func:`patchify`.

    Args:
        patches: shape ``[B, N, 3 patch²]``.
        size: ``(H, W)`` in px.
        patch: edge of a patch, px.

    Returns:
        Shape ``[B, 3, H, W]``.
    """
    return F.fold(patches.transpose(1, 2), tuple(size), patch, stride=patch)


def _split(images: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised patches ``[B, N, 3 patch²]``, and what restores the pixels: ``patches * deviation + mean``."""
    # Stained tissue absorbs green most. That constant hue would be most of what a patch varies by, and nothing to learn.
    hue = patchify(images.mean(dim=(2, 3), keepdim=True).expand_as(images), patch)
    patches = patchify(images, patch) - hue
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, unbiased=False)
    deviation = (variance + GLASS_VARIANCE).sqrt()
    return (patches - mean) / deviation, mean + hue, deviation


def normalized_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    r"""What is to be predicted: :math:`t_i = (\tilde x_i - \mu_i) / \sqrt{\sigma_i^2 + 10^{-4}}` for each patch.

    :math:`\tilde x_i` are the pixels of patch ``i`` less the image's mean of their channel, ``μ_i`` and ``σ_i²`` their mean and
    variance over the three channels together. Without the first step the hue that all of the stained tissue shares explains
    most of the target, and a network that predicts nothing else seems to do well.

    Args:
        images: shape ``[B, 3, H, W]``, float in [0, 1].
        patch: edge of a patch, px.

    Returns:
        Shape ``[B, N, 3 patch²]``, float.
    """
    return _split(images, patch)[0]


class ReconstructedPatches(NamedTuple):
    """What a masked autoencoder gives.

    Attributes:
        patches: predicted normalised pixels of all patches, shape ``[B, N, 3 patch²]``, float.
        masked: whether a patch was hidden from the encoder, shape ``[B, N]``, bool.
    """

    patches: torch.Tensor
    masked: torch.Tensor


class MaskedReconstructionLoss(nn.Module):
    r"""Squared error of the patches that were hidden.

    .. math::
        L(y, x) = \frac{1}{|M|} \sum_{i\in M} \frac{1}{P}\, \| y_i - t_i \|_2^2, \qquad
        t_i = \frac{\tilde x_i-\mu_i}{\sqrt{\sigma_i^2+10^{-4}}}

    ``M`` are the hidden patches of the batch, ``y_i`` the prediction of one, ``t_i`` its target of
    :func:`normalized_patches`, both of ``P`` = 3 patch² values. A prediction of 0 everywhere has a loss of about 1.

    References:
        1. K. He, X. Chen, S. Xie, Y. Li, P. Dollár, R. Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR
           2022, arXiv 2111.06377, section 3 and table 1d (normalised pixels).
    """

    def forward(self, output: ReconstructedPatches, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            output: of :class:`MaskedAutoencoder`.
            images: shape ``[B, 3, H, W]``, float in [0, 1].

        Returns:
            Scalar; 0 where nothing was hidden.
        """
        target = normalized_patches(images, isqrt(output.patches.shape[-1] // 3))
        error = (output.patches - target).square().mean(dim=-1)
        return (error * output.masked).sum() / output.masked.sum().clamp_min(1)


class _VisibleTokens(nn.Module):
    """Takes the place of timm's patch dropout: keeps the prefix tokens and the patches at ``indices``, all if None."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.indices: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.indices is None:
            return x
        patches = x[:, self.prefix :]
        kept = patches.gather(1, self.indices[..., None].expand(-1, -1, patches.shape[-1]))
        return torch.cat([x[:, : self.prefix], kept], dim=1)


def _vision_transformer(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A timm vision transformer whose tokens see their own patch only.

    Raises:
        InputError: an unknown name or a model of another kind.
    """
    encoder = _create(name, dict(options))
    timm = import_timm()
    advice = "Masked autoencoding hides patches from a plain vision transformer, such as vit_tiny_patch16_224."
    if not isinstance(encoder, timm.models.vision_transformer.VisionTransformer):
        raise InputError(f"backbone {name!r} is a {type(encoder).__name__}, no timm VisionTransformer. {advice}")
    embed = encoder.patch_embed
    if not isinstance(embed, timm.layers.PatchEmbed) or embed.patch_size[0] != embed.patch_size[1]:
        raise InputError(f"backbone {name!r} does not cut images into square patches that are seen apart. {advice}")
    if encoder.pos_embed is None:
        raise InputError(f"backbone {name!r} has no position embedding, so a hidden patch has no place. {advice}")
    return encoder


class MaskedAutoencoder(nn.Module):
    """A timm vision transformer that sees a few patches of an image, and a light decoder that predicts the others.

    The encoder is timm's model as it is, with its own patch embedding, positions, blocks and norm; hidden patches are taken
    out before the first block. The decoder puts a learned token in their place, adds fixed sine-cosine positions, and is
    thrown away after training. Without weights, the encoder's learned positions start as sine-cosine ones too.

    Args:
        backbone: name of a timm vision transformer.
        backbone_kwargs: further options of ``timm.create_model`` (``depth``, ``embed_dim``, ``patch_size`` …).
        weights: local file to start from (a state dict of the timm model); None to start from random weights.
        decoder_width: channels of the decoder, a multiple of 32.
        decoder_depth: blocks of the decoder.
        mask_ratio: share of the patches that are hidden, in (0, 1); of ``N`` patches ``round(mask_ratio N)``, but at least
            one is hidden and one seen.
        mean, std: channel statistics the input is normalised with; None for those of the backbone, which
            ``monai-vslp train`` uses, too.

    Attributes:
        encoder: the timm model.
        patch: edge of a patch, px; sides of the input are multiples of it.

    Raises:
        InputError: an unknown backbone, one that is no vision transformer, weights that do not fit, or an impossible option.

    References:
        1. K. He, X. Chen, S. Xie, Y. Li, P. Dollár, R. Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR
           2022, arXiv 2111.06377.
    """

    def __init__(
        self,
        backbone: str = "vit_tiny_patch16_224",
        backbone_kwargs: Mapping[str, Any] | None = None,
        weights: str | Path | None = None,
        decoder_width: int = 192,
        decoder_depth: int = 4,
        mask_ratio: float = 0.75,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise InputError(
                f"mask_ratio is the share of patches that are hidden, between 0 and 1, got {mask_ratio}; try 0.75."
            )
        if decoder_width < HEAD_WIDTH or decoder_width % HEAD_WIDTH:
            raise InputError(
                f"decoder_width must be a positive multiple of {HEAD_WIDTH}, got {decoder_width}; try "
                f"{max(1, round(decoder_width / HEAD_WIDTH)) * HEAD_WIDTH}."
            )
        if decoder_depth < 1:
            raise InputError(f"decoder_depth must be at least 1 block, got {decoder_depth}.")
        self.encoder = _vision_transformer(backbone, backbone_kwargs or {})
        timm = import_timm()
        self._positions = timm.layers.build_sincos2d_pos_embed
        self.patch = int(self.encoder.patch_embed.patch_size[0])
        self.mask_ratio = mask_ratio
        self.prefix = int(self.encoder.num_prefix_tokens)
        self.encoder.patch_drop = _VisibleTokens(self.prefix)
        if weights is not None:
            self._load(backbone, weights)
        elif self.encoder.embed_dim % 4 == 0:
            self._start_positions()
        cfg = self.encoder.pretrained_cfg
        for key, given in (("mean", mean), ("std", std)):
            values = torch.tensor(cfg.get(key, (0.5, 0.5, 0.5)) if given is None else given, dtype=torch.float32)
            if values.shape != (3,) or (key == "std" and not (values > 0).all()):
                raise InputError(f"{key} must be three numbers (R, G, B){' above 0' if key == 'std' else ''}, got {given}.")
            self.register_buffer(key, values.view(3, 1, 1), persistent=False)
        block = timm.models.vision_transformer.Block
        self.embed = nn.Linear(self.encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        heads = decoder_width // HEAD_WIDTH
        self.decoder = nn.Sequential(*(block(decoder_width, heads, qkv_bias=True) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.to_pixels = nn.Linear(decoder_width, 3 * self.patch**2)

    def _load(self, name: str, path: str | Path) -> None:
        timm = import_timm()
        # Converts older layouts and resamples position embeddings.
        state = timm.models.vision_transformer.checkpoint_filter_fn(load_weights(path), self.encoder)
        own = self.encoder.state_dict()
        bad = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
        if bad:
            raise InputError(
                f"weights {path} do not fit backbone {name!r}: {len(bad)} of {len(own)} entries are missing or of another "
                f"shape ({', '.join(bad[:4])}). Give the name of the model that the file was saved from."
            )
        self.encoder.load_state_dict({key: state[key] for key in own})

    @torch.no_grad()
    def _start_positions(self) -> None:
        """Positions that are told apart from the first step on; learned ones start too much alike to place a patch."""
        encoder = self.encoder
        grid = self._positions(list(encoder.patch_embed.grid_size), encoder.embed_dim)
        encoder.pos_embed.zero_()
        encoder.pos_embed[0, encoder.pos_embed.shape[1] - len(grid) :] = grid

    def random_mask(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Hide the same number of patches in each image, drawn uniformly.

        Args:
            images: shape ``[B, 3, H, W]``.
            generator: of the draw, on the CPU; None for torch's own, on the device of ``images``.

        Returns:
            Shape ``[B, N]``, bool, True for hidden patches.

        Raises:
            InputError: sides that are no multiples of the patch, or a single patch.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch or height * width < 2 * self.patch**2:
            raise InputError(
                f"images must have sides that are multiples of the patch of {self.patch} px and at least two patches, got "
                f"{height} x {width} px."
            )
        count = (height // self.patch) * (width // self.patch)
        hidden = min(max(round(self.mask_ratio * count), 1), count - 1)
        device = images.device if generator is None else "cpu"
        order = torch.rand(len(images), count, generator=generator, device=device).argsort(dim=1)
        return (order < hidden).to(images.device)

    def encode(self, images: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of the patches that are seen; the others are not computed with.

        Args:
            images: shape ``[B, 3, H, W]``, float in [0, 1].
            masked: hidden patches, shape ``[B, N]``, bool, the same number in each image; None to see all.

        Returns:
            Prefix tokens (class token …), then seen patches in their order, shape ``[B, prefix + seen, embed_dim]``.
        """
        drop = self.encoder.patch_drop
        # A stable sort of False before True: the seen patches in their order.
        drop.indices = None if masked is None else masked.byte().argsort(dim=1, stable=True)[:, : int((~masked[0]).sum())]
        try:
            return self.encoder.forward_features((images - self.mean) / self.std)
        finally:
            drop.indices = None

    def decode(self, latent: torch.Tensor, masked: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Predict the normalised pixels of all patches.

        Args:
            latent: of :meth:`encode`.
            masked: hidden patches, shape ``[B, N]``, bool.
            grid: patches along ``(H, W)``.

        Returns:
            Shape ``[B, N, 3 patch²]``.
        """
        seen = self.embed(latent)
        width = seen.shape[-1]
        places = masked.byte().argsort(dim=1, stable=True)[:, : latent.shape[1] - self.prefix]
        x = self.mask_token.to(seen.dtype).expand(*masked.shape, width)
        x = x.scatter(1, places[..., None].expand(-1, -1, width), seen[:, self.prefix :])
        x = x + self._positions(list(grid), width, device=x.device, dtype=x.dtype)
        x = self.decoder(torch.cat([seen[:, : self.prefix], x], dim=1))
        return self.to_pixels(self.decoder_norm(x[:, self.prefix :]))

    def forward(self, images: torch.Tensor, masked: torch.Tensor | None = None) -> ReconstructedPatches:
        """
        Args:
            images: shape ``[B, 3, H, W]``, float in [0, 1].
            masked: hidden patches, shape ``[B, N]``, bool, the same number in each image; None to draw them.

        Raises:
            InputError: sides that are no multiples of the patch.
        """
        masked = self.random_mask(images) if masked is None else masked
        grid = [side // self.patch for side in images.shape[-2:]]
        return ReconstructedPatches(self.decode(self.encode(images, masked), masked, grid), masked)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, masked: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network saw, and what it makes of it.

        Predictions are of normalised pixels; to be looked at they get the true mean and deviation of their patch.

        Args:
            images: shape ``[B, 3, H, W]``, float in [0, 1].
            masked: hidden patches, shape ``[B, N]``, bool; None to draw them.

        Returns:
            The images with hidden patches in grey, and with hidden patches predicted, both ``[B, 3, H, W]`` in [0, 1].
        """
        output = self(images, masked)
        patches, size, hidden = patchify(images, self.patch), images.shape[-2:], output.masked[..., None]
        _, mean, deviation = _split(images, self.patch)
        shown = torch.where(hidden, torch.full_like(patches, 0.5), patches)
        filled = torch.where(hidden, output.patches * deviation + mean, patches).clamp(0, 1)
        return unpatchify(shown, size, self.patch), unpatchify(filled, size, self.patch)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer; biases, norms, positions and single tokens do not decay."""
        kept: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            single = parameter.ndim < 2 or name.endswith(("pos_embed", "_token"))
            (kept if single else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def save_backbone(network: MaskedAutoencoder, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the encoder's state dict as ``.safetensors``, atomically; timm's model of that name loads it.

    Args:
        network: a masked autoencoder.
        path: the file.
        metadata: notes kept in the file's header, as text.

    Returns:
        ``path``.

    Raises:
        OSError: the file cannot be written.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in network.encoder.state_dict().items()}
    notes = {str(key): str(value) for key, value in (metadata or {}).items()}
    with atomic_path(path) as temporary:
        save_safetensors(state, str(temporary), metadata={"format": "pt", **notes})
    return Path(path)


class ReconstructionPicture:
    """Images, what the network saw of them, and what it made of it: a picture with one row per image.

    Args:
        network: a masked autoencoder.
        images: gives image ``i``, shape ``[3, H, W]``, float in [0, 1].
        path: the PNG file that is written.
        count: rows.
        seed: of the patches hidden, so that pictures can be compared.
    """

    def __init__(
        self,
        network: MaskedAutoencoder,
        images: Callable[[int], torch.Tensor],
        path: str | Path,
        count: int = 4,
        seed: int = 0,
    ) -> None:
        self.network, self.images, self.path, self.count, self.seed = network, images, Path(path), count, seed

    def draw(self) -> np.ndarray:
        """RGB, shape ``[count H, 3 W, 3]``, uint8."""
        device = next(self.network.parameters()).device
        images = torch.stack([self.images(i) for i in range(self.count)]).to(device)
        masked = self.network.random_mask(images, torch.Generator().manual_seed(self.seed))
        training = self.network.training
        self.network.eval()
        parts = [images, *self.network.reconstruct(images, masked)]
        self.network.train(training)
        rows = torch.cat(parts, dim=3).mul(255).round().byte().cpu()
        return torch.cat(list(rows), dim=1).permute(1, 2, 0).numpy()

    def __call__(self) -> Path:
        """Write the picture; returns its path."""
        picture = self.draw()
        with atomic_path(self.path) as temporary:
            Image.fromarray(picture).save(temporary)
        return self.path
