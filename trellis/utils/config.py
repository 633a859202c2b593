"""Reading a configuration, checking it and filling in defaults, before anything is built.

The schema of a component's `args` is its constructor: names, defaults and annotations. `Annotated[int,
Range(min=1)]` adds a range. An argument that is not in the signature is an error that names the nearest right one.
"""

import collections.abc
import inspect
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from .errors import ConfigError
from .inputs import require_file
from .registry import Registry, did_you_mean

MAX_BYTES = 4 * 2**20  # of a file of JSON; that of a large model has ten thousand
MAX_DEPTH = 64  # of objects and lists inside each other; deeper ones exhaust Python's stack somewhere
MAX_KEY = 200  # characters of a key
MAX_DIGITS = 20  # of a whole number; int64 has 19
SHOWN = 80  # characters of a value or assignment that a message quotes


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included unless `open_min`."""

    min: float | None = None
    max: float | None = None
    open_min: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.min is None or (value > self.min if self.open_min else value >= self.min)
        return above and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        low = "" if self.min is None else f"{'>' if self.open_min else '>='} {self.min}"
        high = "" if self.max is None else f"<= {self.max}"
        return " and ".join(filter(None, (low, high)))


Count = Annotated[int, Range(min=1)]
"""A whole number of at least 1."""


# --- reading ---------------------------------------------------------------------------------------------


def load_config(path: str) -> dict:
    """Read a JSON configuration.

    Raise ConfigError for a missing file, what is no regular file or larger than MAX_BYTES, and as `parse_json`.
    """
    require_file(path, ConfigError, "--config takes a JSON file", MAX_BYTES)
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows editors put a byte order mark before the text
            config = parse_json(file.read(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); --config takes a JSON file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; --config takes a JSON file, saved as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: the file must hold one JSON object")
    return config


def parse_json(text: str, where: str) -> Any:
    """Parse JSON in which no key is given twice and every number is finite.

    where: what messages begin with.
    Raise json.JSONDecodeError for what is no JSON, ConfigError for a key given twice, for NaN and Infinity, for
    a key with a line break, and for what goes beyond MAX_DEPTH, MAX_KEY or MAX_DIGITS.
    """

    def no_duplicates(pairs):
        seen = set()
        for key, _ in pairs:
            _check_key(key, where)
            if key in seen:
                raise ConfigError(f"{where}: key {key!r} is given twice in one object; keep one")
            seen.add(key)
        return dict(pairs)

    def no_constants(name):
        raise ConfigError(f"{where}: {name} is not a number that JSON knows; give a finite number or null")

    def whole(digits):
        if len(digits) > MAX_DIGITS:
            raise ConfigError(f"{where}: a number has {len(digits)} digits; use at most {MAX_DIGITS - 1}")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants, parse_int=whole)
        too_deep = _is_deep(value)
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ConfigError(f"{where}: has more than {MAX_DEPTH} objects or lists inside each other; use fewer")
    return value


def _is_deep(value: Any) -> bool:
    """Return whether objects and lists nest deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for items in inner for child in items]
    return any(isinstance(item, dict | list) for item in level)


def apply_override(config: dict, assignment: str) -> None:
    """Apply one `path.to.key=value` in place. The value is JSON, or else a plain string.

    The parent of the key must exist. Whether the key is known is checked later, with the whole configuration.
    """
    path, equals, text = assignment.partition("=")
    keys = path.split(".")
    where = f"--set {shortened(assignment)}"
    if not equals or not all(keys):
        raise ConfigError(f"{where}: write it as path.to.key=value")
    try:
        value = parse_json(text, where)
    except json.JSONDecodeError:
        value = text
    node = config
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(node, dict) or key not in node:
            known = node if isinstance(node, dict) else ()
            missing = shortened(".".join(keys[: depth + 1]))
            hint = did_you_mean(key[:MAX_KEY], known) if known else ""
            if depth and "did you mean" not in hint:  # it may be right, but the file leaves it out
                hint += f"; to add it, --set {missing} to a whole JSON object"
            raise ConfigError(f"{where}: {missing} is not in the configuration{hint}")
        node = node[key]
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: {'.'.join(keys[:-1])} has type {json_type(node)}, not object")
    _check_key(keys[-1], where)
    node[keys[-1]] = value


def _check_key(key: str, where: str) -> None:
    """Raise ConfigError for a key that no message of one line could name."""
    if len(key) > MAX_KEY:
        raise ConfigError(f"{where}: a key has {len(key)} characters; use at most {MAX_KEY}")
    if "\n" in key:
        raise ConfigError(f"{where}: the key {key!r} has a line break; keep it on one line")


def shortened(text: str) -> str:
    """Return a text for a message: on one line, cut after SHOWN characters."""
    return (text if len(text) <= SHOWN else f"{text[:SHOWN]}…").replace("\n", "\\n")


# --- checking --------------------------------------------------------------------------------------------


def json_type(value: Any) -> str:
    """Return what JSON calls this value's type."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def describe(annotation: Any) -> str:
    """Return an annotation in a user's words, such as "integer >= 1 or null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (list, collections.abc.Sequence):
        return f"list of {describe(args[0])}"
    if origin is dict or annotation is dict:
        return "object"
    if annotation is type(None):
        return "null"
    return {int: "integer", float: "number", str: "string", bool: "boolean", list: "list"}.get(
        annotation, str(annotation)
    )


def matches(value: Any, annotation: Any) -> bool:
    """Return whether a JSON value fits an annotation.

    An integer fits float; one beyond int64 fits nothing. Neither a boolean nor a number out of range (1e999) is a
    number.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return matches(value, args[0]) and all(value in bound for bound in args[1:] if isinstance(bound, Range))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, list) and all(matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(item, args[1]) for item in value.values())
    if annotation is type(None):
        return value is None
    if annotation is float:
        return (isinstance(value, float) and math.isfinite(value)) or matches(value, int)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and not _is_beyond(value)
    return isinstance(value, annotation)


def _is_beyond(value: Any) -> bool:
    """Return whether a value is, or has in a list, a whole number beyond int64, which torch cannot take."""
    if isinstance(value, list):
        return any(map(_is_beyond, value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def config_arguments(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that a configuration may give a class: {name: (annotation, default)}.

    `**kwargs` continues with the parent's constructor. Two attributes of a class, inherited by its subclasses, leave
    arguments out: `runtime_args`, given by the program, and `dropped_args`, of a parent but not of this class.
    A missing default is `inspect.Parameter.empty`.
    """
    hidden = {"self"}
    for ancestor in cls.__mro__:
        hidden.update(vars(ancestor).get("runtime_args", ()), vars(ancestor).get("dropped_args", ()))
    arguments: dict[str, tuple[Any, Any]] = {}
    for ancestor in cls.__mro__:
        constructor = vars(ancestor).get("__init__")
        if constructor is None:
            continue
        hints = typing.get_type_hints(constructor, include_extras=True)
        parameters = inspect.signature(constructor).parameters.values()
        for parameter in parameters:
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variadic and parameter.name not in hidden:
                arguments.setdefault(parameter.name, (hints[parameter.name], parameter.default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return arguments


def check_value(value: Any, annotation: Any, where: str) -> None:
    """Raise ConfigError unless the value at the path `where` fits the annotation."""
    if not matches(value, annotation):
        limit = ", and below 2^63" if _is_beyond(value) else ""
        raise ConfigError(f"{where} is {shortened(json.dumps(value))}; it must be {describe(annotation)}{limit}")


def fill_in(args: dict, cls: type) -> dict[str, Any]:
    """Return the arguments with the class's defaults filled in, as JSON values in the constructor's order."""
    defaults = {name: default for name, (_, default) in config_arguments(cls).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (defaults | args).items()}


def check_args(args: Any, cls: type, where: str) -> dict[str, Any]:
    """Return the `args` of a component with defaults filled in. `where` is their path in the file.

    Raise ConfigError for arguments that its constructor does not take, lacks, or takes with other values.
    """
    if not isinstance(args, dict):
        raise ConfigError(f"{where} has type {json_type(args)}; it must be an object of arguments of {cls.__name__}")
    known = config_arguments(cls)
    for name, value in args.items():
        if name not in known:
            raise ConfigError(f"{where}.{name} is unknown{did_you_mean(name, known)}")
        check_value(value, known[name][0], f"{where}.{name}")
    for name, (annotation, default) in known.items():
        if default is inspect.Parameter.empty and name not in args:
            raise ConfigError(f"{where}.{name} is missing; give it as {describe(annotation)}")
    return fill_in(args, cls)


def check_component(spec: Any, where: str, keys: tuple[str, ...] = ("name", "args")) -> None:
    """Raise ConfigError unless `spec` is {"name": string, "args": object}; `args` may be left out.

    keys: all that it may have.
    """
    if not isinstance(spec, dict):
        raise ConfigError(f'{where} has type {json_type(spec)}; it must be an object {{"name": …, "args": {{…}}}}')
    for key in spec:
        if key not in keys:
            raise ConfigError(f"{where}.{key} is unknown{did_you_mean(key, keys)}")
    if not isinstance(spec.get("name"), str):
        raise ConfigError(f"{where}.name is missing; give the class name as a string")
    if not isinstance(spec.get("args", {}), dict):
        raise ConfigError(f"{where}.args has type {json_type(spec['args'])}; it must be an object")


def complete_component(spec: Any, registry: Registry, where: str) -> dict[str, Any]:
    """Return {"name", "args"} of a class of the registry with defaults filled in. Raise ConfigError for a mistake."""
    check_component(spec, where)
    cls = registry.get(spec["name"], f"{where}.name")
    return {"name": spec["name"], "args": check_args(spec.get("args", {}), cls, f"{where}.args")}


_ABSENT = object()


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, str, str]]:
    """Return (path, old value, new value) where two configurations differ.

    A path is such as "trainer.args.optimizer.args.lr". Values are JSON, or "absent".
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = ((f"{where}.{key}" if where else key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys)
        return [found for path, a, b in parts for found in differences(a, b, path)]
    if type(old) is type(new) and old == new:
        return []
    before, now = ("absent" if value is _ABSENT else json.dumps(value, default=str) for value in (old, new))
    return [(where, before, now)]


def differing_keys(old: Any, new: Any, where: str = "") -> list[str]:
    """Return the paths at which two configurations differ."""
    return [path for path, _, _ in differences(old, new, where)]
