"""Parts that configs name as ``_target_`` where an expression would be needed otherwise.

Hospital platforms evaluate no Python in a config beyond paths and devices. So whatever a config has to decide or count is a
function here, or beside what it is about, and takes references as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

from monai_vslp.utils.errors import InputError

__all__ = [
    "absent",
    "attribute",
    "call",
    "count",
    "either",
    "first_with_items",
    "numbered",
    "off",
    "same",
    "share_of",
    "text",
    "total_steps",
    "unless_empty",
]


def attribute(of: Any, name: str) -> Any:
    """What an object has under a name, such as the head of a network.

    Args:
        of: any object.
        name: one name, or several with dots between them (``head.linear_logits``); private names are refused.

    Raises:
        InputError: there is nothing of that name, or it is private.
    """
    for part in name.split("."):
        if part.startswith("_"):
            raise InputError(f"configs may not use private names, got {name!r}.")
        try:
            of = getattr(of, part)
        except AttributeError as error:
            known = ", ".join(sorted(found for found in dir(of) if not found.startswith("_")))
            raise InputError(f"{type(of).__name__} has no {part!r} (asked for {name!r}); it has {known}.") from error
    return of


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call an object of the config: a step of ``run`` or ``initialize``."""
    return function(**arguments)


def count(items: Sized) -> int:
    """How many there are."""
    return len(items)


def either(switch: Any, on: Any = None, off: Any = None) -> Any:
    """``on`` where ``switch`` counts as true (True, a number that is not 0, something with items), ``off`` elsewhere."""
    return on if switch else off


def off(value: Any) -> bool:
    """Whether a switch is off or a collection empty; for ``_disabled_``."""
    return not value


def same(value: Any) -> Any:
    """What it is given: MONAI's check of properties takes no bare reference for a handler."""
    return value


def absent(values: Sequence[Any]) -> bool:
    """Whether one of several is None or has no items; for ``_disabled_``. Other values, 0 too, are there."""
    return any(value is None or (isinstance(value, Sized) and len(value) == 0) for value in values)


def unless_empty(value: Any, items: Sized) -> Any:
    """``value``, or None where ``items`` has none: an evaluator only where something is held out."""
    return value if len(items) else None


def first_with_items(candidates: Sequence[Sized]) -> Sized:
    """The first collection that has items, or the last."""
    return next((found for found in candidates if len(found)), candidates[-1])


def numbered(stem: str, number: int, offset: int = 0, suffix: str = "") -> str:
    """A name with a number in it: ``round`` and 2 make ``round2``.

    Args:
        stem: what comes before the number.
        number, offset: their sum is the number.
        suffix: what comes after it.
    """
    return f"{stem}{number + offset}{suffix}"


def text(value: Any) -> str:
    """A value as it is written."""
    return str(value)


def total_steps(epochs: int, batches: int | Sized, extra: int = 1) -> int:
    """Steps of a schedule over a training.

    Args:
        epochs: passes.
        batches: of one pass, or what gives them.
        extra: more, since some schedules of torch count the step after the last one too.
    """
    return epochs * (batches if isinstance(batches, int) else len(batches)) + extra


def share_of(number: int, share: float) -> int:
    """A share of a whole number, rounded down."""
    return int(share * number)
