"""Classes by name, imported only when asked for."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from .errors import ConfigError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the nearest of the known names, or the whole list if none is near."""
    known = sorted(known)
    other_case = [each for each in known if each.lower() == name.lower()]
    nearest = other_case or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else f"; it can be one of: {', '.join(known)}"


class Registry:
    """Classes by name. A class's module is imported when `get` asks for it.

    package: the package that the modules are relative to.
    classes: {class name: ".module"}.
    """

    def __init__(self, package: str, classes: dict[str, str]):
        self.package, self.classes = package, classes

    def get(self, name: str, where: str) -> type[Any]:
        """Return the class. Raise ConfigError starting with `where` (a config key) for an unknown name."""
        if not isinstance(name, str) or name not in self.classes:
            raise ConfigError(f"{where} is {name!r}, which is not known{did_you_mean(str(name), self.classes)}")
        return getattr(importlib.import_module(self.classes[name], self.package), name)
