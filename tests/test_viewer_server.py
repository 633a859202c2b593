"""The viewer's server without a browser: files that visitors bring and take, their visits, its errors, its command."""

import argparse
import base64
import errno
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode, urljoin

import numpy as np
import pytest
import torch
from helpers import RESOLUTION, ROOT, VQ, make_tokenizer, run, solid_grids, tiny_config

from trellis import SparseStructureTokenizer
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.meshes import load_mesh, mesh_to_grid
from trellis.grids.placing import turn_to_y_up
from trellis.grids.voxels import occupancy_to_points, points_to_occupancy, read_ply, write_ply
from trellis.utils.errors import ConfigError, DataError, UserError
from trellis.viewer import page_state, uploads
from trellis.viewer.backend import Backend
from trellis.viewer.callbacks import saved
from trellis.viewer.code_usage import UsageCounter
from trellis.viewer.serve import open_data


def needs(*names: str):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


needs_dash, needs_meshes = needs("dash", "waitress"), needs("numba", "trimesh")
needs_surface = needs("skimage", "trimesh")


@pytest.fixture(scope="module")
def opener():
    opener = uploads.Opener(workers=1)
    yield opener
    opener.close()


@pytest.fixture(scope="module")
def app(backend, opener):
    from trellis.viewer.app import create_app

    return create_app(backend, UsageCounter(backend, 4), opener)


def box(path: Path, size=(1.0, 0.5, 0.25)) -> Path:
    import trimesh

    trimesh.creation.box(size).export(path)
    return path


# --- files in and out ---


def test_kinds_of_files_are_the_voxelizer_s():
    assert uploads.check_name("a/B.GLB") == ".glb"
    for name in ("a.exe", "glb", "", "a.zip", "a.glb.zip", "a.stl.gz"):
        with pytest.raises(DataError, match="is not one of"):
            uploads.check_name(name)


def test_files_that_point_to_other_files_are_turned_away(tmp_path):
    outside = {"asset": {"version": "2.0"}, "buffers": [{"uri": "../../secret.bin", "byteLength": 4}]}
    entity = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><COLLADA>&e;</COLLADA>'
    cases = {
        "a.gltf": (json.dumps(outside).encode(), "in another file, '../../secret.bin'"),
        "b.gltf": (b"{", "its JSON is damaged"),
        "c.dae": (entity.encode(), "XML entity"),
        "d.dae": (entity.encode("utf-16"), "XML entity"),
        "e.dae": (b"PK\x03\x04 an archive", "its content is zip archive of a mesh, its name says COLLADA"),
        "f.glb": (b"glTF" + bytes(8), "too few for a GLB"),
        "g.gltf": (b'{"asset": {}, "buffers": 5}', "buffers is 5; it should be an array"),
        "h.gltf": (b'{"asset": {}, "buffers": [5]}', "buffers has an entry that is not an object"),
        "i.gltf": (b"[]", "not an object"),
        "j.gltf": (b"[" * 100_000, "its JSON is damaged"),
        "k.gltf": (b'{"asset": {}, "buffers": [{"uri": 5}]}', r"buffers\[0\].uri is 5; it should be a string"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            uploads.open_shape(path, RESOLUTION, "auto", "cube", voxelize=True)


@needs_meshes
def test_an_upload_is_read_as_voxelize_reads_it(tmp_path):
    """A GLB whose JSON is padded with zeros, and COLLADA in another encoding and with a document type."""
    content = box(tmp_path / "a.glb").read_bytes()
    size = int.from_bytes(content[12:16], "little")
    text = content[20 : 20 + size].rstrip() + bytes(8)
    text += bytes(-len(text) % 4)
    chunks = len(text).to_bytes(4, "little") + b"JSON" + text + content[20 + size :]
    (tmp_path / "a.glb").write_bytes(content[:8] + (12 + len(chunks)).to_bytes(4, "little") + chunks)
    triangles = (
        '<library_geometries><geometry id="g"><mesh>'
        '<source id="p"><float_array id="a" count="9">0 0 0 2 0 0 0 1 0</float_array><technique_common>'
        '<accessor source="#a" count="3" stride="3"><param name="X" type="float"/><param name="Y" type="float"/>'
        '<param name="Z" type="float"/></accessor></technique_common></source>'
        '<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>'
        '<triangles count="1"><input semantic="VERTEX" source="#v" offset="0"/><p>0 1 2</p></triangles>'
        "</mesh></geometry></library_geometries>"
    )
    head = '<?xml version="1.0" encoding="ISO-8859-1"?><!DOCTYPE COLLADA><!-- h\u00fclle -->'
    document = f'{head}<COLLADA version="1.4.1"><asset/>{triangles}</COLLADA>'
    (tmp_path / "b.dae").write_bytes(document.encode("iso-8859-1"))
    for name in ("a.glb", "b.dae"):
        shape = uploads.open_shape(tmp_path / name, RESOLUTION, "auto", "cube", voxelize=True)
        assert np.array_equal(shape.voxels, np.argwhere(mesh_to_grid(tmp_path / name, RESOLUTION)[0].numpy()))


def test_simplified_meshes_are_small_and_near(monkeypatch):
    trimesh = pytest.importorskip("trimesh")
    ball = trimesh.creation.icosphere(5, radius=0.5)
    monkeypatch.setattr(uploads, "SHOWN_TRIANGLES", 3000)
    vertices, triangles = uploads.simplified(np.asarray(ball.vertices), np.asarray(ball.faces))
    assert 1000 < len(triangles) <= 3000 and triangles.max() < len(vertices)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.5).max() < 0.03


@needs_meshes
def test_a_worker_gives_the_tokenizer_s_own_grid(opener, backend, tmp_path):
    path = box(tmp_path / "a.glb")
    for up_axis in ("auto", "z", "y", "keep"):
        shape = opener.open(path, RESOLUTION, up_axis, "cube", voxelize=True)
        want = mesh_to_grid(path, RESOLUTION, up_axis)[0].numpy()
        assert np.array_equal(shape.voxels, np.argwhere(want))
        # The mesh that is shown lies in its voxels: it is turned and scaled as they are.
        assert np.abs(shape.mesh.vertices.min(0) - shape.voxels.min(0)).max() <= 1
        assert np.abs(shape.mesh.vertices.max(0) - shape.voxels.max(0) - 1).max() <= 1
    grid = backend.object(0)
    write_ply(tmp_path / "b.ply", occupancy_to_points(grid))
    shape = opener.open(tmp_path / "b.ply", RESOLUTION, "z", "cube", voxelize=True)
    assert np.array_equal(shape.voxels, np.argwhere(grid)) and shape.mesh is None


@needs_meshes
@pytest.mark.parametrize("normalization", ["cube", "shapellm"])
def test_a_file_is_parsed_once_and_its_mesh_lies_in_its_voxels(normalization, tmp_path, monkeypatch):
    loaded = []

    def counted(path, *args):
        loaded.append(path)
        return load_mesh(path, *args)

    monkeypatch.setattr(uploads, "load_mesh", counted)
    path = box(tmp_path / "a.glb", (1.0, 0.6, 0.3))
    shape = uploads.open_shape(path, RESOLUTION, "y", normalization, True)
    assert loaded == [path]
    grid = mesh_to_grid(path, RESOLUTION, "y", normalization)[0].numpy()
    assert np.array_equal(shape.voxels, np.argwhere(grid))
    assert np.abs(shape.mesh.vertices.min(0) - shape.voxels.min(0)).max() <= 1
    assert np.abs(shape.mesh.vertices.max(0) - shape.voxels.max(0) - 1).max() <= 1
    shown = uploads.open_shape(path, RESOLUTION, "y", normalization, False)
    assert shown.voxels is None and np.array_equal(shown.mesh.vertices, shape.mesh.vertices)


@needs_meshes
def test_limits_of_time_and_memory_end_a_file_and_not_the_server(tmp_path):
    import trimesh

    path = tmp_path / "ball.stl"
    trimesh.creation.icosphere(6).export(path)
    for limits, reason in (({"seconds": 0.02}, "time limit of 0.02 s"), ({"memory": 2**20}, "memory")):
        limited = uploads.Opener(workers=1, **limits)
        try:
            with pytest.raises(DataError, match=reason):
                limited.open(path, RESOLUTION, "z", "cube", voxelize=True)
            limited.seconds, limited.memory = 60, uploads.MEMORY
            assert limited.open(path, RESOLUTION, "z", "cube", voxelize=True).mesh.triangles == 81920
        finally:
            limited.close()


@needs_surface
def test_downloads_hold_the_edited_object(backend, tmp_path):
    import trimesh

    state = page_state.new_object(backend, backend.object(1), "shapes/ball.stl", "k", "z")
    opened = page_state.open_object(backend, state, {"of": "k", "list": [[0, 3], [9, 30]]})
    ids = torch.from_numpy(opened.ids)
    grid = (backend.tokenizer.decode(ids)[0, 0] > 0).numpy()
    untouched = page_state.open_object(backend, state, None)
    assert saved(backend, untouched, "voxels")[0] == "ball_voxels.ply"  # so that neither replaces the other
    name, content = saved(backend, opened, "voxels")
    (tmp_path / name).write_bytes(content)
    assert name == "ball_edited_voxels.ply"
    assert np.array_equal(points_to_occupancy(read_ply(tmp_path / name), RESOLUTION)[0].numpy() > 0, grid)
    name, content = saved(backend, opened, "tokens")
    facts = json.loads(content)
    assert facts["tokens"] == opened.ids.tolist() and facts["tokenizer_hash"] == backend.tokenizer.hash
    assert torch.equal(backend.tokenizer.from_text(facts["text"]), ids)
    mesh = backend.tokenizer.to_mesh(ids)
    for kind in ("glb", "ply"):
        name, content = saved(backend, opened, kind)
        loaded = trimesh.load(io.BytesIO(content), file_type=kind, force="mesh")
        assert name == f"ball_edited_decoded.{kind}" and loaded.faces.shape == mesh.faces.shape


def stool(path: Path, y_up: bool) -> Path:
    """A slab with a long thin leg downwards: most of its surface is above, whatever the format."""
    import trimesh

    top, leg = trimesh.creation.box((1.0, 0.8, 0.25)), trimesh.creation.box((0.1, 0.1, 1.0))
    mesh = trimesh.util.concatenate([top.apply_translation((0, 0, 0.5)), leg])
    if y_up:
        mesh.vertices = turn_to_y_up(mesh.vertices)
    mesh.export(path)
    return path


def up_of(points: np.ndarray, axes: tuple[str, ...] = ("x", "y", "z", "-x", "-y", "-z")) -> str:
    """Which way the slab of a `stool` lies: the side where most points are."""
    low, high = points.min(0), points.max(0)
    means = (points.mean(0) - (low + high) / 2) / (high - low)
    return axes[int(np.argmax([*means, *-means]))]


STANDS = {  # file, y-up or not, dropdown: how the grid stands, how its GLB and its PLY come down
    ("a.glb", True, "auto"): ("z", "y", "y"),
    ("a.glb", True, "y"): ("z", "y", "y"),
    ("a.glb", True, "keep"): ("y", "y", "y"),
    ("a.glb", True, "z"): ("y", "y", "y"),  # said wrongly: it lies, but comes down as it came
    ("a.stl", False, "auto"): ("z", "y", "z"),
    ("a.stl", False, "z"): ("z", "y", "z"),
    ("a.stl", False, "keep"): ("z", "y", "z"),
    ("a.obj", True, "y"): ("z", "y", "y"),
    ("a.obj", False, "z"): ("z", "y", "z"),
    ("a.obj", True, "auto"): ("y", "y", "y"),  # not known: as it is
    ("a.obj", False, "keep"): ("z", "z", "z"),
}


@needs_dash
@needs_meshes
@needs_surface
@pytest.mark.parametrize("name, y_up, up_axis", STANDS)
def test_a_dropped_mesh_stands_and_comes_down_standing(name, y_up, up_axis, app, backend, tmp_path, monkeypatch):
    import trimesh

    grid_up, glb_up, ply_up = STANDS[name, y_up, up_axis]
    path = stool(tmp_path / name, y_up)
    answer = app.server.test_client().post(
        f"/upload?name={name}&up_axis={up_axis}", data=path.read_bytes(), headers={"X-Viewer": "1"}
    )
    state, mesh = answer.get_json()["object"], answer.get_json()["mesh"]
    shown = page_state.open_object(backend, state, None)
    assert up_of(np.argwhere(shown.grid)) == grid_up
    drawn = next(trace for trace in mesh["figure"]["data"] if trace["type"] == "mesh3d")
    assert up_of(plotly_points(drawn)) == grid_up
    assert ("which axis is up" in mesh["caption"]) == (name == "a.obj" and up_axis == "auto")
    assert ("was taken as" in mesh["caption"]) == (name == "a.glb" and up_axis == "z")

    reconstruction = torch.from_numpy(shown.grid)[None, None].float() - 0.5
    monkeypatch.setattr(backend.tokenizer, "decode", lambda ids, precision="fp32": reconstruction)
    for kind, up in (("glb", glb_up), ("ply", ply_up)):
        _, content = saved(backend, shown, kind)
        loaded = trimesh.load(io.BytesIO(content), file_type=kind, force="mesh")
        assert up_of(loaded.vertices) == up


def plotly_points(trace: dict) -> np.ndarray:
    """The corners of a trace, [N, 3]; Plotly's JSON has arrays of numbers as base64."""
    columns = []
    for axis in "xyz":
        value = trace[axis]
        if isinstance(value, dict):
            value = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        columns.append(np.asarray(value, dtype=float))
    return np.stack(columns, 1)


@pytest.mark.parametrize("setting, tokenizer_s, axis", [
    ("auto", "keep", "z"), ("y", "z", "y"), ("z", "y", "z"), ("keep", "z", "keep"),
    (None, "keep", "keep"), (None, "auto", "z"), (None, "y", "y"),
])  # fmt: skip
def test_objects_of_a_data_set_have_the_axes_of_its_setting_else_of_the_tokenizer_s(
    setting, tokenizer_s, axis, tmp_path
):
    bits = np.packbits(solid_grids(2, RESOLUTION, 0).reshape(2, -1), axis=1)
    np.savez(tmp_path / "a.npz", bits=bits, **({} if setting is None else {"up_axis": np.full(2, setting)}))
    tokenizer = make_tokenizer()
    tokenizer.up_axis = tokenizer_s
    data = SparseStructure(str(tmp_path / "a.npz"), resolution=RESOLUTION, split="all")
    shown = Backend(tokenizer, data)
    assert shown.grid_axis(1) == axis
    assert shown.grid_axis() == {"auto": "z"}.get(tokenizer_s, tokenizer_s)  # a dropped file of voxels


def test_meshes_of_a_data_set_are_found_as_voxelize_left_them(tmp_path):
    grid = solid_grids(1, RESOLUTION, 0)[0]
    rows = ["sha256,file,voxelized,num_voxels,up_axis,resolution,split"]
    (tmp_path / "voxels").mkdir()
    for number, file in enumerate(("there.stl", "gone.stl")):
        write_ply(tmp_path / "voxels" / f"{number:064x}.ply", occupancy_to_points(grid))
        rows.append(f"{number:064x},{tmp_path / file},True,{grid.sum()},y,{RESOLUTION},val")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "there.stl").touch()
    found = Backend(make_tokenizer(), SparseStructure(str(tmp_path), resolution=RESOLUTION, split="all"))
    assert found.mesh_file(0) == (tmp_path / "there.stl", "y", "cube") and found.mesh_file(1) is None


# --- the server ---


def ask(client, app, output: str, values: dict[str, object]) -> dict:
    """What a callback that writes `output` answers; values: {"id.property": value} of its inputs and states."""
    (key,) = (key for key in app.callback_map if output in key)
    spec = next(item for item in app._callback_list if item["output"] == key)
    fill = [
        [{**item, "value": values.get(f"{item['id']}.{item['property']}")} for item in spec[part]]
        for part in ("inputs", "state")
    ]
    outputs = [dict(zip(("id", "property"), name.rsplit(".", 1), strict=True)) for name in key.strip(".").split("...")]
    body = {
        "output": key,
        "outputs": outputs if key.startswith("..") else outputs[0],
        "inputs": fill[0],
        "state": fill[1],
        "changedPropIds": [next(iter(values))],
    }
    answer = client.post("/_dash-update-component", json=body)
    assert answer.status_code == 200, answer.data
    return answer.get_json()


@needs_dash
def test_visitors_get_their_own_object_and_edits(app, backend):
    first, second = app.server.test_client(), app.server.test_client()
    states = [page_state.new_object(backend, backend.object(i), str(i), f"object-{i}", "z") for i in (0, 1)]
    edits = {"of": "object-0", "list": [[11, int((backend.encode(backend.object(0))[11] + 1) % 32)]]}
    wanted = [
        backend.decode(page_state.open_object(backend, states[0], edits).ids),
        backend.decode(backend.encode(backend.object(1))),
    ]
    for _ in range(2):
        for client, state, own, grid in ((first, states[0], edits, wanted[0]), (second, states[1], edits, wanted[1])):
            answer = ask(client, app, "caption-reconstruction", {"object.data": state, "edits.data": own})
            assert answer["response"]["caption-reconstruction"]["children"] == f"{grid.sum():,} voxels"
            assert bool(answer["response"]["legend-reconstruction"]["children"]) == (client is first)


@needs_dash
def test_errors_of_callbacks_are_sentences_on_the_page(app, backend):
    state = page_state.new_object(backend, backend.object(0), "a", "object-0", "z")
    values = {"edit-set.n_clicks": 1, "object.data": state, "chosen.data": 0, "part.value": "0", "code.value": 999}
    said = ask(app.server.test_client(), app, "edits.data", values)["sideUpdate"]["message"]["children"]
    assert said == "the code is 999; it must be a whole number from 0 to 31"
    for damage in ({"grid": 7}, {"axis": "w"}, {"axis": None}, {"axis": ["y"]}):
        broken = {"object.data": {**state, **damage}, "edits.data": None}
        said = ask(app.server.test_client(), app, "caption-reconstruction", broken)["sideUpdate"]["message"]["children"]
        assert "reload" in said and "Traceback" not in said


@needs_dash
def test_uploads_are_checked_before_they_are_opened(app):
    from trellis.viewer.app import MAX_REQUEST

    client = app.server.test_client()
    ours = {"X-Viewer": "1"}
    cases = [
        ("name=a.stl&up_axis=z", b"solid", {}, "viewer's own page"),
        ("name=a.exe&up_axis=z", b"MZ", ours, ".glb"),
        ("name=a.stl&up_axis=w", b"solid", ours, "up_axis"),
        ("name=a.stl&up_axis=z", b"", ours, "a.stl: the file is empty. Export it again"),
    ]
    for query, content, headers, words in cases:
        answer = client.post(f"/upload?{query}", data=content, headers=headers)
        assert answer.status_code == 400 and words in answer.get_json()["error"]
    too_large = {"CONTENT_LENGTH": str(uploads.MAX_BYTES + 1)}
    answer = client.post("/upload?name=a.stl&up_axis=z", headers=ours, environ_overrides=too_large)
    assert answer.status_code == 400 and "more than 64 MiB. Simplify" in answer.get_json()["error"]
    rest = client.post("/_dash-update-component", data=b" " * (MAX_REQUEST + 1), content_type="application/json")
    assert rest.status_code == 413


@needs_dash
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_is_answered_by_all_of_its_names_and_no_other(address, backend, opener):
    from trellis.viewer.app import create_app

    client = create_app(backend, UsageCounter(backend, 4), opener, address).server.test_client()
    for host in ("127.0.0.1", "localhost:8050", "LOCALHOST", "[::1]", "[::1]:8050"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    others = ("another.example", "127.0.0.1.example:8050", "[::2]:8050", "[::1", "::1", "a@[::1]", "a:b@localhost", "")
    for host in others:
        for path in ("/", "/_dash-layout", "/upload", "/nothing"):
            assert client.get(path, headers={"Host": host}).status_code == 400


@needs_dash
def test_an_address_of_the_network_is_answered_by_any_name(backend, opener):
    from trellis.viewer.app import create_app

    client = create_app(backend, UsageCounter(backend, 4), opener, "0.0.0.0").server.test_client()
    assert client.get("/", headers={"Host": "lab.example:8050"}).status_code == 200


@needs_dash
@pytest.mark.parametrize("settings, options", [
    ({"up_axis": "z"}, ["auto", "y", "z", "keep"]),
    ({}, ["auto", "y", "z", "keep"]),
    ({"normalization": "shapellm", "up_axis": "y"}, ["auto", "y"]),
])  # fmt: skip
def test_the_page_offers_the_ways_to_take_axes_and_begins_with_the_tokenizer_s(settings, options):
    from trellis.viewer.layout import toolbar

    tokenizer = SparseStructureTokenizer(make_tokenizer().specs, RESOLUTION, **settings)
    parts = [part for _, part in walk(toolbar(Backend(tokenizer)))]
    (dropdown,) = (part for part in parts if getattr(part, "id", None) == "up-axis")
    assert list(dropdown.options) == options and dropdown.value == tokenizer.up_axis


def walk(component):
    """All parts of a part of the page."""
    return [(None, component), *component._traverse_with_paths()]


@needs_dash
@needs_meshes
def test_an_upload_becomes_an_object_and_a_damaged_one_a_sentence(app, backend, tmp_path):
    client, ours = app.server.test_client(), {"X-Viewer": "1"}
    path = box(tmp_path / "a.glb")
    answer = client.post("/upload?name=my%20box.glb&up_axis=z", data=path.read_bytes(), headers=ours).get_json()
    grid = mesh_to_grid(path, RESOLUTION, "z")[0].numpy() > 0
    opened = page_state.open_object(backend, answer["object"], None)
    assert opened.name == "my box.glb" and np.array_equal(opened.grid, grid)
    assert np.array_equal(opened.ids, backend.tokenizer.encode(path)[0].numpy())
    assert answer["mesh"]["of"] == answer["object"]["key"]
    assert answer["mesh"]["caption"] == "12 triangles; says that y is up, but was taken as z-up"
    for name, content in (
        ("a.glb", path.read_bytes()[:300]),
        ("b.ply", b"ply\n"),
        ("c.stl", os.urandom(500)),
        ("d.obj", b"nothing"),
        ("e.dae", b"<COLLADA/>"),
        ("f.off", b"OFF\n9 9 9\n"),
    ):
        answer = client.post(f"/upload?name={name}&up_axis=z", data=content, headers=ours)
        said = answer.get_json()["error"]
        assert answer.status_code == 400 and said.startswith(f"{name}: "), said
        assert "Traceback" not in said and str(tmp_path) not in said and "/tmp" not in said
    assert client.get("/").status_code == 200


@needs_dash
@needs_meshes
def test_an_upload_leaves_no_file_whatever_its_name(app, tmp_path, monkeypatch):
    content = box(tmp_path / "a.stl").read_bytes()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = set(tmp_path.rglob("*"))
    client = app.server.test_client()
    for name in ("../../b.stl", str(tmp_path / "b.stl"), "b\0.stl", "\n\u202e.stl", "b" * 5000 + ".stl", "..stl"):
        query = urlencode({"name": name, "up_axis": "z"})
        answer = client.post(f"/upload?{query}", data=content, headers={"X-Viewer": "1"})
        assert answer.status_code == 200 and "/" not in answer.get_json()["object"]["name"]
        broken = client.post(f"/upload?{query}", data=content[:50], headers={"X-Viewer": "1"})
        assert broken.status_code == 400 and str(tmp_path) not in broken.get_json()["error"]
    assert set(tmp_path.rglob("*")) == before


@needs_dash
def test_more_uploads_than_can_wait_are_refused_and_a_full_disk_is_said(app, opener, monkeypatch):
    client, ours = app.server.test_client(), {"X-Viewer": "1"}

    def said() -> str:
        return client.post("/upload?name=a.stl&up_axis=z", data=b"solid", headers=ours).get_json()["error"]

    with ExitStack() as taken:
        for _ in range(uploads.WAITING):
            taken.enter_context(opener._slots)
        assert said() == "a.stl: too many files are being opened at the moment: try again in a minute"

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trellis.viewer.app.open", full, raising=False)
    assert said() == "a.stl: the server cannot keep the file (No space left on device)"


@needs_dash
def test_the_page_asks_for_nothing_from_outside(app):
    page = app.server.test_client().get("/").get_data(as_text=True)
    assert "http://" not in page and "https://" not in page and "assets/viewer.js" in page


# --- what changes while it is looked at ---


def folder_of_voxels(folder: Path) -> list[Path]:
    """A data set of three objects, each in a file of its own."""
    files, rows = [], ["sha256,voxelized,num_voxels,resolution,split"]
    for number, grid in enumerate(solid_grids(3, RESOLUTION, 0)):
        files.append(folder / "voxels" / f"{number:064x}.ply")
        files[-1].parent.mkdir(exist_ok=True)
        write_ply(files[-1], occupancy_to_points(grid))
        rows.append(f"{number:064x},True,{grid.sum()},{RESOLUTION},val")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return files


@needs_dash
def test_data_and_runs_that_vanish_are_sentences_on_the_page(opener, tmp_path, caplog):
    from trellis.viewer.app import UNEXPECTED, create_app

    files = folder_of_voxels(tmp_path)
    data = SparseStructure(str(tmp_path), resolution=RESOLUTION, split="all")
    shown = Backend(make_tokenizer(), data, tmp_path / "run")
    usage = UsageCounter(shown)
    app = create_app(shown, usage, opener)
    client = app.server.test_client()

    def said(output: str, values: dict) -> str:
        return ask(client, app, output, values)["sideUpdate"]["message"]["children"]

    curves = {"tabs.value": "curves", "read-curves.n_clicks": 0}
    assert said(
        "curves.children", curves
    ) == f"{tmp_path}/run/log.txt: cannot be read (No such file or directory): " + ("has the run trained yet?")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text('{"st')
    (tmp_path / "run" / "status.json").write_text("{")
    answer = json.dumps(ask(client, app, "curves.children", curves)["response"])
    assert "There is no curve yet" in answer and "status.json is damaged" in answer
    assert "object" in ask(client, app, "object.data", {"pick.value": 1})["response"]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    for index in (1, 2):
        for output in ("object.data", "figure-mesh.data"):
            words = said(output, {"pick.value": index})
            assert files[index].name in words and "\n" not in words and words != UNEXPECTED
    usage.start().wait()
    assert files[1].name in usage.problem and "terminal" not in usage.problem
    assert not [record for record in caplog.records if record.exc_info]


@needs_dash
def test_a_run_being_trained_is_shown_by_its_last_whole_checkpoint_and_a_damaged_one_is_named(
    data_dir, write_config, tmp_path
):
    from trellis.viewer import __main__, serve

    folder = tmp_path / "run"
    config = tiny_config(VQ, max_steps=4, i_eval=100, i_sample=100)
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", folder) == 0
    args = __main__.parse_args(["--run", str(folder), "--device", "cpu"])

    def shown() -> str:
        app, _, opener = serve.build(args)
        opener.close()
        return next(part.title for _, part in walk(app.layout) if "sha256 over" in str(getattr(part, "title", "")))

    last = shown()
    (folder / "ckpts" / "misc_step0000004.pt").rename(folder / "misc")  # as before the last file of a set is written
    before = shown()
    assert before != last
    (folder / "misc").rename(folder / "ckpts" / "misc_step0000004.pt")
    assert shown() == last
    named = set()
    for file in sorted((folder / "ckpts").glob("*coder_ema*step0000004.pt")):
        content = file.read_bytes()
        half = len(content) // 2
        for damaged in (content[:half], content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]):
            file.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    found = shown()
                except UserError as error:
                    assert file.name in str(error) and "\n" not in str(error)
                    named.add(file.name)
                    continue
            assert found == before and any(file.name in str(warning.message) for warning in said)
            named.add(file.name)
        file.write_bytes(content)
    assert len(named) == 2 and shown() == last


# --- the command ---


def test_data_of_a_run_may_be_gone_but_data_that_are_asked_for_may_not(data_dir):
    tokenizer = make_tokenizer()
    found = open_data(argparse.Namespace(data_dir=data_dir, run=None), tokenizer)
    assert len(found) == 30
    assert open_data(argparse.Namespace(data_dir=None, run=None), tokenizer) is None
    with pytest.raises(DataError):
        open_data(argparse.Namespace(data_dir="/nowhere", run=None), tokenizer)


def test_data_of_other_settings_than_the_tokenizer_s_are_refused_or_named(tmp_path, capsys):
    bits = np.packbits(solid_grids(2, RESOLUTION, 0).reshape(2, -1), axis=1)
    for name, setting in (("normalization", "shapellm"), ("up_axis", "keep"), ("up_axis", "y")):
        np.savez(tmp_path / f"{setting}.npz", bits=bits, **{name: np.full(2, setting)})
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="shapellm.npz: its grids have normalization shapellm.* tokenizer's is cube"):
        open_data(argparse.Namespace(data_dir=str(tmp_path / "shapellm.npz"), run=None), tokenizer)
    for setting in ("keep", "y"):
        open_data(argparse.Namespace(data_dir=str(tmp_path / f"{setting}.npz"), run=None), tokenizer)
        said = "made with up_axis keep, but the tokenizer's is z" in capsys.readouterr().err
        assert said == (setting == "keep")


@needs_dash
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_page_is_loaded_ends_with_its_code(number, monkeypatch, capsys):
    from trellis.viewer import __main__, serve

    def build(args):
        os.kill(os.getpid(), number)
        time.sleep(5)  # a handler runs between two instructions

    monkeypatch.setattr(serve, "build", build)
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:  # also if it was ignored at the start
        assert __main__.main(["--tokenizer", "none", "--port", "0"]) == 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr() == ("", "interrupted\n")


@needs_dash
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_at_this_machine_alone(number, tmp_path, data_dir):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "trellis.viewer", "--tokenizer", str(tmp_path / "tokenizer"), "--port", "0"]
    # SIGINT is ignored in what a shell starts in the background; the page must end by it all the same.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = subprocess.Popen(
            [*command, "--data_dir", data_dir], stdout=subprocess.PIPE, env=environment, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        url = line.split()[0]
        assert urllib.request.urlopen(url, timeout=30).status == 200
    finally:
        server.send_signal(number)
        assert server.wait(20) == 0


@needs_dash
def test_a_port_in_use_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    from trellis.viewer import __main__, serve

    def build(args):
        raise AssertionError("loaded")

    real = serve.build
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(serve, "build", build)
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert __main__.main(["--run", str(tmp_path), "--port", str(port)]) == 1
    said = f"error: --port {port} is in use at 127.0.0.1: give another --port, or 0 for a free one\n"
    assert capsys.readouterr().err == said
    for host in ("192.0.2.1", "nowhere.invalid", "a" * 300):  # 192.0.2.1: RFC 5737, of no machine
        assert __main__.main(["--run", str(tmp_path), "--port", "0", "--host", host]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: --host {host} --port 0: cannot be served")
    monkeypatch.setattr(serve, "build", real)
    assert __main__.main(["--tokenizer", str(tmp_path / "none"), "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@contextmanager
def served(app, url_prefix: str = "/", host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server that is as the command makes it."""
    from trellis.viewer.serve import listen, make_server

    with listen(host, 0) as listener:
        server = make_server(app.server, listener, url_prefix)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.trigger.pull_trigger(server.close)  # in its own thread
            thread.join(10)
            server.task_dispatcher.shutdown()
            assert not thread.is_alive()


@needs_dash
def test_the_address_of_ipv6_is_answered(backend, opener):
    from trellis.viewer.app import create_app
    from trellis.viewer.serve import listen

    try:
        listen("::1", 0).close()
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with served(create_app(backend, UsageCounter(backend, 4), opener, "::1"), host="::1") as port:
        assert urllib.request.urlopen(f"http://[::1]:{port}/", timeout=30).status == 200


PREFIX = "/user/jane%40x.org/proxy/8050/"


@contextmanager
def proxied(port: int, strip: bool) -> Iterator[str]:
    """The address of a reverse proxy that shows the page at PREFIX alone, with the name that the browser asks for."""

    class Proxy(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            if not self.path.startswith(PREFIX):
                self.send_error(404)
                return
            path = self.path.removeprefix(PREFIX[:-1]) if strip else self.path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            target = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            target.request(self.command, path, body, {**self.headers, "Host": "hub.example.org"})
            answer = target.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            target.close()

        do_GET = do_POST = pass_on

        def log_message(self, *_) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}{PREFIX}"
    finally:
        proxy.shutdown()
        proxy.server_close()


@needs_dash
@needs_meshes
@pytest.mark.parametrize("strip", [True, False])
def test_behind_a_proxy_every_address_of_the_page_has_the_prefix(strip, backend, opener, tmp_path):
    from trellis.viewer.app import create_app

    app = create_app(backend, UsageCounter(backend, 4), opener, url_prefix=PREFIX)
    with served(app, PREFIX) as port, proxied(port, strip) as url:

        def get(address: str, **more):
            return urllib.request.urlopen(urllib.request.Request(urljoin(url, address), **more), timeout=60)

        page = get("").read().decode()
        asked = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert any("viewer.js" in address for address in asked) and any("viewer.css" in address for address in asked)
        for address in asked:
            assert address.startswith(PREFIX) and get(address).status == 200
        settings = json.loads(re.search(r'id="_dash-config"[^>]*>(.*?)</script>', page)[1])
        assert settings["requests_pathname_prefix"] == PREFIX
        parts = get("_dash-layout").read().decode()
        (upload,) = (json.loads(found) for found in re.findall(r'"upload": ?("[^"]+")', parts))
        assert upload == f"{PREFIX}upload"
        content = box(tmp_path / "a.stl").read_bytes()
        answer = get(f"{upload}?name=a.stl&up_axis=z", data=content, headers={"X-Viewer": "1"})
        assert json.loads(answer.read())["object"]["name"] == "a.stl"
        # The same server without the proxy.
        for path in ("/", PREFIX):
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).status == 200


def test_a_prefix_is_a_path(capsys):
    from trellis.viewer.__main__ import parse_args

    for given, taken in (("/", "/"), ("/a", "/a/"), ("/a/b/", "/a/b/"), (PREFIX, PREFIX), ("/~x/a;b=1/", "/~x/a;b=1/")):
        assert parse_args(["--run", "x", "--url_prefix", given]).url_prefix == taken
    for wrong in (
        "",
        "a",
        "http://a/b",
        "//a",
        "/a//b",
        "/a?b",
        "/a b",
        "/a#b",
        "/a%4",
        "/\u00e4",
        "/a\n",
        "/<b>",
        '/"',
    ):
        with pytest.raises(SystemExit) as caught:
            parse_args(["--run", "x", "--url_prefix", wrong])
        assert caught.value.code == 2 and "it must be a path alone" in capsys.readouterr().err


@needs_dash
def test_uploads_that_never_end_hold_no_thread_and_are_closed(app, monkeypatch):
    from trellis.viewer import serve

    monkeypatch.setattr(serve, "IDLE_SECONDS", 2)
    monkeypatch.setattr(serve, "CLEANUP_SECONDS", 1)
    head = (
        b"POST /upload?name=a.stl&up_axis=z HTTP/1.1\r\nHost: localhost\r\nX-Viewer: 1\r\nContent-Length: 5000\r\n\r\n"
    )
    with served(app) as port, ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(40)]
        for number, each in enumerate(slow):
            each.sendall(head[: 60 if number % 2 else None])  # half of them do not even end the header
        started = time.monotonic()
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).status == 200
        assert time.monotonic() - started < 2
        # More than the server keeps open: those wait, until the dead ones are closed.
        slow += [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(40)]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=50).status == 200
        for each in slow[:40]:
            while each.recv(1000):  # an answer of the server, if any, and then the end
                pass


def test_without_dash_the_error_names_the_command():
    code = """
import sys
sys.modules["dash"] = None
from trellis.viewer.__main__ import main
sys.exit(main(["--run", "none"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "pip install dash" in done.stderr
