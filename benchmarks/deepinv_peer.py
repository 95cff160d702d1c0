r"""Chambolle–Pock of deepinv as a peer; runs in an environment of its own (deepinv 0.5.0).

    /path/to/deepinv/python benchmarks/deepinv_peer.py case.npz result.npz [--iterations 25 100]

Minimises :math:`\sum_i \langle c_i,u_i\rangle + \alpha\sum_i \varphi_\gamma(\lVert (Du)_i\rVert_2)` over simplex-valued u
with ``deepinv.optim.PDCP``: a data fidelity whose proximal map is a projection onto the simplex, and a prior on :math:`Du`
whose conjugate has the proximal map of the Huber function. Two things differ from the energy of ``refine``: there is no
entropy (ε = 0; its Euclidean proximal map has no closed form) and no marginal (deepinv has no part for a constraint that
couples all pixels).

Reads ``cost`` (float32 ``[C, H, W]``), ``alpha`` and ``huber``; writes per number of iterations ``u`` (``[runs, C, H, W]``,
float32), ``seconds`` and ``iterations``.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch


def _declare_torchvision_operators() -> None:
    """A CPU build of torch beside a CUDA build of torchvision lacks two operators that nothing here calls."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            return  # declared by torchvision itself
    globals()["_torchvision_library"] = library  # declarations live as long as this object


try:
    import torchvision  # noqa: F401
except RuntimeError:
    _declare_torchvision_operators()

from deepinv.optim import PDCP, DataFidelity, Prior  # noqa: E402
from deepinv.physics import Denoising  # noqa: E402


def gradient(u: torch.Tensor) -> torch.Tensor:
    """Forward differences (down, across) of ``[1, C, H, W]``, shape ``[1, C, H, W, 2]``; 0 at the last row and column."""
    d = torch.zeros(*u.shape, 2, dtype=u.dtype)
    d[:, :, :-1, :, 0] = u[:, :, 1:] - u[:, :, :-1]
    d[:, :, :, :-1, 1] = u[..., 1:] - u[..., :-1]
    return d


def gradient_adjoint(d: torch.Tensor) -> torch.Tensor:
    u = torch.zeros_like(d[..., 0])
    u[:, :, :-1] -= d[:, :, :-1, :, 0]
    u[:, :, 1:] += d[:, :, :-1, :, 0]
    u[..., :-1] -= d[:, :, :, :-1, 1]
    u[..., 1:] += d[:, :, :, :-1, 1]
    return u


def project_simplex(v: torch.Tensor) -> torch.Tensor:
    """Euclidean projection of each pixel of ``[1, C, H, W]`` onto the simplex, by sorting."""
    ordered = v.sort(dim=1, descending=True).values
    count = torch.arange(1, v.shape[1] + 1, dtype=v.dtype).view(1, -1, 1, 1)
    level = (ordered.cumsum(dim=1) - 1) / count
    active = (ordered > level).sum(dim=1, keepdim=True)
    return (v - level.gather(1, active - 1)).clamp_min(0)


class LinearOnSimplex(DataFidelity):
    """⟨y, x⟩ for x on the simplex; the measurement y is the cost."""

    def fn(self, x, y, physics, *args, **kwargs):
        return (x * y).flatten(1).sum(dim=1)

    def prox(self, x, y, physics, *args, gamma=1.0, **kwargs):
        return project_simplex(x - gamma * y)


class VectorialHuber(Prior):
    """α Σ_i φ_γ of the joint norm over classes and directions of ``[1, C, H, W, 2]``."""

    def __init__(self, alpha: float, huber: float) -> None:
        super().__init__()
        # A prior on Du, not on u: without this the solver evaluates it at u for its cost history.
        self.explicit_prior = False
        self.alpha = alpha
        self.huber = huber

    def prox_conjugate(self, d, *args, gamma=1.0, lamb=1.0, **kwargs):
        """Damp by the quadratic part, then bound the norm by α (closed form for λ = 1, which is what is used)."""
        damped = d / (1 + gamma * self.huber / self.alpha)
        return damped * (self.alpha / damped.square().sum(dim=(1, 4), keepdim=True).sqrt().clamp_min(self.alpha))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("result")
    parser.add_argument("--iterations", type=int, nargs="+", default=[25, 100])
    options = parser.parse_args()
    with np.load(options.case) as case:
        cost = torch.from_numpy(case["cost"])[None]
        alpha, huber = float(case["alpha"]), float(case["huber"])
    start_u = torch.softmax(-cost, dim=1)
    maps, seconds = [], []
    with torch.no_grad():
        for iterations in options.iterations:
            solver = PDCP(
                K=gradient,
                K_adjoint=gradient_adjoint,
                data_fidelity=LinearOnSimplex(),
                prior=VectorialHuber(alpha, huber),
                lambda_reg=1.0,
                stepsize=8**-0.5,
                stepsize_dual=8**-0.5,  # τ σ ‖D‖² = 1
                g_first=True,
                max_iter=iterations,
                early_stop=False,
                custom_init=lambda y, physics: {"est": (start_u, start_u, torch.zeros(*start_u.shape, 2))},
            )
            begin = time.perf_counter()
            u = solver(cost, Denoising())
            seconds.append(time.perf_counter() - begin)
            maps.append(project_simplex(u)[0].numpy())
    np.savez(options.result, u=np.stack(maps), seconds=np.array(seconds), iterations=np.array(options.iterations))


if __name__ == "__main__":
    main()
