"""PLY: all formats, types, orders and lists give the same mesh; headers that do not fit the file are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from trellis.grids.readers import ply
from trellis.utils.errors import DataError

VERTICES = [[0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0], [-1, -1, 3]]
FACES = [[0, 1, 2], [0, 2, 4], [1, 3, 4]]
MIXED = [[0, 1, 2], [0, 1, 2, 3], [], [4], [1, 4], [0, 1, 2, 3, 4], [2, 3, 4]]
MIXED_FACES = [[0, 1, 2], [0, 1, 2], [2, 3, 0], [0, 1, 2], [0, 2, 3], [0, 3, 4], [2, 3, 4]]
CODES = {"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d"}
CODES |= {"int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}
CODES |= {"float32": "f", "float64": "d", "int64": "q", "uint64": "Q"}
FORMATS = ["ascii", "binary_little_endian", "binary_big_endian"]


def write(form: str, elements: list, header: str = "", end: str = "\n") -> bytes:
    """Return a file; elements: (name, properties, rows), where a property is "float x" or "list uchar int name"."""
    lines = ["ply", f"format {form} 1.0", *([header] if header else [])]
    body = b""
    order = ">" if form == "binary_big_endian" else "<"
    for name, properties, rows in elements:
        lines += [f"element {name} {len(rows)}", *(f"property {line}" for line in properties)]
        for row in rows:
            words, packed = [], b""
            for line, value in zip(properties, row, strict=True):
                types = line.split()
                if types[0] == "list":
                    words += [len(value), *value]
                    packed += struct.pack(f"{order}{CODES[types[1]]}{len(value)}{CODES[types[2]]}", len(value), *value)
                else:
                    words.append(value)
                    packed += struct.pack(order + CODES[types[0]], value)
            body += (" ".join(map(str, words)) + end).encode() if form == "ascii" else packed
    return (end.join([*lines, "end_header", ""])).encode("latin-1") + body


def mesh(
    form: str, faces: list = FACES, kind: str = "float", index: str = "int", count: str = "uchar", **kwargs
) -> bytes:
    vertex = ("vertex", [f"{kind} {axis}" for axis in "xyz"], VERTICES)
    return write(
        form, [vertex, ("face", [f"list {count} {index} vertex_indices"], [[face] for face in faces])], **kwargs
    )


def read(path: Path, content: bytes):
    path = path / "file.ply"
    path.write_bytes(content)
    return ply.read(path)


def check(path: Path, content: bytes, faces: list = FACES, dtype: type | None = None) -> None:
    geometry = read(path, content)
    if dtype:
        assert geometry.vertices.dtype == dtype
    assert geometry.faces.dtype == np.int64 and geometry.up is None
    few = "without 3 of its 7 faces, which have less than three corners"
    assert geometry.notes == ((few,) if faces is MIXED_FACES else ())
    assert np.array_equal(geometry.vertices, VERTICES) and np.array_equal(geometry.faces, faces)


def refused(path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(path, content)
    assert "file.ply" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize("form", FORMATS)
def test_types(tmp_path: Path, form: str):
    for kind in ("char", "int8", "short", "int16", "int", "int32", "int64", "float", "float32", "double", "float64"):
        single = form != "ascii" and kind in ("float", "float32")
        check(tmp_path, mesh(form, kind=kind), dtype=np.float32 if single else np.float64)
    for index in ("char", "uchar", "short", "ushort", "int", "uint", "uint8", "int16", "uint32", "int64", "uint64"):
        check(tmp_path, mesh(form, index=index))
        check(tmp_path, mesh(form, MIXED, index=index), MIXED_FACES)
    for count in ("char", "uchar", "short", "ushort", "int", "uint", "uint8", "int64"):
        check(tmp_path, mesh(form, count=count))
        check(tmp_path, mesh(form, MIXED, count=count), MIXED_FACES)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["vertex_indices", "vertex_index", "Vertex_Indices", "corners"])
@pytest.mark.parametrize("faces", [FACES, MIXED], ids=["triangles", "mixed"])
def test_order_of_elements_and_properties(tmp_path: Path, form: str, name: str, faces: list):
    expected = FACES if faces is FACES else MIXED_FACES
    vertex = (
        "vertex",
        ["uchar red", "float nx", "double z", "list uchar short extra", "float x", "double y", "int id"],
        [(i, 0.5, z, [9] * (i % 3), x, y, -1) for i, (x, y, z) in enumerate(VERTICES)],
    )
    face = (
        "face",
        [
            "int flags",
            "list uchar float texcoord",
            f"list int uint {name}",
            "uchar red",
            "list ushort double more",
            "float q",
        ],
        [(7, [0.25] * (i % 4), f, 255, [0.5] * i, 1.5) for i, f in enumerate(faces)],
    )
    other = ("edge", ["int vertex1", "int vertex2", "list uchar uchar data"], [(0, 1, []), (1, 2, [1, 2]), (2, 3, [7])])
    empty = ("material", [], [])
    for elements in ([vertex, face], [face, vertex], [other, face, empty, vertex], [vertex, other, face, other]):
        check(tmp_path, write(form, elements), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_headers(tmp_path: Path, form: str, end: str, mark: bytes):
    header = end.join(["comment gr\xfc\xdfe end_header", "obj_info made by hand", "comment", "", "COMMENT x"])
    content = mark + mesh(form, header=header, end=end)
    check(tmp_path, content)
    check(tmp_path, content.replace(b"end_header" + end.encode(), b" end_header  " + end.encode(), 2))
    if end != "\r":
        other = "\n" if end == "\r\n" else "\r\n"
        check(
            tmp_path,
            content.replace(f"end_header{end}".encode(), f"end_header{other}".encode()).replace(
                f"gr\xfc\xdfe end_header{other}".encode("latin-1"), b"x" + end.encode()
            ),
        )
    # A body that begins like the end of a line.
    first = struct.unpack("<f", b"\n\r\n\0")[0]
    rows = [[first, 0, 0], *VERTICES[1:]]
    elements = [
        ("vertex", ["float x", "float y", "float z"], rows),
        ("face", ["list uchar int vertex_index"], [[FACES[0]]]),
    ]
    if form == "binary_little_endian":
        assert np.array_equal(read(tmp_path, write(form, elements, end=end)).vertices, np.float32(rows))


@pytest.mark.parametrize("form", FORMATS)
def test_cut_files(tmp_path: Path, form: str):
    for faces in (FACES, MIXED):
        content = mesh(form, faces)
        for end in range(len(content) - 1 - (form == "ascii")):  # the last is the end of the last line
            refused(tmp_path, content[:end], "it is cut|no PLY file|end_header|no statement|ascii or binary")


@pytest.mark.parametrize("form", FORMATS)
def test_counts_that_do_not_fit(tmp_path: Path, form: str):
    content = mesh(form)
    refused(tmp_path, content.replace(b"face 3", b"face 4"), 'counts 4 rows of "face", but the file has room for 3')
    refused(tmp_path, content.replace(b"face 3", b"face 2"), "has .* more than its header describes")
    refused(tmp_path, content.replace(b"face 3", b"face 4000000000"), "counts 4000000000 rows")
    refused(tmp_path, content.replace(b"vertex 5", b"vertex 4000000000"), "counts 4000000000 rows")
    refused(tmp_path, mesh(form, MIXED).replace(b"face 7", b"face 99999999999"), "counts 99999999999 rows")
    for count in (b"many", b"-1", b"3.0", b"", b"9" * 5000):
        refused(tmp_path, content.replace(b"face 3", b"face " + count), 'has "element face.* in its header')


def test_a_vertex_too_many_that_takes_the_bytes_of_a_face_is_noted(tmp_path: Path):
    """The first face of 13 bytes becomes a vertex of 12 and a face of no corners: all counts fit."""
    geometry = read(tmp_path, mesh(FORMATS[1]).replace(b"vertex 5", b"vertex 6"))
    assert np.array_equal(geometry.faces, FACES[1:])
    assert geometry.notes == ("without 1 of its 3 faces, which have less than three corners",)


def test_behind_the_last_row(tmp_path: Path):
    for form in FORMATS:
        check(tmp_path, mesh(form) + b"\r\n \n")
    check(tmp_path, mesh(FORMATS[1]) + b"\0" * 1000)
    refused(tmp_path, mesh(FORMATS[1]) + b"more", "has 4 bytes more than its header describes")
    refused(tmp_path, mesh(FORMATS[0]) + b"3 0 1 2", "has 4 values more than its header describes")


def test_rows_that_have_other_values(tmp_path: Path):
    content = mesh("ascii")
    refused(tmp_path, content.replace(b"3 0 1 2\n", b"3 0 1 2 255\n"), "cut, or its header is wrong")
    refused(tmp_path, content.replace(b"3 0 1 2\n", b"3 0 1 x\n"), "has a face whose vertices are no whole numbers")
    refused(tmp_path, content.replace(b"1 2 0\n", b"1 x 0\n"), 'has "x" where a coordinate is expected')
    refused(tmp_path, content.replace(b"3 0 1 2\n", b"-3 0 1 2\n"), 'has "-3" where the length of a list is expected')
    refused(
        tmp_path,
        mesh(FORMATS[1], count="char").replace(b"\x03\0\0\0\0\1", b"\xfd\0\0\0\0\1"),
        "has a list of length -3",
    )
    refused(tmp_path, mesh(FORMATS[1], [[0, 1, 5]]), "its faces use vertices 0 to 5 of 5")
    refused(tmp_path, mesh(FORMATS[2], [[0, 1, -1, 2]]), "its faces use vertices -1 to 2 of 5")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"float y", b"half y", "no statement of PLY"),
        (b"float y", b"float v", "has no element with x, y and z"),
        (b"float y", b"list uchar float y", 'has "-1" where the length of a list'),
        (b"list uchar int", b"list float int", "the length of a list is a whole number"),
        (b"list uchar int", b"list uchar float", 'its element "face" has 0 lists of vertices, not one'),
        (b"list uchar int vertex_indices", b"int v1", "lists of vertices|more than its header"),
        (b"format ascii", b"format utf8", "no statement of PLY"),
        (b"format ascii 1.0\n", b"", "does not say in its header whether"),
        (b"ply\n", b"plyx\n", "is no PLY file"),
        (b"end_header\n", b"", 'has no "end_header"'),
        (b"element vertex 5\n", b"", "no statement of PLY"),
    ],
)
def test_damaged_headers(tmp_path: Path, old: bytes, new: bytes, reason: str):
    content = mesh("ascii")
    assert old in content
    refused(tmp_path, content.replace(old, new), reason)


def test_what_is_no_ply(tmp_path: Path):
    refused(tmp_path, mesh("ascii").decode().encode("utf-16"), "is UTF-16 text")
    refused(tmp_path, b"", "is no PLY file")


@pytest.mark.parametrize("form", FORMATS)
def test_tristrips(tmp_path: Path, form: str):
    vertex = ("vertex", ["float x", "float y", "float z"], VERTICES)
    strips = (
        "tristrips",
        ["list int int vertex_indices"],
        [[[0, 1, 2, 3, 4, -1, 4, 3, 2]], [[-1, 0, 1, -1]], [[1, 2, 3]]],
    )
    expected = [[0, 1, 2], [2, 1, 3], [2, 3, 4], [4, 3, 2], [1, 2, 3]]
    check(tmp_path, write(form, [vertex, strips]), expected)
    face = ("face", ["list uchar int vertex_indices"], [[FACES[0]]])
    check(tmp_path, write(form, [vertex, strips, face]), [FACES[0], *expected])


@pytest.mark.parametrize("form", FORMATS)
def test_points(tmp_path: Path, form: str):
    vertex = ("vertex", ["double x", "double y", "double z", "uchar red"], [(*v, 1) for v in VERTICES])
    for elements in ([vertex], [vertex, ("face", ["list uchar int vertex_indices"], [])]):
        geometry = read(tmp_path, write(form, elements))
        assert np.array_equal(geometry.vertices, VERTICES) and geometry.faces.shape == (0, 3)
    lines = ("line", ["list uchar int vertex_indices"], [[[0, 1]]])
    assert read(tmp_path, write(form, [vertex, lines])).notes == (
        'its element "line" has lists of vertices and is not read',
    )


@pytest.mark.parametrize("name", ["f_dc_0", "rot_0", "scale_0", "packed_position"])
def test_gaussian_splats_are_refused_by_name(tmp_path: Path, name: str):
    for axes in ("xyz", ""):
        properties = [f"float {axis}" for axis in axes] + [f"float {name}"]
        content = write(FORMATS[1], [("vertex", properties, [[0.5] * len(properties)] * 3)])
        refused(tmp_path, content, rf"holds 3D Gaussian splats \(property {name}\)")


def test_concave_polygon(tmp_path: Path):
    pytest.importorskip("mapbox_earcut")
    dart = [[0, 0, 0], [4, 2, 0], [0, 4, 0], [1, 2, 0]]
    for form in FORMATS:
        elements = [
            ("vertex", ["float x", "float y", "float z"], dart),
            ("face", ["list uchar int vertex_index"], [[range(4)]]),
        ]
        corners = (geometry := read(tmp_path, write(form, elements))).vertices[geometry.faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
        assert area == pytest.approx(6)


def test_text_keeps_digits_that_float32_lacks(tmp_path: Path):
    content = mesh("ascii").replace(b"1 2 0\n", b"4000000.123 1e-310 nan\n")
    assert read(tmp_path, content).vertices[2, :2].tolist() == [4000000.123, 1e-310]


def test_few_digits_far_from_the_origin(tmp_path: Path):
    rows = b"".join(b"%.5e %.5e %.5e\n" % (x + 4000013, y, z) for x, y, z in VERTICES)
    plain = b"".join(b"%d %d %d\n" % tuple(v) for v in VERTICES)
    refused(
        tmp_path, mesh("ascii").replace(plain, rows), "its coordinates have 6 digits, a step of 10 in an object of 3"
    )
