"""A network as TorchScript, ONNX or a ``torch.export`` program, each compared with the network that it was made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.utils import convert_to_onnx, convert_to_torchscript
from monai.utils import look_up_option, optional_import

from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError

__all__ = ["EXPORT_FORMATS", "export_network"]

onnxruntime, has_onnxruntime = optional_import("onnxruntime")
_, has_onnx = optional_import("onnx")
_, has_onnxscript = optional_import("onnxscript")

TOLERANCE = 1e-3  # largest difference of logits that a conversion may make
REPORT = "export.json"


def _torchscript(network: torch.nn.Module, example: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    module = convert_to_torchscript(network, inputs=[example], use_trace=True)
    torch.jit.save(module, str(path))
    return torch.jit.load(str(path))


def _onnx(network: torch.nn.Module, example: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    if not has_onnx or not has_onnxscript:
        raise InputError("ONNX needs the packages onnx and onnxscript: pip install 'monai_vslp[export]', or leave onnx out.")
    import onnx

    model = convert_to_onnx(network, inputs=[example], input_names=["image"], output_names=["pred"])
    onnx.save(model, str(path))
    if not has_onnxruntime:
        raise InputError("what ONNX gives is checked with onnxruntime: pip install 'monai_vslp[export]', or leave onnx out.")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _program(network: torch.nn.Module, example: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with torch.no_grad():  # a program does not keep a network's own switches of gradients
        program = torch.export.export(network, (example,), strict=False)
    torch.export.save(program, str(path))
    return torch.export.load(str(path)).module()


EXPORT_FORMATS = {
    "torchscript": ("model.ts", _torchscript),
    "onnx": ("model.onnx", _onnx),
    "torch_export": ("model.pt2", _program),
}


def export_network(
    network: torch.nn.Module,
    folder: str | Path,
    formats: Sequence[str] = ("torchscript",),
    channels: int = 3,
    size: Sequence[int] = (224, 224),
) -> dict[str, Any]:
    """Write a network in other formats, and compare what they give with what it gives itself.

    The number of windows an image is cut into is fixed by ``size``: what is exported takes images of this size, in batches of
    one. A ``torch.export`` program and a TorchScript module need no code of this package.

    Args:
        network: in evaluation mode or not; it is exported in evaluation mode, on the CPU.
        folder: where ``model.ts``, ``model.onnx``, ``model.pt2`` and ``export.json`` go.
        formats: of ``torchscript`` (traced), ``onnx``, ``torch_export``.
        channels: of the input.
        size: height and width of the input, px.

    Returns:
        By format the file, and the largest absolute difference of its output from the network's; also in ``export.json``.

    Raises:
        ValueError: an unknown format; names the nearest.
        InputError: a package is missing, or an exported network gives something else.
    """
    folder = Path(folder)
    chosen = [look_up_option(name, tuple(EXPORT_FORMATS)) for name in formats]
    folder.mkdir(parents=True, exist_ok=True)
    network = network.cpu().eval().requires_grad_(False)  # tracing keeps no constants that learn
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.rand(1, channels, *size, generator=generator) for _ in range(2))
    with torch.no_grad():
        expected = network(other)
    found: dict[str, Any] = {}
    for name in chosen:
        file, convert = EXPORT_FORMATS[name]
        with atomic_path(folder / file) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every size that becomes a constant, which is meant here
            run = convert(network, example, Path(temporary))
            with torch.no_grad():
                difference = float((run(other) - expected).abs().max())
            if not difference <= TOLERANCE:
                raise InputError(f"the network as {name} differs from the network by up to {difference:.3g}; it is not kept.")
        found[name] = {"file": file, "size": list(size), "largest_difference": difference}
    write_json(folder / REPORT, found)
    return found
