"""The refinement against its peers on the synthetic test of the method: one command, one table.

    python benchmarks/refinement.py [--size 1024] [--classes 3 5] [--output table.md]
        [--crf-python /path/to/python] [--deepinv-python /path/to/python]

Needs nothing but the package; the dense CRF and deepinv run in environments of their own (see ``benchmarks/README.md``) and
their rows say so where those are not given. Times are medians of ``--repeats`` runs of the whole call in this process.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peers import Trace, energy, primal_dual

from monai_vslp.data.raters import simulate_raters
from monai_vslp.data.synthetic_labels import reference_case
from monai_vslp.metrics import ConfusionMatrix
from monai_vslp.variational import RefinementResult, refine

EPSILON, DELTA, HUBER = 0.1, 1e-3, 0.1
FEASIBLE = 1e-5  # ‖ū − p‖₁ that counts as meeting the marginal; refine itself goes to 1e-6


def miou(labels: torch.Tensor | np.ndarray, truth: torch.Tensor, classes: int) -> float:
    matrix = ConfusionMatrix(classes)
    matrix.update(labels, truth)
    return matrix.compute().miou


def median_time(call: Callable[[], RefinementResult], repeats: int) -> tuple[RefinementResult, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def coloured_image(labels: torch.Tensor, classes: int, contrast: float, seed: int) -> np.ndarray:
    """A picture for the dense CRF, which needs one: a colour per class under noise, uint8 ``[H, W, 3]``.

    ``contrast`` is the distance of the class colours in standard deviations (12 grey levels) of the noise; 0 shows nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(classes, 3, generator=generator)
    # Mean distance of two colours drawn like this is about 2.26 standard deviations.
    image = 150 + 12 * (contrast / 2.26 * colours[labels] + torch.randn(*labels.shape, 3, generator=generator))
    return image.round().clamp(0, 255).to(torch.uint8).numpy()


class Table:
    """Rows of a Markdown table, printed as they come and kept for the output file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def row(self, *cells: object) -> None:
        self.line("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")

    def head(self, *names: str) -> None:
        self.line("| " + " | ".join(names) + " |")
        self.line("|" + "---|" * len(names))


def run_peer(python: str, script: str, arrays: dict[str, np.ndarray], *arguments: str) -> dict[str, np.ndarray]:
    """Run a peer's script with its own interpreter on ``arrays``; returns what it saved.

    Raises:
        RuntimeError: the script failed; carries the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        case, result = Path(folder) / "case.npz", Path(folder) / "result.npz"
        np.savez(case, **arrays)
        command = [python, str(Path(__file__).with_name(script)), str(case), str(result), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(str(error)) from error
        if done.returncode != 0:
            raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:]) or f"exit status {done.returncode}")
        with np.load(result) as data:
            return {name: data[name] for name in data.files}


def when(trace: Trace, target: float, residual: float) -> str:
    reached = trace.reached(target, residual)
    return "not reached" if reached is None else f"{reached[0]:.2f} s ({reached[1]})"


def gap(value: float, best: float) -> str:
    return f"{(value - best) / abs(best):.1e}"


def solvers(table: Table, cost, confidence, labels, p, classes: int, options) -> None:
    """Ours and PDHG on the same energy, without and with hard marginal."""
    table.line("Same energy, same machine, same threads. Time of a whole `refine` call (in brackets: accepted steps on the")
    table.line("finest grid); of PDHG the iterations alone, for the best of")
    table.line(
        "the step ratios tried; evaluations of the energy are not counted, nor the search for the ratio. E* is the lowest"
    )
    table.line(f"feasible energy found by either (PDHG with {options.pdhg_iterations} iterations). With the marginal, PDHG")
    table.line(f"counts once ‖ū − p‖₁ ≤ {FEASIBLE:g}; `refine` ends at its own residual.\n")
    table.head(
        "problem", "refine s (steps)", "energy", "E/E* − 1", "‖ū − p‖₁", "mIoU", "PDHG to the same energy",
        "PDHG to E*(1 + 1e-4)", "PDHG to E*(1 + 1e-5)", "PDHG s per iteration", "PDHG mIoU",
    )  # fmt: skip
    kwargs = {"alpha": options.alpha, "epsilon": EPSILON, "huber": HUBER}
    for name, proportions in (("no proportions", None), ("hard marginal", p)):
        ours, seconds = median_time(
            lambda given=proportions: refine(confidence, given, alpha=options.alpha, tolerance=options.tolerance),
            options.repeats,
        )
        own = energy(ours.u, cost, **kwargs)
        if abs(own - ours.energies[-1]) > 1e-5 * abs(own):
            raise RuntimeError(f"two evaluations of one energy differ: {own} and {ours.energies[-1]}.")
        residual_limit = math.inf if proportions is None else FEASIBLE
        traces = [
            primal_dual(cost, proportions=proportions, iterations=options.pdhg_iterations, ratio=ratio, **kwargs)
            for ratio in options.ratios
        ]
        feasible = [e for t in traces for e, r in zip(t.energies, t.residuals) if r <= min(residual_limit, 1e-6)]
        # An iterate that misses the marginal by a little may lie below the minimum: only the feasible ones define E*.
        best = min([own, *feasible])
        targets = (own, best + 1e-4 * abs(best), best + 1e-5 * abs(best))
        quickest = min(traces, key=lambda t: (t.reached(targets[1], residual_limit) or (math.inf,))[0])
        residual = f"{float((ours.proportions - p).abs().sum()):.0e}" if proportions is not None else "–"
        table.row(
            name,
            f"{seconds:.2f} ({len(ours.energies) - 1})",
            f"{own:.6f}",
            gap(own, best),
            residual,
            f"{miou(ours.labels, labels, classes):.3f}",
            *(when(quickest, target, residual_limit) for target in targets),
            f"{quickest.seconds[-1] / quickest.iterations[-1]:.3f}",
            f"{miou(quickest.u.argmax(dim=0), labels, classes):.3f}",
        )
    table.line()


def quality(table: Table, cost, confidence, labels, p, classes: int, options) -> None:
    """Each term alone, both together, and what others offer."""
    table.line(f"mIoU from global counts; α = {options.alpha:g}, ε = {EPSILON:g}, tolerance {options.tolerance:g}.\n")
    table.head("method", "seconds", "mIoU", "remark")
    table.row("argmax", None, f"{miou(confidence.argmax(dim=0), labels, classes):.3f}", None)
    rows = {
        "transport alone": (p, math.inf, 0.0),
        "TV alone": (None, math.inf, options.alpha),
        "TV + KL, ρ = 1": (p, 1.0, options.alpha),
        "TV + KL, ρ = 3": (p, 3.0, options.alpha),
        "TV + hard marginal": (p, math.inf, options.alpha),
    }
    for name, (given, trust, alpha) in rows.items():
        result, seconds = median_time(
            lambda given=given, trust=trust, alpha=alpha: refine(
                confidence, given, trust=trust, alpha=alpha, tolerance=options.tolerance
            ),
            options.repeats,
        )
        table.row(
            name, f"{seconds:.2f}", f"{miou(result.labels, labels, classes):.3f}", None if result.converged else result.reason
        )
    dense_crf(table, confidence, labels, classes, options)
    deepinv(table, cost, labels, classes, options)
    table.line()


def dense_crf(table: Table, confidence, labels, classes: int, options) -> None:
    if options.crf_python is None:
        table.row("dense CRF", None, None, "skipped: no --crf-python")
        return
    probabilities = confidence.permute(1, 2, 0).contiguous().numpy()
    for name, contrast in (("dense CRF, empty image", 0.0), ("dense CRF, image in class colours", options.contrast)):
        image = coloured_image(labels, classes, contrast, seed=options.seed)
        try:
            found = run_peer(
                options.crf_python,
                "crf_peer.py",
                {"image": image, "probabilities": probabilities},
                "--repeats",
                str(options.repeats),
            )
        except RuntimeError as error:
            table.row(name, None, None, f"skipped: {error}")
            return
        scores = [miou(found_labels, labels, classes) for found_labels in found["labels"]]
        top = int(np.argmax(scores))
        seen = "" if contrast == 0 else f"; sees colours {contrast:g} standard deviations apart, which no other row does"
        table.row(
            name, f"{found['seconds'][top]:.2f}", f"{scores[top]:.3f}",
            f"best of {len(scores)} parameter sets by the true labels: {found['names'][top]}{seen}",
        )  # fmt: skip


def deepinv(table: Table, cost, labels, classes: int, options) -> None:
    if options.deepinv_python is None:
        table.row("deepinv PDCP", None, None, "skipped: no --deepinv-python")
        return
    arrays = {"cost": cost.numpy(), "alpha": np.array(options.alpha), "huber": np.array(HUBER)}
    steps = [str(n) for n in options.deepinv_iterations]
    try:
        found = run_peer(options.deepinv_python, "deepinv_peer.py", arrays, "--iterations", *steps)
    except RuntimeError as error:
        table.row("deepinv PDCP", None, None, f"skipped: {error}")
        return
    for u, seconds, iterations in zip(torch.from_numpy(found["u"]), found["seconds"], found["iterations"]):
        crisp = energy(u, cost, alpha=options.alpha, epsilon=0.0, huber=HUBER)
        table.row(
            "deepinv PDCP, TV alone", f"{seconds:.2f}", f"{miou(u.argmax(dim=0), labels, classes):.3f}",
            f"{iterations} iterations; ε = 0 and no proportions; its own energy (ε = 0) {crisp:.6f}",
        )  # fmt: skip
    ours = refine(confidence_of(cost), None, alpha=options.alpha, tolerance=options.tolerance)
    crisp = energy(ours.u, cost, alpha=options.alpha, epsilon=0.0, huber=HUBER)
    table.row("(TV alone, judged by the energy of deepinv)", None, None, f"{crisp:.6f}, though minimised with ε = {EPSILON:g}")


def confidence_of(cost: torch.Tensor) -> torch.Tensor:
    """The confidence that a cost came from."""
    return (torch.exp(-cost) - DELTA).clamp_min(0)


def wrong_proportions(table: Table, confidence, labels, p, classes: int, options) -> None:
    """Hard against finite trust for proportions that are off."""
    # The confidences lean towards the last class: a finite trust undoes an error against that bias, not one along with it.
    tilt = torch.linspace(0.5, -0.5, classes, dtype=torch.float64)
    given = {}
    for name, bent in (
        ("against the bias: p · exp(0.5 … −0.5)", p * tilt.exp()),
        ("with the bias: p · exp(−0.5 … 0.5)", p / tilt.exp()),
    ):
        given[name] = [bent / bent.sum()]
    for level in ("low", "medium"):
        drawn = simulate_raters(p[None].numpy(), level, raters=options.raters, seed=options.seed)[:, 0]
        given[f"{options.raters} simulated raters, {level} noise"] = [torch.from_numpy(row) for row in drawn]
    table.line("Wrong proportions: mean mIoU; each rater's estimate refined by itself (rounded to 5 or 10 %, as people do).\n")
    table.head("proportions", "mean ‖p̃ − p‖₁", "hard", "ρ = 3", "ρ = 1")
    for name, estimates in given.items():
        off = float(torch.stack([(estimate - p).abs().sum() for estimate in estimates]).mean())
        scores = []
        for trust in (math.inf, 3.0, 1.0):
            results = [refine(confidence, e, trust=trust, alpha=options.alpha, tolerance=options.tolerance) for e in estimates]
            scores.append(statistics.mean(miou(result.labels, labels, classes) for result in results))
        table.row(name, f"{off:.2f}", *(f"{score:.3f}" for score in scores))
    table.line()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the map in px")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=2.0)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="stopping rule of refine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--raters", type=int, default=3)
    parser.add_argument("--pdhg-iterations", type=int, default=300)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0], help="step ratios of PDHG; the best is shown")
    parser.add_argument(
        "--contrast", type=float, default=4.0, help="class colours for the dense CRF, standard deviations apart"
    )
    parser.add_argument("--crf-python", help="interpreter of the environment with SimpleCRF")
    parser.add_argument("--deepinv-python", help="interpreter of the environment with deepinv")
    parser.add_argument("--deepinv-iterations", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    table = Table()
    table.line(
        f"`python benchmarks/refinement.py {' '.join(sys.argv[1:])}`\n\n{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, median of {options.repeats}.\n"
    )
    for classes in options.classes:
        labels, confidence, p = reference_case(options.size, classes, options.seed)
        cost = -torch.log(confidence + DELTA)
        shares = ", ".join(f"{share:.3f}" for share in p.tolist())
        table.line(f"### {options.size}² pixels, {classes} classes, proportions {shares} (seed {options.seed})\n")
        solvers(table, cost, confidence, labels, p, classes, options)
        quality(table, cost, confidence, labels, p, classes, options)
        wrong_proportions(table, confidence, labels, p, classes, options)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(table.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
