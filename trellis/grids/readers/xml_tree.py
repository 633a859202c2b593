"""XML as readers need it: a tree of elements, and numbers out of their text.

The standard library's tree builder is fed by its expat parser here, so that declared entities (which can expand a small
file to gigabytes, or name other files) are refused instead of being expanded.
"""

import binascii
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from ...utils.errors import DataError
from .text import to_coordinates

WRONG_ENCODING = [
    expat.errors.codes[message]
    for message in (
        expat.errors.XML_ERROR_INVALID_TOKEN,
        expat.errors.XML_ERROR_INCORRECT_ENCODING,
        expat.errors.XML_ERROR_UNKNOWN_ENCODING,
    )
]
Number = TypeVar("Number", bound=np.generic)


def parse(content: bytes, leaves: Mapping[str, tuple[str, ...]] | None = None) -> Element:
    """Return the root of an XML document, as UTF-8 or as its declaration says.

    Prefixes of namespaces are cut off the names of elements and attributes, so `p:path` is `path`; the declarations
    `xmlns` and `xmlns:p` stay.
    leaves: attributes of elements that are too many to become elements, by their name: the values become words of the
        text of the element around them.
    Raise DataError if it is not well-formed, such as a file that is cut off, or declares entities.
    """
    content = content.lstrip(b" \t\r\n")
    try:
        return _parse(content, leaves or {}, None)
    except expat.ExpatError as error:
        if error.code in WRONG_ENCODING:
            # Names and comments are often in another encoding than the file says; geometry is ASCII.
            for encoding in ("utf-8", "iso-8859-1"):
                with suppress(expat.ExpatError):
                    return _parse(content, leaves or {}, encoding)
        raise DataError(f"is not well-formed XML ({error}): it is damaged or cut off") from error
    except (LookupError, ValueError) as error:
        raise DataError(f"its XML has an encoding that cannot be read ({error})") from error


def _parse(content: bytes, leaves: Mapping[str, tuple[str, ...]], encoding: str | None) -> Element:
    """Parse in an encoding, None for the one that the document declares. Raise what expat raises, and DataError."""
    builder = TreeBuilder()
    parser = expat.ParserCreate(encoding)
    parser.buffer_text = True

    def start(tag: str, attributes: dict[str, str]) -> None:
        tag = _local(tag)
        if tag not in leaves:
            names = {key if key.startswith("xmlns") else _local(key): value for key, value in attributes.items()}
            builder.start(tag, names)
            return
        # A word that is no number, so that it is refused where the numbers are needed.
        builder.data(" ".join([attributes.get(name, f"<{tag}>-without-{name}") for name in leaves[tag]]) + " ")

    def end(tag: str) -> None:
        tag = _local(tag)
        if tag not in leaves:
            builder.end(tag)

    def refuse(*_: object) -> None:
        raise DataError("declares or uses an XML entity of its own, which is not expanded: replace it by its text")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    parser.SkippedEntityHandler = refuse
    parser.Parse(content, True)
    return builder.close()


def read_tree(path: Path, root: str, name: str) -> Element:
    """Return the root of an XML file. Raise DataError if it is not called `root`, as in files of the format `name`."""
    tree = parse(path.read_bytes())
    if tree.tag != root:
        raise DataError(f"is XML, but no {name}: its first element is <{tree.tag}>, not <{root}>")
    return tree


def _local(name: str) -> str:
    return name.rpartition(":")[2]


def numbers(text: str | None, dtype: type[Number] | np.dtype[Number], name: str) -> np.ndarray[Any, np.dtype[Number]]:
    """Return the numbers of a text, separated by white space. Raise DataError if it has anything else.

    name: what the reason calls the text, such as "<p>".
    """
    text = text or ""
    try:
        if "_" in text:  # Python allows it between digits
            raise ValueError("an underscore")
        return np.array(text.encode().split(), dtype=dtype)  # numpy reads bytes faster than str
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{name} has something that is not a number of its type ({reason})") from error


def check_digits(points: np.ndarray, text: str | None, index: np.ndarray) -> None:
    """Raise DataError if an object far from the origin is written with too few digits; see `text.to_coordinates`.

    points: [N, 3] float64, the numbers of the words at index [N, 3] int64 of the text.
    """
    finite = points[np.isfinite(points).all(axis=1)]
    if len(finite) and np.abs(finite).max() > 1000 * np.ptp(finite, axis=0).max():
        words = (text or "").encode().split()
        to_coordinates([[words[place] for place in column] for column in index.T])


def integer(element: Element, attribute: str, default: int | None = None) -> int:
    """Return an attribute that is a whole number from 0. Raise DataError if it is none, or missing without default."""
    text = element.get(attribute)
    if text is None and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        value = -1
    if value < 0:
        raise DataError(f'<{element.tag}> has {attribute}="{text or ""}", which is not a whole number from 0')
    return value


def base64_bytes(text: str | bytes, name: str) -> bytes:
    """Return the bytes of base64 streams that follow one another: each ends with its padding.

    Raise DataError if the text, which the reason calls `name`, is not base64.
    """
    packed = b"".join((text.encode("ascii", "replace") if isinstance(text, str) else text).split())
    try:
        return b"".join(binascii.a2b_base64(stream, strict_mode=True) for stream in re.findall(rb"[^=]+=*", packed))
    except binascii.Error as error:
        raise DataError(f"{name} is not base64 ({error}): the file is damaged or cut off") from error
