"""Numbers of values in a Parquet file, from its footer.

pyarrow gives them too, but a damaged footer ends the process there: an exception of C++ that it does not expect. So
this reads the footer by itself, in the compact protocol of Thrift (github.com/apache/thrift, doc/specs/
thrift-compact-protocol.md), by the field numbers of parquet.thrift (github.com/apache/parquet-format).
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"PAR1"
MAX_DEPTH = 32  # of structs in structs; Parquet has 8
# Types of the protocol.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


class RowGroup(NamedTuple):
    """A row group: its rows, and the values of each column by its path."""

    num_rows: int
    num_values: dict[str, int]


def read_row_groups(path: Path) -> list[RowGroup]:
    """Return the row groups of a file. Raise ValueError, KeyError, IndexError or TypeError for a damaged footer."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read()
        length = int.from_bytes(end[:4], "little")
        if end[4:] != MAGIC or length > size - 8:
            raise ValueError("it has no footer")
        file.seek(size - 8 - length)
        footer = _Reader(file.read(length)).value(STRUCT)
    groups = []
    for group in footer[4]:
        chunks = [chunk[3] for chunk in group[1]]
        groups.append(RowGroup(group[3], {b".".join(chunk[3]).decode(): chunk[5] for chunk in chunks}))
    return groups


class _Reader:
    """A reader of the protocol. A struct becomes {field number: value}."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def value(self, kind: int, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self.take(1)[0]
        if kind in (I16, I32, I64):
            number = self.varint()
            return (number >> 1) ^ -(number & 1)
        if kind == DOUBLE:
            return self.take(8)
        if kind == BINARY:
            return self.take(self.varint())
        if kind in (LIST, SET):
            head = self.take(1)[0]
            return self.items(head >> 4 if head >> 4 < 15 else self.varint(), (head & 15,), depth)
        if kind == MAP:
            count = self.varint()
            kinds = self.take(1)[0] if count else 0
            return self.items(count, (kinds >> 4, kinds & 15), depth)
        if kind == STRUCT:
            fields, number = {}, 0
            while head := self.take(1)[0]:
                number = number + (head >> 4) if head >> 4 else self.value(I16)
                fields[number] = self.value(head & 15, depth + 1)
            return fields
        raise ValueError(f"its footer has a value of the unknown type {kind}")

    def items(self, count: int, kinds: tuple[int, ...], depth: int) -> list[Any]:
        if count > len(self.data) - self.at:  # each takes a byte at least
            raise ValueError("its footer ends too early")
        # In here, and not in a struct, a truth value takes a byte.
        kinds = tuple(BYTE if kind in (TRUE, FALSE) else kind for kind in kinds)
        return [self.value(kind, depth + 1) for _ in range(count) for kind in kinds]

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) < count:
            raise ValueError("its footer ends too early")
        self.at += count
        return taken

    def varint(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("its footer has a number of more than 64 bits")
