"""What voxelize.py says at its end: counts, notes and reasons by kind."""

import re
from collections.abc import Container, Iterable

from trellis.grids.meshes import UNKNOWN_AXIS

KINDS_SHOWN = 5
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")


def count(number: int, one: str, many: str = "") -> str:
    """Return a number of things for people. many: default: one with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def by_kind(texts: Iterable[tuple[str, str]], objects: Container[str] = ()) -> list[str]:
    """Return a line for each kind of text, the most frequent first: one with its file, several with their number.

    texts: (file, note or reason). Those that differ in numbers alone are of one kind.
    objects: the names among them that are objects of a file.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for file, text in texts:
        kinds.setdefault(NUMBER.sub("#", text), []).append((file, text))
    ranked = sorted(kinds.values(), key=lambda members: -len(members))
    lines = []
    for members in ranked[:KINDS_SHOWN]:
        file, text = members[0]
        units = {"objects" if name in objects else "files" for name, _ in members}
        what = f"{len(members)} {' and '.join(sorted(units))}"
        if len(members) == 1:
            lines.append(f"{file}: {text}")
        elif all(other == text for _, other in members):
            lines.append(f"{what}: {text}")
        else:
            lines.append(f"{what}, such as {file}: {text}")
        if text == f"{UNKNOWN_AXIS}: taken as they are":
            lines[-1] += ". Say it by --up_axis y or z"
    if len(ranked) > KINDS_SHOWN:
        lines.append(f"and {sum(map(len, ranked[KINDS_SHOWN:]))} more")
    return lines
