"""Names of Dash that load it as they are first used: every module of the package imports without it."""

import importlib
from types import ModuleType
from typing import Any

from ..utils.errors import ConfigError


class Part:
    """Stands for `dash.<name>`, whether its attributes are wanted or it is called."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(load(), self._name), attribute)

    def __call__(self, *args, **kwargs) -> Any:
        return getattr(load(), self._name)(*args, **kwargs)


def load() -> ModuleType:
    """Return Dash. Raises ConfigError with the command that mends it where it is missing."""
    try:
        return importlib.import_module("dash")
    except ModuleNotFoundError as error:
        raise ConfigError(f"a Python package is missing ({error}): pip install dash") from error


ClientsideFunction, Input, Output, State = map(Part, ("ClientsideFunction", "Input", "Output", "State"))
ctx, dcc, html = map(Part, ("ctx", "dcc", "html"))
