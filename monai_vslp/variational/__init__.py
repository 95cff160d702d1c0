"""The variational stage: potentials, transport, solver and their front door. Knows nothing of slides or engines."""

from monai_vslp.variational.explain import (
    BandMove,
    FlipBand,
    energy_report,
    flip_band,
    marginal_sensitivity,
    offset_sensitivity,
    pixel_sensitivity,
)
from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.fusion import FusionFidelity, spread_weights
from monai_vslp.variational.implicit import implicit_offsets
from monai_vslp.variational.learned import LearnedRefinement
from monai_vslp.variational.marginal import (
    MARGINALS,
    Interval,
    KullbackLeibler,
    MarginalSum,
    Wasserstein,
    trust_from_spread,
)
from monai_vslp.variational.network import RefinementNetwork
from monai_vslp.variational.outofcore import StoreResult, refine_store
from monai_vslp.variational.potential import FIDELITIES, REGULARIZERS, Potential, WeightedSum
from monai_vslp.variational.refine import RefinementOptions, RefinementResult, refine, refine_all
from monai_vslp.variational.regularizer import HuberTotalVariation, image_edge_weight
from monai_vslp.variational.solver import Problem, Solution, Step, StoppingRule, minimize
from monai_vslp.variational.tdv import DeepVariationPotential, TotalDeepVariation, convert_published_state_dict
from monai_vslp.variational.transport import TransportResult, solve_transport, transport_plan
from monai_vslp.variational.unrolled import UnrolledRefinement, UnrolledResult, regularizer_groups
from monai_vslp.variational.wasserstein import ground_metric, simplex_wasserstein

__all__ = [
    "FIDELITIES",
    "MARGINALS",
    "REGULARIZERS",
    "AssignmentFidelity",
    "BandMove",
    "DeepVariationPotential",
    "FlipBand",
    "FusionFidelity",
    "HuberTotalVariation",
    "Interval",
    "KullbackLeibler",
    "LearnedRefinement",
    "MarginalSum",
    "Potential",
    "Problem",
    "RefinementNetwork",
    "RefinementOptions",
    "RefinementResult",
    "Solution",
    "Step",
    "StoppingRule",
    "StoreResult",
    "TotalDeepVariation",
    "TransportResult",
    "UnrolledRefinement",
    "UnrolledResult",
    "Wasserstein",
    "WeightedSum",
    "assignment_cost",
    "convert_published_state_dict",
    "energy_report",
    "flip_band",
    "ground_metric",
    "image_edge_weight",
    "implicit_offsets",
    "marginal_sensitivity",
    "minimize",
    "offset_sensitivity",
    "pixel_sensitivity",
    "refine",
    "refine_all",
    "refine_store",
    "regularizer_groups",
    "simplex_wasserstein",
    "solve_transport",
    "spread_weights",
    "transport_plan",
    "trust_from_spread",
]
