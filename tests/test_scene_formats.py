"""Readers of formats with scenes, cells or archives, and the table of formats. Each test writes its files itself."""

import base64
import gzip
import importlib
import lzma
import math
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from trellis.grids import formats
from trellis.grids.geometry import Geometry
from trellis.grids.readers import archive, collada, gifti, threemf, vtk
from trellis.utils.errors import DataError

# A lopsided tetrahedron: no rotation, reflection or order of axes takes it to itself.
POINTS = np.array([[0, 0, 0], [3, 0, 0], [1, 2, 0], [0.5, 0.25, 1]], dtype=np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
# A square with a notch: its fan from the first corner covers the notch.
NOTCHED = np.array([[0, 0, 5], [2, 1, 5], [4, 0, 5], [4, 4, 5], [0, 4, 5]], dtype=np.float64)
NOTCHED_AREA = 14.0


def triangles(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Corners [F, 3, 3] of triangles, each beginning with its lowest, sorted: equal if the triangles are equal."""
    corners = np.asarray(vertices, dtype=np.float64)[np.asarray(faces)]
    rows = []
    for triangle in corners.tolist():
        first = triangle.index(min(triangle))
        rows.append(triangle[first:] + triangle[:first])
    return np.array(sorted(rows)).reshape(-1, 3, 3)


def area(geometry: Geometry) -> float:
    a, b, c = np.moveaxis(np.asarray(geometry.vertices, dtype=np.float64)[geometry.faces], 1, 0)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def assert_same(geometry: Geometry, vertices: np.ndarray, faces: np.ndarray, tolerance: float = 0) -> None:
    got, want = triangles(*geometry[:2]), triangles(vertices, faces)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def refusal(read, path: Path) -> str:
    """The reason for which a reader refuses a file: it names no file and has no full stop at its end."""
    with pytest.raises(DataError) as error:
        read(path)
    reason = str(error.value)
    assert path.name not in reason and not reason.endswith(".") and "\n" not in reason
    return reason


def assert_cut_is_refused(read, path: Path, content: bytes, step: int) -> None:
    """Every shorter copy of a file is refused or, where only an end without meaning is lost, read as the same."""
    path.write_bytes(content)
    want = read(path)
    for length in range(1, len(content) - 1, step):
        path.write_bytes(content[:length])
        try:
            got = read(path)
        except DataError:
            continue
        assert_same(got, *want[:2])


# --- the table of formats ---


@pytest.mark.parametrize(
    "name, reader, kind",
    [
        ("a.GLB", "gltf", "mesh"),
        ("a.Stl", "stl", "mesh"),
        ("a.tar.stl", "stl", "mesh"),
        ("a.STL.GZ", "archive", "mesh"),
        ("a.gltf.gz", None, None),
        ("a.surf.gii", "gifti", "mesh"),
        ("scan.nii.gz", None, "volume"),
        ("scan.seg.nrrd", None, "volume"),
        ("nii.gz", None, None),
        (".stl", None, None),
        ("stl", None, None),
        ("a.gz", None, None),
        ("a.txt", None, None),
    ],
)
def test_a_suffix_names_a_reader(name, reader, kind):
    known = formats.reader_of(Path("folder.stl") / name)
    assert (known.reader, known.kind) == (reader, kind) if known else kind is None


def test_readers_of_the_table_exist():
    for known in formats.FORMATS.values():
        assert (known.reader is None) == (known.kind == "volume")
        if known.reader:
            assert callable(importlib.import_module(f"trellis.grids.readers.{known.reader}").read)
    assert set(formats.MESH_SUFFIXES) | set(formats.VOLUME_SUFFIXES) == set(formats.FORMATS)


def test_the_rule_of_a_format_says_what_is_up():
    up = {suffix: known.up for suffix, known in formats.FORMATS.items()}
    assert [up[suffix] for suffix in (".glb", ".gltf", ".stl", ".3mf", ".gii")] == ["y", "y", "z", "z", "z"]
    assert [up[suffix] for suffix in (".obj", ".ply", ".off", ".vtk", ".vtp", ".dae", ".zip")] == [None] * 7


@pytest.mark.parametrize("suffix", [".fbx", ".USDZ", ".blend", ".step", ".3ds", ".wrl", ".urdf", ".las", ".tar.gz"])
def test_a_format_that_is_not_read_has_a_remedy(suffix, tmp_path):
    reason = formats.why_not(tmp_path / f"part{suffix}")
    assert reason and " is not read: " in reason and not reason.endswith(".")


@pytest.mark.parametrize("name", ["IM_0001", "1.2.840.113619.2"])
def test_dicom_files_as_scanners_name_them(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    assert formats.why_not(tmp_path / name) == "DICOM is not read under this name: rename it to .dcm"
    for other in (b"", bytes(200), b"DICM" + bytes(200)):
        (tmp_path / name).write_bytes(other)
        assert formats.why_not(tmp_path / name) is None


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("3001.dat", b"0 Brick  2 x  4\r\n0 Name: 3001.dat\r\n", "LDraw"),
        ("log.dat", b"0 1 2\n", None),
        ("world.sdf", b"<?xml version='1.0'?><sdf version='1.6'/>", "robot"),
        ("molecule.sdf", b"aspirin\n  RDKit\n", None),
        ("scene.xml", b"<mujoco model='ant'/>", "robot"),
        ("pom.xml", b"<project/>", None),
        ("scan.xyz", b"0.1 0.2 0.3\n", "point cloud"),
        ("water.xyz", b"3\nwater\nO 0 0 0\n", None),
        ("a.max", b"text", None),
        ("notes.txt", b"", None),
        ("a.stl", b"", None),
    ],
)
def test_a_shared_suffix_counts_only_with_the_content(name, content, word, tmp_path):
    (tmp_path / name).write_bytes(content)
    reason = formats.why_not(tmp_path / name)
    assert (word in reason) if word else reason is None


# --- COLLADA ---


def source(name: str, values: np.ndarray, columns: str = "XYZ") -> str:
    text = " ".join(repr(float(value)) for value in np.asarray(values).ravel())
    params = "".join(f'<param name="{column}" type="float"/>' for column in columns)
    count = np.size(values)
    return (
        f'<source id="{name}"><float_array id="{name}-array" count="{count}">{text}</float_array><technique_common>'
        f'<accessor source="#{name}-array" count="{count // len(columns)}" stride="{len(columns)}">{params}</accessor>'
        "</technique_common></source>"
    )


def words(name: str, kind: str, values: list[str]) -> str:
    return (
        f'<source id="{name}"><{kind} id="{name}-array" count="{len(values)}">{" ".join(values)}</{kind}>'
        f'<technique_common><accessor source="#{name}-array" count="{len(values)}"><param name="JOINT" type="name"/>'
        "</accessor></technique_common></source>"
    )


def matrices(name: str, values: np.ndarray) -> str:
    text = " ".join(repr(float(value)) for value in values.ravel())
    return (
        f'<source id="{name}"><float_array id="{name}-array" count="{values.size}">{text}</float_array>'
        f'<technique_common><accessor source="#{name}-array" count="{len(values)}" stride="16">'
        '<param name="TRANSFORM" type="float4x4"/></accessor></technique_common></source>'
    )


def geometry(name: str, points: np.ndarray, primitives: str) -> str:
    return (
        f'<geometry id="{name}"><mesh>{source(name + "-p", points)}<vertices id="{name}-v">'
        f'<input semantic="POSITION" source="#{name}-p"/></vertices>{primitives}</mesh></geometry>'
    )


def vertex_input(name: str) -> str:
    return f'<input semantic="VERTEX" source="#{name}-v" offset="0"/>'


def faces_text(name: str, faces: np.ndarray) -> str:
    indices = " ".join(map(str, np.ravel(faces)))
    return f'<triangles count="{len(faces)}">{vertex_input(name)}<p>{indices}</p></triangles>'


TETRA = geometry("g", POINTS, faces_text("g", FACES))
INSTANCE = '<instance_geometry url="#g"/>'


def document(
    geometries: str = TETRA,
    nodes: str = f"<node>{INSTANCE}</node>",
    rest: str = "",
    up: str = "<up_axis>Z_UP</up_axis>",
    head: str = '<?xml version="1.0"?>',
    scene: str = '<scene><instance_visual_scene url="#s"/></scene>',
    version: str = "1.4.1",
) -> bytes:
    return (
        f'{head}<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="{version}"><asset>{up}</asset>'
        f"<library_geometries>{geometries}</library_geometries>{rest}"
        f'<library_visual_scenes><visual_scene id="s">{nodes}</visual_scene></library_visual_scenes>{scene}</COLLADA>'
    ).encode()


def dae(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "scene.dae"
    path.write_bytes(content)
    return path


SQUARE = np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0], [-2, 1, 0]], dtype=np.float64)  # and a point beside it
HOUSE = [[0, 1, 2], [2, 3, 0], [0, 3, 4]]  # the square and a triangle on one of its sides


@pytest.mark.parametrize(
    "primitive, faces",
    [
        ('<triangles count="2">{}<p>0 1 2 0 2 3</p></triangles>', [[0, 1, 2], [0, 2, 3]]),
        # Two inputs: the vertex is the second of each pair of indices.
        (
            '<triangles count="1"><input semantic="NORMAL" source="#g-p" offset="0"/>'
            '<input semantic="VERTEX" source="#g-v" offset="1"/><p>9 0 9 1 9 2</p></triangles>',
            [[0, 1, 2]],
        ),
        (
            '<polylist count="2">{}<vcount>3 4</vcount><p>0 3 4 0 1 2 3</p></polylist>',
            [[0, 3, 4], [0, 1, 2], [2, 3, 0]],
        ),
        ('<polygons count="2">{}<p>0 1 2 3</p><p>0 3 4</p></polygons>', HOUSE),
        ('<tristrips count="2">{}<p>1 0 2 3</p><p>0 3 4</p></tristrips>', [[1, 0, 2], [2, 0, 3], [0, 3, 4]]),
        ('<tristrips count="1">{}<p>1 0 2 2 4 4 0 3</p></tristrips>', [[1, 0, 2], [0, 4, 3]]),  # joined by repetition
        ('<trifans count="1">{}<p>0 1 2 3</p></trifans>', [[0, 1, 2], [0, 2, 3]]),
        ('<triangles count="0">{}</triangles><trifans count="1">{}<p>0 1 2</p></trifans>', [[0, 1, 2]]),
        ('<lines count="1">{}<p>0 4</p></lines><triangles count="1">{}<p>0 1 2</p></triangles>', [[0, 1, 2]]),
    ],
)
def test_collada_primitives(primitive, faces, tmp_path):
    text = geometry("g", SQUARE, primitive.replace("{}", vertex_input("g")))
    assert_same(collada.read(dae(tmp_path, document(text))), SQUARE, faces)


@pytest.mark.parametrize(
    "primitive",
    [
        '<polylist count="1">{}<vcount>5</vcount><p>0 1 2 3 4</p></polylist>',
        '<polygons count="1">{}<p>0 1 2 3 4</p></polygons>',
        '<polygons count="1">{}<ph><p>0 1 2 3 4</p></ph></polygons>',
    ],
)
def test_collada_concave_polygons_keep_their_notch(primitive, tmp_path):
    text = geometry("g", NOTCHED, primitive.replace("{}", vertex_input("g")))
    got = collada.read(dae(tmp_path, document(text)))
    assert area(got) == pytest.approx(NOTCHED_AREA) and (got.vertices[got.faces][..., 2] == 5).all()


def test_collada_polygons_keep_their_holes(tmp_path):
    hole = np.array([[1, 2, 5], [1, 3, 5], [2, 3, 5], [2, 2, 5], [3, 3, 5], [3, 2, 5], [2.5, 2, 5]])
    turn = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])  # the polygon is not in a plane of two axes
    points = np.concatenate([NOTCHED, hole]) @ turn
    primitive = (
        f'<polygons count="1">{vertex_input("g")}<ph><p>0 1 2 3 4</p><h>5 6 7 8</h><h>9 10 11</h></ph></polygons>'
    )
    got = collada.read(dae(tmp_path, document(geometry("g", points, primitive))))
    assert area(got) == pytest.approx(NOTCHED_AREA - 1 - 0.25)


@pytest.mark.parametrize(
    "up, axis, turned",
    [
        ("<up_axis>Y_UP</up_axis>", "y", POINTS),
        ("<up_axis> Z_UP </up_axis>", "z", POINTS),
        ("", "y", POINTS),
        ("<up_axis>X_UP</up_axis>", "y", np.stack([-POINTS[:, 1], POINTS[:, 0], POINTS[:, 2]], axis=1)),
    ],
)
def test_collada_says_what_is_up(up, axis, turned, tmp_path):
    got = collada.read(dae(tmp_path, document(up=up + '<unit meter="0.01" name="cm"/>')))
    assert got.up == axis and bool(got.notes) == ("X_UP" in up)
    assert_same(got, turned, FACES)


def test_collada_refuses_another_axis(tmp_path):
    assert "W_UP" in refusal(collada.read, dae(tmp_path, document(up="<up_axis>W_UP</up_axis>")))


def rotation(axis: list[float], degrees: float) -> np.ndarray:
    """By the quaternion's formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis) * math.sin(math.radians(degrees) / 2)
    w = math.cos(math.radians(degrees) / 2)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@pytest.mark.parametrize(
    "text, linear, offset",
    [
        ("<translate>1 2 3</translate>", np.eye(3), [1, 2, 3]),
        ("<scale>2 -1 0.5</scale>", np.diag([2, -1, 0.5]), [0, 0, 0]),
        ("<rotate>1 2 2 40</rotate>", rotation([1, 2, 2], 40), [0, 0, 0]),
        ("<matrix>0 -1 0 7 1 0 0 8 0 0 1 9 0 0 0 1</matrix>", [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [7, 8, 9]),
        # By 45 degrees, y leans toward x: the shear of x by y.
        ("<skew>45 0 1 0 1 0 0</skew>", [[1, 1, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 0]),
        # A camera at (0, 0, 5) that looks along -x has its own x along -z, and its back along x.
        ("<lookat>0 0 5 -1 0 5 0 1 0</lookat>", [[0, 0, 1], [0, 1, 0], [-1, 0, 0]], [0, 0, 5]),
        # The last one comes first: the point is scaled, then moved.
        ("<translate>1 0 0</translate><scale>2 2 2</scale>", 2 * np.eye(3), [1, 0, 0]),
        ("<scale>2 2 2</scale><translate>1 0 0</translate>", 2 * np.eye(3), [2, 0, 0]),
    ],
)
def test_collada_transforms(text, linear, offset, tmp_path):
    got = collada.read(dae(tmp_path, document(nodes=f"<node>{text}{INSTANCE}</node>")))
    assert_same(got, POINTS @ np.array(linear, dtype=np.float64).T + offset, FACES, 1e-12)


@pytest.mark.parametrize("text", ["<rotate>1 0 0</rotate>", "<matrix>1 2</matrix>", "<translate>1 2 x</translate>"])
def test_collada_transforms_of_another_length_are_refused(text, tmp_path):
    assert text[1:5] in refusal(collada.read, dae(tmp_path, document(nodes=f"<node>{text}{INSTANCE}</node>")))


def test_collada_instances_of_nodes(tmp_path):
    """A node of the library, used twice below nodes of the scene, and a nested one; one in the library is not shown."""
    library = (
        "<library_nodes>"
        f'<node id="part"><translate>0 0 1</translate>{INSTANCE}<node><scale>3 3 3</scale>{INSTANCE}</node></node>'
        f'<node id="unused">{INSTANCE}</node></library_nodes>'
    )
    nodes = (
        '<node><translate>10 0 0</translate><instance_node url="#part"/></node>'
        '<node><scale>2 2 2</scale><instance_node url="#part"/></node>'
    )
    want = [
        POINTS + [10, 0, 1],
        3 * POINTS + [10, 0, 1],
        2 * (POINTS + [0, 0, 1]),
        2 * (3 * POINTS + [0, 0, 1]),
    ]
    got = collada.read(dae(tmp_path, document(nodes=nodes, rest=library)))
    assert_same(got, np.concatenate(want), np.concatenate([FACES + 4 * copy for copy in range(4)]), 1e-12)


def test_collada_nodes_that_contain_themselves_are_refused(tmp_path):
    nodes = '<node id="a"><node id="b"><instance_node url="#a"/></node></node>'
    assert "contains itself" in refusal(collada.read, dae(tmp_path, document(nodes=nodes)))


def test_collada_deep_trees_take_linear_time(tmp_path):
    depth = 20_000
    nodes = "<node><translate>1 0 0</translate>" * depth + INSTANCE + "</node>" * depth
    start = time.perf_counter()
    got = collada.read(dae(tmp_path, document(nodes=nodes)))
    assert_same(got, POINTS + [depth, 0, 0], FACES)
    assert time.perf_counter() - start < 5


def test_collada_instances_of_instances_are_bounded(tmp_path, monkeypatch):
    from trellis.grids.readers import parts

    monkeypatch.setattr(parts, "MAX_INSTANCES", 1000)
    library = "".join(
        f'<node id="n{level}"><instance_node url="#n{level + 1}"/><instance_node url="#n{level + 1}"/></node>'
        for level in range(60)
    )
    nodes = f'<node><instance_node url="#n0"/></node>{library}<node id="n60">{INSTANCE}</node>'
    assert "more than 1,000" in refusal(collada.read, dae(tmp_path, document(nodes=nodes)))


def skinned(names: str = "Name_array", weights: str = "", order: str = "a b", node: str = "") -> bytes:
    """A tetrahedron bound to two joints that the scene has moved."""
    bind = np.eye(4)
    bind[:3, 3] = [0, 0, 2]
    inverses = np.stack([np.eye(4), np.eye(4)])
    inverses[1, :3, 3] = [-3, 0, 0]
    weights = weights or "<vcount>1 1 2 2</vcount><v>0 0 1 0 0 1 1 2 0 1 -1 1</v>"
    controllers = (
        '<library_controllers><controller id="c"><skin source="#g"><bind_shape_matrix>'
        f"{' '.join(map(str, bind.ravel()))}</bind_shape_matrix>{words('j', names, order.split())}"
        f"{matrices('i', inverses)}{source('w', np.array([1.0, 0.5, 1.5]), 'W')}"
        '<joints><input semantic="JOINT" source="#j"/><input semantic="INV_BIND_MATRIX" source="#i"/></joints>'
        '<vertex_weights count="4"><input semantic="JOINT" source="#j" offset="0"/>'
        f'<input semantic="WEIGHT" source="#w" offset="1"/>{weights}</vertex_weights></skin></controller>'
        "</library_controllers>"
    )
    nodes = (
        # Another skeleton has joints of the same names.
        '<node><translate>99 99 99</translate><node sid="a" type="JOINT"/><node sid="b" type="JOINT"/></node>'
        '<node id="root"><translate>0 10 0</translate><node id="a" sid="a" type="JOINT"><scale>2 2 2</scale>'
        '<node id="b" sid="b" type="JOINT"><translate>5 0 0</translate><rotate>0 0 1 90</rotate></node></node></node>'
        f'<node>{node}<instance_controller url="#c"><skeleton>#root</skeleton></instance_controller></node>'
    )
    return document(nodes=nodes, rest=controllers)


def skinned_points() -> np.ndarray:
    """What `skinned` must give, vertex by vertex."""
    bound = POINTS.astype(np.float64) + [0, 0, 2]
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])

    def a(point):
        return 2 * point + [0, 10, 0]

    def b(point):
        return a(turn @ (point - [3, 0, 0]) + [5, 0, 0])

    return np.array(
        [
            a(bound[0]),
            b(bound[1]),
            (0.5 * a(bound[2]) + 1.5 * b(bound[2])) / 2,  # the weights are normalized
            0.5 * a(bound[3]) + 0.5 * bound[3],  # joint -1 is the bind shape
        ]
    )


@pytest.mark.parametrize("names", ["Name_array", "IDREF_array"])
def test_collada_skins_take_the_pose_of_their_joints(names, tmp_path):
    got = collada.read(dae(tmp_path, skinned(names)))
    assert_same(got, skinned_points(), FACES, 1e-12)
    assert not got.notes


def test_collada_skins_ignore_the_node_of_their_instance(tmp_path):
    got = collada.read(dae(tmp_path, skinned(node="<translate>50 0 0</translate>")))
    assert_same(got, skinned_points(), FACES, 1e-12)


def test_collada_skins_without_their_joints_are_shown_as_modeled(tmp_path):
    content = skinned(order="a gone", node="<translate>50 0 0</translate>")
    got = collada.read(dae(tmp_path, content))
    assert_same(got, POINTS + [50, 0, 0], FACES)
    assert len(got.notes) == 1 and "gone" in got.notes[0]
    instance = content[content.index(b"<instance_controller") : content.rindex(b"</instance_controller>") + 22]
    twice = collada.read(dae(tmp_path, content.replace(instance, instance * 2)))
    assert len(twice.faces) == 2 * len(got.faces) and twice.notes == got.notes


@pytest.mark.parametrize(
    "weights, word",
    [
        ("<vcount>1 1 1</vcount><v>0 0 0 0 0 0</v>", "3 vertices"),
        ("<vcount>1 1 1 1</vcount><v>0 0 0 0 0 0</v>", "6 indices"),
        ("<vcount>1 1 1 1</vcount><v>0 0 0 0 0 0 2 0</v>", "joints 0 to 2 of 2"),
        ("<vcount>1 1 1 1</vcount><v>0 0 0 0 0 0 -2 0</v>", "joints -2 to 0 of 2"),
        ("<vcount>1 1 1 1</vcount><v>0 0 0 0 0 0 0 3</v>", "weights 0 to 3 of 3"),
        ("<vcount>1 1 1 -1</vcount><v>0 0 0 0 0 0 0 0</v>", "damaged"),
    ],
)
def test_collada_skins_that_do_not_fit_are_refused(weights, word, tmp_path):
    assert word in refusal(collada.read, dae(tmp_path, skinned(weights=weights)))


@pytest.mark.parametrize(
    "method, want",
    [
        (' method="NORMALIZED"', 0.5 * POINTS + 0.75 * (POINTS + [1, 0, 0]) - 0.25 * (2 * POINTS)),
        ("", 0.5 * POINTS + 0.75 * (POINTS + [1, 0, 0]) - 0.25 * (2 * POINTS)),
        (' method="RELATIVE"', POINTS + 0.75 * (POINTS + [1, 0, 0]) - 0.25 * (2 * POINTS)),
    ],
)
def test_collada_morphs_have_their_weights(method, want, tmp_path):
    """In the space of the node that has the instance. Targets may have points alone."""
    targets = geometry("t0", POINTS + [1, 0, 0], "") + geometry("t1", 2 * POINTS, faces_text("t1", FACES))
    controllers = (
        f'<library_controllers><controller id="m"><morph source="#g"{method}>{words("mt", "IDREF_array", ["t0", "t1"])}'
        f'{source("mw", np.array([0.75, -0.25]), "W")}<targets><input semantic="MORPH_TARGET" source="#mt"/>'
        '<input semantic="MORPH_WEIGHT" source="#mw"/></targets></morph></controller></library_controllers>'
    )
    nodes = '<node><translate>0 0 4</translate><instance_controller url="#m"/></node>'
    got = collada.read(dae(tmp_path, document(TETRA + targets, nodes, controllers)))
    assert_same(got, want + [0, 0, 4], FACES, 1e-12)


def test_collada_without_a_scene_has_its_geometries_and_a_note(tmp_path):
    content = document(scene="").replace(b"visual_scene", b"other_scene")
    got = collada.read(dae(tmp_path, content))
    assert_same(got, POINTS, FACES)
    assert len(got.notes) == 1 and "no scene" in got.notes[0]


def test_collada_takes_the_scene_that_it_names(tmp_path):
    other = f'</visual_scene><visual_scene id="other"><node><scale>2 2 2</scale>{INSTANCE}</node>'
    content = document(
        nodes=f"<node>{INSTANCE}</node>{other}", scene='<scene><instance_visual_scene url="#other"/></scene>'
    )
    assert_same(collada.read(dae(tmp_path, content)), 2 * POINTS, FACES)


@pytest.mark.parametrize(
    "change, word",
    [
        ((b'count="12">', b'count="13">'), "12 of 13 values"),
        ((b'count="4" stride="3"', b'count="5" stride="3"'), "takes 5 times 3"),
        ((b'<triangles count="4">', b'<triangles count="5">'), "for 5 triangles"),
        ((b"<p>0 2 1 ", b"<p>0 2 "), "11 corners"),
        ((b"<p>0 2 1 ", b"<p>0 2 4 "), "0 to 4 of 4"),
        ((b"<p>0 2 1 ", b"<p>0 2 -1 "), "-1 to 3 of 4"),
        ((b"<p>0 2 1 ", b"<p>0 2 1.5 "), "not a number"),
        ((b"<p>0 2 1 ", b"<p>0 2 0_1 "), "not a number"),
        ((b"<p>0 2 1 ", b"<p>0 2 99999999999999999999 "), "not a number"),
        ((b'<instance_geometry url="#g"', b'<instance_geometry url="#h"'), "#h"),
        ((b'<instance_geometry url="#g"', b'<instance_geometry url="other.dae#g"'), "another file"),
        ((b'offset="0"', b'offset="-1"'), "offset"),
        ((b'stride="3"', b'stride="99999999999999"'), "takes 4 times"),
        ((b'count="4" stride="3"', b'count="0" stride="99999999999999999999"'), "0 to 3 of 0"),
        ((b'semantic="VERTEX"', b'semantic="NORMAL"'), "VERTEX"),
        ((b'version="1.4.1"', b'version="1.3.0"'), "1.3.0"),
        ((b"<mesh>", b"<brep>"), "XML"),
        ((b"COLLADA", b"html"), "<html>"),
    ],
)
def test_collada_that_does_not_fit_is_refused(change, word, tmp_path):
    content = document()
    assert change[0] in content
    assert word in refusal(collada.read, dae(tmp_path, content.replace(*change)))


@pytest.mark.parametrize(
    "inner, word", [("<convex_mesh convex_hull_of='#g'/>", "convex hull"), ("<brep/>", "boundary representation")]
)
def test_collada_geometry_of_other_kinds_is_refused_by_name(inner, word, tmp_path):
    text = f'{TETRA}<geometry id="k">{inner}</geometry>'
    nodes = '<node><instance_geometry url="#k"/></node>'
    assert word in refusal(collada.read, dae(tmp_path, document(text, nodes)))


def test_collada_ids_are_taken_where_they_are_used(tmp_path):
    """Exporters give all meshes sources of the same ids, and nodes the ids of their geometries."""
    other = geometry("g", 2 * POINTS, faces_text("g", FACES)).replace('<geometry id="g">', '<geometry id="h">')
    nodes = f'<node id="g">{INSTANCE}</node><node id="h"><instance_geometry url="#h"/></node>'
    got = collada.read(dae(tmp_path, document(TETRA + other, nodes)))
    assert_same(got, np.concatenate([POINTS, 2 * POINTS]), np.concatenate([FACES, FACES + 4]))
    assert not got.notes
    twice = geometry("g", 2 * POINTS, faces_text("g", FACES))
    got = collada.read(dae(tmp_path, document(TETRA + twice)))
    assert_same(got, POINTS, FACES)
    assert len(got.notes) == 1 and '"g"' in got.notes[0]


def test_coordinates_with_too_few_digits_are_refused(tmp_path):
    """Six digits are steps of 10 here, in an object of 3."""
    far = np.asarray(POINTS, dtype=np.float64) + 4_000_000
    written = [" ".join(f"{value:.5e}" for value in far.ravel()), " ".join(f"{value:.8e}" for value in far.ravel())]
    exact = " ".join(repr(float(value)) for value in far.ravel())
    content = document(geometry("g", far, faces_text("g", FACES))).decode()
    assert "digits" in refusal(collada.read, dae(tmp_path, content.replace(exact, written[0]).encode()))
    assert_same(collada.read(dae(tmp_path, content.replace(exact, written[1]).encode())), far, FACES, 0.01)
    text = model(f'<object id="1">{mesh_3mf(far)}</object>', '<item objectid="1"/>')
    for value in np.unique(far):
        text = text.replace(f'"{value}"', f'"{value:.5e}"')
    assert "digits" in refusal(threemf.read, write_3mf(tmp_path / "a.3mf", text))


def test_collada_of_lines_has_no_triangles(tmp_path):
    text = geometry("g", POINTS, f'<lines count="1">{vertex_input("g")}<p>0 1</p></lines>')
    assert refusal(collada.read, dae(tmp_path, document(text))) == "has no triangles, only lines"


def test_collada_cut_off_is_refused(tmp_path):
    assert_cut_is_refused(collada.read, tmp_path / "cut.dae", skinned(), 37)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_xml_in_its_encoding(encoding, tmp_path):
    name = {"utf-8-sig": "utf-8", "latin-1": "iso-8859-1"}.get(encoding, encoding)
    content = document(head=f'<?xml version="1.0" encoding="{name}"?><!-- Schädel -->').decode()
    assert_same(collada.read(dae(tmp_path, content.encode(encoding))), POINTS, FACES)


@pytest.mark.parametrize("declared", ["", ' encoding="utf-8"', ' encoding="utf-16"', ' encoding="windows-1252"'])
def test_xml_in_another_encoding_than_it_says(declared, tmp_path):
    content = document(head=f'<?xml version="1.0"{declared}?><!-- Schädel -->').decode()
    for encoding in ("latin-1", "utf-8"):
        assert_same(collada.read(dae(tmp_path, content.encode(encoding))), POINTS, FACES)


def test_xml_entities_are_never_expanded(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0 2 1 0 1 3 1 2 3 2 0 3")
    levels = "".join(f'<!ENTITY e{level} "{f"&e{level - 1};" * 10}">' for level in range(1, 10))
    for declared, used in (
        (f'<!DOCTYPE COLLADA [<!ENTITY e0 "0 1 2 ">{levels}]>', "&e9;"),
        (f'<!DOCTYPE COLLADA [<!ENTITY x SYSTEM "file://{secret}">]>', "&x;"),
        (f'<!DOCTYPE COLLADA SYSTEM "file://{secret}">', "&x;"),
    ):
        content = document(head=f'<?xml version="1.0"?>{declared}').replace(b"0 2 1 0 1 3 1 2 3 2 0 3", used.encode())
        assert "entity" in refusal(collada.read, dae(tmp_path, content))


# --- 3MF ---

CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
PRODUCTION = "http://schemas.microsoft.com/3dmanufacturing/production/2015/06"


def mesh_3mf(points: np.ndarray = POINTS, faces: np.ndarray = FACES, more: str = "") -> str:
    vertices = "".join('<vertex x="{}" y="{}" z="{}"/>'.format(*point) for point in points.tolist())
    corners = "".join(
        '<triangle v1="{}" v2="{}" v3="{}" pid="9"/>'.format(*face) for face in np.asarray(faces).tolist()
    )
    return f"<mesh><vertices>{vertices}</vertices><triangles>{corners}</triangles>{more}</mesh>"


def model(resources: str, build: str, attributes: str = "") -> str:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><model unit="inch" xmlns="{CORE}" xmlns:p="{PRODUCTION}" {attributes}>'
        f"<resources>{resources}</resources><build>{build}</build></model>"
    )


def write_3mf(path: Path, text: str, target: str = "/3D/3dmodel.model", **parts: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Target="{target}" Id="r" Type="{threemf.MODEL}"/></Relationships>',
        )
        package.writestr("3D/3dmodel.model", text)
        for name, content in parts.items():
            package.writestr(f"3D/Objects/{name}.model", content)
    return path


def test_3mf_is_its_build(tmp_path):
    """Items, components of components and transforms; what is not built is not read."""
    resources = (
        f'<object id="1">{mesh_3mf()}</object><object id="7">{mesh_3mf(9 * POINTS)}</object>'
        '<object id="2" type="model"><components><component objectid="1" transform="0 1 0 -1 0 0 0 0 1 5 6 7"/>'
        '<component objectid="1"/></components></object>'
        '<object id="3"><components><component objectid="2" transform="2 0 0 0 2 0 0 0 2 0 0 0"/></components></object>'
    )
    build = '<item objectid="3" transform="1 0 0 0 1 0 0 0 1 100 0 0"/><item objectid="1"/>'
    got = threemf.read(write_3mf(tmp_path / "a.3mf", model(resources, build)))
    turned = np.stack([-POINTS[:, 1], POINTS[:, 0], POINTS[:, 2]], axis=1) + [5, 6, 7]  # rows times the matrix
    want = [2 * turned + [100, 0, 0], 2 * POINTS + [100, 0, 0], POINTS]
    assert_same(got, np.concatenate(want), np.concatenate([FACES + 4 * copy for copy in range(3)]))
    assert got.up == "z" and not got.notes


def test_3mf_parts_of_the_production_extension(tmp_path):
    text = model(
        '<object id="1"><components><component p:path="/3D/Objects/Part.model" objectid="1"/></components></object>',
        '<item objectid="1" p:UUID="x"/><item objectid="1" p:path="/3d/objects/part.model"/>',
        'requiredextensions="p"',
    )
    got = threemf.read(write_3mf(tmp_path / "a.3mf", text, part=model(f'<object id="1">{mesh_3mf()}</object>', "")))
    assert_same(got, np.concatenate([POINTS, POINTS]), np.concatenate([FACES, FACES + 4]))


def test_3mf_says_what_a_slicer_keeps_in_it(tmp_path):
    path = write_3mf(tmp_path / "a.3mf", model(f'<object id="1">{mesh_3mf()}</object>', '<item objectid="1"/>'))
    with zipfile.ZipFile(path, "a") as package:
        volumes = "".join(
            f'<volume firstid="0" lastid="1"><metadata type="volume" key="volume_type" value="{kind}"/></volume>'
            for kind in ("ModelPart", "NegativeVolume")
        )
        package.writestr("Metadata/Slic3r_PE_model.config", f'<config><object id="1">{volumes}</object></config>')
    got = threemf.read(path)
    assert_same(got, POINTS, FACES)
    assert len(got.notes) == 1 and "(NegativeVolume)" in got.notes[0]


def test_3mf_leaves_out_supports_and_says_so(tmp_path):
    resources = f'<object id="1">{mesh_3mf()}</object>' + "".join(
        f'<object id="{number}" type="{kind}">{mesh_3mf(2 * POINTS)}</object>'
        for number, kind in ((2, "support"), (3, "solidsupport"), (4, "other"))
    )
    build = "".join(f'<item objectid="{number}"/>' for number in (1, 2, 3, 4))
    got = threemf.read(write_3mf(tmp_path / "a.3mf", model(resources, build)))
    assert_same(got, POINTS, FACES)
    assert len(got.notes) == 1 and "3 objects" in got.notes[0]


BEAM = "http://schemas.microsoft.com/3dmanufacturing/beamlattice/2017/02"


@pytest.mark.parametrize(
    "resources, build, attributes, word",
    [
        (mesh_3mf(more="<b:beamlattice/>"), None, f'xmlns:b="{BEAM}"', "beam lattice"),
        (mesh_3mf(), None, f'xmlns:b="{BEAM}" requiredextensions="p b"', "beam lattices"),
        (mesh_3mf(), None, 'xmlns:q="http://example.org/q" requiredextensions="q"', "http://example.org/q"),
        ("<o:booleanshape/>", None, 'xmlns:o="x"', "<booleanshape>"),
        (mesh_3mf(), "", "", "no items"),
        (mesh_3mf(), '<item objectid="2"/>', "", "object 2"),
        (mesh_3mf(), '<item objectid="1" transform="1 0 0"/>', "", "3 numbers"),
        (mesh_3mf(faces=np.array([[0, 1, 4]])), None, "", "0 to 4 of 4"),
        (mesh_3mf(faces=np.array([[0, 1, -1]])), None, "", "-1 to 1 of 4"),
        (mesh_3mf().replace(' z="1.0"', ""), None, "", "without-z"),
        ('<components><component objectid="1"/></components>', None, "", "contains itself"),
    ],
)
def test_3mf_that_is_not_read_is_refused_by_name(resources, build, attributes, word, tmp_path):
    build = '<item objectid="1"/>' if build is None else build
    text = model(f'<object id="1">{resources}</object>', build, attributes)
    assert word in refusal(threemf.read, write_3mf(tmp_path / "a.3mf", text))


def test_3mf_damaged_is_refused(tmp_path):
    path = write_3mf(tmp_path / "a.3mf", model(f'<object id="1">{mesh_3mf()}</object>', '<item objectid="1"/>'))
    assert_cut_is_refused(threemf.read, path, path.read_bytes(), 7)
    assert "no part" in refusal(threemf.read, write_3mf(path, "", target="/3D/other.model"))
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("readme.txt", "hello")
    assert "_rels/.rels" in refusal(threemf.read, path)


def test_3mf_as_trimesh_writes_it(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("lxml")
    pytest.importorskip("networkx")
    scene = trimesh.Scene()
    mesh = trimesh.Trimesh(POINTS, FACES, process=False)
    scene.add_geometry(mesh, "a", "a", transform=trimesh.transformations.rotation_matrix(0.7, [1, 2, 3], [4, 5, 6]))
    path = tmp_path / "a.3mf"
    path.write_bytes(scene.export(file_type="3mf"))
    want = trimesh.transform_points(POINTS, scene.graph["a"][0])
    assert_same(threemf.read(path), want, FACES, 1e-6)


# --- archives ---


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in members.items():
            package.writestr(name, content)
    return path


def test_a_zipped_mesh_is_read(tmp_path):
    members = {
        "models/": b"",
        "models/scene.DAE": document(up=""),
        "models/texture.png": b"no picture",
        "readme.txt": b"",
        "__MACOSX/models/._scene.dae": b"no mesh",
        ".git/old.dae": b"no mesh",
    }
    got = archive.read(write_zip(tmp_path / "a.zip", members))
    assert_same(got, POINTS, FACES)
    assert (got.up, got.usual_up) == ("y", None)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.zip"]


def test_the_buffers_of_a_zipped_gltf_are_beside_it(tmp_path, monkeypatch):
    """The reader finds them under their names, pictures left out."""
    seen = {}

    class Reader:
        @staticmethod
        def read(path: Path) -> Geometry:
            folder = path.parent.parent
            seen.update({each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*.*")})
            return Geometry(POINTS, FACES)

    monkeypatch.setattr(archive.importlib, "import_module", lambda *_: Reader)
    members = {"a/scene.gltf": b"{}", "a/scene.bin": b"1", "a\\more\\x.dat": b"2", "a/skin.JPG": b"3"}
    got = archive.read(write_zip(tmp_path / "a.zip", members))
    assert seen == {"a/scene.gltf": b"{}", "a/scene.bin": b"1", "a/more/x.dat": b"2"}
    assert (got.up, got.usual_up) == (None, "y")  # the rule of glTF


@pytest.mark.parametrize(
    "members, word",
    [
        ({"a.obj": b"", "b/c.stl": b"", "d.ply": b""}, "holds 3 meshes (a.obj, c.stl, d.ply)"),
        ({"a.fbx": b"", "t.png": b""}, "only .fbx .png"),
        ({}, "no mesh"),
        ({"inner.zip": b""}, "only .zip"),
        ({"../a.dae": b"x"}, "out of the archive"),
        ({"/etc/a.dae": b"x"}, "out of the archive"),
        ({"C:\\a.dae": b"x"}, "out of the archive"),
        ({"a.dae": b""}, "a.dae in it: the file is empty"),
        ({"a.dae": b"version https://git-lfs.github.com/spec/v1"}, "a.dae in it: is a pointer of git-lfs"),
        ({"a.dae": b"<COLLADA>"}, "a.dae in it: is not well-formed"),
    ],
)
def test_a_zip_without_its_one_mesh_is_refused(members, word, tmp_path):
    assert word in refusal(archive.read, write_zip(tmp_path / "archive.zip", members))


def test_encrypted_and_endless_archives_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "archive.zip", {"a.dae": document()})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag, in the header of the member and in the directory
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(archive.read, path)

    from trellis.grids.readers import zipped

    monkeypatch.setattr(zipped, "MAX_BYTES", 10_000)
    monkeypatch.setattr(archive, "MAX_BYTES", 10_000)
    path = write_zip(path, {"a.dae": bytes(10_001)})
    assert "10,001 bytes when unpacked" in refusal(archive.read, path)
    packed = tmp_path / "b.dae.gz"
    packed.write_bytes(gzip.compress(bytes(10_001)))
    assert "more than 10,000 bytes" in refusal(archive.read, packed)


def test_damaged_archives_are_refused(tmp_path):
    path = write_zip(tmp_path / "archive.zip", {"a.dae": document()})
    assert_cut_is_refused(archive.read, path, path.read_bytes(), 11)
    content = bytearray(path.read_bytes())
    content = bytearray(write_zip(path, {"a.dae": document()}).read_bytes())
    content[200] ^= 0xFF  # the checksum, or the compressed data, no longer fit
    path.write_bytes(content)
    assert "damaged" in refusal(archive.read, path)


def test_a_mesh_in_gzip_is_read(tmp_path):
    path = tmp_path / "scene.dae.gz"
    path.write_bytes(gzip.compress(document()))
    got = archive.read(path)
    assert_same(got, POINTS, FACES)
    assert got.up == "z"
    assert_cut_is_refused(archive.read, path, path.read_bytes(), 9)


# --- VTK ---

CELLS = [[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]]
MIXED = [[0, 1, 2, 3], [0, 3, 4]]  # of SQUARE


def numbers_vtk(values, code: str, binary: bool) -> bytes:
    """Numbers of a legacy file; code is a type of struct."""
    values = list(np.ravel(values))
    if binary:
        return struct.pack(f">{len(values)}{code}", *values) + b"\n"
    lines = [" ".join(str(value) for value in values[start : start + 9]) for start in range(0, len(values), 9)]
    return "\n".join(lines).encode() + b" \n"


def cells_vtk(keyword: str, cells: list[list[int]], binary: bool, version: str) -> bytes:
    corners = [corner for cell in cells for corner in cell]
    if version < "5":
        flat = [number for cell in cells for number in (len(cell), *cell)]
        return f"{keyword} {len(cells)} {len(flat)}\n".encode() + numbers_vtk(flat, "i", binary)
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(int).tolist()
    return (
        f"{keyword} {len(offsets)} {len(corners)}\nOFFSETS vtktypeint64\n".encode()
        + numbers_vtk(offsets, "q", binary)
        + b"CONNECTIVITY vtktypeint64\n"
        + numbers_vtk(corners, "q", binary)
    )


def legacy(sections: bytes, points=POINTS, kind: str = "float", binary: bool = False, version: str = "3.0") -> bytes:
    code = {"float": "f", "double": "d", "int": "i"}[kind]
    head = f"# vtk DataFile Version {version}\na title\n{'BINARY' if binary else 'ASCII'}\nDATASET POLYDATA\n"
    return head.encode() + f"POINTS {len(points)} {kind}\n".encode() + numbers_vtk(points, code, binary) + sections


def vtk_file(tmp_path: Path, content: bytes, name: str = "a.vtk") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("version", ["2.0", "4.2", "5.1"])
@pytest.mark.parametrize("kind", ["float", "double", "int"])
def test_legacy_vtk_polygons(binary, version, kind, tmp_path):
    points = np.asarray(SQUARE, dtype={"float": np.float32, "double": np.float64, "int": int}[kind])
    content = legacy(
        cells_vtk("VERTICES", [[4]], binary, version)
        + cells_vtk("LINES", [[0, 1, 2], [3, 4]], binary, version)
        + cells_vtk("POLYGONS", MIXED, binary, version)
        + b"\nCELL_DATA 2\nSCALARS s float\nLOOKUP_TABLE default\n"
        + numbers_vtk([1, 2], "f", binary),
        points,
        kind,
        binary,
        version,
    )
    got = vtk.read(vtk_file(tmp_path, content))
    assert_same(got, SQUARE, HOUSE)
    assert got.vertices.dtype == (np.float32 if kind == "float" else np.float64) and got.up is None


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("version", ["3.0", "5.1"])
def test_legacy_vtk_strips_metadata_and_fields(binary, version, tmp_path):
    metadata = b"METADATA\nINFORMATION 1\nNAME L2_NORM_RANGE LOCATION vtkDataArray\nDATA 2 0.5 1.2 \n\n"
    long = b"x" * 100  # binary strings begin with their length and, in two bits, the size of that
    strings = b"\xc2ab" + b"\x80\x64" + long + b"\n" if binary else b"ab\n" + long + b"\n"
    field = b"FIELD FieldData 2\nTIME 1 1 double\n" + numbers_vtk([2.5], "d", binary) + b"names 1 2 string\n" + strings
    content = legacy(
        metadata + cells_vtk("TRIANGLE_STRIPS", [[1, 0, 2, 3], [0, 3, 4]], binary, version), SQUARE, "double"
    )
    if binary:
        content = legacy(
            metadata + cells_vtk("TRIANGLE_STRIPS", [[1, 0, 2, 3], [0, 3, 4]], True, version),
            SQUARE,
            "double",
            True,
            version,
        )
    content = content.replace(b"DATASET POLYDATA\n", b"DATASET POLYDATA\n" + field)
    got = vtk.read(vtk_file(tmp_path, content))
    assert_same(got, SQUARE, [[1, 0, 2], [2, 0, 3], [0, 3, 4]])


def test_legacy_vtk_concave_polygons_keep_their_notch(tmp_path):
    got = vtk.read(vtk_file(tmp_path, legacy(cells_vtk("POLYGONS", [[0, 1, 2, 3, 4]], False, "3.0"), NOTCHED)))
    assert area(got) == pytest.approx(NOTCHED_AREA)


@pytest.mark.parametrize("binary", [False, True])
def test_legacy_vtk_flat_cells_of_a_grid(binary, tmp_path):
    """A triangle, a strip, a polygon, a pixel and a quad, with a line and a vertex between."""
    cells = [[0, 1, 2], [0, 1], [1, 0, 2, 3], [0, 1, 2, 3, 4], [0], [0, 1, 3, 2], [0, 1, 2, 3]]
    types = [5, 3, 6, 7, 1, 8, 9]
    content = legacy(cells_vtk("CELLS", cells, binary, "3.0"), SQUARE, "double", binary)
    content = content.replace(b"POLYDATA", b"UNSTRUCTURED_GRID")
    got = vtk.read(vtk_file(tmp_path, content + b"CELL_TYPES 7\n" + numbers_vtk(types, "i", binary)))
    want = [
        [0, 1, 2],
        [0, 1, 2],
        [0, 2, 3],
        [0, 3, 4],
        [0, 1, 2],
        [2, 3, 0],
        [0, 1, 2],
        [2, 3, 0],
        [1, 0, 2],
        [2, 0, 3],
    ]
    assert_same(got, SQUARE, want)
    solid = content + b"CELL_TYPES 7\n" + numbers_vtk([*types[:-1], 10], "i", binary)
    assert "type 10" in refusal(vtk.read, vtk_file(tmp_path, solid))


def test_legacy_vtk_points_and_lines(tmp_path):
    got = vtk.read(vtk_file(tmp_path, legacy(cells_vtk("VERTICES", [[0, 1, 2, 3]], False, "3.0"))))
    assert (got.vertices == POINTS).all() and got.faces.shape == (0, 3)
    lines = legacy(cells_vtk("LINES", [[0, 1, 2, 3]], False, "3.0"))
    assert refusal(vtk.read, vtk_file(tmp_path, lines)) == "has no triangles, only lines"


@pytest.mark.parametrize(
    "change, word",
    [
        ((b"# vtk DataFile", b"# data"), "does not begin"),
        ((b"ASCII", b"TEXT"), "'TEXT'"),
        ((b"POLYDATA", b"STRUCTURED_POINTS"), "image"),
        ((b"POLYDATA", b"STRUCTURED_GRID"), "STRUCTURED_GRID"),
        ((b"POINTS 4 float", b"POINTS 5 float"), "12 of 15"),
        ((b"POINTS 4 float", b"POINTS 999999999999 float"), "12 of 2999999999997"),
        ((b"POINTS 4 float", b"POINTS 4 half"), "'half'"),
        ((b"POINTS 4 float", b"POINTS x float"), "counts"),
        ((b"POLYGONS 4 16", b"POLYGONS 4 17"), "16 of 17"),
        ((b"POLYGONS 4 16", b"POLYGONS 5 16"), "5 cells"),
        ((b"3 0 2 1", b"3 0 2 4"), "0 to 4 of 4"),
        ((b"3 0 2 1", b"3 0 2 -1"), "-1 to 3 of 4"),
        ((b"3 0 2 1", b"4 0 2 1"), "damaged"),
        ((b"3 0 2 1", b"-3 0 2 1"), "damaged"),
        ((b"3 0 2 1", b"3 0 2 b"), "not a number"),
    ],
)
def test_legacy_vtk_that_does_not_fit_is_refused(change, word, tmp_path):
    content = legacy(cells_vtk("POLYGONS", CELLS, False, "3.0"))
    assert change[0] in content
    assert word in refusal(vtk.read, vtk_file(tmp_path, content.replace(*change)))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("version", ["3.0", "5.1"])
def test_legacy_vtk_cut_off_is_refused(binary, version, tmp_path):
    """Text may end in the last index: it loses a digit there, but not where indices have one."""
    content = legacy(cells_vtk("POLYGONS", CELLS, binary, version), POINTS, "float", binary, version)
    path = tmp_path / "cut.vtk"
    for length in range(0, len(content) - 2, 3):
        path.write_bytes(content[:length])
        try:
            got = vtk.read(path)
        except DataError:
            continue
        assert len(got.faces) in (0, 4)
        assert len(got.faces) == 4 or b"POLYGONS 4" not in content[:length] and b"POLYGONS 5" not in content[:length]


class XmlWriter:
    """A .vtp file with its arrays in one of the ways that the format has."""

    def __init__(self, way: str, compressor: str = "", order: str = "<", header: str = "I"):
        self.way, self.compressor, self.order, self.header = way, compressor, order, header
        self.appended = b""

    def sizes(self, *values: int) -> bytes:
        return struct.pack(f"{self.order}{len(values)}{self.header}", *values)

    def stream(self, content: bytes, in_base64: bool) -> bytes:
        """Header and data. Compressed, these are two streams of base64, of blocks of 32 bytes here."""
        if not self.compressor:
            whole = self.sizes(len(content)) + content
            return base64.b64encode(whole) if in_base64 else whole
        pack = {"vtkZLibDataCompressor": zlib.compress, "vtkLZMADataCompressor": lzma.compress}[self.compressor]
        blocks = [pack(content[start : start + 32]) for start in range(0, len(content), 32)]
        header = self.sizes(len(blocks), 32, len(content) % 32, *map(len, blocks)) if blocks else self.sizes(0)
        parts = header, b"".join(blocks)
        return b"".join(map(base64.b64encode, parts)) if in_base64 else b"".join(parts)

    def array(self, name: str, values: np.ndarray, kind: str, components: int = 1) -> str:
        dtype = np.dtype(self.order + {"Float32": "f4", "Float64": "f8", "Int64": "i8", "Int32": "i4"}[kind])
        head = f'<DataArray type="{kind}" Name="{name}" NumberOfComponents="{components}" format="{self.way}"'
        content = np.asarray(values).astype(dtype).tobytes()
        if self.way == "ascii":
            return f"{head}><InformationKey/>{' '.join(map(str, np.ravel(values).tolist()))}</DataArray>"
        if self.way == "binary":
            return f"{head}>\n  {self.stream(content, True).decode()}\n</DataArray>"
        offset = len(self.appended)
        self.appended += self.stream(content, self.way == "appended-base64")
        return f'{head.replace(self.way, "appended")} offset="{offset}"/>'

    def cells(self, tag: str, cells: list[list[int]], kind: str) -> str:
        corners = np.array([corner for cell in cells for corner in cell], dtype=np.int64)
        ends = np.cumsum([len(cell) for cell in cells])
        return f"<{tag}>{self.array('connectivity', corners, kind)}{self.array('offsets', ends, kind)}</{tag}>"

    def piece(self, points, polygons=(), strips=(), kind: str = "Float32", lines: int = 0) -> str:
        return (
            f'<Piece NumberOfPoints="{len(points)}" NumberOfVerts="0" NumberOfLines="{lines}" '
            f'NumberOfStrips="{len(strips)}" NumberOfPolys="{len(polygons)}"><PointData>'
            f"{self.array('n', np.zeros(3 * len(points)), 'Float32', 3)}</PointData>"
            f"<Points>{self.array('Points', points, kind, 3)}</Points>"
            f"{self.cells('Strips', list(strips), 'Int64')}{self.cells('Polys', list(polygons), 'Int32')}</Piece>"
        )

    def file(self, *pieces: str, kind: str = "PolyData") -> bytes:
        order = "LittleEndian" if self.order == "<" else "BigEndian"
        compressor = f' compressor="{self.compressor}"' if self.compressor else ""
        header = ' header_type="UInt64"' if self.header == "Q" else ""
        text = (
            f'<?xml version="1.0"?><VTKFile type="{kind}" version="1.0" byte_order="{order}"{header}{compressor}>'
            f"<{kind}>{''.join(pieces)}</{kind}>"
        ).encode()
        if self.appended:
            encoding = b"raw" if self.way == "appended-raw" else b"base64"
            text += b'<AppendedData encoding="' + encoding + b'">\n   _' + self.appended + b"\n  </AppendedData>"
        return text + b"</VTKFile>"


WAYS = ["ascii", "binary", "appended-base64", "appended-raw"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compressor", ["", "vtkZLibDataCompressor", "vtkLZMADataCompressor"])
@pytest.mark.parametrize("order, header", [("<", "I"), (">", "Q")])
def test_vtp_in_every_encoding(way, compressor, order, header, tmp_path):
    """Two pieces, polygons and strips; the bits of float32 are kept."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 3)).astype(np.float32)
    writer = XmlWriter(way, compressor, order, header)
    content = writer.file(
        writer.piece(points, [[0, 1, 2], [3, 4, 39]]), writer.piece(POINTS, CELLS, [[0, 1, 2, 3]], lines=2)
    )
    got = vtk.read(vtk_file(tmp_path, content, "a.vtp"))
    want = [[0, 1, 2], [3, 4, 39], *(np.array([*CELLS, [0, 1, 2], [2, 1, 3]]) + 40).tolist()]
    assert_same(got, np.concatenate([points, POINTS]), want)
    assert got.vertices.dtype == np.float32 and got.up is None


@pytest.mark.parametrize("way", WAYS)
def test_vtp_cut_off_is_refused(way, tmp_path):
    writer = XmlWriter(way, "vtkZLibDataCompressor")
    assert_cut_is_refused(vtk.read, tmp_path / "cut.vtp", writer.file(writer.piece(POINTS, CELLS)), 17)


def test_vtp_of_lines_points_and_other_kinds(tmp_path):
    writer = XmlWriter("ascii")
    lines = writer.file(writer.piece(POINTS, lines=3))
    assert refusal(vtk.read, vtk_file(tmp_path, lines, "a.vtp")) == "has no triangles, only lines"
    got = vtk.read(vtk_file(tmp_path, writer.file(writer.piece(POINTS)), "a.vtp"))
    assert (got.vertices == POINTS).all() and got.faces.shape == (0, 3)
    other = writer.file(writer.piece(POINTS), kind="UnstructuredGrid")
    assert "UnstructuredGrid" in refusal(vtk.read, vtk_file(tmp_path, other, "a.vtp"))


@pytest.mark.parametrize(
    "change, word",
    [
        ((b'NumberOfPoints="4"', b'NumberOfPoints="5"'), "12 coordinates of 5"),
        ((b'NumberOfPolys="4"', b'NumberOfPolys="5"'), "4 of 5 Polys"),
        ((b'NumberOfPoints="4"', b'NumberOfPoints="-4"'), "NumberOfPoints"),
        ((b"3 6 9 12", b"3 6 9 11"), "offsets"),
        ((b"3 6 9 12", b"3 9 6 12"), "offsets"),
        ((b"0 2 1 0 1 3", b"0 2 1 0 1 4"), "0 to 4 of 4"),
        ((b"0 2 1 0 1 3", b"0 2 1 0 x 3"), "not a number"),
        ((b'type="Float32" Name="Points"', b'type="Float16" Name="Points"'), "Float16"),
        ((b'byte_order="LittleEndian"', b'byte_order="Middle"'), "Middle"),
        ((b'format="ascii"', b'format="hex"'), "'hex'"),
    ],
)
def test_vtp_that_does_not_fit_is_refused(change, word, tmp_path):
    writer = XmlWriter("ascii")
    content = writer.file(writer.piece(POINTS, CELLS))
    assert change[0] in content
    assert word in refusal(vtk.read, vtk_file(tmp_path, content.replace(*change), "a.vtp"))


def test_vtp_sizes_that_the_file_only_claims_are_refused(tmp_path):
    """Of bytes, of blocks, and of what a block has when it is decompressed."""
    for way, claim in (("binary", b"\xff\xff\xff\x7f"), ("appended-raw", b"\xff\xff\xff\xff")):
        for compressor in ("", "vtkZLibDataCompressor"):
            writer = XmlWriter(way, compressor)
            content = writer.file(writer.piece(POINTS, CELLS))
            stream = writer.stream(POINTS.tobytes(), way == "binary")
            start = content.index(stream)
            changed = base64.b64encode(claim + base64.b64decode(stream[:8])[4:6]) if way == "binary" else claim
            content = content[:start] + changed + content[start + len(changed) :]
            assert "damaged" in refusal(vtk.read, vtk_file(tmp_path, content, "a.vtp"))
    bomb = zlib.compress(bytes(10**7))
    stream = base64.b64encode(struct.pack("<4I", 1, 48, 48, len(bomb))) + base64.b64encode(bomb)
    writer = XmlWriter("binary", "vtkZLibDataCompressor")
    content = writer.file(writer.piece(POINTS, CELLS)).replace(writer.stream(POINTS.tobytes(), True), stream)
    assert "another size than 48" in refusal(vtk.read, vtk_file(tmp_path, content, "a.vtp"))


def test_vtp_of_another_compressor_is_refused_by_name(tmp_path):
    writer = XmlWriter("binary", "vtkZLibDataCompressor")
    content = writer.file(writer.piece(POINTS, CELLS)).replace(b"vtkZLib", b"vtkLZ4")
    assert "vtkLZ4DataCompressor" in refusal(vtk.read, vtk_file(tmp_path, content, "a.vtp"))


# --- GIfTI ---


def gifti_file(tmp_path: Path, arrays: list[tuple[np.ndarray, str]], encoding: str = "GIFTI_ENCODING_B64GZ") -> Path:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.gifti.GiftiImage()
    for array, intent in arrays:
        image.add_gifti_data_array(nibabel.gifti.GiftiDataArray(array, intent=intent, encoding=encoding))
    path = tmp_path / "a.surf.gii"
    path.write_bytes(image.to_bytes())
    return path


SURFACE = [(POINTS, gifti.POINTS), (FACES.astype(np.int32), gifti.TRIANGLES)]


@pytest.mark.parametrize("encoding", ["GIFTI_ENCODING_B64GZ", "GIFTI_ENCODING_B64BIN", "GIFTI_ENCODING_ASCII"])
def test_gifti_surfaces(encoding, tmp_path):
    got = gifti.read(gifti_file(tmp_path, SURFACE, encoding))
    assert_same(got, POINTS, FACES, 1e-6 if "ASCII" in encoding else 0)
    assert got.vertices.dtype == np.float32 and got.up == "z"


@pytest.mark.parametrize("order, indexing", [("<", "RowMajorOrder"), (">", "ColumnMajorOrder")])
def test_gifti_orders(order, indexing, tmp_path):
    def array(values: np.ndarray, intent: str, kind: str, code: str) -> str:
        content = np.asarray(values, order + code).tobytes("C" if indexing == "RowMajorOrder" else "F")
        return (
            f'<DataArray Intent="{intent}" DataType="NIFTI_TYPE_{kind}" ArrayIndexingOrder="{indexing}" '
            f'Dimensionality="2" Dim0="4" Dim1="3" Encoding="GZipBase64Binary" '
            f'Endian="{"LittleEndian" if order == "<" else "BigEndian"}"><MetaData/><Data>'
            f"{base64.b64encode(zlib.compress(content)).decode()}</Data></DataArray>"
        )

    path = tmp_path / "a.gii"
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE GIFTI SYSTEM "http://gifti.projects.nitrc.org/gifti.dtd"><GIFTI>'
        f"{array(FACES, gifti.TRIANGLES, 'INT32', 'i4')}{array(POINTS, gifti.POINTS, 'FLOAT32', 'f4')}</GIFTI>"
    )
    assert_same(gifti.read(path), POINTS, FACES)


def test_gifti_without_a_surface_is_refused_by_its_intent(tmp_path):
    data = [(np.ones(4, dtype=np.float32), "NIFTI_INTENT_SHAPE")]
    assert "NIFTI_INTENT_SHAPE" in refusal(gifti.read, gifti_file(tmp_path, data))
    assert "only triangles" in refusal(gifti.read, gifti_file(tmp_path, SURFACE[1:]))
    got = gifti.read(gifti_file(tmp_path, SURFACE[:1]))
    assert (got.vertices == POINTS).all() and got.faces.shape == (0, 3)


def test_gifti_that_does_not_fit_is_refused(tmp_path):
    far = [SURFACE[0], (np.array([[0, 1, 4]], dtype=np.int32), gifti.TRIANGLES)]
    assert "0 to 4 of 4" in refusal(gifti.read, gifti_file(tmp_path, far))
    flat = [(POINTS[:, :2].copy(), gifti.POINTS), SURFACE[1]]
    assert "[4, 2]" in refusal(gifti.read, gifti_file(tmp_path, flat))
    path = gifti_file(tmp_path, SURFACE, "GIFTI_ENCODING_ASCII")
    content = path.read_bytes()
    for before, after, word in (
        (b'Dim0="4"', b'Dim0="5"', "12 numbers of 5 times 3"),
        (b'Dim0="4"', b'Dim0="99999999999999999999"', "12 numbers of 9"),
        (b"NIFTI_TYPE_FLOAT32", b"NIFTI_TYPE_RGB24", "NIFTI_TYPE_RGB24"),
        (b'Encoding="ASCII"', b'Encoding="ExternalFileBinary"', "another file"),
        (b"<!DOCTYPE", b'<!DOCTYPE GIFTI [<!ENTITY x "">]><!--', "XML"),
    ):
        assert before in content
        path.write_bytes(content.replace(before, after))
        assert word in refusal(gifti.read, path)
    path.write_bytes(content.replace(b'NumberOfDataArrays="2"', b'NumberOfDataArrays="999999999999"'))
    assert_same(gifti.read(path), POINTS, FACES, 1e-6)
    path = gifti_file(tmp_path, SURFACE)
    assert_cut_is_refused(gifti.read, path, path.read_bytes(), 31)
