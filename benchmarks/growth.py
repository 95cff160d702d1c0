"""How time and memory of a refinement grow with the map: in memory, and from a store by way of scratch files.

    python benchmarks/growth.py [--sizes 1e6 4e6 1.6e7 1e8] [--classes 5] [--folder /fast/disk]

Total variation with a hard marginal. Each run is a process of its own; sizes are rounded to squares of 512 px blocks, and
the map is one smooth random field, repeated, with noise of its own in each block, so that its statistics do not depend on its
size. Prints a Markdown table: time per pixel in all, and per pixel and iteration on the finest grid (reading, writing and
coarser grids left out), each with its ratio to that of the smallest size, and the peak of memory beyond what imports take.
In-memory runs are left out where they would take more than half of the memory there is. Needs Zarr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr

from monai_vslp.variational.outofcore import refine_store, scratch_bytes
from monai_vslp.variational.refine import refine

BLOCK = 512
FIELD = 2 * BLOCK  # px after which the smooth field repeats
BYTES_IN_MEMORY = 4 * 12  # per pixel and class, for what refine holds at its peak, measured


def proportions(classes: int) -> torch.Tensor:
    return torch.softmax(torch.linspace(0, 1, classes, dtype=torch.float64), dim=0)


def make(path: Path, side: int, classes: int) -> None:
    """Confidences ``[classes, side, side]`` in float16, written block by block."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, classes, FIELD // 64, FIELD // 64, generator=generator)
    coarse = torch.nn.functional.pad(coarse, (2, 2, 2, 2), mode="circular")
    field = torch.nn.functional.interpolate(coarse, scale_factor=64, mode="bicubic")[0, :, 128:-128, 128:-128]
    array = zarr.create_array(str(path), shape=(classes, side, side), chunks=(classes, BLOCK, BLOCK), dtype="float16")
    for row in range(0, side, BLOCK):
        for column in range(0, side, BLOCK):
            i, j = row % FIELD, column % FIELD
            noise = 1.5 * torch.randn(classes, BLOCK, BLOCK, generator=generator)
            q = torch.softmax(2.0 * field[:, i : i + BLOCK, j : j + BLOCK] + noise, dim=0)
            array[:, row : row + BLOCK, column : column + BLOCK] = q.numpy().astype(np.float16)


def resident(name: str) -> int:
    """Memory of this process, bytes: ``VmRSS`` now or ``VmHWM`` at its peak (``ru_maxrss`` would include the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


def child(kind: str, path: Path, tolerance: float) -> None:
    """Refine one map in one way; prints the figures as JSON."""
    source = zarr.open_array(str(path), mode="r")
    classes, side, _ = source.shape
    before, stamps = resident("VmRSS"), []

    def look(step) -> None:
        if step.pixels == side * side:
            stamps.append(time.perf_counter())

    start = time.perf_counter()
    options = {"tolerance": tolerance, "on_step": look}
    if kind == "memory":
        result = refine(torch.from_numpy(source[...]).float(), proportions(classes), **options)
    else:
        result = refine_store(source, path.parent / "out.zarr", proportions(classes), **options)
    seconds = time.perf_counter() - start
    steps = len(stamps) - 1
    figures = {
        "seconds": seconds,
        "steps": steps,
        "per_step": (stamps[-1] - stamps[0]) / max(1, steps),
        "memory": resident("VmHWM") - before,
        "energy": result.energies[-1],
        "converged": result.converged,
    }
    print("FIGURES " + json.dumps(figures))


def measure(kind: str, path: Path, tolerance: float) -> dict:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(path), "--tolerance", str(tolerance)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{kind} on {path} failed:\n{done.stderr[-3000:]}")
    shutil.rmtree(path.parent / "out.zarr", ignore_errors=True)
    return json.loads(done.stdout.split("FIGURES ")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 4e6, 1.6e7, 1e8], help="pixels")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--kinds", nargs="+", choices=["memory", "store"], default=["memory", "store"])
    parser.add_argument("--folder", type=Path, help="where maps and scratch files lie; a temporary folder by default")
    parser.add_argument("--child", choices=["memory", "store"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.tolerance)
        return
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(
        f"{options.classes} classes, tolerance {options.tolerance:g}, float32, {torch.get_num_threads()} threads, "
        f"{available / 2**30:.0f} GiB of memory\n"
    )
    print("| map | way | steps | total s | µs/px | ratio | ns/px/step | ratio | extra memory MiB | scratch GiB | energy |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    first: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="growth-") as folder:
        for size in sorted(options.sizes):
            side = max(1, round(size**0.5 / BLOCK)) * BLOCK
            pixels = side * side
            path = Path(folder) / "q.zarr"
            make(path, side, options.classes)
            for kind in options.kinds:
                if kind == "memory" and pixels * options.classes * BYTES_IN_MEMORY > available / 2:
                    print(f"| {side}² | {kind} | | | | | | | would not fit | | |", flush=True)
                    continue
                found = measure(kind, path, options.tolerance)
                total, step = found["seconds"] / pixels, found["per_step"] / pixels
                base = first.setdefault(kind, (total, step))
                scratch = scratch_bytes((side, side), options.classes, mass=False) / 2**30 if kind == "store" else 0
                print(
                    f"| {side}² | {kind} | {found['steps']}{'' if found['converged'] else ' (limit)'} | {found['seconds']:.1f} "
                    f"| {total * 1e6:.2f} | {total / base[0]:.2f} | {step * 1e9:.0f} | {step / base[1]:.2f} "
                    f"| {found['memory'] / 2**20:.0f} | {scratch:.2f} | {found['energy']:.6f} |",
                    flush=True,
                )
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
