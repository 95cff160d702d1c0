"""Errors a person can act on: each message says what was received, what is allowed and what to do next."""

from __future__ import annotations

__all__ = ["ImageReadError", "InputError", "ProportionError", "SlideError"]


class InputError(ValueError):
    """Wrong input from a person (file, table, option). The command line prints it without a traceback."""


class ProportionError(InputError):
    """A proportion entry or row that cannot be understood; names row, column and value."""


class ImageReadError(InputError):
    """An image that is missing, truncated or of an unsupported pixel type."""


class SlideError(InputError):
    """A whole-slide file that cannot be read, or whose pixel size is unknown."""
