"""What the readers of text formats share: line ends, byte-order marks, numbers."""

import itertools
import warnings
from pathlib import Path

import numpy as np

from ...utils.errors import DataError

BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> bytes:
    """Return a text file with "\\n" for every line end and without UTF-8's byte-order mark.

    Names and comments may have any bytes. Raise DataError if it is UTF-16 or has zero bytes.
    """
    data = path.read_bytes()
    refuse_utf16(data)
    if b"\0" in data:
        raise DataError(f"has a zero byte at position {data.index(0)}, where text is expected: it is binary or damaged")
    return unify_line_ends(data.removeprefix(BOM))


def refuse_utf16(data: bytes) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is UTF-16 text: save it as ASCII or UTF-8")


def unify_line_ends(data: bytes) -> bytes:
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data


def to_coordinates(columns: list[list[bytes]]) -> np.ndarray:
    """Return vertices [V, D] float64 of their D columns of words.

    Raise ValueError if a word is no number, DataError if the words have too few digits: programs that write six or
    seven of them ("4.00001e+06") move the vertices of an object that is far from the origin.
    """
    vertices = np.stack([to_floats(words) for words in columns], axis=1)
    finite = vertices[np.isfinite(vertices).all(axis=1)]
    if not len(finite):
        return vertices
    extent = (finite.max(axis=0) - finite.min(axis=0)).max()
    largest = np.abs(finite).max()
    if largest <= 1000 * extent:  # nine of ten files: six digits are enough
        return vertices
    large = [
        word.lower()
        for words, numbers in zip(columns, vertices.T, strict=True)
        for word in itertools.compress(words, np.abs(numbers) > largest / 10)
    ]
    if all(b"e" in word for word in large):  # plain decimals keep the digits that they need, or cannot be told apart
        mantissa = max((word.partition(b"e")[0].strip(b"+-").replace(b".", b"") for word in large), key=len)
        step = 10.0 ** (np.floor(np.log10(largest)) + 1 - len(mantissa))
        if 6 <= len(mantissa) <= 9 and step > extent / 64:
            raise DataError(
                f"its coordinates have {len(mantissa)} digits, a step of {step:g} in an object of {extent:g}: "
                "move it to the origin before saving it"
            )
    return vertices


def to_floats(words: list[bytes]) -> np.ndarray:
    """Return decimal numbers as [N] float64, each rounded correctly. Raise ValueError if a word is no number."""
    if b"_" in b"".join(words):  # Python allows it between digits
        raise ValueError("a number has an underscore")
    return np.fromiter(map(float, words), np.float64, len(words))


def are_floats(words: list[bytes]) -> bool:
    try:
        to_floats(words)
    except ValueError:
        return False
    return True


def to_ints(words: list[bytes]) -> np.ndarray:
    """Return whole numbers as [N] int64; larger ones become the largest int64.

    Raise ValueError if a word is no whole number.
    """
    if not words:
        return np.zeros(0, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of NumPy 1, which stops at what is no number
        try:
            numbers = np.fromstring(b" ".join(words), dtype=np.int64, sep=" ")  # 8 times as fast as int() of each
        except DeprecationWarning as warning:
            raise ValueError("a word is no whole number") from warning
    if len(numbers) != len(words) or not words[-1][-1:].isdigit():  # an empty word gives no number, or a last 0
        raise ValueError("a word is no whole number")
    return numbers


def to_count(word: bytes) -> int | None:
    """Return a number of things; None if the word is none."""
    return int(word) if word.isdigit() and len(word) < 19 else None


def quote(line: bytes) -> str:
    """Return the beginning of a line of a file, for a message."""
    text = " ".join(line.decode("ascii", "backslashreplace").split())
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
