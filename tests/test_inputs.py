"""What --input names: files to read, and what is left out by name."""

import hashlib
import json
import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from dataset_toolkits.inputs import find_files, sha256_of
from dataset_toolkits.plan import plan_meshes
from trellis.grids.formats import FORMATS
from trellis.utils.errors import DataError

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="needs links, pipes and permissions")


def find(*paths: Path):
    return find_files(paths, exclude=paths[0] / "voxels")


def names_below(folder: Path, found: dict) -> set[str]:
    return {Path(name).relative_to(folder).as_posix() for name in found}


def test_every_suffix_is_found_in_any_case(tmp_path):
    (tmp_path / "sub").mkdir()
    for suffix in FORMATS:
        (tmp_path / f"a{suffix}").touch()
        (tmp_path / "sub" / f"b.1{suffix.upper()}").touch()
    for name in ("texture.png", "material.mtl", "scene.bin", "README", "notes.txt"):
        (tmp_path / name).touch()
    found = find(tmp_path)
    expected = {f"a{suffix}" for suffix in FORMATS} | {f"sub/b.1{suffix.upper()}" for suffix in FORMATS}
    assert names_below(tmp_path, found.files) == expected and not found.left_out
    assert list(found.files) == sorted(found.files)


def test_formats_that_are_not_read_are_left_out_by_name(tmp_path):
    names = ["a.fbx", "b.STEP", "c.usdz", "d.blend", "e.urdf"]
    for name in ("mesh.obj", *names):
        (tmp_path / name).touch()
    found = find(tmp_path)
    assert names_below(tmp_path, found.files) == {"mesh.obj"}
    assert names_below(tmp_path, found.left_out) == set(names)
    assert all(" is not read: " in reason for reason in found.left_out.values())
    for name in names:
        with pytest.raises(DataError, match=f"{name}: .* is not read: .*[a-z]+"):
            find(tmp_path / name)
    (tmp_path / "mesh.obj").unlink()
    with pytest.raises(
        DataError, match=r"no mesh or volume there or below. 5 left out, such as .*a.fbx: FBX is not read"
    ):
        find(tmp_path)


@needs_links
def test_what_is_no_file_is_left_out_by_name_and_never_opened(tmp_path):
    (tmp_path / "good.obj").touch()
    os.mkfifo(tmp_path / "pipe.obj")
    os.mkfifo(tmp_path / "pipe.dat")  # of a suffix that other formats share: its content is not looked at
    os.mkfifo(tmp_path / "other.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.ply"))
    (tmp_path / "zero.stl").symlink_to("/dev/zero")
    (tmp_path / "broken.glb").symlink_to("gone.glb")
    (tmp_path / "unmounted").symlink_to("/gone/meshes")
    (tmp_path / "circle.off").symlink_to("circle.off")
    (tmp_path / "broken.txt").symlink_to("gone.txt")
    (tmp_path / "good link.obj").symlink_to("good.obj")
    found = find(tmp_path)
    assert names_below(tmp_path, found.files) == {"good.obj", "good link.obj"}
    reasons = {Path(name).name: reason for name, reason in found.left_out.items()}
    assert reasons == {
        "pipe.obj": "is a named pipe and not a file",
        "socket.ply": "is a socket and not a file",
        "zero.stl": "is a device and not a file",
        "broken.glb": "is a link to what is not there",
        "unmounted": "is a link to what is not there",
        "circle.off": "is a link to what is not there",
    }
    for name in reasons:
        with pytest.raises(DataError, match=f"{name}: {reasons[name]}"):
            find(tmp_path / name)
    with pytest.raises(DataError, match="/dev/zero: is a device"):
        find(Path("/dev/zero"))


@needs_links
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Root may read all folders, so the system's refusal is made here."""
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mesh.obj").touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find(tmp_path)
    assert names_below(tmp_path, found.files) == {"open/mesh.obj"}
    assert {Path(name).name: reason for name, reason in found.left_out.items()} == {
        "closed": "the folder cannot be read: Permission denied"
    }
    with pytest.raises(DataError, match="closed: the folder cannot be read: Permission denied"):
        find(tmp_path / "closed")


@pytest.mark.parametrize("name", ["seg data.raw", "LOCALIZER.raw", "LIST.raw"])
@pytest.mark.parametrize(
    "suffix, line", [(".mhd", " ElementDataFile = {}\n"), (".nhdr", "data file: {}\n"), (".nhdr", "Datafile: {}\r\n")]
)
def test_a_header_is_hashed_with_its_data(suffix, line, name, tmp_path):
    """Scans of one machine have the same header, and would be taken for one."""
    hashes = set()
    for case in "ab":
        folder = tmp_path / case
        folder.mkdir()
        (folder / f"seg{suffix}").write_bytes(line.format(name).encode())
        (folder / name).write_bytes(case.encode())
        hashes.add(sha256_of(folder / f"seg{suffix}"))
    assert len(hashes) == 2
    (folder / name).unlink()  # reading the volume says what is missing
    assert sha256_of(folder / f"seg{suffix}") == hashlib.sha256((folder / f"seg{suffix}").read_bytes()).hexdigest()


def test_meshes_are_planned_without_volumes(tmp_path):
    for name, content in (("a.obj", b"1"), ("b.obj", b"2"), ("c.obj", b"1"), ("scan.nii.gz", b"3"), ("d.fbx", b"")):
        (tmp_path / name).write_bytes(content)
    plan = plan_meshes([str(tmp_path)], tmp_path, 2)
    assert [[Path(name).name for name in job.names] for job in plan.jobs] == [["a.obj", "c.obj"], ["b.obj"]]
    assert plan.jobs[0].sha256 == hashlib.sha256(b"1").hexdigest()
    reasons = {Path(row["file"]).name: row["reason"] for row in plan.failures}
    assert reasons.keys() == {"scan.nii.gz", "d.fbx"} and "is a volume" in reasons["scan.nii.gz"]
    with pytest.raises(DataError, match="no mesh, only volumes"):
        plan_meshes([str(tmp_path / "scan.nii.gz")], tmp_path, 2)


def test_gltf_files_that_differ_in_their_buffers_alone_are_two_objects(tmp_path):
    text = json.dumps({"buffers": [{"byteLength": 3, "uri": "my%20mesh.bin"}, {"byteLength": 0, "uri": "data:,"}]})
    hashes = set()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gltf").write_text(text)
        (tmp_path / name / "my mesh.bin").write_text({"a": "one", "b": "two", "c": "one"}[name])
        hashes.add(sha256_of(tmp_path / name / "model.gltf"))
    assert hashes == {hashlib.sha256((text + data).encode()).hexdigest() for data in ("one", "two")}
    alone = hashlib.sha256(text.encode()).hexdigest()
    assert sha256_of(tmp_path / "a" / "model.gltf", known={alone}) == alone
    (tmp_path / "a" / "my mesh.bin").rename(tmp_path / "a" / "my%20mesh.bin")
    assert sha256_of(tmp_path / "a" / "model.gltf") == hashlib.sha256((text + "one").encode()).hexdigest()
    for damaged in ("{", "[]", '{"buffers": 5}', '{"buffers": [{"uri": 5}]}', "\xff"):
        (tmp_path / "a" / "model.gltf").write_text(damaged)
        assert sha256_of(tmp_path / "a" / "model.gltf") == hashlib.sha256(damaged.encode()).hexdigest()


@pytest.mark.parametrize(
    "uri, name",
    [("my%20mesh.bin", "my mesh.bin"), ("parts\\\\x.bin", "parts/x.bin"), ("m\u00fcsh.bin", "mu\u0308sh.bin")],
)
@pytest.mark.parametrize("form", ["text", "binary"])
def test_every_buffer_that_is_read_is_hashed(uri, name, form, tmp_path):
    """As `readers/gltf_accessors.py` finds them; a buffer of another kind beside them does not matter."""
    text = f'{{"buffers": [{{"byteLength": 0}}, {{"uri": "{uri}", "byteLength": 3}}]}}'.encode()
    if form == "binary":
        text = b"glTF" + struct.pack("<5I", 2, 20 + len(text), len(text), 0x4E4F534A, 0)[:16] + text
    hashes = set()
    for folder, data in (("a", b"one"), ("b", b"two")):
        path = tmp_path / folder / "model.glb"
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(data)
        path.write_bytes(text)
        hashes.add(sha256_of(path))
    assert hashes == {hashlib.sha256(text + data).hexdigest() for data in (b"one", b"two")}


def test_a_glb_whose_chunk_claims_more_than_the_file_is_hashed_alone(tmp_path):
    content = b"glTF" + struct.pack("<4I", 2, 1 << 31, (1 << 32) - 1, 0x4E4F534A) + b'{"uri": '
    (tmp_path / "model.glb").write_bytes(content)
    assert sha256_of(tmp_path / "model.glb") == hashlib.sha256(content).hexdigest()
