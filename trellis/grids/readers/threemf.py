"""3MF (.3mf) after its core specification 1.3, with the parts and paths of the production extension 1.1.

A reader of our own: trimesh needs lxml and networkx for it, and reads objects that are not of the model. Read are the
items of <build> with their components and transforms; materials, properties and the unit, which only scales, are not.
Extensions that change the shape are refused by name.
"""

from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote
from xml.etree.ElementTree import Element
from zipfile import ZipFile

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from .parts import Parts
from .xml_tree import check_digits, numbers, parse
from .zipped import check_members, opened_zip

MODEL = "http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"
# Extensions that a file may require and that leave its triangles as they are.
HARMLESS = (
    "http://schemas.microsoft.com/3dmanufacturing/material/2015/02",
    "http://schemas.microsoft.com/3dmanufacturing/production/2015/06",
    "http://schemas.3mf.io/3dmanufacturing/trianglesets/2021/07",
)
NAMES = {
    "http://schemas.microsoft.com/3dmanufacturing/slice/2015/07": "slices",
    "http://schemas.microsoft.com/3dmanufacturing/beamlattice/2017/02": "beam lattices",
    "http://schemas.microsoft.com/3dmanufacturing/securecontent/2019/04": "encrypted content",
    "http://schemas.3mf.io/3dmanufacturing/booleanoperations/2023/07": "Boolean operations",
    "http://schemas.3mf.io/3dmanufacturing/displacement/2023/10": "displacement",
    "http://schemas.3mf.io/3dmanufacturing/volumetric/2022/01": "volumetric data",
    "http://schemas.3mf.io/3dmanufacturing/implicit/2023/12": "implicit functions",
}
SHOWN = ("model", "surface")  # types of objects; others are supports, and what a slicer keeps for itself
SLICER = "Metadata/Slic3r_PE_model.config"
LEAVES = {"vertex": ("x", "y", "z"), "triangle": ("v1", "v2", "v3")}


class _Use(NamedTuple):
    """An object to be placed: the part of the package and the id that it has there, and its matrix [4, 4]."""

    part: str
    id: str
    matrix: np.ndarray


def read(path: Path) -> Geometry:
    """Read all triangles that a 3MF file builds, in float64, z-up as its specification says; see `Geometry`.

    Raise DataError with the reason if the file is damaged, or needs an extension that is not read.
    """
    with opened_zip(path) as archive:
        package = _Package(archive)
        start = package.start()
        build = package.model(start).find("build")
        items = [] if build is None else build.findall("item")
        if not items:
            raise DataError("its <build> has no items: nothing of it is to be made")
        parts = Parts()
        helpers = package.helpers()
        left_out = _place([package.use(item, start, np.eye(4)) for item in items], package, parts)
    vertices, faces = parts.joined()
    notes = [f"leaves out {left_out} objects of type support or other"] if left_out else []
    if helpers:
        notes.append(f"has volumes that a slicer keeps for itself ({', '.join(helpers)}), read like the model")
    return Geometry(vertices, faces, "z", tuple(notes))


def _place(items: list[_Use], package: "_Package", parts: Parts) -> int:
    """Add the meshes of all items and their components to `parts`; return how many are of another type than SHOWN."""
    left_out = 0
    stack: list[_Use | tuple[str, str]] = list(reversed(items))
    entered: set[tuple[str, str]] = set()
    while stack:
        use = stack.pop()
        if not isinstance(use, _Use):
            entered.discard(use)
            continue
        key = (use.part.lower(), use.id)
        if key in entered:
            raise DataError(f"object {use.id[:50]} contains itself")
        parts.count_instance()
        thing = package.object(use)
        if thing.get("type", "model") not in SHOWN:
            left_out += 1
            continue
        components = thing.find("components")
        if components is None:
            parts.add(*package.mesh(use, thing), use.matrix)
            continue
        entered.add(key)
        stack.append(key)
        for component in reversed(components.findall("component")):
            stack.append(package.use(component, use.part, use.matrix))
    return left_out


class _Package:
    """The parts of a 3MF package that were read already."""

    def __init__(self, archive: ZipFile):
        self.archive = archive
        # Names of parts do not depend on case, and begin with a slash.
        self.names = {"/" + name.replace("\\", "/").lstrip("/").lower(): name for name in archive.namelist()}
        self._models: dict[str, Element] = {}
        self._objects: dict[str, dict[str, Element]] = {}
        self._meshes: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def _content(self, part: str) -> bytes:
        name = self.names.get(part.lower())
        if name is None:
            raise DataError(f"has no part {part[:100]}: it is no 3MF file, or damaged")
        check_members([self.archive.getinfo(name)])
        return self.archive.read(name)

    def helpers(self) -> list[str]:
        """Return the kinds of volumes besides parts of the model that PrusaSlicer puts into the same meshes."""
        if "/" + SLICER.lower() not in self.names:
            return []
        settings = parse(self._content("/" + SLICER))
        kinds = {each.get("value", "")[:50] for each in settings.iter("metadata") if each.get("key") == "volume_type"}
        return sorted(kinds - {"ModelPart"})

    def start(self) -> str:
        """Return the name of the model that the package begins with."""
        for relationship in parse(self._content("/_rels/.rels")).iter("Relationship"):
            if relationship.get("Type") == MODEL:
                return "/" + unquote(relationship.get("Target", "")).lstrip("/")
        raise DataError("names no 3D model in _rels/.rels: it is no 3MF file")

    def model(self, part: str) -> Element:
        """Return the <model> of a part. Raise DataError if it requires an extension that is not read."""
        part = part.lower()
        if part not in self._models:
            root = parse(self._content(part), LEAVES)
            if root.tag != "model":
                raise DataError(f"its part {part[:100]} has <{root.tag[:50]}> where <model> should be")
            for prefix in root.get("requiredextensions", "").split():
                space = root.get(f"xmlns:{prefix}", prefix)
                if space not in HARMLESS:
                    raise DataError(f"requires {NAMES.get(space, space[:100])}, which is not read: export it as a mesh")
            self._models[part] = root
            self._objects[part] = {each.get("id", ""): each for each in root.findall("resources/object")}
        return self._models[part]

    def use(self, element: Element, part: str, parent: np.ndarray) -> _Use:
        """Return what an <item> or <component> places. Its path is another part than its own."""
        path = element.get("path")
        return _Use(
            "/" + unquote(path).lstrip("/") if path else part, element.get("objectid", ""), parent @ _transform(element)
        )

    def object(self, use: _Use) -> Element:
        """Return an <object>. Raise DataError if there is none of this id."""
        self.model(use.part)
        found = self._objects[use.part.lower()].get(use.id)
        if found is None:
            raise DataError(f"uses object {use.id[:50]}, which is not in {use.part[:100]}: the file is damaged")
        return found

    def mesh(self, use: _Use, thing: Element) -> tuple[np.ndarray, np.ndarray]:
        """Return the vertices [V, 3] float64 and faces [F, 3] int64 of an object."""
        key = (use.part.lower(), use.id)
        if key not in self._meshes:
            self._meshes[key] = _read_mesh(thing)
        return self._meshes[key]


def _read_mesh(thing: Element) -> tuple[np.ndarray, np.ndarray]:
    name = f"object {thing.get('id', '')[:50]}"
    mesh = thing.find("mesh")
    if mesh is None:
        kinds = " ".join(f"<{child.tag[:50]}>" for child in thing if child.tag != "metadatagroup") or "nothing"
        raise DataError(f"{name} has {kinds} where a mesh should be, which is not read: export it as a mesh")
    if mesh.find("beamlattice") is not None:
        raise DataError(f"{name} has a beam lattice, which is not read: export it as a mesh")
    if thing.get("meshresolution") == "lowres":
        raise DataError(f"{name} has its shape in slices, which are not read: export it as a mesh")
    text = mesh.findtext("vertices")
    vertices = numbers(text, np.float64, f"<vertices> of {name}")
    faces = numbers(mesh.findtext("triangles"), np.int64, f"<triangles> of {name}")
    if len(vertices) % 3 or len(faces) % 3:
        raise DataError(f"{name} has vertices or triangles of other than three numbers: the file is damaged")
    vertices, faces = vertices.reshape(-1, 3), faces.reshape(-1, 3)
    check_digits(vertices, text, np.arange(vertices.size).reshape(-1, 3))
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise DataError(f"{name} uses vertices {faces.min()} to {faces.max()} of {len(vertices)}")
    return vertices, faces


def _transform(element: Element) -> np.ndarray:
    """Return the matrix [4, 4] float64 of an item or component, for column vectors: the file has rows for rows."""
    matrix = np.eye(4)
    text = element.get("transform")
    if text is not None:
        values = numbers(text, np.float64, "transform")
        if len(values) != 12:
            raise DataError(f"has a transform of {len(values)} numbers, not 12")
        if not np.isfinite(values).all():
            raise DataError("has a transform with a number that is not finite")
        matrix[:3] = values.reshape(4, 3).T
    return matrix
