"""Semi-dual Newton against POT's log-Sinkhorn: the same transport problem, objective and machine.

    python benchmarks/transport.py [--pixels 1000000] [--classes 5] [--repeats 3]

Prints a Markdown table: median seconds of each, their ratio, residuals, and the relative difference of the objectives.
Needs POT (``pip install 'monai_vslp[transport]'``).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import ot
import torch

from monai_vslp.variational import solve_transport, transport_plan


def objective(u: torch.Tensor, scores: torch.Tensor, mass: torch.Tensor, smoothing: float) -> float:
    """Primal value in float64: Σ a_i (−⟨Z_i, u_i⟩ + h⟨u_i, log u_i⟩)."""
    u, scores, mass = u.double(), scores.double(), mass.double()
    return float((mass * (-(scores * u) + smoothing * torch.xlogy(u, u)).sum(dim=0)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoothing", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    scores = torch.log_softmax(2 * torch.randn(options.classes, options.pixels, generator=generator), dim=0)
    mass = torch.full((options.pixels,), 1 / options.pixels)
    p = torch.softmax(torch.linspace(0, 2, options.classes, dtype=torch.float64), dim=0)
    cost = -scores.T.double().numpy()
    weights = np.full(options.pixels, 1 / options.pixels)
    threads = torch.get_num_threads()
    print(f"{options.pixels:,} pixels, {options.classes} classes, float32; POT in float64; {threads} threads\n")
    print("| ε | Newton s | residual | POT log-Sinkhorn s | residual | ratio | relative difference of objectives |")
    print("|---|---|---|---|---|---|---|")
    for smoothing in options.smoothing:
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            result = solve_transport(scores, mass, p, smoothing=smoothing, tolerance=1e-6)
            times.append(time.perf_counter() - start)
        u, _ = transport_plan(scores, result.psi, smoothing)
        residual = float(((u.double() * mass.double()).sum(dim=1) - p).abs().sum())
        start = time.perf_counter()
        plan = ot.sinkhorn(
            weights, p.numpy(), cost, reg=smoothing, method="sinkhorn_log", numItermax=2000, stopThr=1e-6, warn=False
        )
        pot = time.perf_counter() - start
        pot_residual = float(np.abs(plan.sum(axis=0) - p.numpy()).sum() + np.abs(plan.sum(axis=1) - weights).sum())
        ours = objective(u, scores, mass, smoothing)
        theirs = objective(torch.from_numpy(plan.T) / mass.double(), scores, mass, smoothing)
        newton = statistics.median(times)
        print(
            f"| {smoothing:g} | {newton:.3f} | {residual:.1e} | {pot:.2f} | {pot_residual:.1e} | {pot / newton:.0f}× | "
            f"{abs(ours - theirs) / abs(theirs):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
