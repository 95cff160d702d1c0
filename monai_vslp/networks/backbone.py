"""Features of the middle blocks of any timm backbone, on one token grid."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.utils import optional_import
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

__all__ = ["TokenBackbone", "load_weights"]

load_safetensors, _ = optional_import("safetensors.torch", name="load_file")

FINEST_STRIDE = 8  # px; finer maps of hierarchical backbones hold colour and edges rather than tissue


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from ``.safetensors`` or from a ``.pt``/``.pth`` file that holds tensors only.

    A dictionary nested under ``state_dict`` or ``model`` is unpacked.

    Raises:
        InputError: the file is missing, of another kind, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            state = load_safetensors(str(path))
        elif path.suffix in (".pt", ".pth", ".bin"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise InputError(f"weights file {path}: {path.suffix!r} is not known; allowed are .safetensors, .pt, .pth, .bin.")
    except InputError:
        raise
    except Exception as error:  # the readers raise a dozen kinds for damaged files
        raise InputError(f"weights file {path} cannot be read as a plain state dict: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise InputError(f"weights file {path} holds a {type(state).__name__}; expected a state dict (name → tensor).")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        known = timm.list_models()
        if name.partition(".")[0] not in known:
            near = difflib.get_close_matches(name.partition(".")[0], known, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else " See timm.list_models() for the names."
            raise InputError(f"backbone {name!r} is not a timm model.{hint}")
    layer = options.get("mlp_layer")
    if isinstance(layer, str):  # timm wants the class, a config has its name
        if not hasattr(timm.layers, layer):
            raise InputError(
                f"mlp_layer {layer!r} is not in timm.layers; models with gated MLPs take 'SwiGLUPacked' or 'SwiGLU'."
            )
        options = {**options, "mlp_layer": getattr(timm.layers, layer)}
    # Families differ in how they are told that inputs vary in size; convolutional ones need no telling.
    for flexible in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        try:
            return timm.create_model(name, num_classes=0, **flexible, **options)
        except TypeError as error:
            if not any(key in str(error) for key in flexible):
                raise InputError(f"backbone {name!r} does not take the options {options}: {error}.") from error
        except Exception as error:  # no such tag or repository, no connection, no token for it, a damaged file
            raise InputError(
                f"backbone {name!r} cannot be made: {error} Without a connection, name a timm architecture and give its "
                "weights as a local file."
            ) from error
    raise AssertionError("unreachable: the last attempt passes no extra option")


class TokenBackbone(nn.Module):
    """Middle-block features of a timm backbone, concatenated on one grid.

    Middle blocks of a vision transformer carry more about tissue than the last, which serves the classifier it was
    trained with. Blocks behind the last one used are removed. Each block's features are standardised over channels
    (LayerNorm without parameters), so that no block dominates by its scale. Maps of hierarchical backbones (Swin,
    ConvNeXt) are resampled linearly to the grid of the finest one used.

    Args:
        name: timm model, for instance ``vit_tiny_patch16_224``, ``hf-hub:organisation/model``, or ``local-dir:folder``
            with a copy of such a model (``config.json``, ``model.safetensors``), whose weights are read with ``pretrained``.
        blocks: indices into timm's intermediate features; None for blocks at about 1/3, 1/2 and 3/4 of the depth
            (3, 5 and 8 of 12), or of a hierarchical backbone those stages with a stride of 8 to 16 px.
        weights: local file with a state dict of the timm model, a classifier head in it is ignored.
        pretrained: let timm fetch its weights; needs the internet or a filled cache.
        norm: standardise each block's features over channels.
        **options: passed on to ``timm.create_model`` (``depth``, ``embed_dim``, ``patch_size``, ``init_values``,
            ``reg_tokens`` …); ``mlp_layer`` may be the name of a class of ``timm.layers``, such as ``SwiGLUPacked``.

    Attributes:
        channels: number of feature channels.
        stride: px per token.
        multiple: px of which sides of the input must be multiples: the stride of the coarsest block used.
        mean, std: the channel statistics with which the weights were trained, three values each.

    Raises:
        InputError: an unknown name, impossible blocks, or weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[int] | None = None,
        weights: str | Path | None = None,
        pretrained: bool = False,
        norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = _create(name, {"pretrained": pretrained, **options})
        if not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"backbone {name!r} offers no intermediate features; choose a ViT, Swin or ConvNeXt model.")
        self.mean = tuple(self.model.pretrained_cfg.get("mean", (0.5, 0.5, 0.5)))
        self.std = tuple(self.model.pretrained_cfg.get("std", (0.5, 0.5, 0.5)))
        if weights is not None:
            self._load(name, weights)
        info = self.model.feature_info
        reductions, widths = ([entry[key] for entry in info] for key in ("reduction", "num_chs"))
        count = len(reductions)
        if blocks is None:
            if len(set(reductions)) == 1:
                blocks = sorted({round(count * share) - 1 if count > 3 else i for i, share in enumerate((1 / 3, 1 / 2, 3 / 4))})
            else:
                blocks = [i for i, r in enumerate(reductions) if FINEST_STRIDE <= r <= 2 * FINEST_STRIDE] or [count - 1]
            blocks = [block for block in blocks if block < count]
        if not blocks or any(not 0 <= block < count for block in blocks):
            raise InputError(f"backbone {name!r} has blocks 0 to {count - 1}, got {list(blocks)}.")
        self.blocks = sorted(set(blocks))
        self.norm = norm
        self.stride = int(reductions[self.blocks[0]])
        self.multiple = int(reductions[self.blocks[-1]])
        self.channels = int(sum(widths[block] for block in self.blocks))
        kept = self.model.prune_intermediate_layers(self.blocks, prune_norm=True, prune_head=True)
        self._indices = list(kept)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, a third more time.

        Raises:
            InputError: the model cannot.
        """
        try:
            self.model.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            raise InputError(
                f"{type(self.model).__name__} knows no gradient checkpointing ({error}); leave out grad_checkpointing."
            ) from error

    def _load(self, name: str, path: str | Path) -> None:
        state = load_weights(path)
        # Each timm family knows how to convert older layouts and resample position embeddings.
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            state = convert(state, self.model)
        own = self.model.state_dict()
        wrong = [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ]
        missing = [key for key in own if key not in state]
        if wrong or missing:
            shown = ", ".join([*(f"{key} (missing)" for key in missing), *wrong][:4])
            raise InputError(
                f"weights {path} do not fit backbone {name!r}: {len(missing)} entries missing, {len(wrong)} of another "
                f"shape: {shown}. Give the name of the model that the file was saved from."
            )
        self.model.load_state_dict({key: state[key] for key in own})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: normalised images, shape ``[B, 3, H, W]``; ``H`` and ``W`` are multiples of ``multiple``.

        Returns:
            Features, shape ``[B, channels, H / stride, W / stride]``, float.
        """
        maps = self.model.forward_intermediates(
            x, indices=self._indices, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        grid = maps[0].shape[-2:]
        aligned = []
        for features in maps:
            if self.norm:
                features = F.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2]).permute(0, 3, 1, 2)
            if features.shape[-2:] != grid:
                features = F.interpolate(features, grid, mode="bilinear", align_corners=False)
            aligned.append(features)
        return torch.cat(aligned, dim=1)
