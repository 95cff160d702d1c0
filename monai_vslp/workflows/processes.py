"""Run a training config in several processes of this machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import tracking_settings

__all__ = ["OVERLAY", "check_processes", "run_processes"]

OVERLAY = "multi_gpu_train.json"


def check_processes(count: int, batch_size: int) -> None:
    """Raise before anything is computed where ``count`` processes cannot train together here.

    Args:
        count: processes.
        batch_size: images per step of all of them.

    Raises:
        InputError: no such number, a batch that cannot be shared evenly, fewer GPUs, or torch without ``distributed``.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"processes must be a whole number from 1, got {count!r}.")
    if count == 1:
        return
    if batch_size % count:
        raise InputError(
            f"batch_size {batch_size} cannot be shared evenly by {count} processes; choose a multiple, such as "
            f"{max(round(batch_size / count), 1) * count}."
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise InputError(f"{count} processes need {count} GPUs, this machine has {torch.cuda.device_count()}.")
    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed; train with one process.")


def run_processes(
    run: Path, count: int, names: Sequence[str] = ("train.json",), progress: bool = True, **overrides: str
) -> None:
    """Run configs of a bundle folder, with the overlay for several processes, as ``torchrun`` does; tracked in MLflow.

    Args:
        run: bundle folder.
        count: processes on this machine; each has a GPU, or all share its CPUs.
        names: configs, the first with overlays behind it.
        progress: show progress bars.
        **overrides: values of the config, by their ids.

    Raises:
        RuntimeError: a process failed; its message is on stderr.
        KeyboardInterrupt: after the processes have ended.
    """
    with socket.socket() as probe:  # a free port, so that runs beside each other do not meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configs = [str(run / "configs" / name) for name in (*names, OVERLAY)]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--nnodes=1",
        "--master_addr=127.0.0.1", f"--master_port={port}", "-m", "monai.bundle", "run", "--config_file", str(configs),
        "--meta_file", str(run / "configs" / "metadata.json"), "--bundle_root", str(run), "--progress", str(progress),
        "--logging_file", "False", "--tracking", str(tracking_settings(run)),
        *(part for key, value in overrides.items() for part in (f"--{key}", value)),
    ]  # fmt: skip
    # In a session of its own a terminal's Ctrl-C reaches it once, through here, and so does a signal to this process alone.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code:
        raise RuntimeError(
            f"training by {count} processes ended with exit status {code}; what went wrong stands above. Epochs that were "
            "finished are kept: the same command goes on after them."
        )
