"""One image or region that a person works on: what does not change is kept, so that a correction only solves again."""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from threading import RLock
from typing import Any

import numpy as np
import torch

from monai_vslp.apps.label.bundle_model import View
from monai_vslp.apps.label.strokes import NOT_PAINTED, STROKE_COST, unary_costs
from monai_vslp.transforms.refinement import TRUST_RULES, VariationalRefinement
from monai_vslp.utils.errors import ProportionError
from monai_vslp.variational import RefinementResult, image_edge_weight, refine

__all__ = ["Session", "SessionCache", "Solution", "adjusted"]

CORNER = 4.0  # boundary, px, that a painted pixel may cost the regularizer at most
WARM_STEPS = 3  # proximal steps of an answer that starts from the last one
PAINTED_START = 0.95  # of the painted class, where the last answer knew nothing of the stroke
LARGEST_CACHE = 2**31  # bytes of all sessions


@dataclass(frozen=True)
class Solution:
    """An answer of a session.

    Attributes:
        result: segmentation with potentials and energies.
        given: proportions that it met or was drawn to, fractions ``[C]``; None where they were left free.
        painted: class index or ``NOT_PAINTED``, shape ``[H, W]``, uint8; None without strokes.
        kept: share of the painted pixels of tissue that got their class; None without strokes.
        warm: whether it started from the answer before.
        seconds: of the solver.
    """

    result: RefinementResult
    given: list[float] | None
    painted: np.ndarray | None
    kept: float | None
    warm: bool
    seconds: float


def adjusted(
    refinement: VariationalRefinement, trust: float | str | None, alpha: float | None, regularizer: str | None = None
) -> VariationalRefinement:
    """A copy with other options; None leaves one as it is, ``tv`` leaves a learned regularizer out."""
    changed = copy.copy(refinement)
    if trust is not None:
        changed.rule = trust if trust in TRUST_RULES else None
        changed.options = replace(changed.options, trust=math.inf if changed.rule else trust)
    if alpha is not None:
        changed.options = replace(changed.options, alpha=alpha)
    if regularizer == "tv":
        changed.learned = changed.term = None
    return changed


class Session:
    """Confidences, edges of the image, and the last answer of one view.

    With total variation, an answer after the first starts from the one before and takes ``WARM_STEPS`` steps; the same request
    again goes on from there. A learned regularizer always takes all of its steps.

    Args:
        view: what is worked on.
        refinement: the model's variational stage at the view's resolution.
    """

    def __init__(self, view: View, refinement: VariationalRefinement) -> None:
        self.view, self.refinement = view, refinement
        self.last: Solution | None = None
        self._weight: torch.Tensor | None = None
        self._strength: float | None = None

    @property
    def bytes(self) -> int:
        """Memory that the session holds: confidences, image, tissue, edges, segmentation and energies."""
        height, width = self.view.confidence.shape[-2:]
        return 4 * height * width * (2 * len(self.view.confidence) + 3 + 8)

    def network_proportions(self) -> list[float]:
        """Those of the confidences alone, over tissue, fractions ``[C]``."""
        return self._own.tolist()

    @cached_property
    def _own(self) -> torch.Tensor:
        q, mass = self.view.confidence, self.view.mass
        weight = torch.ones_like(q[0]) if mass is None else mass
        return (q * weight).sum(dim=(1, 2), dtype=torch.float64) / weight.sum(dtype=torch.float64).clamp_min(1e-12)

    def _edges(self, strength: float) -> torch.Tensor | None:
        if self.view.image is None or strength == 0:
            return None
        if self._weight is None or self._strength != strength:
            self._weight, self._strength = image_edge_weight(self.view.image, strength), strength
        return self._weight

    def solve(
        self,
        proportions: Sequence[float] | None,
        *,
        spread: Sequence[float] | None = None,
        bounds: Sequence[Sequence[float]] | None = None,
        painted: np.ndarray | None = None,
        refinement: VariationalRefinement | None = None,
        cold: bool = False,
        energy_maps: bool = False,
    ) -> Solution:
        """Draw the region anew.

        Args:
            proportions: fractions ``[C]``; None leaves them free.
            spread: standard deviation between raters ``[C]``, for trust ``raters``.
            bounds: lower and upper fractions, ``[C]`` each, for trust ``bounds``.
            painted: class index or ``NOT_PAINTED``, shape ``[H, W]``, uint8.
            refinement: other options for this answer; see :func:`adjusted`.
            cold: do not start from the last answer.
            energy_maps: find the energies per pixel, which take time.

        Raises:
            ProportionError: proportions that cannot be met, or strokes of a class whose proportion is 0.
            InputError: a rule of trust without what it rests on.
        """
        started = time.perf_counter()
        stage = self.refinement if refinement is None else refinement
        view, classes = self.view, len(self.view.confidence)
        if painted is not None and not (painted != NOT_PAINTED).any():
            painted = None
        if painted is not None and proportions is not None and stage.rule != "bounds":
            painted_classes = np.unique(painted[painted != NOT_PAINTED])
            if nothing := [view.classes[k] for k in painted_classes if proportions[k] == 0]:
                raise ProportionError(f"strokes paint {', '.join(nothing)}, whose proportion is 0; raise it, or erase them.")
        given, trust, limits = stage.terms(proportions, spread, bounds, lambda: self._own)
        # What is painted shall not give way to the regularizer, however strong that is.
        cost = STROKE_COST + CORNER * stage.options.alpha / stage.pixel_size
        unary = None if painted is None else unary_costs(painted, classes, cost)
        if stage.learned is not None:
            q = view.confidence if unary is None else (view.confidence * torch.exp(-unary)).clamp_min(1e-12)
            q = q / q.sum(dim=0)
            options = {"trust": trust, "pixel_size": stage.pixel_size, "epsilon": stage.options.epsilon}
            result, warm = stage.learned(q, given, view.mass, view.image, bounds=limits, **options), False
        else:
            options = asdict(stage.options_for(trust))
            start = None if cold else self._start(painted, given, limits)
            warm = start is not None
            if warm:
                options["max_iterations"] = WARM_STEPS
            result = refine(
                view.confidence,
                given,
                view.mass,
                bounds=limits,
                weight=self._edges(stage.options.edge_strength),
                unary=unary,
                regularizer=stage.term,
                start=start,
                energy_maps=energy_maps,
                **options,
            )
        kept = None
        if painted is not None:
            there = torch.from_numpy(painted != NOT_PAINTED)
            there &= True if view.mass is None else view.mass > 0
            same = result.labels[there] == torch.from_numpy(painted.astype(np.int64))[there]
            kept = float(same.float().mean()) if same.numel() else 1.0
        shown = None if proportions is None else [float(value) for value in proportions]
        self.last = Solution(result, shown, painted, kept, warm, time.perf_counter() - started)
        return self.last

    def _start(self, painted: np.ndarray | None, given: Any, limits: Any) -> torch.Tensor | None:
        """The last segmentation, with new strokes in it and without those that were erased; None where it is no start."""
        if self.last is None:
            return None
        u = self.last.result.u
        wanted = torch.as_tensor(limits[1] if limits is not None else given if given is not None else [1.0] * len(u))
        if bool(((u.amax(dim=(1, 2)) == 0) & (wanted > 0)).any()):
            return None  # a class that could not occur before
        before = np.full(u.shape[1:], NOT_PAINTED, np.uint8) if self.last.painted is None else self.last.painted
        now = np.full(u.shape[1:], NOT_PAINTED, np.uint8) if painted is None else painted
        changed = torch.from_numpy(before != now)
        if not bool(changed.any()):
            return u
        u = u.clone()
        labels = torch.from_numpy(now.astype(np.int64))
        free = changed & (labels == NOT_PAINTED)
        u[:, free] = self.view.confidence[:, free]
        for k in range(len(u)):
            fresh = changed & (labels == k)
            u[:, fresh] = (1 - PAINTED_START) / max(len(u) - 1, 1)
            u[k, fresh] = PAINTED_START
        return u


class SessionCache:
    """Sessions by key, the least recently used ones dropped where there are too many bytes. Threads may share it.

    Args:
        largest: bytes of all sessions together; the newest stays, however large.
    """

    def __init__(self, largest: int = LARGEST_CACHE) -> None:
        self.largest = largest
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()
        self.lock = RLock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: Hashable, make: Callable[[], Session]) -> tuple[Session, bool]:
        """The session of a key, made where there is none; and whether it was there."""
        with self.lock:
            found = key in self._sessions
            session = self._sessions.pop(key) if found else make()
            self._sessions[key] = session
            while len(self._sessions) > 1 and sum(one.bytes for one in self._sessions.values()) > self.largest:
                self._sessions.popitem(last=False)
            return session, found
