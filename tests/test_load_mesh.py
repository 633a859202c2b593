"""What `load_mesh` says of files whatever their format: other names than contents, zeros, rounded coordinates."""

import gzip
import json
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from trellis.grids.formats import FORMATS, MESH_SUFFIXES
from trellis.grids.meshes import load_mesh
from trellis.utils.errors import DataError

POINTS = np.array([[0, 0, 0], [3, 0, 0], [1, 2, 0], [0.5, 0.25, 1]])
FACES = [[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]]
V, F = ("\n".join(" ".join(map(str, row)) for row in rows) + "\n" for rows in (POINTS.tolist(), FACES))
WORDS = "\n".join(f"3 {row}" for row in F.split("\n")[:-1]) + "\n"
OBJ = "# by hand\n" + re.sub("(?m)^(?=.)", "v ", V) + "".join("f {} {} {}\n".format(*np.add(face, 1)) for face in FACES)
GLTF = json.dumps({"asset": {"version": "2.0"}, "scenes": [{"nodes": []}]})
STL = "solid a\n" + "".join(
    "facet normal 0 0 0\nouter loop\n"
    + "".join("vertex {} {} {}\n".format(*POINTS[corner]) for corner in face)
    + "endloop\nendfacet\n"
    for face in FACES
)
DAE = '<?xml version="1.0"?>\n<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1"/>\n'
CONTENTS = {
    ".obj": OBJ.encode(),
    ".ply": f"ply\nformat ascii 1.0\nelement vertex 4\n{''.join(f'property float {axis}{chr(10)}' for axis in 'xyz')}"
    f"element face 4\nproperty list uchar int vertex_index\nend_header\n{V}{WORDS}".encode(),
    ".off": f"OFF\n4 4 0\n{V}{WORDS}".encode(),
    ".stl": (STL + "endsolid a\n").encode(),
    ".stl, binary": b"x" * 80 + struct.pack("<I", 2) + b"\0" * 100,
    ".vtk": b"# vtk DataFile Version 3.0\na\nASCII\nDATASET POLYDATA\n"
    + f"POINTS 4 float\n{V}POLYGONS 4 16\n{WORDS}".encode(),
    ".vtp": b'<?xml version="1.0"?>\n<VTKFile type="PolyData"/>',
    ".gii": b'<?xml version="1.0"?>\n<!DOCTYPE GIFTI>\n<GIFTI Version="1.0"/>',
    ".dae": DAE.encode(),
    ".gltf": GLTF.encode(),
    ".glb": b"glTF" + struct.pack("<4I", 2, 20 + len(GLTF), len(GLTF), 0x4E4F534A) + GLTF.encode(),
}


def reason(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_mesh(path)
    assert path.name not in str(error.value) and not str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_under_the_name_of_another_format_is_named(kind, mark, tmp_path):
    suffix = kind.partition(",")[0]
    if suffix == ".glb" or "binary" in kind:
        mark = b""
    for name in (each for each in MESH_SUFFIXES if FORMATS[each].reader != FORMATS[suffix].reader):
        path = tmp_path / f"part{name}"
        path.write_bytes(mark + CONTENTS[kind])
        said = f"its content is {FORMATS[suffix].name}, its name says {FORMATS[name].name}: rename it to {suffix}"
        assert reason(path) == said, name


def test_packed_files_under_the_name_of_what_is_in_them_are_named(tmp_path):
    for suffix in (".stl", ".obj", ".ply", ".glb", ".off", ".dae", ".vtk", ".gii", ".3mf"):
        path = tmp_path / f"part{suffix}"
        path.write_bytes(gzip.compress(CONTENTS.get(suffix, b"x")))
        assert reason(path) == f"is in gzip: {'unpack it' if suffix == '.3mf' else f'rename it to {suffix}.gz'}"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("part.obj", OBJ)
        if suffix != ".3mf":
            assert reason(path).endswith("rename it to .zip")
            assert len(load_mesh(path.rename(tmp_path / "part.zip")).faces) == 4


def test_a_damaged_file_under_its_own_name_keeps_its_reason(tmp_path):
    for suffix in (".obj", ".ply", ".off", ".stl", ".vtk"):
        (tmp_path / f"part{suffix}").write_bytes(CONTENTS[suffix][:-21])
        assert "rename" not in reason(tmp_path / f"part{suffix}")
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        archive.writestr("3D/readme.txt", "none")
    assert reason(tmp_path / "part.zip") == "holds no mesh of a format that is read, only .txt"


@pytest.mark.parametrize(
    "page", ["<!DOCTYPE html>\n<p>", "\n<HTML>", "<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC>", "<!-- a -->\n<html>"]
)
def test_a_web_page_is_no_mesh(page, tmp_path):
    for suffix in MESH_SUFFIXES:
        (tmp_path / f"part{suffix}").write_text(page)
        assert reason(tmp_path / f"part{suffix}").startswith("is a web page (HTML)")


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_zeros_are_no_mesh(suffix, tmp_path):
    (tmp_path / f"part{suffix}").write_bytes(b"\0" * 2000)
    assert reason(tmp_path / f"part{suffix}").startswith("begins with 512 zero bytes")


def test_text_that_single_precision_rounded_is_noted(tmp_path):
    def notes(points: np.ndarray) -> tuple[str, ...]:
        lines = "".join("v {!r} {!r} {!r}\n".format(*row) for row in points.tolist())
        (tmp_path / "part.obj").write_text(lines + OBJ[OBJ.index("f ") :])
        return load_mesh(tmp_path / "part.obj").notes

    far = POINTS / 7 + 4e6
    (note,) = notes(far.astype(np.float32).astype(np.float64))
    assert note.startswith("all its coordinates are numbers of single precision, which has steps of 0.25 at 4e+06")
    assert notes(far) == () and notes(POINTS * 7 + 4e6) == () and notes(POINTS * 1e200) == ()


def test_coordinates_that_double_precision_rounds_are_refused(tmp_path):
    node = {"mesh": 0, "translation": [1e17, 0, 0]}
    accessors = [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 3}]
    tree = json.loads(GLTF) | {"scenes": [{"nodes": [0]}], "nodes": [node], "accessors": accessors}
    tree |= {"meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "buffers": [{"uri": "a.bin"}]}
    tree |= {"bufferViews": [{"buffer": 0, "byteLength": 36}]}
    (tmp_path / "a.bin").write_bytes(POINTS[1:].astype("<f4").tobytes())
    (tmp_path / "part.gltf").write_text(json.dumps(tree))
    assert reason(tmp_path / "part.gltf").startswith(
        "its coordinates are too coarse: double precision has steps of 16 at 1e+17, but the object is 2 long"
    )
    node["translation"] = [1e12, 0, 0]
    (tmp_path / "part.gltf").write_text(json.dumps(tree))
    assert np.array_equal(load_mesh(tmp_path / "part.gltf").vertices, POINTS[1:] + [1e12, 0, 0])
