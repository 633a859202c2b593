"""glTF: exact triangles of small files made here, one for each thing that can change them; reasons of refused ones."""

import base64
import json
import struct
import sys
import time

import numpy as np
import pytest

from trellis.grids.readers import gltf
from trellis.utils.errors import ConfigError, DataError

CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
WIDTHS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
# A tetrahedron: four corners, four faces. No corner is at the origin, none repeats, no two axes are alike.
CORNERS = np.array([[1, 2, 3], [4, 2, 3], [1, 7, 3], [2, 3, 11]], dtype=np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
SAME = np.eye(3)
TURN = [0.0, 0.0, np.sin(np.pi / 4), np.cos(np.pi / 4)]  # a quarter turn about z: x to y


class Model:
    """A file being made. `tree` is its JSON; `node` places mesh 0, a tetrahedron unless `positions` says otherwise."""

    def __init__(self, positions=CORNERS, indices=FACES, **node):
        self.data = b""
        self.tree: dict = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": [], "meshes": [], "nodes": []}
        if positions is not None:
            self.mesh(positions, indices)
            self.tree["nodes"].append({"mesh": 0, **node})

    def view(self, content: bytes, **view) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(content), **view}
        self.tree["bufferViews"].append(view)
        self.data += content
        return len(self.tree["bufferViews"]) - 1

    def add(self, values, dtype="f4", **accessor) -> int:
        values = np.asarray(values, dtype="<" + dtype)
        kind = WIDTHS[1 if values.ndim == 1 else values.shape[1]]
        values_of = {"componentType": CODES[dtype], "count": len(values), "type": kind}
        self.tree["accessors"].append({"bufferView": self.view(values.tobytes()), **values_of, **accessor})
        return len(self.tree["accessors"]) - 1

    def mesh(self, positions=CORNERS, indices=FACES, **primitive) -> dict:
        """Add a mesh of one primitive and return the primitive."""
        made = {"attributes": {"POSITION": self.add(positions)}, **primitive}
        if indices is not None:
            made["indices"] = self.add(np.ravel(indices), "u2")
        self.tree["meshes"].append({"primitives": [made]})
        return made

    @property
    def primitive(self) -> dict:
        return self.tree["meshes"][0]["primitives"][0]

    @property
    def node(self) -> dict:
        return self.tree["nodes"][0]

    def use(self, *names: str, required: bool = True) -> "Model":
        self.tree["extensionsUsed"] = list(names)
        if required:
            self.tree["extensionsRequired"] = list(names)
        return self

    def glb(self, text: bytes | None = None) -> bytes:
        self.tree.setdefault("buffers", [{"byteLength": len(self.data)}])
        text = json.dumps(self.tree).encode() if text is None else text
        chunks = [(0x4E4F534A, text + b" " * (-len(text) % 4)), (0x004E4942, self.data + b"\0" * (-len(self.data) % 4))]
        body = b"".join(struct.pack("<II", len(content), kind) + content for kind, content in chunks)
        return b"glTF" + struct.pack("<II", 2, 12 + len(body)) + body

    def text(self, uri: str) -> bytes:
        self.tree["buffers"] = [{"byteLength": len(self.data), "uri": uri}]
        return json.dumps(self.tree).encode()

    def data_uri(self) -> str:
        return "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()


@pytest.fixture
def load(tmp_path):
    """Read a model, or the bytes of a file."""

    def load(model: Model | bytes, name: str = "shape.glb") -> gltf.Geometry:
        path = tmp_path / name
        path.write_bytes(model if isinstance(model, bytes) else model.glb())
        return gltf.read(path)

    return load


@pytest.fixture
def reason(load):
    """Return why a model, or the bytes of a file, is refused."""

    def reason(model: Model | bytes, name: str = "shape.glb") -> str:
        with pytest.raises(DataError) as error:
            load(model, name)
        assert name not in str(error.value) and not str(error.value).endswith(".")
        return str(error.value)

    return reason


def triangles(geometry: gltf.Geometry) -> np.ndarray:
    return geometry.vertices[geometry.faces]


def tetrahedron(matrix=SAME, move=(0, 0, 0)) -> np.ndarray:
    """The triangles of the tetrahedron, moved."""
    return (CORNERS.astype(np.float64) @ np.asarray(matrix, dtype=np.float64).T + move)[FACES]


def close(geometry: gltf.Geometry, *parts: np.ndarray, atol: float = 1e-12) -> bool:
    return np.allclose(triangles(geometry), np.concatenate(parts), rtol=0, atol=atol)


# --- the container ---


def test_an_untouched_mesh_keeps_single_precision_and_is_y_up(load):
    geometry = load(Model())
    assert geometry.vertices.dtype == np.float32 and geometry.faces.dtype == np.int64
    assert geometry.up == "y" and geometry.notes == ()
    assert np.array_equal(triangles(geometry), CORNERS[FACES])


def test_bytes_behind_the_length_of_the_header_are_left_alone(load):
    assert np.array_equal(triangles(load(Model().glb() + b"more\0\1\2")), CORNERS[FACES])


def test_chunks_of_other_kinds_are_passed_over(load):
    content = Model().glb()
    end = 20 + int.from_bytes(content[12:16], "little")
    other = struct.pack("<I4s", 8, b"OTHR") + b"8 bytes."
    content = content[:8] + struct.pack("<I", len(content) + 16) + content[12:end] + other + content[end:]
    assert np.array_equal(triangles(load(content)), CORNERS[FACES])


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"", b" \r\n\t"])
def test_text_with_a_byte_order_mark_and_under_either_suffix(load, mark):
    model = Model()
    for name in ("shape.gltf", "shape.glb"):
        assert np.array_equal(triangles(load(mark + model.text(model.data_uri()), name)), CORNERS[FACES])
    assert np.array_equal(triangles(load(Model().glb(), "shape.gltf")), CORNERS[FACES])


def test_json_that_is_padded_with_zeros(load):
    model = Model()
    model.glb()
    text = json.dumps(model.tree).encode()
    assert np.array_equal(triangles(load(model.glb(text + b"\0" * (4 + -len(text) % 4)))), CORNERS[FACES])


def test_a_glb_that_is_cut_anywhere_is_refused(reason):
    content = Model().glb()
    for length in range(4, len(content)):
        assert reason(content[:length]).startswith("is cut off: ")


def test_lengths_that_the_file_does_not_have(reason):
    content = Model().glb()
    long = content[:12] + struct.pack("<I", 0xFFFFFFF0) + content[16:]
    assert reason(long) == f"is damaged: its JSON chunk claims 4294967280 bytes, and {len(content) - 20} are left"
    short = content[:8] + struct.pack("<I", 12) + content[12:]
    assert reason(short) == "is damaged: its header says 12 bytes, which is too few for a GLB"
    other = content[:16] + b"BIN\0" + content[20:]
    assert reason(other) == "is damaged: its first chunk is not JSON"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b'{"asset": {"version": "2.0"}, "nodes": [{"mesh": ', "its JSON is damaged (Expecting value: line 1 column"),
        (b'{"nodes": [' + b"[" * 100_000, "its JSON is damaged"),
        (b'{"nodes": "\xff\xfe"}', "its JSON is damaged ('utf-8' codec"),
        (b"[1, 2]", "its JSON is an array of 2, not an object"),
        (b'"text"', "is not glTF"),
        (b'{"name": "a package"}', "its JSON has no asset, scenes, nodes or meshes"),
        (b"solid cube\n", "is not glTF: it is neither a GLB nor JSON"),
    ],
)
def test_text_that_is_no_gltf(reason, text, word):
    assert word in reason(text, "shape.gltf")


@pytest.mark.parametrize("version", ["1.0", "1.1", "0.8", 1])
def test_version_1_is_named_with_a_remedy(reason, version):
    model = Model()
    model.tree["asset"]["version"] = version
    assert "and glTF 2.0 is read: npx gltf-pipeline" in reason(model)


def test_version_1_by_its_layout_and_by_its_container(reason):
    old: dict = {"accessors": {"a": {}}, "meshes": {"m": {}}, "nodes": {"n": {}}, "scenes": {"s": {}}}
    assert reason(json.dumps(old).encode()).startswith("is glTF 1.0, and 2.0 is read: npx gltf-pipeline")
    assert reason(b"glTF" + struct.pack("<II", 1, 24) + b"\0" * 12).startswith("is glTF 1.0")
    assert reason(b"glTF" + struct.pack("<II", 3, 24) + b"\0" * 12).startswith("is a GLB of version 3")


def test_versions_of_2_are_read_unless_they_need_more(load, reason):
    for version in ("2.0", "2.1", 2.0, None):
        model = Model()
        model.tree["asset"]["version"] = version
        assert np.array_equal(triangles(load(model)), CORNERS[FACES])
    model.tree["asset"]["minVersion"] = "2.1"
    assert reason(model) == "asset.minVersion is '2.1', and glTF 2.0 is read: export it as 2.0"


# --- what has the wrong type or points to nothing ---


@pytest.mark.parametrize("value", [5, "x", {"a": 1}, True])
@pytest.mark.parametrize("key", ["buffers", "bufferViews", "accessors", "meshes", "nodes", "scenes", "skins"])
def test_collections_that_are_no_arrays(reason, key, value):
    model = Model()
    model.glb()
    model.tree["scenes"] = [{"nodes": [0]}]
    model.tree[key] = value
    assert reason(model).startswith(f"{key} is ")


@pytest.mark.parametrize("value", [-1, 1, 99, 0.5, "0", True, [0], {}, 1e300, 10**400])
@pytest.mark.parametrize(
    "path",
    [
        "scene",
        "scenes/0/nodes/0",
        "nodes/0/mesh",
        "nodes/0/skin",
        "nodes/0/children/0",
        "meshes/0/primitives/0/attributes/POSITION",
        "meshes/0/primitives/0/indices",
        "accessors/0/bufferView",
        "bufferViews/0/buffer",
    ],
)
def test_indices_of_nothing_are_named(reason, path, value):
    model = Model()
    model.glb()
    model.tree |= {"scene": 0, "scenes": [{"nodes": [0]}], "skins": []}
    model.tree["accessors"] = model.tree["accessors"] + []
    *keys, last = path.split("/")
    at = model.tree
    for key in keys:
        at = at[int(key)] if key.isdigit() else at.setdefault(key, [0] if key in ("children",) else {})
    if value == 1 and last in ("POSITION", "indices", "bufferView"):
        value = 2  # 1 is one of these
    at[int(last) if last.isdigit() else last] = value
    name = "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in path.split("/")).lstrip(".")
    word = reason(model)
    assert word.startswith(name if not last.isdigit() else name.rpartition("[")[0])
    assert "an index of the" in word or "is no index of the" in word


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("accessors/0/count", -3, "accessors[0].count is -3; it should be a whole number"),
        ("accessors/0/count", None, "accessors[0].count is missing; it should be a whole number"),
        ("accessors/0/componentType", 5124, "accessors[0].componentType is 5124; it should be one of 5120, "),
        ("accessors/0/type", "VEC2", "accessors[0].type is 'VEC2'; it should be 'VEC3', for meshes[0].primitives[0]"),
        ("accessors/0/normalized", 1, "accessors[0].normalized is 1; it should be true or false"),
        ("accessors/1/componentType", 5122, "meshes[0].primitives[0].indices are not of an unsigned type"),
        ("accessors/1/count", 11, "meshes[0].primitives[0] has 11 indices for triangles, no multiple of 3"),
        ("bufferViews/0/byteLength", "48", "bufferViews[0].byteLength is '48'; it should be a whole number"),
        ("bufferViews/0/byteStride", 8, "bufferViews[0].byteStride is 8; it should be at least 12, the bytes of an"),
        ("meshes/0/primitives/0/mode", 7, "meshes[0].primitives[0].mode is 7; it should be 0 to 6"),
        ("meshes/0/primitives/0/attributes", 3, "meshes[0].primitives[0].attributes is 3; it should be an object"),
        ("meshes/0/primitives", [1], "meshes[0].primitives has an entry that is not an object"),
        ("nodes/0/translation", [1, 2], "nodes[0].translation is an array of 2; it should be 3 numbers"),
        ("nodes/0/scale", [1, 2, "3"], "nodes[0].scale is an array of 3; it should be 3 numbers"),
        ("nodes/0/scale", [1, 2, float("nan")], "nodes[0].scale has a number that is not finite"),
        ("nodes/0/scale", [1, 2, 10**400], "nodes[0].scale has a number that is not finite"),
        ("nodes/0/rotation", [0, 0, 0, 0], "nodes[0].rotation is zero, which is no rotation"),
        ("nodes/0/matrix", list(range(16)), "nodes[0].matrix has the last row [3.0, 7.0, 11.0, 15.0]"),
        ("buffers/0/uri", 5, "buffers[0].uri is 5; it should be a string"),
        ("buffers/0/uri", "data:text", "buffers[0].uri is a data URI without a comma"),
        ("buffers/0/uri", "data:;base64,M44K!8KA", "buffers[0].uri is damaged: its base64 cannot be read"),
        ("buffers/0/uri", "/etc/hostname", "buffers[0].uri is '/etc/hostname', which is no relative path"),
        ("buffers/0/uri", "a\0b", "which is no relative path"),
        ("buffers/0/uri", "a" * 5000, "cannot be read (File name too long)"),
        ("buffers/0/uri", "..", "needs '..', which is not there"),
        ("buffers/0/uri", "none%20such.bin", "needs 'none such.bin', which is not there: put it beside the file"),
        ("extensionsRequired", ["ACME_shape"], "requires ACME_shape, which is not read: export it without"),
        ("extensionsRequired", "ACME_shape", "extensionsRequired is 'ACME_shape'; it should be an array"),
        ("extensionsRequired", [5], "extensionsRequired has an entry that is not a string"),
    ],
)
def test_values_that_cannot_be(reason, path, value, word):
    model = Model()
    model.glb()
    *keys, last = path.split("/")
    at = model.tree
    for key in keys:
        at = at[int(key)] if key.isdigit() else at[key]
    at[last] = value
    assert word in reason(model)


def test_what_is_not_geometry_is_not_looked_at(load):
    model = Model()
    model.primitive["attributes"] |= {"COLOR_0": 99, "NORMAL": -1}
    model.primitive["material"] = 7
    model.tree |= {"materials": 5, "images": [{"uri": "missing.png"}], "animations": [{}], "cameras": "none"}
    model.node["camera"] = 3
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


# --- buffers ---


def test_names_of_buffers(tmp_path, load):
    """As the specification has them, percent-encoded; and as many writers put them."""
    for uri, name in [
        ("my%20shape.bin", "my shape.bin"),
        ("my shape.bin", "my shape.bin"),
        ("./plain.bin", "plain.bin"),
        ("odd%20name.bin", "odd%20name.bin"),
        ("gr%C3%B6%C3%9Fe.bin", "größe.bin"),
        ("größe.bin", "größe.bin"),
        ("gro\u0308ße.bin", "größe.bin"),
        ("größe.bin", "gro\u0308ße.bin"),
        ("sub/part.bin", "sub/part.bin"),
        ("sub\\part.bin", "sub/part.bin"),
    ]:
        model = Model()
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.data)
        assert np.array_equal(triangles(load(model.text(uri), "shape.gltf")), CORNERS[FACES]), uri
        path.unlink()


def test_data_uris(load):
    model = Model()
    plain = "data:,%" + "%".join(f"{byte:02x}" for byte in model.data)
    coded = base64.b64encode(model.data).decode()
    for uri in (
        plain,
        f"data:;base64,{coded}",
        f"DATA:application/gltf-buffer;charset=x;BASE64,{coded.rstrip('=')}",
        f"data:;base64,{base64.urlsafe_b64encode(model.data).decode().replace('=', '%3D')}",
        f"data:;base64,{coded[:20]}\n {coded[20:]}",
    ):
        assert np.array_equal(triangles(load(model.text(uri), "shape.gltf")), CORNERS[FACES]), uri[:40]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/x.bin", "https://a.b/x", "file:///etc/hostname", "//host/x.bin"])
def test_buffers_from_elsewhere_are_never_fetched(reason, uri):
    word = f"buffers[0].uri is {uri}, which is not fetched: export it as .glb, all in one"
    assert reason(Model().text(uri), "shape.gltf") == word


def test_buffers_without_data(reason):
    model = Model()
    model.glb()
    assert reason(json.dumps(model.tree).encode(), "shape.gltf").startswith("buffers[0] has no data: ")
    model.tree["buffers"].append({"byteLength": 1000})
    model.tree["bufferViews"][0]["buffer"] = 1
    assert reason(model).startswith("buffers[1] has no data: ")


def test_a_buffer_may_be_shorter_than_it_claims_where_nothing_is_needed(load, reason):
    model = Model()
    model.tree["buffers"] = [{"byteLength": 10_000}]
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])
    model.data = model.data[:60]
    assert reason(model) == (
        "accessors[1] needs 24 bytes of bufferViews[1], which has 12 of the 24 that it claims: its buffer is cut off"
    )


# --- accessors ---


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
def test_quantized_positions(load, dtype):
    """KHR_mesh_quantization: as they are, or normalized by the formulas of the specification."""
    limits = np.iinfo(dtype)
    stored = np.array([[limits.min, 0, 1], [limits.max, 5, 0], [0, limits.max, 7], [3, 2, limits.max]], dtype)
    for normalized in (False, True):
        model = Model().use("KHR_mesh_quantization")
        model.primitive["attributes"]["POSITION"] = model.add(stored, dtype, normalized=normalized)
        expected = np.maximum(stored / limits.max, -1) if normalized else stored.astype(np.float64)
        assert np.array_equal(triangles(load(model)), expected[FACES])


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_types_of_indices(load, dtype):
    model = Model()
    model.primitive["indices"] = model.add(FACES.ravel(), dtype)
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


def test_interleaved_offset_and_misaligned_data(load):
    rows = np.zeros(4, dtype=[("junk", "u1"), ("position", "<f4", 3), ("normal", "<f4", 3)])
    rows["position"] = CORNERS
    model = Model()
    view = model.view(b"abc" + rows.tobytes(), byteStride=rows.itemsize)
    accessor = {"bufferView": view, "byteOffset": 4, "componentType": 5126, "count": 4, "type": "VEC3"}
    model.tree["accessors"][0] = accessor
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


def sparse(model: Model, rows, values, dtype: str = "u2") -> dict:
    indices = {"bufferView": model.view(np.asarray(rows, "<" + dtype).tobytes()), "componentType": CODES[dtype]}
    values = {"bufferView": model.view(np.asarray(values, "<f4").tobytes())}
    return {"count": len(rows), "indices": indices, "values": values}


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_sparse_values(load, dtype):
    model = Model()
    model.tree["accessors"][0]["sparse"] = sparse(model, [1, 3], [[9, 8, 7], [-1, -2, -3]], dtype)
    expected = CORNERS.copy()
    expected[[1, 3]] = [[9, 8, 7], [-1, -2, -3]]
    assert np.array_equal(triangles(load(model)), expected[FACES])


def test_sparse_values_alone_stand_among_zeros(load):
    model = Model()
    model.tree["accessors"][0] |= {"bufferView": None, "sparse": sparse(model, [0, 1, 3], CORNERS[[0, 1, 3]])}
    expected = CORNERS.copy()
    expected[2] = 0
    assert np.array_equal(triangles(load(model)), expected[FACES])


def test_sparse_values_alone_may_be_many_where_the_file_has_as_many_bytes(load, reason):
    count = (1 << 20) + 3
    model = Model(indices=range(count - 3, count))
    rows = range(count - 3, count)
    model.primitive["indices"] = model.add(rows, "u4")
    lone = {"bufferView": None, "count": count, "sparse": sparse(model, rows, CORNERS[:3], "u4")}
    model.tree["accessors"][0].update(lone)
    assert reason(model) == f"accessors[0] claims {count} elements without data for them"
    model.data += b"\0" * count
    model.tree.pop("buffers")
    assert np.array_equal(load(model).vertices, CORNERS[:3])


def test_sparse_values_that_do_not_fit(reason):
    model = Model()
    model.tree["accessors"][0]["sparse"] = sparse(model, [1, 4], CORNERS[:2])
    assert reason(model) == "accessors[0].sparse.indices has 4, and there are 4 elements"
    model.tree["accessors"][0]["sparse"]["count"] = 1000
    assert reason(model).startswith("accessors[0].sparse.indices needs 2000 bytes of bufferViews[2], which has 4")


@pytest.mark.parametrize("count", [5, 10**9, 2**52])
def test_counts_beyond_the_data_are_refused_before_memory_is_taken(reason, count):
    model = Model()
    model.tree["accessors"][0]["count"] = count
    assert reason(model) == f"accessors[0] needs {12 * count} bytes of bufferViews[0], which has 48"
    if count > 5:
        model.tree["accessors"][0] |= {"bufferView": None, "sparse": sparse(model, [0], [[1, 2, 3]])}
        assert reason(model) == f"accessors[0] claims {count} elements without data for them"
        model.tree["accessors"][0].pop("sparse")
        assert (
            reason(model) == "meshes[0].primitives[0].attributes.POSITION has no data: its accessor has no bufferView"
        )


def test_vertices_out_of_range(reason):
    model = Model()
    model.primitive["indices"] = model.add([0, 1, 4], "u1")
    assert reason(model) == "meshes[0].primitives[0] uses vertex 4 of 4"
    model.primitive["indices"] = model.add([0, 1, 65535], "u2")
    restart = "it is a primitive restart, which needs KHR_mesh_primitive_restart"
    assert reason(model) == f"meshes[0].primitives[0] uses vertex 65535 of 4; {restart}"


def test_only_used_vertices_are_kept(load):
    positions = np.full((1000, 3), np.nan, dtype=np.float32)
    positions[[7, 500, 999]] = CORNERS[:3]
    for indices in ([7, 500, 999], [7, 500, 999] * 300):
        model = Model(positions, indices)
        geometry = load(model)
        assert np.array_equal(geometry.vertices, CORNERS[:3])
        assert np.array_equal(geometry.faces, [[0, 1, 2]] * (len(indices) // 3))


# --- kinds of primitives ---

ROW = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 0, 0], [2, 1, 0]], dtype=np.float32)
STRIP = [[0, 1, 2], [1, 3, 2], [2, 3, 4], [3, 5, 4]]
FAN = [[1, 2, 0], [2, 3, 0], [3, 4, 0], [4, 5, 0]]


@pytest.mark.parametrize(("mode", "faces"), [(4, [[0, 1, 2], [3, 4, 5]]), (5, STRIP), (6, FAN)])
@pytest.mark.parametrize("indexed", [False, True])
def test_triangles_strips_and_fans_keep_their_winding(load, mode, faces, indexed):
    positions = ROW[::-1] if indexed else ROW
    model = Model(positions, range(5, -1, -1) if indexed else None)
    model.primitive["mode"] = mode
    assert np.array_equal(triangles(load(model)), ROW[faces])


def test_a_strip_leads_to_its_next_part_without_triangles(load):
    model = Model(ROW, [0, 1, 2, 2, 5, 5, 3, 4])
    model.primitive["mode"] = 5
    assert np.array_equal(triangles(load(model)), ROW[[[0, 1, 2], [5, 4, 3]]])


@pytest.mark.parametrize(
    ("mode", "faces"),
    [(5, [[0, 1, 2], [1, 3, 2], [3, 4, 5], [0, 2, 4]]), (6, [[1, 2, 0], [2, 3, 0], [4, 5, 3], [2, 4, 0]])],
)
def test_primitive_restart(load, reason, mode, faces):
    """KHR_mesh_primitive_restart: the largest index ends a strip or fan. Otherwise it is no vertex."""
    for dtype, stop in (("u1", 255), ("u2", 65535), ("u4", 2**32 - 1)):
        model = Model(ROW, None).use("KHR_mesh_primitive_restart")
        order = [stop, 0, 1, 2, 3, stop, 3, 4, 5, stop, stop, 1, 2, stop, 0, 2, 4]
        model.primitive.update(mode=mode, indices=model.add(order, dtype))
        assert np.array_equal(triangles(load(model)), ROW[faces])
        model.use()
        assert f"uses vertex {stop} of 6; it is a primitive restart" in reason(model)


def test_lines_and_points_beside_triangles_are_left_out(load):
    model = Model()
    for mode in (0, 1, 2, 3):
        model.mesh(ROW + 100, None, mode=mode)
        model.tree["nodes"].append({"mesh": mode + 1})
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


def test_points_alone_are_points(load):
    model = Model(ROW, None, translation=[1, 2, 3])
    model.primitive["mode"] = 0
    model.mesh(CORNERS, [3, 1], mode=0)
    model.tree["nodes"].append({"mesh": 1})
    geometry = load(model)
    assert np.array_equal(geometry.vertices, [*(ROW + [1, 2, 3]), CORNERS[1], CORNERS[3]])
    assert geometry.faces.shape == (0, 3)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_lines_alone_are_nothing(load, mode):
    model = Model(ROW, None)
    model.primitive["mode"] = mode
    geometry = load(model)
    assert geometry.vertices.shape == geometry.faces.shape == (0, 3)


def test_a_primitive_without_positions_is_skipped(load):
    """As the specification says, unless an extension may have them."""
    model = Model()
    model.tree["meshes"][0]["primitives"].append({"attributes": {}})
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


def test_positions_in_an_extension_that_is_not_read(reason):
    model = Model().use("ACME_packed", required=False)
    model.primitive.update(attributes={}, extensions={"ACME_packed": {"bufferView": 0}})
    assert reason(model) == (
        "meshes[0].primitives[0] has its positions in ACME_packed, which is not read: export it without"
    )


# --- nodes and scenes ---


@pytest.mark.parametrize(
    ("node", "matrix", "move"),
    [
        ({"translation": [5, -6, 7]}, np.eye(3), [5, -6, 7]),
        ({"scale": [2, 3, 4]}, np.diag([2, 3, 4]), [0, 0, 0]),
        ({"rotation": TURN}, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [0, 0, 0]),
        ({"rotation": [0, 0, 3, 3]}, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [0, 0, 0]),  # brought to length 1
        (
            {"translation": [1, 2, 3], "rotation": TURN, "scale": [2, 3, 4]},
            [[0, -3, 0], [2, 0, 0], [0, 0, 4]],
            [1, 2, 3],
        ),
        ({"matrix": [0, 2, 0, 0, -3, 0, 0, 0, 0, 0, 4, 0, 1, 2, 3, 1]}, [[0, -3, 0], [2, 0, 0], [0, 0, 4]], [1, 2, 3]),
        ({"matrix": [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]}, [[1, 1, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 0]),
    ],
)
def test_transforms_of_a_node(load, node, matrix, move):
    geometry = load(Model(**node))
    assert geometry.vertices.dtype == np.float64
    assert close(geometry, tetrahedron(matrix, move))


def test_rotations_about_each_axis_and_in_general(load):
    """Against rotation by the vector form, v + 2 r x (r x v + w v)."""
    rng = np.random.default_rng(0)
    for quaternion in [*np.eye(4), *rng.normal(size=(5, 4))]:
        q = quaternion / np.linalg.norm(quaternion)
        corners = CORNERS.astype(np.float64)
        turned = corners + 2 * np.cross(q[:3], np.cross(q[:3], corners) + q[3] * corners)
        assert close(load(Model(rotation=quaternion.tolist())), turned[FACES])


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"translation": [0, 0, 0], "rotation": [0, 0, 0, 1], "scale": [1, 1, 1]},
        {"matrix": np.eye(4).ravel().tolist()},
    ],
)
def test_transforms_that_change_nothing_leave_single_precision(load, node):
    geometry = load(Model(**node))
    assert geometry.vertices.dtype == np.float32
    assert np.array_equal(triangles(geometry), CORNERS[FACES])


def test_mirrored_faces_are_turned_over(load):
    for node in ({"scale": [-1, 1, 1]}, {"matrix": np.diag([-1, 1, 1, 1]).ravel().tolist()}):
        assert np.array_equal(triangles(load(Model(**node))), tetrahedron(np.diag([-1, 1, 1]))[:, ::-1])
    assert close(load(Model(scale=[-1, -1, 1])), tetrahedron(np.diag([-1, -1, 1])))


def test_transforms_of_parents_and_several_uses_of_a_mesh(load):
    model = Model()
    model.tree["nodes"] = [
        {"mesh": 0, "children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "rotation": TURN},
        {"children": [3], "scale": [2, 2, 2]},
        {"mesh": 0, "translation": [0, 1, 0]},
    ]
    turn = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    expected = [
        tetrahedron(move=[10, 0, 0]),
        tetrahedron(turn, [10, 0, 0]),
        tetrahedron(2 * np.eye(3), [10, 2, 0]),
    ]
    assert close(load(model), *expected)


def test_deep_trees_are_read_in_linear_time(load):
    depth = 30_000
    model = Model()
    model.tree["nodes"] = [{"children": [i + 1], "translation": [0.5, 0, 0]} for i in range(depth)] + [{"mesh": 0}]
    assert depth > sys.getrecursionlimit()
    start = time.perf_counter()
    assert close(load(model), tetrahedron(move=[depth / 2, 0, 0]))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([{"children": [0], "mesh": 0}], "nodes[0] is below itself"),
        ([{"children": [1], "mesh": 0}, {"children": [2]}, {"children": [0]}], "nodes[0] is below itself"),
        ([{"mesh": 0}, {"children": [2]}, {"children": [1]}], "nodes[1] is below itself"),
        ([{"children": [2]}, {"children": [2]}, {"mesh": 0}], "nodes[2] has two parents, 0 and 1"),
        ([{"mesh": 0, "matrix": [1.0, 0, 0, 0] * 4}], "nodes[0].matrix has the last row"),
        (
            [{"mesh": 0, "scale": [2, 1, 1], "matrix": np.eye(4).ravel().tolist()}],
            "nodes[0] has both matrix and scale, of which glTF allows one",
        ),
    ],
)
def test_trees_that_are_none(reason, nodes, word):
    model = Model()
    model.tree["nodes"] = nodes
    assert reason(model).startswith(word)


def two_scenes() -> Model:
    model = Model()
    model.tree["nodes"] = [{"mesh": 0}, {"mesh": 0, "scale": [2, 2, 2]}, {"mesh": 0, "scale": [9, 9, 9]}]
    model.tree["scenes"] = [{"nodes": [0]}, {"nodes": [1]}]
    return model


@pytest.mark.parametrize(("scene", "scale"), [(0, 1), (1, 2), (None, 1)])
def test_the_default_scene_is_shown_else_the_first(load, scene, scale):
    model = two_scenes()
    model.tree["scene"] = scene
    geometry = load(model)
    assert close(geometry, tetrahedron(scale * np.eye(3)))
    assert geometry.notes == (f"scene {scene or 0} of its 2 is read",)


def test_without_scenes_all_roots_are_shown(load):
    model = two_scenes()
    model.tree["scenes"] = []
    geometry = load(model)
    assert close(geometry, *(tetrahedron(scale * np.eye(3)) for scale in (1, 2, 9)))
    assert geometry.notes == ()


def test_children_in_the_list_of_a_scene(load, reason):
    """The specification wants roots. A child of a parent that moves nothing, or that is shown itself, has one place."""
    model = Model()
    model.tree["nodes"] = [{"children": [1]}, {"mesh": 0, "children": [2]}, {"mesh": 0, "scale": [2, 2, 2]}]
    model.tree["scenes"] = [{"nodes": [1]}]
    expected = [tetrahedron(), tetrahedron(2 * np.eye(3))]
    assert close(load(model), *expected)
    model.tree["scenes"][0]["nodes"] = [2, 0, 1, 1]
    assert len(load(model).faces) == 8
    model.tree["nodes"][0]["translation"] = [1, 0, 0]
    assert len(load(model).faces) == 8
    model.tree["scenes"][0]["nodes"] = [1]
    assert reason(model) == "scenes[0].nodes has 1, a child of node 0, which moves it"


def test_a_scene_that_shows_no_mesh(reason):
    model = Model()
    model.tree["scenes"] = [{"nodes": []}, {"nodes": [0]}]
    assert reason(model) == "its scene shows none of its meshes; scene 0 of its 2 is read"
    model.tree |= {"nodes": [], "scenes": []}
    assert reason(model) == "its scene shows none of its meshes"


def test_a_file_without_meshes_has_nothing(load):
    geometry = load(json.dumps({"asset": {"version": "2.0"}, "nodes": [{}]}).encode())
    assert geometry.vertices.shape == geometry.faces.shape == (0, 3)


@pytest.mark.parametrize("required", [False, True])
def test_hidden_nodes_and_all_below_are_left_out(load, reason, required):
    hidden, shown = ({"extensions": {"KHR_node_visibility": {"visible": visible}}} for visible in (False, True))
    model = Model().use("KHR_node_visibility", required=required)
    model.tree["nodes"] = [
        {"mesh": 0, **shown},
        {"mesh": 0, "scale": [50, 50, 50], "children": [2], **hidden},
        {"mesh": 0, "children": [3], **shown},
        {"mesh": 0},
    ]
    geometry = load(model)
    assert np.array_equal(triangles(geometry), CORNERS[FACES])
    assert geometry.notes == ("nodes that it hides (KHR_node_visibility) are left out",)
    model.tree["nodes"][0] |= hidden
    assert reason(model).startswith("its scene shows none of its meshes; nodes that it hides")


def test_lower_levels_of_detail_are_left_out(load):
    """MSFT_lod: its node is the finest level, also where the others are in the scene."""
    model = Model().use("MSFT_lod", required=False)
    model.tree["nodes"] = [
        {"mesh": 0, "extensions": {"MSFT_lod": {"ids": [1, 2]}}},
        {"mesh": 0, "scale": [2, 2, 2]},
        {"mesh": 0, "scale": [3, 3, 3]},
    ]
    model.tree["scenes"] = [{"nodes": [0]}]
    geometry = load(model)
    assert np.array_equal(triangles(geometry), CORNERS[FACES]) and geometry.notes == ()
    model.tree["scenes"] = []
    geometry = load(model)
    assert np.array_equal(triangles(geometry), CORNERS[FACES])
    assert geometry.notes == ("its lower levels of detail (MSFT_lod) are left out",)


# --- extensions ---


@pytest.mark.parametrize(
    "name",
    "KHR_materials_unlit KHR_materials_variants KHR_materials_pbrSpecularGlossiness KHR_texture_basisu "
    "EXT_texture_webp KHR_texture_transform KHR_lights_punctual EXT_lights_image_based KHR_xmp_json_ld "
    "KHR_animation_pointer MSFT_texture_dds MSFT_packing_occlusionRoughnessMetallic "
    "ADOBE_materials_thin_transparency CESIUM_primitive_outline EXT_mesh_features EXT_structural_metadata "
    "FB_geometry_metadata VRM VRMC_materials_mtoon GODOT_single_root KHR_mesh_quantization KHR_node_visibility "
    "EXT_mesh_gpu_instancing".split(),
)
def test_required_extensions_that_leave_triangles_or_are_read(load, name):
    assert np.array_equal(triangles(load(Model().use(name))), CORNERS[FACES])


@pytest.mark.parametrize(
    "name", ["ACME_shape", "KHR_accessor_float64", "MPEG_buffer_circular", "khr_materials_unlit", "KHR_materials"]
)
def test_other_required_extensions_are_refused_by_name(load, reason, name):
    if name == "KHR_materials":
        assert np.array_equal(triangles(load(Model().use(name))), CORNERS[FACES])
        return
    assert reason(Model().use(name)) == f"requires {name}, which is not read: export it without this extension"
    assert np.array_equal(triangles(load(Model().use(name, required=False))), CORNERS[FACES])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("EXT_meshopt_compression", "npx @gltf-transform/cli copy IN.glb OUT.glb unpacks it"),
        ("KHR_meshopt_compression", "export it without compression"),
    ],
)
def test_meshopt_is_read_from_its_fallback_only(load, reason, name, remedy):
    model = Model()
    packed = {"buffer": 0, "byteOffset": 0, "byteLength": 8, "byteStride": 12, "count": 4, "mode": "ATTRIBUTES"}
    for view in model.tree["bufferViews"]:
        view["extensions"] = {name: packed}
    assert np.array_equal(triangles(load(model.use(name, required=False))), CORNERS[FACES])
    assert reason(model.use(name)) == f"requires {name}, which is not read: {remedy}"
    model = model.use(name, required=False)
    model.tree.pop("extensionsRequired")
    model.tree["buffers"].append({"byteLength": 48, "extensions": {name: {"fallback": True}}})
    model.tree["bufferViews"][0]["buffer"] = 1
    assert reason(model) == f"bufferViews[0] has its data in {name} alone, which is not read: {remedy}"


def instanced(required: bool, **attributes) -> Model:
    model = Model(scale=[2, 2, 2]).use("EXT_mesh_gpu_instancing", required=required)
    model.node["extensions"] = {
        "EXT_mesh_gpu_instancing": {
            "attributes": {
                name: model.add(values, dtype, normalized=dtype != "f4") for name, (values, dtype) in attributes.items()
            }
        }
    }
    return model


@pytest.mark.parametrize("required", [False, True])
def test_instances(load, required):
    """EXT_mesh_gpu_instancing: the transform of the node after that of each instance."""
    moves = np.array([[0, 0, 0], [10, 0, 0], [0, 0, 5]])
    expected = [tetrahedron(2 * np.eye(3), 2 * move) for move in moves]
    assert close(load(instanced(required, TRANSLATION=(moves, "f4"))), *expected)
    half = 127 if required else 1
    turns = np.array([[0, 0, 0, 127], [0, 0, 127, 0], [127, 0, 0, 0]])
    signs = [[1, 1, 1], [-1, -1, 1], [1, -1, -1]]
    scales = np.array([[1, 1, 1], [2, 2, 2], [1, 2, 3]])
    expected = [
        tetrahedron(2 * np.diag(sign) * scale, 2 * move)
        for sign, scale, move in zip(np.array(signs), scales, moves, strict=True)
    ]
    rotation = (turns // 127 * half, "i1" if required else "f4")
    model = instanced(
        required, TRANSLATION=(moves, "f4"), ROTATION=rotation, SCALE=(scales, "f4"), _ID=([1, 2, 3], "u1")
    )
    assert close(load(model), *expected)


def test_mirrored_instances_are_turned_over(load):
    geometry = load(instanced(True, SCALE=([[1, 1, 1], [1, -1, 1]], "f4")))
    mirrored = tetrahedron(2 * np.diag([1, -1, 1]))[:, ::-1]
    assert close(geometry, tetrahedron(2 * np.eye(3)), mirrored)


def test_instances_that_do_not_go_together(reason):
    model = instanced(True, TRANSLATION=(np.zeros((3, 3)), "f4"), SCALE=(np.ones((2, 3)), "f4"))
    assert "have 2 to 3 elements, not equally many" in reason(model)
    model = instanced(True, ROTATION=([[0, 0, 0, 1], [0, 0, 0, 0]], "f4"))
    assert "ROTATION 1 is zero, which is no rotation" in reason(model)


def test_a_small_file_cannot_ask_for_endless_copies(reason):
    positions = np.zeros((3000, 3), dtype=np.float32)
    model = Model(positions, None)
    model.tree["nodes"] = [{"mesh": 0}] * 20_000
    assert reason(model) == "its scene repeats meshes until they have more than 30000000 vertices and triangles"


# --- morph targets ---


def morphed(mesh_weights=None, node_weights=None) -> Model:
    model = Model()
    targets = [[[1, 0, 0]] * 4, [[0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 4]]]
    model.primitive["targets"] = [{"POSITION": model.add(target), "NORMAL": 99} for target in targets]
    model.tree["meshes"][0]["weights"] = mesh_weights
    model.node["weights"] = node_weights
    return model


@pytest.mark.parametrize(
    ("mesh_weights", "node_weights", "weights"),
    [
        (None, None, [0, 0]),
        ([0.5, 0.25], None, [0.5, 0.25]),
        ([0.5, 0.25], [0, 1], [0, 1]),
        (None, [2, -1], [2, -1]),
        ([1, 1], [0, 0], [0, 0]),
        ([1], None, [1, 0]),
        ([1, 0, 0], None, [1, 0]),
    ],
)
def test_morph_targets(load, mesh_weights, node_weights, weights):
    geometry = load(morphed(mesh_weights, node_weights))
    expected = CORNERS + weights[0] * np.array([[1.0, 0.0, 0.0]])
    expected[[0, 3]] += weights[1] * np.array([[0, 2, 0], [0, 0, 4]])
    assert np.array_equal(triangles(geometry), expected[FACES])
    assert geometry.notes == (("its morph targets are applied with their weights",) if any(weights) else ())


def test_morph_targets_that_are_sparse_quantized_or_of_unused_vertices(load):
    model = Model(np.concatenate([CORNERS[:1] * 0, CORNERS]), FACES + 1)
    model.tree["meshes"][0]["weights"] = [1, 1, 1]
    moves = np.array([[9, 9, 9], [127, 0, 0], [0, -128, 0], [0, 0, 0], [0, 0, 0]])
    model.tree["accessors"].append({"componentType": 5126, "count": 5, "type": "VEC3"})
    number = len(model.tree["accessors"]) - 1
    model.tree["accessors"][number]["sparse"] = sparse(model, [2], [[1, 2, 3]])
    model.tree["accessors"].append({"componentType": 5126, "count": 5, "type": "VEC3"})  # zeros
    targets = [model.add(moves, "i1", normalized=True), number, number + 1]
    model.primitive["targets"] = [{"POSITION": target} for target in targets]
    expected = CORNERS.astype(np.float64)
    expected[0, 0] += 1
    expected[1] += [1, 1, 3]
    assert np.array_equal(triangles(load(model)), expected[FACES])


def test_morph_targets_that_do_not_fit(reason):
    model = morphed([0, 0, 1])
    assert reason(model) == "meshes[0].primitives[0] has 2 targets for 3 weights"
    model = morphed([1, 0])
    model.primitive["targets"][0]["POSITION"] = model.add(CORNERS[:3])
    assert reason(model) == "accessors[4] has 3 elements, and the positions 4"


# --- skins ---


def skinned(joints=None, weights=None, joint_type="u1", weight_type="f4", bind=None, **node) -> Model:
    """The tetrahedron, each corner with a joint of its own unless told otherwise. Joints are nodes 1 to 4."""
    joints = [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]] if joints is None else joints
    weights = [[1, 0, 0, 0]] * 4 if weights is None else weights
    model = Model(skin=0, **node)
    model.primitive["attributes"] |= {
        "JOINTS_0": model.add(joints, joint_type),
        "WEIGHTS_0": model.add(weights, weight_type, normalized=weight_type != "f4"),
    }
    model.tree["nodes"] += [{"translation": move} for move in ([1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 4, 4])]
    model.tree["skins"] = [{"joints": [1, 2, 3, 4]}]
    if bind is not None:
        model.tree["skins"][0]["inverseBindMatrices"] = model.add(np.asarray(bind).transpose(0, 2, 1).reshape(-1, 16))
    return model


MOVES = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 4, 4]])
POSED = "its skins are posed by their joints"


def test_joints_move_their_vertices_and_the_node_of_the_mesh_does_not(load):
    model = skinned(translation=[100, 0, 0])
    model.tree["nodes"].append({"children": [0], "scale": [50, 50, 50]})
    geometry = load(model)
    assert close(geometry, (CORNERS + MOVES)[FACES])
    assert geometry.notes == (POSED,)


def test_parents_of_joints_apply(load):
    model = skinned()
    model.tree["nodes"].append({"children": [1, 2, 3, 4], "scale": [2, 2, 2], "translation": [0, 0, 7]})
    assert close(load(model), (2 * (CORNERS + MOVES) + [0, 0, 7])[FACES])


def test_joints_outside_of_the_scene_apply_too(load):
    model = skinned()
    model.tree["scenes"] = [{"nodes": [0]}]
    assert close(load(model), (CORNERS + MOVES)[FACES])


def test_the_bind_pose_gives_the_mesh_as_it_is(load):
    bind = np.tile(np.eye(4), (4, 1, 1))
    bind[:, :3, 3] = -MOVES
    geometry = load(skinned(bind=bind))
    assert close(geometry, tetrahedron())
    assert geometry.notes == ()


@pytest.mark.parametrize(
    ("moved", "notes"),
    [
        (np.diag([1.0, 1.0, 1.0, 1.0]) + 0.0, (gltf.FRAME,)),
        (np.array([[1, 0, 0, 0.12], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), (gltf.FRAME,)),
        (np.array([[1, 0, 0, 0.13], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), (POSED,)),
    ],
)
def test_an_animated_skin_that_fills_the_box_of_its_model_is_shown_as_modeled(moved, notes, load):
    bind = np.tile(np.eye(4), (4, 1, 1))
    bind[:, :3, 3] = -MOVES
    bind[1] = moved @ bind[1]  # the corner at x = 1, the largest
    model = skinned(bind=bind)
    model.tree["animations"] = [{"channels": [{"sampler": 0, "target": {"node": 2, "path": "rotation"}}]}]
    geometry = load(model)
    expected = CORNERS.astype(np.float64)
    if notes == (POSED,):
        expected[1] = moved[:3, :3] @ CORNERS[1] + moved[:3, 3]
    assert close(geometry, expected[FACES], atol=1e-6)
    assert geometry.notes == notes
    del model.tree["animations"]  # without an animation the pose is the file's word
    assert load(model).notes == ((POSED,) if moved[0, 3] else ())


def test_inverse_bind_matrices_come_before_joints(load):
    bind = np.tile(np.diag([2.0, 3.0, 4.0, 1.0]), (4, 1, 1))
    bind[:, 0, 3] = 5
    model = skinned(bind=bind)
    for joint in model.tree["nodes"][1:]:
        joint["rotation"] = TURN
    x, y, z = CORNERS.T
    expected = np.stack([-3 * y, 2 * x + 5, 4 * z], axis=1) + MOVES
    assert close(load(model), expected[FACES], atol=1e-6)


@pytest.mark.parametrize("joint_type", ["u1", "u2"])
@pytest.mark.parametrize(("weight_type", "one"), [("f4", 1), ("u1", 255), ("u2", 65535)])
def test_weights_mix_joints(load, joint_type, weight_type, one):
    joints = [[0, 1, 2, 3]] * 4
    weights = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [2, 3, 0, 0], [1, 1, 2, 1]])
    shares = weights / weights.sum(1, keepdims=True)
    stored = shares * one  # a fifth of 255 or 65535 is whole
    expected = CORNERS + shares @ MOVES
    assert close(load(skinned(joints, stored, joint_type, weight_type)), expected[FACES], atol=1e-6)
    # Weights that do not add up to one are brought to it.
    assert close(load(skinned(joints, weights * 20, joint_type, weight_type)), expected[FACES], atol=1e-6)


def test_more_than_four_joints_of_a_vertex(load):
    model = skinned(weights=[[0.5, 0, 0, 0]] * 4)
    attributes = model.primitive["attributes"]
    attributes |= {"JOINTS_1": model.add([[0, 3, 0, 0]] * 4, "u1"), "WEIGHTS_1": model.add([[0, 0.5, 0, 0]] * 4)}
    assert close(load(model), (CORNERS + (MOVES + MOVES[3]) / 2)[FACES])


def test_a_joint_that_is_named_twice_keeps_its_place(load):
    model = skinned()
    model.tree["skins"][0]["joints"] = [1, 1, 1, 2]
    assert close(load(model), (CORNERS + MOVES[[0, 0, 0, 1]])[FACES])


def test_morph_targets_come_before_the_skin(load):
    model = skinned()
    for joint in model.tree["nodes"][1:]:
        joint["scale"] = [2, 2, 2]
    model.primitive["targets"] = [{"POSITION": model.add([[0, 0, 1]] * 4)}]
    model.tree["meshes"][0]["weights"] = [10]
    assert close(load(model), (2 * (CORNERS + [0, 0, 10]) + MOVES)[FACES])


def test_joints_without_a_skin_do_nothing(load):
    model = skinned()
    model.node.pop("skin")
    assert np.array_equal(triangles(load(model)), CORNERS[FACES])


def test_joints_without_weight_may_be_anything(load):
    joints = [[0, 99, 255, 7], [1, 99, 255, 7], [2, 99, 255, 7], [3, 99, 255, 7]]
    assert close(load(skinned(joints)), (CORNERS + MOVES)[FACES])


def test_vertices_without_weights_follow_the_first_joint(load):
    weights = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    geometry = load(skinned(weights=weights))
    assert close(geometry, (CORNERS + MOVES[[0, 0, 2, 0]])[FACES])
    assert set(geometry.notes) == {POSED, "vertices without skin weights follow the first joint of their skin"}


def test_skins_that_do_not_fit(reason):
    assert reason(skinned([[4, 0, 0, 0]] * 4)) == "accessors[2] has joint 4 of 4"
    assert "inverseBindMatrices has 2 elements for 4 joints" in reason(skinned(bind=np.tile(np.eye(4), (2, 1, 1))))
    assert "inverseBindMatrices has the last row" in reason(skinned(bind=np.ones((4, 4, 4))))
    model = skinned()
    model.primitive["attributes"].pop("WEIGHTS_0")
    assert "attributes has no JOINTS_0 and WEIGHTS_0, which nodes[0].skin needs" in reason(model)
    model = skinned()
    model.primitive["attributes"]["JOINTS_0"] = model.add(np.zeros((4, 4)))
    assert "JOINTS_0 is not of an unsigned type" in reason(model)
    model = skinned()
    model.primitive["attributes"]["JOINTS_0"] = model.add(np.zeros((3, 4)), "u1")
    assert reason(model) == "accessors[4] has 3 elements, and the positions 4"
    model = skinned()
    model.tree["skins"][0]["joints"] = []
    assert "joints is an array of 0; it should be an array of nodes" in reason(model)
    model = skinned()
    model.node["extensions"] = {"EXT_mesh_gpu_instancing": {}}
    assert "has a skin and EXT_mesh_gpu_instancing" in reason(model)


# --- coarse coordinates ---


def test_coordinates_that_single_precision_made_coarse(load, reason):
    """Also where a node brings them back to the origin. What a node itself moves far away stays fine."""
    far = CORNERS + np.float32(2**27)  # steps of 16
    assert "its coordinates are too coarse: single precision has steps of 16 there" in reason(
        Model(far, translation=[-(2.0**27), 0, 0])
    )
    assert "steps of 8 there" in reason(Model(far, scale=[0.5, 0.5, 0.5]))
    assert load(Model(far)).vertices.dtype == np.float32  # load_mesh sees it
    geometry = load(Model(translation=[2.0**27, 0, 0]))
    assert close(geometry, tetrahedron(move=[2.0**27, 0, 0]))


def test_a_small_part_of_a_large_scene_is_not_coarse(load):
    """What counts is the step against the whole scene, not against the part."""
    model = Model(CORNERS * np.float32(1e-3) + np.float32(1000), translation=[1, 0, 0])
    model.mesh(CORNERS * 1000)
    model.tree["nodes"].append({"mesh": 1})
    assert len(load(model).faces) == 8


def test_whole_numbers_are_exact_however_few(load):
    model = Model(translation=[0.5, 0, 0]).use("KHR_mesh_quantization")
    model.primitive["attributes"]["POSITION"] = model.add(CORNERS, "u1")
    assert close(load(model), tetrahedron(move=[0.5, 0, 0]))


# --- Draco ---


def draco(required: bool = True, fallback: bool = False, **arguments) -> Model:
    """The tetrahedron packed with Draco; with `fallback`, plain data beside it that are another shape."""
    DracoPy = pytest.importorskip("DracoPy")
    packed = DracoPy.encode(CORNERS, FACES.astype(np.uint32), **{"quantization_bits": 16, **arguments})
    model = Model(CORNERS * 3 if fallback else CORNERS).use("KHR_draco_mesh_compression", required=required)
    if not fallback:
        for accessor in model.tree["accessors"]:
            accessor.pop("bufferView")
    model.primitive["extensions"] = {
        "KHR_draco_mesh_compression": {"bufferView": model.view(packed), "attributes": {"POSITION": 0}}
    }
    return model


def in_order(shape: np.ndarray) -> np.ndarray:
    """Triangles from their smallest corner on, sorted: Draco keeps neither order nor first corners."""
    first = [min(range(3), key=lambda corner: tuple(face[corner])) for face in shape.tolist()]
    turned = np.stack([np.roll(face, -start, axis=0) for face, start in zip(shape, first, strict=True)])
    return turned[np.lexsort(turned.reshape(-1, 9).T[::-1])]


@pytest.mark.parametrize("preserve_order", [True, False])  # sequential and edgebreaker
@pytest.mark.parametrize("mode", [4, 5])
def test_draco(load, preserve_order, mode):
    model = draco(preserve_order=preserve_order)
    model.primitive["mode"] = mode
    model.node["translation"] = [1, 0, 0]
    found = triangles(load(model))
    assert np.allclose(in_order(np.round(found, 2)), in_order(tetrahedron(move=[1, 0, 0])), atol=9 * 2**-16)


@pytest.mark.parametrize(("dtype", "code"), [("u2", 5123), ("i2", 5122)])
@pytest.mark.parametrize("normalized", [False, True])
def test_draco_integers_joints_and_weights(load, reason, dtype, code, normalized):
    """Attributes go by their number in the Draco data; what integers mean, the accessor says."""
    DracoPy = pytest.importorskip("DracoPy")
    stored = (CORNERS * 1000 - (5000 if dtype == "i2" else 0)).astype(dtype)
    joints, weights = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.float32)
    joints[:, 0], weights[:, 0] = range(4), 1
    more = {1: joints, 2: weights}
    packed = DracoPy.encode(stored, FACES.astype(np.uint32), preserve_order=True, generic_attributes=more)
    numbers = {attribute["num_components"]: attribute["unique_id"] for attribute in DracoPy.decode(packed).attributes}
    model = skinned().use("KHR_draco_mesh_compression", "KHR_mesh_quantization")
    for accessor in model.tree["accessors"]:
        accessor.pop("bufferView")
    model.tree["accessors"][0].update(componentType=code, normalized=normalized)
    names = {"POSITION": numbers[3], "JOINTS_0": 1, "WEIGHTS_0": 2}
    extension = {"bufferView": model.view(packed), "attributes": names}
    model.primitive["extensions"] = {"KHR_draco_mesh_compression": extension}
    expected = stored / np.iinfo(dtype).max if normalized else stored
    assert close(load(model), (expected + MOVES)[FACES])
    model.tree["accessors"][0]["componentType"] = 5120
    assert "has numbers that are not of the type that accessors[0] gives" in reason(model)


def test_draco_beside_plain_data(load, monkeypatch):
    """Required, it is what counts; otherwise both are the same by the specification, and plain data need no decoder."""
    assert np.allclose(load(draco(fallback=True, preserve_order=True)).vertices, CORNERS, atol=1e-3)
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    assert np.array_equal(triangles(load(draco_without_decoder())), 3 * CORNERS[FACES])


def draco_without_decoder(fallback: bool = True) -> Model:
    model = Model(CORNERS * 3).use("KHR_draco_mesh_compression", required=False)
    extension = {"bufferView": model.view(b"DRACO"), "attributes": {"POSITION": 0}}
    model.primitive["extensions"] = {"KHR_draco_mesh_compression": extension}
    if not fallback:
        model.tree["accessors"][0].pop("bufferView")
    return model


def test_draco_without_its_package(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    with pytest.raises(ConfigError, match=r"a Python package is missing \(.*\): pip install DracoPy"):
        load(draco_without_decoder(fallback=False))


def test_draco_that_is_damaged_or_does_not_fit(reason):
    path = "meshes[0].primitives[0].extensions.KHR_draco_mesh_compression"
    model = draco()
    model.tree["bufferViews"][-1]["byteLength"] -= 30
    assert reason(model).startswith(f"{path} is damaged (")
    model = draco()
    extension = model.primitive["extensions"]["KHR_draco_mesh_compression"]
    extension["attributes"]["POSITION"] = 9
    assert reason(model) == f"{path}.attributes.POSITION is 9, which the Draco data do not have"
    DracoPy = pytest.importorskip("DracoPy")
    extension |= {"bufferView": model.view(DracoPy.encode(CORNERS)), "attributes": {"POSITION": 0}}
    assert reason(model) == f"{path} holds points; glTF allows triangles only"
