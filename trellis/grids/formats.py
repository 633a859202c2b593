"""Formats by suffix: which files are read, by which reader, and what turns the others into files that are.

Suffixes are compared without regard to case. A suffix of two parts, such as .nii.gz, goes before its last part.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .geometry import Up


class Format(NamedTuple):
    """A format that is read.

    name: what messages call it.
    kind: "mesh" for triangles or points, "volume" for voxels of a scan or an occupancy array.
    reader: the module of `readers/` whose `read` takes it; None for volumes, which `volumes` reads.
    up: the axis that the format's specification says is up; None if it leaves that open, or each file says it.
    """

    name: str
    kind: Literal["mesh", "volume"]
    reader: str | None
    up: Up | None = None


class _Unread(NamedTuple):
    """A 3D format that is not read.

    name, remedy: parts of the reason, which reads "NAME is not read: REMEDY".
    fits: whether the first bytes of a file are of this format, for suffixes that other kinds of files have too.
    """

    name: str
    remedy: str
    fits: Callable[[bytes], bool] | None = None


_SINGLE = {
    ".glb": Format("binary glTF", "mesh", "gltf", "y"),
    ".gltf": Format("glTF", "mesh", "gltf", "y"),
    ".obj": Format("Wavefront OBJ", "mesh", "obj"),
    ".ply": Format("PLY", "mesh", "ply"),
    ".stl": Format("STL", "mesh", "stl", "z"),
    ".off": Format("OFF", "mesh", "off"),
    ".dae": Format("COLLADA", "mesh", "collada"),
    ".3mf": Format("3MF", "mesh", "threemf", "z"),
    ".vtk": Format("legacy VTK", "mesh", "vtk"),
    ".vtp": Format("VTK PolyData", "mesh", "vtk"),
    ".gii": Format("GIfTI", "mesh", "gifti", "z"),
}
FORMATS = {
    **_SINGLE,
    ".zip": Format("zip archive of a mesh", "mesh", "archive"),
    # Formats whose files stand alone; a .gltf may need its buffers, a .3mf is a zip already.
    **{
        f"{suffix}.gz": Format(f"{known.name} in gzip", "mesh", "archive", known.up)
        for suffix, known in _SINGLE.items()
        if suffix not in (".gltf", ".3mf")
    },
    ".nii": Format("NIfTI", "volume", None),
    ".nii.gz": Format("NIfTI", "volume", None),
    ".nrrd": Format("NRRD", "volume", None),
    ".nhdr": Format("NRRD header", "volume", None),
    ".mha": Format("MetaImage", "volume", None),
    ".mhd": Format("MetaImage header", "volume", None),
    ".dcm": Format("DICOM", "volume", None),
    ".npy": Format("NumPy array", "volume", None),
    ".npz": Format("NumPy arrays", "volume", None),
    ".binvox": Format("binvox", "volume", None),
}
MESH_SUFFIXES = tuple(suffix for suffix, known in FORMATS.items() if known.kind == "mesh")
VOLUME_SUFFIXES = tuple(suffix for suffix, known in FORMATS.items() if known.kind == "volume")

HEAD = 4096  # bytes that tell apart formats of one suffix


def _starts(*magic: bytes) -> Callable[[bytes], bool]:
    """Return a test for files that begin with one of these bytes, after a byte-order mark and white space."""
    return lambda head: head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic)


def _has(*words: bytes) -> Callable[[bytes], bool]:
    """Return a test for files that have one of these words near their start."""
    return lambda head: any(word in head for word in words)


def _are_points(head: bytes) -> bool:
    """Return whether one of the first three lines of a text file has three numbers or more: x, y, z."""
    for line in head.splitlines()[:3]:
        words = line.replace(b",", b" ").replace(b";", b" ").split()
        try:
            if len([float(word) for word in words]) >= 3:
                return True
        except ValueError:
            continue  # a line of words
    return False


def _is_analyze(head: bytes) -> bool:
    """Return whether this is the header of an image pair: its first number, the header's size, is 348."""
    return head[:4] in ((348).to_bytes(4, "little"), (348).to_bytes(4, "big"))


_BLENDER = "import it in Blender and export .glb"
_ASSIMP = "convert it with assimp (assimp export FILE out.glb)"
_CAD = "export .stl from the CAD program that wrote it"
_MESHING = "mesh it with FreeCAD or gmsh (gmsh -2 FILE -o out.stl)"
_MESHLAB = "open it in MeshLab and export .ply"
_MESHIO = "take its surface with meshio or ParaView (Extract Surface) and save it as .ply"
_LDRAW = "open it in LeoCAD with the LDraw parts library and export Wavefront .obj"
_ROBOT = "it lists the meshes of a robot or scene: give the folder of these meshes"
_POINTS = "open it in CloudCompare and save it as .ply"
_PARAVIEW = "open it in ParaView, apply Extract Surface and save it as .vtp"
_ARCHIVE = "unpack it"
_FREESURFER = "convert it with mris_convert (mris_convert FILE out.surf.gii)"
_SPLATS = "splats are no surface: make a mesh of them with the program that trained them"
_SLICES = "it is the path of a tool: give the model that it was made from"

# Not read, in groups of one name and one remedy. Only suffixes that other programs share have a test of the content.
_UNREAD = {
    suffix: unread
    for suffixes, unread in (
        (".fbx", _Unread("FBX", "convert it with assimp (assimp export FILE out.glb) or, if binary, with Blender")),
        (".usd .usda .usdc .usdz", _Unread("USD", _BLENDER)),
        (".blend", _Unread("a Blender file", "open it in Blender and export .glb")),
        (".abc", _Unread("Alembic", _BLENDER, _starts(b"Ogawa", b"\x89HDF"))),
        (".x3d .x3dv .x3db .x3dz", _Unread("X3D", _MESHLAB)),
        (".wrl .vrml .wrz", _Unread("VRML", _MESHLAB)),
        (".vrm", _Unread("VRM", "it is glTF under another name: rename it to .glb")),
        (".3ds", _Unread("3DS", _ASSIMP)),
        (".lwo", _Unread("LightWave", _ASSIMP, _starts(b"FORM"))),
        (".b3d", _Unread("Blitz3D", _ASSIMP, _starts(b"BB3D"))),
        (".md2 .md3", _Unread("a Quake model", _ASSIMP, _starts(b"IDP"))),
        (".md5mesh", _Unread("a Doom 3 model", _ASSIMP)),
        (".mdl", _Unread("a Quake or Half-Life model", _ASSIMP, _starts(b"IDPO", b"IDST"))),
        (".ms3d", _Unread("MilkShape 3D", _ASSIMP)),
        (".x", _Unread("DirectX", _ASSIMP, _starts(b"xof "))),
        (".ac", _Unread("AC3D", _ASSIMP, _starts(b"AC3D"))),
        (".ase", _Unread("a 3ds Max ASCII export", _ASSIMP, _starts(b"*3DSMAX"))),
        (".amf", _Unread("AMF", _ASSIMP)),
        (".pmx .pmd", _Unread("MikuMikuDance", "import it in Blender (add-on MMD Tools)", _starts(b"PMX", b"Pmd"))),
        (".max", _Unread("3ds Max", "export .obj from 3ds Max", _starts(b"\xd0\xcf\x11\xe0"))),
        (".ma", _Unread("Maya", "export .obj from Maya", _starts(b"//Maya"))),
        (".mb", _Unread("Maya", "export .obj from Maya", _starts(b"FOR4", b"FOR8"))),
        (".c4d", _Unread("Cinema 4D", "export .obj from Cinema 4D")),
        (".ztl", _Unread("ZBrush", "export .obj from ZBrush")),
        (".hip .hipnc .hiplc", _Unread("Houdini", "export .obj from Houdini")),
        (".skp", _Unread("SketchUp", "export .dae from SketchUp")),
        (".3dm", _Unread("Rhino", "export .obj from Rhino")),
        (".step .stp", _Unread("STEP", _MESHING)),
        (".iges .igs", _Unread("IGES", _MESHING)),
        (".brep", _Unread("BREP", _MESHING)),
        (".fcstd", _Unread("FreeCAD", "select the body in FreeCAD and export .stl")),
        (".scad", _Unread("OpenSCAD", "render it (openscad -o out.stl FILE)")),
        (".dwg", _Unread("DWG", _CAD, _starts(b"AC"))),
        (".dxf", _Unread("DXF", _CAD)),
        (".jt", _Unread("JT", _CAD, _starts(b"Version"))),
        (".x_t .x_b .xmt_txt", _Unread("Parasolid", _CAD)),
        (".sat .sab", _Unread("ACIS", _CAD)),
        (".sldprt .sldasm", _Unread("SolidWorks", "export .stl from SolidWorks")),
        (".ipt .iam", _Unread("Inventor", "export .stl from Inventor", _starts(b"\xd0\xcf\x11\xe0"))),
        (".catpart .catproduct", _Unread("CATIA", "export .stl from CATIA")),
        (".f3d .f3z", _Unread("Fusion", "export .stl from Fusion", _starts(b"PK"))),
        (".rvt .rfa", _Unread("Revit", "export .ifc from Revit and convert it with IfcConvert")),
        (".ifc", _Unread("IFC", "convert it with IfcConvert (IfcConvert FILE out.glb)")),
        (".ldr .mpd", _Unread("LDraw", _LDRAW)),
        (".dat", _Unread("LDraw", _LDRAW, _has(b"\n0 Name:", b"\n0 Author:", b"\n0 !LDRAW"))),
        (".urdf .xacro .srdf", _Unread("a robot description", _ROBOT)),
        (".sdf", _Unread("a robot description", _ROBOT, _has(b"<sdf"))),
        (".world", _Unread("a robot description", _ROBOT, _has(b"<sdf"))),
        (".xml .mjcf", _Unread("a robot description", _ROBOT, _has(b"<mujoco", b"<robot "))),
        (".gcode .bgcode", _Unread("G-code", _SLICES)),
        (".las .laz .e57 .pcd", _Unread("a point cloud of this format", _POINTS)),
        (".xyz .pts .asc", _Unread("a point cloud of this format", _POINTS, _are_points)),
        (".ptx", _Unread("a point cloud of this format", _POINTS)),
        (".splat .ksplat .spz", _Unread("a Gaussian splat file", _SPLATS)),
        (".vtu .vts .vtr .vtm .pvtp .pvtu .vtkhdf", _Unread("VTK data of this kind", _PARAVIEW)),
        (".vti", _Unread("a VTK image", "open it in ParaView or 3D Slicer and save it as .nii.gz")),
        (".msh", _Unread("a Gmsh or finite-element mesh", _MESHIO, _starts(b"$MeshFormat", b"(0 "))),
        (".mesh", _Unread("a Medit mesh", _MESHIO, _starts(b"MeshVersionFormatted"))),
        (".drc", _Unread("Draco", "decode it (draco_decoder -i FILE -o out.ply)", _starts(b"DRACO"))),
        (".ctm", _Unread("OpenCTM", "convert it with ctmconv (ctmconv FILE out.ply)", _starts(b"OCTM"))),
        (".b3dm", _Unread("3D Tiles", "convert it (npx 3d-tiles-tools b3dmToGlb -i FILE -o out.glb)")),
        (".osgb .ive", _Unread("OpenSceneGraph", "convert it with osgconv (osgconv FILE out.obj)")),
        (".vox", _Unread("MagicaVoxel", "export .ply from MagicaVoxel", _starts(b"VOX "))),
        (".pial .white .inflated .sphere .smoothwm", _Unread("FreeSurfer", _FREESURFER, _starts(b"\xff\xff\xfe"))),
        (".mz3", _Unread("Surf Ice", "save it as .ply in Surf Ice")),
        (".mgz .mgh", _Unread("FreeSurfer", "convert it with mri_convert (mri_convert FILE out.nii.gz)")),
        (".mnc", _Unread("MINC", "convert it with mnc2nii (mnc2nii FILE out.nii)")),
        (".hdr", _Unread("an Analyze or NIfTI pair", "open it in 3D Slicer and save it as .nii.gz", _is_analyze)),
        (".zae .kmz", _Unread("a zipped COLLADA scene", _ARCHIVE)),
        (".rar .7z .tar .tgz .tar.gz .tar.bz2 .tar.xz", _Unread("an archive of this kind", _ARCHIVE)),
    )
    for suffix in suffixes.split()
}


# What files of a format have in their first HEAD bytes; \\A is after a byte-order mark and white space.
_CONTENTS = {
    ".glb": rb"\AglTF",
    ".gltf": rb"\A\{(?s:.*)\"asset\"\s*:",
    ".ply": rb"\Aply[ \t]*[\r\n]",
    ".stl": rb"\Asolid\b[^\r\n]*[\r\n]\s*facet\s",
    ".off": rb"\A(?:ST)?C?N?4?OFF\s",
    ".vtk": rb"\A#\s*vtk\s+DataFile",
    ".dae": rb"\A<(?s:.*)<COLLADA\b",
    ".vtp": rb"\A<(?s:.*)VTKFile\b",
    ".gii": rb"\A<(?s:.*)GIFTI\b",
    ".3mf": rb"\APK\x03\x04(?s:.*)3D/",
    ".zip": rb"\APK\x03\x04",
    ".gz": rb"\A\x1f\x8b\x08",
    ".obj": rb"(?:\A|[\r\n])[ \t]*v(?:[ \t]+[-+.\d]+(?:e[-+]?\d+)?){3,6}[ \t]*[\r\n]",
}


def suffix_by_content(head: bytes, size: int) -> str | None:
    """Return the suffix that the content of a mesh file asks for, or ".gz" for gzip; None if it does not tell.

    head: its first HEAD bytes.
    size: of the file, in bytes.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for suffix, content in _CONTENTS.items():
        if re.search(content, start):
            return suffix
    triangles = int.from_bytes(head[80:84], "little")
    return ".stl" if triangles and size == 84 + 50 * triangles else None  # a binary one


def suffix_of(path: Path, known: dict[str, Any]) -> str | None:
    """Return the longest suffix of a path that is in a table, in lower case; None if none is."""
    parts = path.name.lower().lstrip(".").split(".")
    for start in range(max(len(parts) - 2, 1), len(parts)):
        suffix = "." + ".".join(parts[start:])
        if suffix in known:
            return suffix
    return None


def reader_of(path: Path) -> Format | None:
    """Return the format of a file by its suffix. None if it is not read, or no 3D format: see `why_not`."""
    suffix = suffix_of(path, FORMATS)
    return FORMATS[suffix] if suffix else None


def why_not(path: Path) -> str | None:
    """Return why a file is not read and what turns it into one that is: "FBX is not read: convert it with …".

    None if it is read, or if it is not known to be of a 3D format. Suffixes that other kinds of files have, such as
    .dat, count only if the content fits.
    Raise OSError if such a file cannot be read.
    """
    if reader_of(path):
        return None
    suffix = suffix_of(path, _UNREAD)
    if suffix is None:
        return "DICOM is not read under this name: rename it to .dcm" if _is_unnamed_dicom(path) else None
    unread = _UNREAD[suffix]
    if unread.fits:
        with open(path, "rb") as file:
            if not unread.fits(file.read(HEAD)):
                return None
    return f"{unread.name} is not read: {unread.remedy}"


def _is_unnamed_dicom(path: Path) -> bool:
    """Return whether a file without a suffix, or named by a number as scanners do, is DICOM (PS3.10, section 7.1)."""
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
