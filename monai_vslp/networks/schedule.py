"""What is trained when, and how fast: learning rates that fall off towards the input, and a head that learns first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monai.utils import optional_import
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["HeadFirst", "parameter_groups"]


def parameter_groups(
    network: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.01,
    layer_decay: float = 1.0,
    head_first: bool = False,
) -> list[dict[str, Any]]:
    r"""Parameters of a network for an optimizer, with a learning rate per layer of the backbone [1]_,

    .. math:: \eta_l = \eta\, d^{\,L + 1 - l}, \qquad l = 0, \dots, L,

    where layer 0 is the embedding of patches, :math:`L` the last block used, and the head learns at the full rate :math:`\eta`:
    early layers hold what any image needs and change little. Norms, biases, position embeddings and class tokens have no
    weight decay. Layers are those of timm's ``group_matcher``. A schedule must scale the rates of the groups rather than set
    one for all: ``OneCycleLR`` takes the list ``max_lr=[group["lr"] for group in groups]``.

    Args:
        network: with a :class:`~monai_vslp.networks.TokenBackbone` as ``backbone``; whatever else it has counts as head.
            Frozen parameters are left out, so call this before :class:`HeadFirst` freezes any.
        learning_rate: :math:`\eta`, larger than 0.
        weight_decay: at least 0.
        layer_decay: :math:`d` in (0, 1]; 1 for one rate. 0.65 to 0.9 is usual for pre-trained transformers.
        head_first: from the head to the input, for schedules that report the rate of the first group.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, from the input to the head; each trained parameter is in one.

    Raises:
        InputError: an option that cannot be, a network without such a backbone, or nothing to train.

    References:
        .. [1] H. Bao, L. Dong, S. Piao, F. Wei, "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022,
           arXiv 2106.08254, appendix (fine-tuning).
    """
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be larger than 0, got {learning_rate}.")
    if not weight_decay >= 0:
        raise InputError(f"weight_decay must be at least 0, got {weight_decay}.")
    if not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay must be in (0, 1], got {layer_decay}; 1 gives all layers the same rate.")
    model = getattr(getattr(network, "backbone", None), "model", None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{type(network).__name__} has no backbone of timm; parameter_groups takes a ConfidenceNet.")
    import_timm()
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    for group in groups:
        # timm gives the last layer the full rate; with its classifier removed that is a block, and the head comes after it.
        group["lr"] = learning_rate * layer_decay * group.pop("lr_scale")
    groups.sort(key=lambda group: group["lr"])
    rest = nn.ModuleDict({name: child for name, child in network.named_children() if child is not network.backbone})
    groups += [{**group, "lr": learning_rate} for group in param_groups_weight_decay(rest, weight_decay)]
    if not groups:
        raise InputError("all parameters of the network are frozen: there is nothing to train.")
    return groups[::-1] if head_first else groups


class HeadFirst:
    """Freeze the backbone for the first epochs of a run, then release it.

    A head that still guesses sends gradients into the backbone which destroy what it knows. Which parameters are frozen
    follows from the engine's epoch alone, so a run continued from a checkpoint needs nothing stored. While frozen the
    backbone is in evaluation mode, and the optimizer leaves it alone (no gradient, no weight decay). What was frozen before
    this handler was made stays frozen.

    Args:
        network: with ``backbone`` and the switch ``freeze_backbone``, such as a
            :class:`~monai_vslp.networks.ConfidenceNet`. Make optimizer and averages before the run starts: they take the
            parameters that are trained at some time.
        epochs: how many epochs the head learns alone; 0 for none.

    Raises:
        InputError: a negative number of epochs, or a network without backbone.
    """

    def __init__(self, network: nn.Module, epochs: int) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise InputError(f"the head learns alone for a whole number of epochs, 0 or more, got {epochs!r}.")
        if not isinstance(getattr(network, "backbone", None), nn.Module):
            raise InputError(f"{type(network).__name__} has no backbone to freeze; HeadFirst takes a ConfidenceNet.")
        self.network, self.epochs = network, epochs
        self._trained = [parameter for parameter in network.backbone.parameters() if parameter.requires_grad]
        self._switch = bool(getattr(network, "freeze_backbone", False))

    def attach(self, engine: Engine) -> None:
        """Register on a trainer; the order among other handlers does not matter."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)
        engine.add_event_handler(Events.COMPLETED, self._release)

    def __call__(self, engine: Engine) -> None:
        """Freeze or release for the epoch that begins."""
        self._set(engine.state.epoch <= self.epochs)

    def _release(self, engine: Engine) -> None:
        self._set(False)

    def _set(self, frozen: bool) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None  # a gradient of 0 would still be decayed and moved by momentum
        # The switch also keeps noise (stochastic depth) and batch statistics still.
        self.network.freeze_backbone = frozen or self._switch
        self.network.train(self.network.training)
