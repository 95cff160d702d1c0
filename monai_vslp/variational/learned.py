"""Refinement by a trained, unrolled regularizer, with the interface and the result of the variational front door."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.marginal import Interval
from monai_vslp.variational.refine import RefinementResult
from monai_vslp.variational.tdv import TotalDeepVariation
from monai_vslp.variational.transport import solve_transport, transport_plan
from monai_vslp.variational.unrolled import UnrolledRefinement

__all__ = ["ARCHITECTURE", "WEIGHTS", "LearnedRefinement"]

ARCHITECTURE = "architecture.json"
WEIGHTS = "model.pt"


class LearnedRefinement:
    r"""A trained :class:`~monai_vslp.variational.unrolled.UnrolledRefinement`, applied to maps of any resolution.

    The regularizer knows structures in cells of the size it was trained at. A finer map is averaged to cells, refined there,
    brought back by linear interpolation of :math:`\log u`, and moved onto the proportions once more by a transport step at
    full resolution, so that :math:`\bar u = p` holds there.

    Args:
        model: the trained steps.
        cell: edge of a cell, px at the resolution of the network of the first stage.
    """

    def __init__(self, model: UnrolledRefinement, cell: int = 4) -> None:
        self.model, self.cell = model.eval(), cell

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> LearnedRefinement:
        """Load what ``monai-vslp train-regularizer`` left in a folder (``architecture.json``, ``model.pt``).

        Raises:
            InputError: a file is missing or does not belong to the other.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))
            state = torch.load(folder / WEIGHTS, map_location=device, weights_only=True)
            model = UnrolledRefinement(TotalDeepVariation(**described["regularizer"]), **described["unrolled"])
            model.load_state_dict(state)
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename} does not exist; train a regularizer with 'monai-vslp train-regularizer'."
            ) from error
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise InputError(f"{folder} holds no regularizer of this version: {error}") from error
        return cls(model.to(device), described["cell"])

    def __call__(
        self,
        confidence: torch.Tensor,
        proportions: torch.Tensor | None = None,
        mass: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        *,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
        trust: float = math.inf,
        pixel_size: float = 1.0,
        epsilon: float = 0.1,
    ) -> RefinementResult:
        """Refine one map.

        Args:
            confidence: q, shape ``[C, H, W]``, on the simplex.
            proportions: p, shape ``[C]``; None leaves them free.
            mass: tissue, shape ``[H, W]``; everywhere by default.
            image: shape ``[3, H, W]``, float in [0, 1], for a regularizer that sees the image.
            bounds: lower and upper fractions, shape ``[C]`` each, instead of ``proportions``; kept by the last transport step.
            trust: ρ.
            pixel_size: edge of a px of the map in px of the network.
            epsilon: entropy of the last transport step and of the energies that are reported.

        Returns:
            As :func:`~monai_vslp.variational.refine`; ``energies`` are those of the learned steps on the grid of cells.

        Raises:
            InputError: a map finer than a px or coarser than a cell of the regularizer.
        """
        q = confidence if confidence.dtype == torch.float64 else confidence.float()
        factor = round(self.cell / pixel_size)
        if factor < 1 or abs(factor * pixel_size - self.cell) > 1e-6:
            raise InputError(
                f"the regularizer was trained on cells of {self.cell} px, the map's pixels of {pixel_size} px do not divide "
                f"them; choose maps of {self.cell} px per pixel, or of a divisor."
            )
        classes, height, width = q.shape
        mass = torch.ones(height, width, dtype=q.dtype, device=q.device) if mass is None else mass.to(q)
        if float(mass.sum()) == 0.0:
            zeros, nan = torch.zeros_like(mass), torch.full((classes,), math.nan, dtype=torch.float64)
            return RefinementResult(
                q.clone(), q.argmax(dim=0), nan, [0.0], None, True, "no tissue: nothing to refine", nan, zeros, zeros.clone()
            )
        # The parameters are float32; the last transport step keeps the precision of the map.
        coarse, share = _cells(q.float(), mass.float(), factor)
        seen = None
        if self.model.regularizer.image_channels:
            if image is None:
                raise InputError("this regularizer sees the image; pass it (image_key of the transform).")
            seen = normalized(_pool(image.float(), factor))[None]
        p = None if proportions is None else torch.as_tensor(proportions, dtype=torch.float64, device=q.device)
        weights = next(self.model.parameters())
        with torch.no_grad():
            found = self.model.unroll(
                coarse[None].to(weights),
                None if p is None else p[None].to(weights),
                trust,
                share[None].to(weights),
                None if seen is None else seen.to(weights),
            )
            r = self.model.regularizer(found.log_u.exp() * (share > 0).to(weights), None if seen is None else seen.to(weights))[
                0
            ]
        log_u = _restored(found.log_u[0].to(q), (share > 0).to(q), factor, (height, width))
        flat, a = log_u.reshape(classes, -1), (mass / mass.sum()).reshape(-1)
        psi, residual = found.psi, None
        if bounds is not None:
            step = solve_transport(flat, a, Interval(*bounds), smoothing=1.0)
            u, log_u_flat = transport_plan(flat, step.psi, 1.0)
            psi, residual = step.psi, step.residual
        elif p is not None:
            # ψ of this step only corrects for interpolation; what explains the map are those of the last learned step.
            target = p if math.isinf(trust) else (coarse_marginal(found.log_u[0], share)).to(p)
            step = solve_transport(flat, a, target / target.sum(), smoothing=1.0)
            u, log_u_flat = transport_plan(flat, step.psi, 1.0)
            residual = step.residual
            psi = psi[0].double().cpu()
        else:
            u, log_u_flat = flat.softmax(dim=0), flat.log_softmax(dim=0)
            psi = torch.full((classes,), math.nan, dtype=torch.float64)
        fidelity = AssignmentFidelity(assignment_cost(q.reshape(classes, -1), self.model.delta), a, epsilon)
        tissue = (mass > 0).to(q)
        alpha = float(self.model.scalars(0.0 if p is None else trust)[1].detach())
        regularization = alpha * _restored(r[None].to(q), (share > 0).to(q), factor, (height, width))[0] * tissue
        steps = self.model.steps
        return RefinementResult(
            u=u.view_as(q),
            labels=u.view_as(q).argmax(dim=0),
            psi=psi,
            energies=found.energies[0].tolist(),
            residual=residual,
            converged=True,
            reason=f"{steps} learned steps up to the learned stopping time",
            proportions=(u * a).sum(dim=1, dtype=torch.float64).cpu(),
            fidelity_energy=fidelity.energy_map(u, log_u_flat.clamp_min(-1e4)).view(height, width) * tissue,
            regularization_energy=regularization,
        )


def coarse_marginal(log_u: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Proportions ``[C]`` of a map ``[C, h, w]``, float64."""
    return (log_u.exp() * (mass / mass.sum())).sum(dim=(1, 2), dtype=torch.float64)


def normalized(image: torch.Tensor) -> torch.Tensor:
    """Each channel of ``[3, h, w]`` with zero mean and unit variance, so that stain and exposure matter less."""
    centred = image - image.mean(dim=(1, 2), keepdim=True)
    return centred / centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-3)


def _pool(x: torch.Tensor, factor: int) -> torch.Tensor:
    return x if factor == 1 else F.avg_pool2d(x[None], factor, ceil_mode=True, count_include_pad=False)[0]


def _cells(q: torch.Tensor, mass: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences averaged over the tissue of each cell, and the tissue's share."""
    if factor == 1:
        return q, mass
    share = _pool(mass[None], factor)[0]
    mean = _pool(q * mass, factor) / share.clamp_min(1e-12)
    return torch.where(share > 0, mean, _pool(q, factor)), share


def _restored(x: torch.Tensor, tissue: torch.Tensor, factor: int, size: tuple[int, int]) -> torch.Tensor:
    """Interpolate ``[C, h, w]`` between cells of tissue (``[h, w]``, 0 or 1) alone; background has nothing to say."""
    if factor == 1:
        return x
    both = torch.cat([x * tissue, tissue[None]])
    fine = F.interpolate(both[None], scale_factor=factor, mode="bilinear", align_corners=False)[0][:, : size[0], : size[1]]
    return fine[:-1] / fine[-1:].clamp_min(1e-6)
