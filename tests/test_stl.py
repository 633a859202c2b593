"""STL: text and binary in every dress give the same triangles; counts and ends that do not fit are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from trellis.grids.readers import stl
from trellis.utils.errors import DataError

TRIANGLES = np.array(
    [[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 0.5], [0, 2, 0], [1, 0, 0]], [[-1, 0, 0], [0, 3, 1e-40], [0, 0, 1]]],
    dtype=np.float32,
)


def binary(triangles: np.ndarray = TRIANGLES, header: bytes = b"part", count: int | None = None) -> bytes:
    body = b"".join(
        struct.pack("<12fH", 0, 0, np.nan, *triangle.ravel().tolist(), 7) for triangle in triangles.astype(np.float32)
    )
    return header.ljust(80, b" ") + struct.pack("<I", len(triangles) if count is None else count) + body


def text(name: str = " part", end: str = "endsolid part\n", triangles: np.ndarray = TRIANGLES) -> str:
    facets = "".join(
        "  facet normal 0 0 1\n    outer loop\n"
        + "".join("      vertex {!r} {!r} {!r}\n".format(*corner) for corner in triangle.astype(float).tolist())
        + "    endloop\n  endfacet\n"
        for triangle in triangles
    )
    return f"solid{name}\n{facets}{end}"


def read(path: Path, content: str | bytes):
    path = path / "file.stl"
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else content)
    return stl.read(path)


def check(path: Path, content: str | bytes, times: int = 1, notes: tuple[str, ...] = ()) -> None:
    """Assert that the content is TRIANGLES, bit for bit and in order."""
    geometry = read(path, content)
    assert geometry.vertices.dtype == (np.float64 if isinstance(content, str) else np.float32)
    assert np.array_equal(geometry.vertices[geometry.faces], np.tile(TRIANGLES, (times, 1, 1)))
    assert geometry.up is None and geometry.notes == notes


def refused(path: Path, content: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(path, content)
    assert "file.stl" not in str(caught.value) and not str(caught.value).endswith(".")


# --- binary ---


@pytest.mark.parametrize("header", [b"", b"part", b"solid part", b"solid\nfacet normal", b"\xff\xfe", b"\0" * 80])
def test_binary_header_may_be_anything(tmp_path: Path, header: bytes):
    check(tmp_path, binary(header=header))
    check(tmp_path, binary(header=header) + binary(header=header), times=2)


@pytest.mark.parametrize(
    "rest, count",
    [
        (b"\0", 0),
        (b"\0" * 1000, 0),
        (b"\r\n\0", 0),
        (b"x" * 49, 49),
        (b"\0\0x\0", 1),
        (b"\2" * 49, 49),
        (b"Saved by a program.\r\n" * 9, 187),
        (binary()[:83], 80),
    ],
)
def test_bytes_behind_that_are_no_triangle(tmp_path: Path, rest: bytes, count: int):
    note = f"ends with {count} bytes that are no triangle, or the beginning of one"
    if rest[:4] == b"part":  # the header of a second file that was cut there
        refused(tmp_path, binary() + rest, "counts 3 triangles, its 317 bytes have room for 4")
    else:
        check(tmp_path, binary() + rest, notes=(note,) if count else ())


def test_several_binary_files_in_one(tmp_path: Path):
    check(tmp_path, binary() * 5, times=5)
    check(tmp_path, binary(TRIANGLES[:1]) + binary(TRIANGLES[1:], header=b"solid x"))
    check(tmp_path, binary() + binary() + b"\0" * 500, times=2)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 1000, 2**32 - 1])
def test_count_that_does_not_fit(tmp_path: Path, count: int):
    refused(tmp_path, binary(count=count), f"counts {count} triangles, its 234 bytes have room for 3")
    refused(tmp_path, binary(header=b"solid x", count=count), f"counts {count} triangles, .* room for 3")


def test_small_count_over_zeros(tmp_path: Path):
    """Zeros among the triangles are no headers of empty solids."""
    flat = np.zeros((60, 3, 3), dtype=np.float32)
    flat[-1] = TRIANGLES[0]
    for count in range(60):
        refused(tmp_path, binary(flat, count=count), f"counts {count} triangles, its 3084 bytes have room for 60")


def test_cut_binary_file(tmp_path: Path):
    whole = binary()
    for end in range(1, len(whole)):
        refused(tmp_path, whole[:end], "cut|is text")
    refused(tmp_path, whole + whole[:-1], "counts 3 triangles, its 467 bytes have room for 7")


def test_no_triangles(tmp_path: Path):
    geometry = read(tmp_path, binary(TRIANGLES[:0]))
    assert geometry.vertices.shape == (0, 3) and geometry.faces.shape == (0, 3)
    refused(tmp_path, "solid vertex\nendsolid\n", "has no triangles$")


# --- text ---


@pytest.mark.parametrize(
    "name", ["", " ", " part", " vertex facet endsolid", " outer loop endfacet", " Gr\xfc\xdfe \xff", " solid"]
)
@pytest.mark.parametrize(
    "end", ["endsolid\n", "endsolid", "  endsolid vertex 1 2 3\n\n", "endsolid\n; saved\n", "end solid"]
)
def test_names(tmp_path: Path, name: str, end: str):
    if end == "end solid":
        refused(tmp_path, text(name, end), "is cut: of 3 facets 3 are complete, and its last line is")
    else:
        check(tmp_path, text(name, end))


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", " \n\n", "\t\r\n"])
@pytest.mark.parametrize("before", ["", "\n  ", "\t", "\xef\xbb\xbf", "\xef\xbb\xbf\r\n"])
def test_white_space(tmp_path: Path, line_end: str, before: str):
    check(tmp_path, before + text().replace("\n", line_end))
    check(tmp_path, before + text().replace("  ", "\t").replace("\n", line_end))
    check(tmp_path, before + text().upper().replace("\n", line_end))


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "\t\t"])
def test_white_space_anywhere(tmp_path: Path, blank: str):
    check(tmp_path, blank.join(text().split()))
    check(tmp_path, blank.join(text().split()).replace("facet", " " * 300_000 + "facet", 1))  # in linear time


def test_several_solids(tmp_path: Path):
    check(tmp_path, text() * 3, times=3)
    check(tmp_path, text(" a") + text(" facet") + text("", ""), times=3, notes=read(tmp_path, text("", "")).notes)


@pytest.mark.parametrize("end", ["", "\n", "end", "\0" * 50])
def test_missing_end_is_noted(tmp_path: Path, end: str):
    check(tmp_path, text(end=end), notes=('has no "endsolid" at its end: facets may be missing',))


def test_a_second_solid_that_is_cut_is_refused_or_noted(tmp_path: Path):
    whole = text() + text(" second", "endsolid second\n")
    for end in range(len(text()) + 1, len(whole) - len("endsolid second\n")):
        try:
            geometry = read(tmp_path, whole[:end])
        except DataError as error:
            assert "is cut" in str(error)
        else:
            assert whole[:end].rstrip().endswith("endfacet") or end < len(text()) + len("solid")
            assert geometry.notes or end < len(text()) + len("solid")  # what follows may be text of a program
    check(tmp_path, whole.replace("\n", " "), times=2)


def test_zeros_behind(tmp_path: Path):
    check(tmp_path, text() + "\0" * 100)


def test_cut_text_file_is_refused_or_noted(tmp_path: Path):
    whole = text()
    last = whole.index("endsolid")
    for end in range(7, len(whole) - len("endsolid part\n")):
        try:
            geometry = read(tmp_path, whole[:end])
        except DataError as error:
            assert "cut" in str(error) or "no triangles" in str(error)
        else:  # between two facets
            assert len(geometry.faces) == whole[:end].count("endfacet")
            assert end >= last or whole[:end].rstrip().endswith("endfacet")
            assert geometry.notes or end >= last


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("vertex 1.0 0.0 0.0", "vertex 1.0 0.0", '"vertex 1.0 0.0" is no vertex: it needs three numbers'),
        ("vertex 1.0 0.0 0.0", "vertex 1.0 0.0 0.0 0.0", "is no vertex"),
        ("vertex 1.0 0.0 0.0", "vertex 1.0 0,0 0.0", "is no vertex"),
        ("vertex 1.0 0.0 0.0", "vertexes 1.0 0.0 0.0", "is no vertex"),
        ("vertex 1.0 0.0 0.0\n", "vertex 1 0 0\nvertex 1 1 1\n", "has 11 vertices for 3 facets"),
        ("vertex 1.0 0.0 0.0\n", "", "has 7 vertices for 3 facets"),
        ("endfacet", "", "of 3 facets 0 are complete"),
    ],
)
def test_damage(tmp_path: Path, old: str, new: str, reason: str):
    refused(tmp_path, text().replace(old, new), reason)


def test_vertices_that_add_up_in_wrong_facets(tmp_path: Path):
    lines = text().split("\n")
    lines.insert(3, lines.pop(10))
    refused(tmp_path, "\n".join(lines), "has 9 vertices for 3 facets; each needs 3 of its own")


def test_what_is_no_stl(tmp_path: Path):
    refused(tmp_path, text().encode("utf-16"), "is UTF-16 text")
    refused(tmp_path, "<html>\n" * 30, 'is text that does not begin with "solid"')
    refused(tmp_path, b"\1\2\3", "is cut, or no STL file: it has 3 bytes")


def test_digits_far_from_the_origin(tmp_path: Path):
    far = TRIANGLES.astype(float) + 4e6
    lines = text(triangles=far).split("\n")
    few = [
        "vertex " + " ".join(f"{float(x):.6e}" for x in line.split()[1:]) if "vertex" in line else line
        for line in lines
    ]
    refused(tmp_path, "\n".join(few), "its coordinates have 7 digits, a step of 1 in an object of 3")
    assert np.array_equal(read(tmp_path, "\n".join(lines)).vertices.reshape(-1, 3, 3), far)
