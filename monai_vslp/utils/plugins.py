"""Parts by name, ours and those of other packages.

A package adds parts by an entry point of the group ``monai_vslp.plugins`` that names a module (importing it registers the
parts) or a function without arguments (which registers them when called). Nothing of it is imported before a name is asked for
that this project does not have, or all names are listed.
"""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from monai.utils import ComponentStore, look_up_option

from monai_vslp.utils.errors import InputError

__all__ = ["PLUGIN_GROUP", "PluginError", "PluginStore", "load_plugins"]

PLUGIN_GROUP = "monai_vslp.plugins"

logger = logging.getLogger(__name__)

_loaded = False
_failures: dict[str, str] = {}


class PluginError(InputError):
    """A package that adds parts could not be loaded."""


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def load_plugins() -> dict[str, str]:
    """Load what other packages add; once in a process.

    Returns:
        Package and reason of each that failed. They are also logged, once: a broken package does not take away the others.
    """
    global _loaded
    if _loaded:
        return dict(_failures)
    _loaded = True  # first: a package that lists names while it registers its own must not begin again
    for entry in entry_points(group=PLUGIN_GROUP):
        try:
            found = entry.load()
            if callable(found):
                found()
        except Exception as error:  # whatever another package raises
            reason = f"{type(error).__name__}: {error}"
            _failures[_package(entry)] = reason
            logger.warning(
                "package %s (entry point %s = %s) could not be loaded, its parts are missing: %s. Mend or uninstall it.",
                *(_package(entry), entry.name, entry.value, reason),
            )
    return dict(_failures)


class PluginStore(ComponentStore):
    """MONAI's store of parts by name, which also knows those of other packages.

    A part of this project is found without loading any other package.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """All names, those of other packages too."""
        load_plugins()
        return tuple(self.components)

    def __contains__(self, name: object) -> bool:
        return name in self.components or name in self.names

    def __getitem__(self, name: str) -> Any:
        """The part of a name.

        Raises:
            PluginError: there is none, and a package that may have it could not be loaded.
            ValueError: there is none.
        """
        if name not in self.components:
            failures = load_plugins()
            if name not in self.components and failures:
                broken = "; ".join(f"{package} ({reason})" for package, reason in failures.items())
                raise PluginError(
                    f"there is no {name!r} among {self.name} ({', '.join(self.components)}), and packages that may have it "
                    f"could not be loaded: {broken}."
                )
        return super().__getitem__(name)

    def add(self, name: str, desc: str, value: Any) -> Any:
        """Store a part under a name that is free.

        Raises:
            InputError: another part has the name.
        """
        known = self.components.get(name)
        if known is not None and known.value is not value:
            raise InputError(f"{self.name} have {name!r} already ({known.description}); choose another name.")
        return super().add(name, desc, value)

    def find(self, name: str) -> Any:
        """The part of a name, with the nearest names in the error.

        Raises:
            PluginError, ValueError: as of ``store[name]``.
        """
        if name not in self.components and not load_plugins():
            look_up_option(name, self.names)
        return self[name]
