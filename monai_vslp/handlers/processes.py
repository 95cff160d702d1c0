"""Training by several processes: one gradient for all of them, and one of them that writes."""

from __future__ import annotations

import os
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from monai.data import DistributedSampler
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import optional_import

from monai_vslp.handlers.checkpoint import RunCheckpoint
from monai_vslp.handlers.tracking import MLflowTracker
from monai_vslp.handlers.training import TrainingProgress
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = [
    "GradientAverage",
    "end_processes",
    "handlers_of_process",
    "process_device",
    "process_trainer",
    "seed_of_process",
    "share_of_batch",
    "shared_sampler",
    "start_processes",
]


def process_device() -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU where there is none.

    Raises:
        InputError: not started by ``torchrun``, or there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "multi_gpu_train.json is for processes that torchrun starts: torchrun --nproc_per_node=2 -m monai.bundle run ..., "
            "or monai-vslp train ... --processes 2. For one process leave it out."
        )
    rank = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise InputError(f"process {rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Start as many.")
    return torch.device("cuda", rank)


def start_processes(device: torch.device) -> None:
    """Join the other processes: over NCCL between GPUs, over gloo on CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def end_processes() -> None:
    """Part from the other processes, where they were joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of_batch(batch_size: int) -> int:
    """Images per step of one process, where ``batch_size`` is that of all.

    Raises:
        InputError: they cannot be shared evenly.
    """
    count = dist.get_world_size()
    if batch_size < count or batch_size % count:
        raise InputError(
            f"batch_size {batch_size} cannot be shared evenly by {count} processes; the nearest that can is "
            f"{max(round(batch_size / count), 1) * count}."
        )
    return batch_size // count


class GradientAverage:
    r"""Replace each process's gradient by the mean over all P processes,

    .. math:: g = \tfrac1P\sum_{r=1}^P g_r,

    which is the gradient of a mean over the images of all processes where each has as many, and every image has tissue.
    Weights start as those of the first process. Between the backward pass and the step of the optimizer, so that it does not
    matter how often a step runs the network, which parameters are frozen meanwhile, or whether a loss is scaled:
    ``DistributedDataParallel`` wraps one forward pass of one module and a fixed set of parameters.

    Args:
        network: whose parameters' gradients are averaged.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Register on a trainer of MONAI, before handlers that copy weights."""
        engine.add_event_handler(Events.STARTED, self._share)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    @torch.no_grad()
    def _share(self, engine: Engine) -> None:
        for value in (*self.network.parameters(), *self.network.buffers()):
            dist.broadcast(value.data, src=0)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Average the gradients of the step that runs."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        by_kind: dict[torch.dtype, list[torch.Tensor]] = {}
        for gradient in gradients:
            by_kind.setdefault(gradient.dtype, []).append(gradient)
        for same in by_kind.values():  # one message for all layers
            flat = torch.cat([gradient.flatten() for gradient in same])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, mean in zip(same, flat.split([gradient.numel() for gradient in same])):
                gradient.copy_(mean.view_as(gradient))


class _Resume:
    """Continue a checkpoint, write none."""

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.checkpoint.resume)


def handlers_of_process(handlers: Sequence[Any], network: torch.nn.Module) -> list[Any]:
    """Handlers of a trainer for this process: all average gradients, the first alone writes, tracks and shows progress.

    Args:
        handlers: of a trainer that is alone.
        network: the network trained.
    """
    own: list[Any] = [GradientAverage(network)]
    for handler in handlers:
        if dist.get_rank() > 0 and isinstance(handler, MLflowTracker):
            continue
        if dist.get_rank() > 0 and isinstance(handler, RunCheckpoint):
            handler = _Resume(handler)
        if dist.get_rank() > 0 and isinstance(handler, TrainingProgress):
            handler.show = False  # it still takes part in the mean loss of all
        own.append(handler)
    return own


def process_trainer(train_handlers: Sequence[Any] = (), **arguments: Any) -> SupervisedTrainer:
    """MONAI's trainer with the handlers that this process has, see :func:`handlers_of_process`.

    Args:
        train_handlers: of a trainer that is alone.
        **arguments: as of ``SupervisedTrainer``.
    """
    return SupervisedTrainer(train_handlers=handlers_of_process(train_handlers, arguments["network"]), **arguments)


def seed_of_process(seed: int) -> int:
    """Seed of draws that the processes share out: another one for each, so that they draw different batches."""
    return seed * dist.get_world_size() + dist.get_rank()


def shared_sampler(dataset: Sized) -> DistributedSampler:
    """Order of held-out items that the processes share; where there are fewer items than processes, each takes all."""
    shared = len(dataset) >= dist.get_world_size()
    return DistributedSampler(
        dataset,
        even_divisible=False,
        num_replicas=dist.get_world_size() if shared else 1,
        rank=dist.get_rank() if shared else 0,
        shuffle=False,
    )
