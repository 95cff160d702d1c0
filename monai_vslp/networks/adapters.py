"""Low-rank adapters: fine-tune a large backbone through a few small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.utils.errors import InputError

__all__ = [
    "TARGETS",
    "LoRALinear",
    "adapter_state_dict",
    "add_lora",
    "load_adapters",
    "merge_lora",
    "merged_state_dict",
    "trainable_parameters",
]

# Names of timm: attention (qkv, proj) and MLP (fc1, fc2; fc1_g and fc1_x of a gated one).
TARGETS = ("qkv", "proj", "fc1*", "fc2")


def _merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return (weight.double() + scale * (b.double() @ a.double())).to(weight)


class LoRALinear(nn.Linear):
    r"""Linear layer with a low-rank correction [1]_,

    .. math:: y = W x + b + \frac{s}{r}\, B A x, \qquad A\in\mathbb R^{r\times n},\ B\in\mathbb R^{m\times r},

    with :math:`B = 0` at the start, which leaves the output as it was. :math:`W` and :math:`b` are frozen and keep their names,
    ``weight`` and ``bias``, so that state dicts differ from those of a plain layer by ``lora_a`` and ``lora_b`` alone.

    Args:
        linear: the layer to adapt; its parameters are taken over, not copied, and frozen.
        rank: :math:`r`, at least 1.
        alpha: :math:`s`, larger than 0.

    References:
        .. [1] E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3), arXiv 2106.09685.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        inputs, outputs = linear.in_features, linear.out_features
        super().__init__(inputs, outputs, linear.bias is not None, device="meta")  # its own weights would be thrown away
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.rank, self.scale = rank, alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, inputs))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape ``[..., m]`` for ``x`` of shape ``[..., n]``."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Plain layer with :math:`W + (s/r) B A`, computed in double precision and rounded once; frozen as this one."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        merged = _merged_weight(self.weight, self.lora_a, self.lora_b, self.scale)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """As of a linear layer, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def add_lora(
    module: nn.Module, rank: int = 8, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> dict[str, LoRALinear]:
    """Freeze a module and give its linear layers trainable low-rank adapters.

    All parameters of ``module`` are frozen; the adapters alone learn. Its output does not change until they do. Works on any
    module, such as a :class:`~monai_vslp.networks.TokenBackbone` (ViT, Swin, ConvNeXt) whose later blocks were removed.

    Args:
        module: changed in place. Load its weights first: they keep their names, and adapters get their own.
        rank: rank of the correction; limited by the layers' own widths.
        alpha: :math:`s` of :class:`LoRALinear`; None for ``rank``, a correction of unit scale.
        targets: which linear layers, as patterns (``*``, ``?``) of their full name or of its last part, such as ``qkv`` or
            ``model.blocks.1?.*``. Layers that are no ``torch.nn.Linear`` (1×1 convolutions) are passed over.

    Returns:
        Name → adapted layer, in the module's order.

    Raises:
        InputError: an impossible rank or scale, adapters there already, or no linear layer of such a name.
    """
    alpha = float(rank) if alpha is None else alpha
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"the rank of adapters must be a whole number of at least 1, got {rank!r}.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha of adapters must be larger than 0, got {alpha}.")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    linear = {name: layer for name, layer in module.named_modules() if name and isinstance(layer, nn.Linear)}
    if any(isinstance(layer, LoRALinear) for layer in linear.values()):
        raise InputError("the network has adapters already: merge them (merge_lora) before adding others.")
    chosen = [
        name
        for name in linear
        if any(fnmatch(name, pattern) or fnmatch(name.rpartition(".")[2], pattern) for pattern in patterns)
    ]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none at all"
        raise InputError(f"no linear layer of the network is named {' or '.join(patterns)}; its linear layers are: {known}.")
    most = min(min(linear[name].in_features, linear[name].out_features) for name in chosen)
    if rank > most:
        raise InputError(f"the rank of adapters can be at most {most}, the narrowest layer chosen, got {rank}.")
    module.requires_grad_(False)
    layers = {name: LoRALinear(linear[name], rank, alpha) for name in chosen}
    for name, layer in layers.items():
        _replace(module, name, layer)
    return layers


def merge_lora(module: nn.Module) -> int:
    """Replace adapted layers by plain ones of the same output: no cost at inference, no trace in the state dict.

    Args:
        module: changed in place; what was frozen stays frozen.

    Returns:
        How many layers were merged; 0 for a module without adapters.
    """
    layers = {name: layer for name, layer in module.named_modules() if name and isinstance(layer, LoRALinear)}
    for name, layer in layers.items():
        _replace(module, name, layer.merged())
    return len(layers)


@torch.no_grad()
def merged_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """State dict of the plain network that :func:`merge_lora` would make, while ``module`` stays as it is.

    Args:
        module: with or without adapters.
        state: of ``module``, such as averaged weights; None for its own.

    Returns:
        Fits a network made without adapters, and computes the same as ``module`` with ``state``.
    """
    state = dict(module.state_dict() if state is None else state)
    for name, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            key, a, b = (f"{name}.{part}" if name else part for part in ("weight", "lora_a", "lora_b"))
            state[key] = _merged_weight(state[key], state.pop(a), state.pop(b), layer.scale)
    return state


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def adapter_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' weights alone, by their names in ``module.state_dict()``: a small file beside a large backbone's.

    Raises:
        InputError: the module has no adapters.
    """
    state = {name: value for name, value in module.state_dict().items() if _is_adapter(name)}
    if not state:
        raise InputError("the network has no adapters to save: add them first (add_lora, or adapters={'rank': 8}).")
    return state


def load_adapters(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what :func:`adapter_state_dict` gave into a module with the same adapters; its other weights stay.

    Args:
        module: changed in place.
        state: name → tensor.

    Raises:
        InputError: adapters are missing, unknown, or of another rank; nothing was loaded.
    """
    own = {name: value for name, value in module.state_dict().items() if _is_adapter(name)}
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise InputError(
            f"these adapters do not fit the network: {len(wrong)} entries are missing, unknown or of another shape, such as "
            f"{wrong[0]}; make it with the rank and targets the adapters were trained with."
        )
    module.load_state_dict(dict(state), strict=False)


def trainable_parameters(module: nn.Module) -> tuple[int, int]:
    """How many numbers of a module are trained, and how many it has."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
