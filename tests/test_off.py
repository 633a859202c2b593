"""OFF: every header and dress gives the same mesh; counts that do not fit are refused."""

from pathlib import Path

import numpy as np
import pytest

from trellis.grids.readers import off
from trellis.utils.errors import DataError

VERTICES = [[0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0], [-1, -1, 3.5]]
FACES = [[0, 1, 2], [0, 2, 4], [1, 3, 4]]
MIXED = [[0, 1, 2], [0, 1, 2, 3], [], [4], [1, 4], [0, 1, 2, 3, 4], [2, 3, 4]]
MIXED_FACES = [[0, 1, 2], [0, 1, 2], [2, 3, 0], [0, 1, 2], [0, 2, 3], [0, 3, 4], [2, 3, 4]]


def text(head: str = "OFF\n5 3 0\n", vertex: str = "{} {} {}", faces: list = FACES, color: str = "") -> str:
    lines = [vertex.format(*v) for v in VERTICES] + [" ".join(map(str, [len(f), *f])) + color for f in faces]
    return head + "".join(line + "\n" for line in lines)


def read(path: Path, content: str | bytes):
    path = path / "file.off"
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else content)
    return off.read(path)


def check(path: Path, content: str | bytes, faces: list = FACES) -> None:
    geometry = read(path, content)
    assert geometry.vertices.dtype == np.float64 and geometry.faces.dtype == np.int64
    assert np.array_equal(geometry.vertices, VERTICES) and np.array_equal(geometry.faces, faces)
    assert geometry.up is None and geometry.notes == ()


def refused(path: Path, content: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(path, content)
    assert "file.off" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "head",
    [
        "OFF\n5 3 0\n",
        "OFF 5 3 0\n",
        "OFF5 3 0\n",
        "5 3 0\n",
        "OFF\n5 3\n",
        "5 3\n",
        "off\n5 3 9\n",
        "\n OFF\n\n5 3 -1\n",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " \n\n", "\t# 3 0 1 2\n", "\n#\n"])
@pytest.mark.parametrize("mark", ["", "\xef\xbb\xbf", "# gr\xfc\xdfe\n"])
def test_headers_and_line_ends(tmp_path: Path, head: str, end: str, mark: str):
    check(tmp_path, mark + text(head).replace("\n", end))
    check(tmp_path, mark + text(head).replace(" ", "\t").replace("\n", end))


@pytest.mark.parametrize(
    ("keyword", "vertex"),
    [
        ("COFF", "{} {} {} 255 0 0"),
        ("COFF", "{} {} {} 0.5 0.5 0.5 1"),
        ("NOFF", "{} {} {} 0 0 1"),
        ("CNOFF", "{} {} {} 0 0 1 255 0 0 255"),
        ("STOFF", "{} {} {} 0.5 0.5"),
        ("STCNOFF", "{} {} {} 0 0 1 0 0 0 1 0.5 0.5"),
        ("4OFF", "{} {} {} 1"),
        ("C4OFF", "{} {} {} 1 255 0 0"),
        ("OFF", "{} {} {} 255 0 0"),
    ],
)
def test_what_follows_coordinates(tmp_path: Path, keyword: str, vertex: str):
    check(tmp_path, text(f"{keyword}\n5 3 0\n", vertex))
    check(tmp_path, text(f"{keyword} 5 3 0\n", vertex, color=" 255 0 0"))


def test_fourth_coordinate_divides(tmp_path: Path):
    double = [[2 * x for x in v] for v in VERTICES]
    rows = "".join("{} {} {} 2\n".format(*v) for v in double)
    content = "4OFF\n5 3 0\n" + rows + "".join("3 {} {} {}\n".format(*f) for f in FACES)
    check(tmp_path, content)
    refused(tmp_path, content.replace("0 0 0 2", "0 0 0 0", 1).replace("0 0 0 2", "0 0 0 0"), "fourth coordinate is 0")


@pytest.mark.parametrize("color", ["", " 7", " 0.5 0.5 0.5", " 255 0 0", " 1 0 0 0.5"])
def test_faces_of_any_size_and_color(tmp_path: Path, color: str):
    check(tmp_path, text("OFF\n5 7 0\n", faces=MIXED, color=color), MIXED_FACES)
    mixed_colors = text(color=color).replace("3 0 2 4" + color, "3 0 2 4")
    check(tmp_path, mixed_colors)


@pytest.mark.parametrize("faces, expected", [(FACES, FACES), (MIXED, MIXED_FACES)], ids=["triangles", "mixed"])
def test_lines_may_break_anywhere(tmp_path: Path, faces: list, expected: list):
    """Without colors and normals, the number of values says where each vertex and face ends."""
    words = text(f"OFF {len(VERTICES)} {len(faces)} 0 ", faces=faces).split()
    for width in (1, 2, 5, 7, 1000):
        lines = [" ".join(words[i : i + width]) for i in range(0, len(words), width)]
        check(tmp_path, "\n".join(lines), expected)
        for damaged in (words[:-1], [*words, "3"], [*words[:2], str(len(faces) + 1), *words[3:]]):
            lines = [" ".join(damaged[i : i + width]) for i in range(0, len(damaged), width)]
            refused(tmp_path, "\n".join(lines), "it is cut|are expected|is no face|is no vertex|its counts are wrong")
    four = "4OFF\n5\n3\n0\n" + text("", "{} {} {} 1").replace(" ", "\n")
    check(tmp_path, four)
    refused(
        tmp_path, text("COFF\n5 3 0\n", "{} {} {}\n1 0 0"), "its header counts 5 vertices and 3 faces, but 13 lines"
    )


def test_points(tmp_path: Path):
    geometry = read(tmp_path, text("OFF\n5 0 0\n", faces=[]))
    assert np.array_equal(geometry.vertices, VERTICES) and geometry.faces.shape == (0, 3)
    assert read(tmp_path, "OFF\n0 0 0\n").vertices.shape == (0, 3)


def test_cut_files(tmp_path: Path):
    for content in (text(), text("OFF\n5 7 0\n", faces=MIXED)):
        for end in range(1, len(content) - 2):
            if content[end - 1] in "\n ":  # in any number, the number is another one
                refused(tmp_path, content[:end], "lines follow instead|is no face|is no vertex|are expected")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("5 3 0", "4000000000 3 0", "counts 4000000000 vertices and 3 faces, but 8 lines follow instead of 4000000003"),
        ("5 3 0", "5 4000000000 0", "counts 5 vertices and 4000000000 faces"),
        ("5 3 0", "5 2 0", "but 8 lines follow instead of 7"),
        ("5 3 0", "6 2 0", 'has "3 0 1 2" among vertices of 3 numbers: its counts are wrong'),
        ("5 3 0", "4 4 0", "is no face"),
        ("5 3 0", "5 3 0 0", "are expected"),
        ("5 3 0", "5", "where the numbers of vertices, faces and edges are expected"),
        ("5 3 0", "five 3 0", "are expected"),
        ("5 3 0", "-5 3 0", "are expected"),
        ("5 3 0", "5 " + "9" * 5000 + " 0", "are expected"),
        ("1 2 0\n", "1 2\n", '"1 2" is no vertex: it needs 3 numbers'),
        ("1 2 0\n", "1 2 x\n", '"1 2 x" is no vertex'),
        ("1 2 0\n", "1,0 2 0\n", "is no vertex"),
        ("3 0 1 2", "3 0 1", '"3 0 1" is no face: it needs the number of its corners'),
        ("3 0 1 2", "9" * 5000 + " 0 1 2", "is no face"),
        ("3 0 1 2", "-3 0 1 2", "is no face"),
        ("3 0 1 2", "3 0 1 x", 'has a face with vertex "x"'),
        ("3 0 1 2", "3 0 1 2.0", 'has a face with vertex "2.0"'),
        ("3 0 1 2", "3 0 1 5", "its faces use vertices 0 to 5 of 5"),
        ("3 0 1 2", "3 0 1 -1", "its faces use vertices -1 to 4 of 5"),
        ("OFF", "nOFF\n3", "has vertices of other than three dimensions"),
        ("OFF", "OFF BINARY", "is binary OFF, which is not read"),
        ("OFF", "<html>", "are expected"),
    ],
)
def test_damage(tmp_path: Path, old: str, new: str, reason: str):
    assert old in text()
    refused(tmp_path, text().replace(old, new, 1), reason)


def test_what_is_no_off(tmp_path: Path):
    refused(tmp_path, text().encode("utf-16"), "is UTF-16 text")
    refused(tmp_path, text() + "\0", "has a zero byte")
    refused(tmp_path, "# nothing\n", "has no header")
    refused(tmp_path, "OFF\n", "are expected")


def test_concave_polygon(tmp_path: Path):
    pytest.importorskip("mapbox_earcut")
    corners = (geometry := read(tmp_path, "OFF\n4 1 0\n0 0 0\n4 2 0\n0 4 0\n1 2 0\n4 0 1 2 3\n")).vertices[
        geometry.faces
    ]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    assert area == pytest.approx(6)


def test_few_digits_far_from_the_origin(tmp_path: Path):
    rows = "".join(f"{x + 4000013:.6g} {y} {z}\n" for x, y, z in VERTICES)
    refused(tmp_path, "OFF\n5 0 0\n" + rows, "its coordinates have 6 digits, a step of 10 in an object of")
