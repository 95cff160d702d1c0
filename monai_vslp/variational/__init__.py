"""The variational stage: potentials, transport, solver and their front door. Knows nothing of slides or engines."""

from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.refine import RefinementOptions, RefinementResult, refine
from monai_vslp.variational.regularizer import HuberTotalVariation, image_edge_weight
from monai_vslp.variational.solver import Solution, StoppingRule, minimize
from monai_vslp.variational.transport import TransportResult, solve_transport, transport_plan

__all__ = [
    "AssignmentFidelity",
    "HuberTotalVariation",
    "RefinementOptions",
    "RefinementResult",
    "Solution",
    "StoppingRule",
    "TransportResult",
    "assignment_cost",
    "image_edge_weight",
    "minimize",
    "refine",
    "solve_transport",
    "transport_plan",
]
