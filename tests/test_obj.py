"""Wavefront OBJ: every way to write vertices and faces gives the same triangles, every damage its line."""

from pathlib import Path

import numpy as np
import pytest

from trellis.grids.readers import obj
from trellis.utils.errors import DataError

VERTICES = [[0, 0, 0], [1, 0, 0], [1, 2, 0.5], [0, 2, 0.25], [-1, -1, 3]]
FACES = [[0, 1, 2], [0, 2, 4], [1, 3, 4]]
V = "".join("v {} {} {}\n".format(*vertex) for vertex in VERTICES)
F = "".join("f {} {} {}\n".format(*(i + 1 for i in face)) for face in FACES)


def read(path: Path, content: str | bytes):
    path = path / "file.obj"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return obj.read(path)


def check(path: Path, content: str | bytes) -> None:
    """Assert that the content is the mesh of VERTICES and FACES."""
    geometry = read(path, content)
    assert geometry.vertices.dtype == np.float64 and geometry.faces.dtype == np.int64
    assert np.array_equal(geometry.vertices, VERTICES) and np.array_equal(geometry.faces, FACES)
    assert geometry.up is None and geometry.notes == ()


def refused(path: Path, content: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(path, content)
    assert "file.obj" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("blank", [" ", "\t", "  ", " \t "])
@pytest.mark.parametrize("indent", ["", "  ", "\t"])
def test_white_space(tmp_path: Path, end: str, mark: str, blank: str, indent: str):
    text = "".join(indent + line.replace(" ", blank) + blank + "\n" for line in (V + "\n" + F).split("\n"))
    check(tmp_path, mark + text.replace("\n", end))


@pytest.mark.parametrize("reference", ["{0}", "{0}/{0}", "{0}//{0}", "{0}/{0}/{0}", "{0}/", "{0}/1/", "+{0}", "00{0}"])
def test_references(tmp_path: Path, reference: str):
    lines = ["f " + " ".join(reference.format(i + 1) for i in face) + "\n" for face in FACES]
    check(tmp_path, V + "vt 0 0\nvn 0 0 1\n" + "".join(lines))


def test_references_of_several_kinds(tmp_path: Path):
    check(tmp_path, V + "f 1 2/1 3//1\nf 1/1/1 3/1/1 5/1/1\nf 2 4 5\n")


def test_other_statements_are_skipped(tmp_path: Path):
    other = (
        "mtllib a.mtl\no x#1\ng a b\nusemtl x\ns off\np 1 2\nl 1 2 3\nvt 0 0\nvn 0 0 1\nvp 0 1\nV 9 9 9\nlod 1\n###\n"
    )
    check(tmp_path, "# made by hand\n" + other + V + other + F + other)


@pytest.mark.parametrize("comment", ["# v 1 2 3", "#", "  # f 9 9 9", "# C:\\models\\"])
def test_comments(tmp_path: Path, comment: str):
    check(tmp_path, "".join(f"{line} {comment}\n{comment}\n" for line in (V + F).splitlines()))


@pytest.mark.parametrize("after", ["1.0", "0.5 0.25 1", "255 0 0", "1 0.5 0.25 1"])
def test_values_after_coordinates(tmp_path: Path, after: str):
    lines = V.splitlines()
    check(tmp_path, "".join(f"{line} {after}\n" for line in lines) + F)
    check(tmp_path, "".join(f"{line} {after if i % 2 else ''}\n" for i, line in enumerate(lines)) + F)


def test_vertices_of_different_lengths_that_add_up(tmp_path: Path):
    refused(tmp_path, V + "v 1 2\nv 1 2 3 4\n" + F, 'line 6: "v 1 2" is no vertex')


def test_bytes_of_no_encoding(tmp_path: Path):
    check(tmp_path, b"# gr\xfc\xdfe \xff\n" + b"o M\xf6bel \x80\n" + V.encode() + b"usemtl \xe9\n" + F.encode())


@pytest.mark.parametrize("name", ["usemtl a\\", "mtllib C:\\models\\", "g x\\", "o x\\"])
def test_continued_lines(tmp_path: Path, name: str):
    text = (V + F).replace(" ", " \\\n ")
    check(tmp_path, text)
    check(tmp_path, text.replace("\n", "\r\n"))
    check(tmp_path, f"{name}\n" + V + f"{name}\n" + F)  # names may end so, and nothing is lost
    refused(tmp_path, V + F + "f 1 2 \\\n 9", "line 9: ")  # the line where it begins


def test_many_continued_lines_take_linear_time(tmp_path: Path):
    corners = " \\\n".join(["1", "2", "3"] * 100_000)
    assert len(read(tmp_path, V + "f " + corners + "\n").faces) == 299_998


def test_negative_indices_count_from_their_statement(tmp_path: Path):
    first = np.array(VERTICES)
    parts = "".join(
        "".join("v {} {} {}\n".format(*(vertex + shift)) for vertex in first)
        + "".join("f {}/-1 {}/-1 {}/-1\n".format(*(i - 5 for i in face)) for face in FACES)
        for shift in (0, 10, 20)
    )
    geometry = read(tmp_path, parts)
    assert np.array_equal(geometry.vertices, np.concatenate([first, first + 10, first + 20]))
    assert np.array_equal(geometry.faces, np.concatenate([np.array(FACES) + 5 * i for i in range(3)]))


def test_polygons(tmp_path: Path):
    pytest.importorskip("mapbox_earcut")
    geometry = read(tmp_path, V + "f 1 2 3 4\nf 1 2\nf 1\nf 5 4 3 2 1\nfo 1 2 3\n")
    assert geometry.faces[:2].tolist() == [[0, 1, 2], [2, 3, 0]] and geometry.faces[-1].tolist() == [0, 1, 2]
    dart = "v 0 0 0\nv 4 2 0\nv 0 4 0\nv 1 2 0\nf 1 2 3 4\n"
    corners = (geometry := read(tmp_path, dart)).vertices[geometry.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    assert area == pytest.approx(6)


def test_numbers(tmp_path: Path):
    geometry = read(tmp_path, "v 1e-3 -2.5E+2 .5\nv 5. 1e-310 0.1\nv nan inf 3\nv 1 2 3\nf 1 2 4\n")
    assert geometry.vertices[:2].tolist() == [[1e-3, -250, 0.5], [5, 1e-310, 0.1]]
    assert np.isnan(geometry.vertices[2, 0]) and geometry.vertices[2, 1] == np.inf


def test_files_without_faces_give_their_vertices(tmp_path: Path):
    for lines in ("", "p 1 2\n", "l 1 2 3\n"):
        geometry = read(tmp_path, V + lines)
        assert geometry.vertices.shape == (5, 3) and geometry.faces.shape == (0, 3)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("f 0 1 2\n", "line 6: a face uses vertex 0; vertices count from 1"),
        ("f 1 2 6\n", 'line 6: "f 1 2 6" uses a vertex that is not there: the file has 5'),
        ("f 1 2 99999999999999999999\n", "line 6: .*99999999999999999999.* uses a vertex that is not there"),
        ("f 1 2 -99999999999999999999\n", "line 6: .* uses a vertex that is not there"),
        ("f -1 -2 -6\nv 0 0 0\n", "line 6: .* not there: 5 vertices come before it"),
        ("v 1 2\n" + F, 'line 6: "v 1 2" is no vertex: it needs three numbers'),
        ("v\n" + F, "line 6: a vertex has no coordinates"),
        ("v 1 2 x\n" + F, "line 6: .* is no vertex"),
        ("v 0,5 1 2\n" + F, "line 6: .* is no vertex"),
        ("v 1_0 1 2\n" + F, "line 6: .* is no vertex"),
        ("f 1 2 x\n", "line 6: .* is no face: it needs whole numbers"),
        ("f 1 2 3.0\n", "line 6: .* is no face"),
        ("f 1 2 -\n", "line 6: .* is no face"),
        ("f 1-2 3\n", "line 6: .* is no face"),
        ("f 1 2 /3\n", "line 6: .* is no face"),
        ("f 1 2 3_1\n", "line 6: .* is no face"),
        ("f 1,2,3\n", "line 6: .* is no face"),
        (F + "f 1 2", 'ends in the middle of a face: "f 1 2"'),
        (F + "v 1 2", 'line 9: "v 1 2" is no vertex'),
        (F + "surf 0 1 0 1 1/1/1\n", "has free-form surfaces, which are not read"),
        (F + "call part.obj\n", "has parts in other files"),
        ("cstype bezier\ndeg 3 3\ncurv 0 1 1 2 3 4\nend\n", "has free-form curves and no faces"),
    ],
)
def test_damage(tmp_path: Path, lines: str, reason: str):
    refused(tmp_path, V + lines, reason)


def test_what_is_no_obj(tmp_path: Path):
    refused(tmp_path, "# nothing\n", "has no vertices and no faces")
    refused(tmp_path, (V + F).encode("utf-16"), "is UTF-16 text")
    refused(tmp_path, (V + F).encode() + b"\0" * 100, "has a zero byte at position ")


def test_cut_in_any_statement_is_refused_or_whole(tmp_path: Path):
    text = V + F
    for end in range(len(V) + 1, len(text)):
        words = text[len(V) : end].split("\n")[-1].split()
        if len(words) in (1, 2, 3):
            refused(tmp_path, text[:end], "ends in the middle of a face")
        else:
            faces = read(tmp_path, text[:end]).faces
            assert np.array_equal(faces, FACES[: len(faces)]) and len(faces) == text[:end].count("f")


def test_six_digits_far_from_the_origin(tmp_path: Path):
    def text(form: str) -> str:
        return "".join(f"v {x + 4000013:{form}} {y:{form}} {z:{form}}\n" for x, y, z in np.array(VERTICES) * 100) + F

    refused(tmp_path, text(".6g"), "its coordinates have 6 digits, a step of 10 in an object of 300")
    refused(tmp_path, text(".5e"), "have 6 digits")
    assert np.array_equal(read(tmp_path, text(".7f")).vertices[:, 0], np.array(VERTICES)[:, 0] * 100 + 4000013)
    assert len(read(tmp_path, text(".12e")).faces) == 3
    assert len(read(tmp_path, "v 1e6 0 0\nv 1.001e6 0 0\nv 1e6 1000 0\nf 1 2 3\n").faces) == 1  # written by hand


@pytest.mark.parametrize("corner", ["{}/1", "{}//1", "{}/1/1", "-{}/-1/-1", "-{}/"])
def test_cut_in_a_corner_that_has_references_is_refused(tmp_path: Path, corner: str):
    text = V + "f " + " ".join(corner.format(i) for i in (1, 2, 4, 3))
    whole = read(tmp_path, text).faces
    assert len(whole) == 2 and np.array_equal(read(tmp_path, text + "\n").faces, whole)
    for end in range(text.rindex(" ") + 2, len(text)):
        last = text[:end].split()[-1]
        if last.count("/") < corner.count("/") or last[-1] == "-" or (last[-1] == "/" and corner[-1] != "/"):
            refused(tmp_path, text[:end], "ends in the middle of a face|is no face")
        else:
            assert np.array_equal(read(tmp_path, text[:end]).faces, whole)


def test_a_copy_that_broke_off_in_a_line_is_noted(tmp_path: Path):
    text = V + F
    note = "ends without a line end, and 1 of its 5 vertices are in no face: it may be cut"
    assert read(tmp_path, text[: len(V) + len("f 1 2 3\nf 1 3 4")]).notes == (note,)
    assert read(tmp_path, V + "f 1 2 3\nf 1 3 4\n").notes == ()
    assert read(tmp_path, text[:-1]).notes == ()
    assert read(tmp_path, V + "f 1 2 3\nf 1 3 4\n# 2 faces").notes == ()
