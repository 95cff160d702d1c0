"""What a client asks of a model: proportions, a region, strokes, and what to send back."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_vslp.apps.label.strokes import features_of
from monai_vslp.data.proportions import ProportionLabel, check_classes, parse_row
from monai_vslp.transforms.refinement import TRUST_RULES
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["RESULTS", "LabelRequest", "move_proportion", "parse_request"]

RESULTS = ("labels", "geojson", "dsa", "layers", "none")
KEYS = (
    "proportions",
    "move",
    "region",
    "location",
    "size",
    "strokes",
    "trust",
    "alpha",
    "regularizer",
    "mpp",
    "result",
    "cold",
)
LIKE = 0.8  # from which a name is taken for a slip


@dataclass(frozen=True)
class LabelRequest:
    """A request that was understood.

    Attributes:
        proportions: given in the request; None where they were not.
        unknown: the request says that proportions are not known, whatever lies beside the image.
        move: class and the share, a fraction, that it is to get; the others keep their ratios. None for no move.
        region: polygons ``[part][ring]`` of level-0 ``(x, y)`` px; None for all of the image.
        strokes: GeoJSON; None for none.
        trust, alpha, regularizer: as of ``monai-vslp segment``; None for the model's.
        mpp: µm per level-0 px; None for what the file says.
        result: one of :data:`RESULTS`.
        cold: solve from nothing, as a first request does.
    """

    proportions: ProportionLabel | None = None
    unknown: bool = False
    move: tuple[str, float] | None = None
    region: list[Any] | None = None
    strokes: Any = None
    trust: float | str | None = None
    alpha: float | None = None
    regularizer: str | None = None
    mpp: float | None = None
    result: str = "labels"
    cold: bool = False


def _number(value: Any, name: str, least: float = 0.0, above: bool = True) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is a number, got {value!r}.") from error
    if not (number > least or (not above and number == least)) or math.isnan(number):
        raise InputError(f"{name} must be {'above' if above else 'at least'} {least:g}, got {value!r}.")
    return number


def _proportions(value: Any, classes: Sequence[str]) -> ProportionLabel | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(classes):
            raise ProportionError(f"proportions: expected {len(classes)} values ({', '.join(classes)}), got {len(value)}.")
        value = dict(zip(classes, value))
    if not isinstance(value, Mapping):
        raise ProportionError(
            f"proportions are an object of the classes {', '.join(classes)}, or a list in that order, got {value!r:.80}."
        )
    return parse_row(value, classes, row="of the request")


def _region(request: Mapping[str, Any]) -> list[Any] | None:
    value, size = request.get("region"), request.get("size")
    if value is not None:
        parts: list[Any] = []
        for number, feature in enumerate(features_of(value, "region"), start=1):
            geometry = feature["geometry"]
            if not geometry["type"].endswith("Polygon"):
                raise InputError(f"region, feature {number}: expected a Polygon or MultiPolygon, got a {geometry['type']}.")
            parts += [geometry["coordinates"]] if geometry["type"] == "Polygon" else list(geometry["coordinates"])
        try:
            corners = np.concatenate([np.asarray(ring, dtype=float)[:, :2] for part in parts for ring in part])
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(f"region: corners are level-0 [x, y] px in closed rings ({error}).") from error
        if not np.isfinite(corners).all():
            raise InputError("region: corners must be finite.")
        return parts
    if size is None or list(size) == [0, 0]:
        return None
    location = request.get("location") or [0, 0]
    if len(location) != 2 or len(size) != 2:
        raise InputError(f"location and size are level-0 [x, y] and [width, height], got {location} and {size}.")
    (x, y), (width, height) = (float(v) for v in location), (_number(v, "size") for v in size)
    return [[[[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]]]


def parse_request(request: Mapping[str, Any], classes: Sequence[str], default_result: str = "labels") -> LabelRequest:
    """Understand a request of MONAI Label.

    Args:
        request: what the server passes on; keys of others, such as ``device`` or ``client_id``, are left alone.
        classes: of the model.
        default_result: where the request names none.

    Raises:
        ProportionError: proportions that are not understood.
        InputError: another value that cannot be meant, or a key that is nearly one of ours.
    """
    for key in request:
        near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=LIKE)
        if near and key not in KEYS:
            raise InputError(f"the request has {key!r}; did you mean {near[0]!r}? There are {', '.join(KEYS)}.")
    if request.get("label") is not None:
        raise InputError("a mask was uploaded as label; corrections are sent as strokes (GeoJSON in the parameter 'strokes').")
    given, move = request.get("proportions"), request.get("move")
    unknown = isinstance(given, str) and given.lower() in ("unknown", "none")
    label = None if given is None or unknown else _proportions(given, classes)
    if move is not None:
        if not isinstance(move, Mapping) or len(move) != 1:
            raise ProportionError(f"move is one class with its new share, such as {{'{classes[0]}': 0.4}}, got {move!r:.80}.")
        ((name, value),) = move.items()
        check_classes([name], classes, "move")
        share = parse_row({name: value}, classes, row="of the request") if value is not None else None
        if share is None:
            raise ProportionError(f"move names {name!r} without a share.")
        if label is not None or unknown:
            raise ProportionError("give proportions or a move, not both.")
        move = (name, float(share.mean[list(classes).index(name)]))
    trust = request.get("trust")
    if trust is not None and trust not in (*TRUST_RULES, "inf"):
        trust = _number(trust, f"trust (or one of inf, {', '.join(TRUST_RULES)})")
    alpha, mpp = request.get("alpha"), request.get("mpp")
    result = request.get("result") or default_result
    if result not in RESULTS:
        raise InputError(f"result is one of {', '.join(RESULTS)}, got {result!r}.")
    regularizer = request.get("regularizer")
    if regularizer not in (None, "tv", "learned"):
        raise InputError(f"regularizer is tv or learned, got {regularizer!r}.")
    if not isinstance(request.get("cold", False), bool):
        raise InputError(f"cold is true or false, got {request['cold']!r}.")
    return LabelRequest(
        proportions=label,
        unknown=unknown,
        move=move,
        region=_region(request),
        strokes=request.get("strokes"),
        trust=math.inf if trust == "inf" else trust,
        alpha=None if alpha is None else _number(alpha, "alpha", above=False),
        regularizer=regularizer,
        mpp=None if mpp is None else _number(mpp, "mpp (µm per level-0 px)"),
        result=result,
        cold=request.get("cold", False),
    )


def move_proportion(current: Sequence[float], index: int, share: float) -> list[float]:
    """Give one class a share; the others keep their ratios, or share alike where they had nothing.

    Args:
        current: fractions that sum to 1.
        index: of the class.
        share: its new fraction, in [0, 1].

    Returns:
        Fractions that sum to 1.

    Raises:
        ProportionError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ProportionError(f"a share lies between 0 and 1, got {share}.")
    rest = [value for k, value in enumerate(current) if k != index]
    left = sum(rest)
    scaled = [value / left * (1 - share) if left > 0 else (1 - share) / len(rest) for value in rest]
    return [*scaled[:index], share, *scaled[index:]]
