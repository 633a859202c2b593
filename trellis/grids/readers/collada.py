"""COLLADA (.dae) after its specification, releases 1.4.1 and 1.5.0 (Khronos Group).

A reader of our own instead of pycollada, which cuts polygons into fans, leaves out skins and morphs, takes files whose
counts do not fit their data, and needs a visual scene. Read are meshes with all their primitives, the nodes of the
scene with their transforms and instances, skins in the pose of the scene's joints, and morphs with their weights.
Materials, animations, physics and the unit, which only scales, are not.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote
from xml.etree.ElementTree import Element

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry, Up
from .collada_nodes import affine, node_matrix
from .collada_primitives import PRIMITIVES, Primitive, adds_up
from .parts import Parts
from .xml_tree import check_digits, integer, numbers, read_tree

# Columns of the rotation from x-up (right is -y, up is x, toward the viewer is z) to y-up.
FROM_X_UP = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def read(path: Path) -> Geometry:
    """Read all triangles of a COLLADA file's scene, in float64. See `Geometry`; `up` is the file's own word, or "y".

    Raise DataError with the reason if the file is damaged or its geometry is of a kind that is not read.
    """
    document = _Document(read_tree(path, "COLLADA", "COLLADA"))
    up, turn = document.up_axis()
    parts = Parts()
    if document.scene is None:
        for geometry in document.root.findall("library_geometries/geometry"):
            parts.add(*document.mesh(geometry), turn)
    else:
        document.place(parts, turn)
    vertices, faces = parts.joined()
    if not len(faces) and document.has_lines:
        raise DataError("has no triangles, only lines")
    return Geometry(vertices, faces, up, tuple(dict.fromkeys(document.notes)))


class _Values(NamedTuple):
    """What a source has: rows of an array of numbers or names, [N, columns]."""

    rows: np.ndarray
    params: list[str]  # names of the columns; "" for a column that is to be skipped
    array: Element  # where they are, and at which of its values
    places: np.ndarray


class _Document:
    """A COLLADA document with its elements by id, and the parts of it that were read already."""

    def __init__(self, root: Element):
        version = root.get("version", "1.4")
        if not version.startswith(("1.4", "1.5")):
            raise DataError(f"COLLADA {version[:20]} is not read: save it again as COLLADA 1.4")
        self.root = root
        self.notes: list[str] = []
        self.has_lines = False
        self._by_id: dict[Element, dict[tuple[str, str], Element]] = {}
        self._ids = self._ids_in(root)
        counts = Counter((element.tag, element.get("id")) for element in root.iter() if element.get("id"))
        self._repeated = {key for key, count in counts.items() if count > 1}
        self._arrays: dict[Element, np.ndarray] = {}
        self._meshes: dict[Element, tuple[np.ndarray, np.ndarray]] = {}
        self._nodes_by_name: dict[tuple[Element, ...], dict[str, Element]] = {}
        self.scene = self._visual_scene()

    def up_axis(self) -> tuple[Up, np.ndarray]:
        """Return the axis that is up and the matrix [4, 4] that makes it so: no grid is x-up."""
        word = (self.root.findtext("asset/up_axis") or "Y_UP").strip().upper()
        if word == "X_UP":
            self.notes.append("turned from x-up, as its <up_axis> says, to y-up")
            return "y", FROM_X_UP
        if word not in ("Y_UP", "Z_UP"):
            raise DataError(f"its <up_axis> is {word[:20]!r}: write X_UP, Y_UP or Z_UP")
        return ("y" if word == "Y_UP" else "z"), np.eye(4)

    def _visual_scene(self) -> Element | None:
        instance = self.root.find("scene/instance_visual_scene")
        if instance is not None:
            return self.find(instance, "url", "visual_scene")
        scenes = self.root.findall("library_visual_scenes/visual_scene")
        if not scenes:
            self.notes.append("has no scene: all its geometries are taken, where they are")
            return None
        if len(scenes) > 1:
            self.notes.append(f"does not say which scene to show: the first of {len(scenes)} is taken")
        return scenes[0]

    def _ids_in(self, part: Element) -> dict[tuple[str, str], Element]:
        """Return the elements of a part of the document by tag and id: exporters give a node its geometry's id."""
        if part not in self._by_id:
            found = self._by_id[part] = {}
            for element in part.iter():
                if name := element.get("id"):
                    found.setdefault((element.tag, name), element)
        return self._by_id[part]

    def find(self, element: Element, attribute: str, *tags: str, within: Element | None = None) -> Element:
        """Return the element that an attribute of another one refers to. Raise DataError if it is none of `tags`.

        within: the mesh, skin or morph whose own elements go before others of the same id.
        """
        url = element.get(attribute, "")
        document, _, name = url.rpartition("#")
        if document:
            raise DataError(f"refers to another file ({url[:100]}), which is not read: export it as one file")
        keys = [(tag, each) for each in (name, unquote(name)) for tag in tags if each]
        own = {} if within is None else self._ids_in(within)
        found = next((own[key] for key in keys if key in own), None)
        if found is not None:
            return found
        for key in keys:
            if key in self._ids:
                if key in self._repeated:
                    self._repeated.discard(key)
                    self.notes.append(f'has more than one {key[0]} with the id "{key[1][:100]}": the first is taken')
                return self._ids[key]
        raise DataError(f'<{element.tag}> has {attribute}="{url[:100]}", which is no {" or ".join(tags)} here')

    # --- sources of numbers and names ---

    def values(self, element: Element, within: Element) -> _Values:
        """Return the rows of the source that an <input> of a mesh, skin or morph refers to."""
        source = self.find(element, "source", "source", within=within)
        accessor = source.find("technique_common/accessor")
        if accessor is None:
            raise DataError(f'source "{source.get("id")}" has no accessor')
        element = self.find(accessor, "source", *ARRAYS, within=source)
        array = self._array(element)
        count, offset, stride = (integer(accessor, *pair) for pair in (("count",), ("offset", 0), ("stride", 1)))
        params = [param.get("name", "") for param in accessor.findall("param")]
        params = params if any(params) else ["X", "Y", "Z"]  # none has a name
        params = params[: max(stride, 1)]
        if count and (stride < 1 or offset + stride * (count - 1) + max(len(params), 1) > len(array)):
            raise DataError(
                f'source "{source.get("id")}" has {len(array)} values, but its accessor takes {count} times {stride} '
                f"from {offset}: the file is damaged"
            )
        used = np.arange(len(params)) if params else np.zeros(1, dtype=np.int64)
        if not count:
            offset = stride = 0  # they may be any number then
        places = offset + stride * np.arange(count)[:, None] + used
        return _Values(array[places], params, element, places)

    def _array(self, element: Element) -> np.ndarray:
        if element not in self._arrays:
            name = f'<{element.tag} id="{element.get("id")}">'
            if ARRAYS[element.tag] is None:
                array = np.array((element.text or "").split(), dtype=object)
            else:
                array = numbers(element.text, np.float64, name)
            declared = integer(element, "count", len(array))
            if declared > len(array):
                raise DataError(f"{name} has {len(array)} of {declared} values: the file is damaged or cut off")
            self._arrays[element] = array
        return self._arrays[element]

    def positions(self, element: Element, within: Element) -> np.ndarray:
        """Return the points [N, 3] float64 of a source."""
        rows, params, array, places = self.values(element, within)
        columns = [column for column, name in enumerate(params) if name][:3]
        if len(columns) < 3 or rows.dtype == object:
            raise DataError(f'source "{element.get("source", "")[1:]}" of positions has not three numbers per point')
        points = rows[:, columns]
        check_digits(points, array.text, places[:, columns])
        return points

    def matrices(self, element: Element, within: Element) -> np.ndarray:
        """Return the matrices [N, 4, 4] float64 of a source of 16 values each."""
        source = self.find(element, "source", "source", within=within)
        accessor = source.find("technique_common/accessor")
        if accessor is None or integer(accessor, "stride", 1) < 16:
            raise DataError(f'source "{source.get("id")}" of matrices has not 16 numbers per matrix')
        array = self._array(self.find(accessor, "source", "float_array", within=source))
        count, offset, stride = integer(accessor, "count"), integer(accessor, "offset", 0), integer(accessor, "stride")
        if not count:
            return np.zeros((0, 4, 4))
        if offset + stride * (count - 1) + 16 > len(array):
            raise DataError(f'source "{source.get("id")}" has {len(array)} values, too few for {count} matrices')
        return array[offset + stride * np.arange(count)[:, None] + np.arange(16)].reshape(-1, 4, 4)

    # --- meshes ---

    def mesh(self, geometry: Element) -> tuple[np.ndarray, np.ndarray]:
        """Return the vertices [V, 3] float64 and faces [F, 3] int64 of a <geometry>, in its own space."""
        if geometry not in self._meshes:
            self._meshes[geometry] = self._read_mesh(geometry)
        return self._meshes[geometry]

    def _read_mesh(self, geometry: Element) -> tuple[np.ndarray, np.ndarray]:
        name = geometry.get("id", geometry.get("name", ""))
        mesh = next((child for child in geometry if child.tag in ("mesh", "convex_mesh", "brep")), None)
        if mesh is None:  # a spline, or nothing
            self.has_lines |= geometry.find("spline") is not None
            return np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
        if mesh.tag == "brep" or mesh.get("convex_hull_of"):
            kind = "a boundary representation" if mesh.tag == "brep" else "the convex hull of another geometry"
            raise DataError(f'geometry "{name}" is {kind}, which is not read: export it as a mesh')

        sources: dict[str, tuple[np.ndarray, int]] = {}  # points, and where they begin among all
        total = 0
        faces: list[np.ndarray] = []
        for primitive in mesh:
            self.has_lines |= primitive.tag in ("lines", "linestrips")
            if primitive.tag not in PRIMITIVES:
                continue
            inputs = primitive.findall("input")
            position, offset = self._position_input(primitive, inputs, mesh)
            if position is None:
                if primitive.find("p") is None and not integer(primitive, "count", 0):
                    continue
                raise DataError(f'<{primitive.tag}> of geometry "{name}" has no VERTEX input')
            source = position.get("source", "")
            if source not in sources:
                sources[source] = self.positions(position, mesh), total
                total += len(sources[source][0])
            vertices, start = sources[source]
            stride = max(integer(each, "offset", 0) for each in inputs) + 1
            faces.append(Primitive(primitive, name, offset, stride, vertices).faces() + start)
        points = [vertices for vertices, _ in sources.values()]
        empty = np.zeros((0, 3), dtype=np.int64)
        if not points and (first := mesh.find("vertices/input[@semantic='POSITION']")) is not None:
            points.append(self.positions(first, mesh))  # points without triangles, such as a target of a morph
        return np.concatenate([np.zeros((0, 3)), *points]), np.concatenate([empty, *faces])

    def _position_input(self, primitive: Element, inputs: list[Element], mesh: Element) -> tuple[Element | None, int]:
        """Return the <input> of a primitive's positions and where its index is in each group of indices."""
        for each in inputs:
            if each.get("semantic") == "VERTEX":
                vertices = self.find(each, "source", "vertices", within=mesh)
                for inner in vertices.findall("input"):
                    if inner.get("semantic") == "POSITION":
                        return inner, integer(each, "offset", 0)
                raise DataError(f'<vertices id="{vertices.get("id")}"> has no POSITION input')
        return None, 0

    # --- the scene ---

    def place(self, parts: Parts, turn: np.ndarray) -> None:
        """Add what the scene shows to `parts`, moved by `turn` last."""
        assert self.scene is not None
        shown: list[tuple[Element, np.ndarray]] = []
        worlds: dict[Element, np.ndarray] = {}  # of a node that is used more than once, its first use
        for node, world in self._nodes(self.scene, parts):
            worlds.setdefault(node, world)
            shown += [(child, world) for child in node if child.tag in ("instance_geometry", "instance_controller")]
        for instance, world in shown:
            parts.count_instance()
            if instance.tag == "instance_geometry":
                parts.add(*self.mesh(self.find(instance, "url", "geometry")), turn @ world)
            else:
                vertices, faces, skinned = self._controlled(instance, worlds)
                parts.add(vertices, faces, turn if skinned else turn @ world)

    def _nodes(self, scene: Element, parts: Parts) -> Iterator[tuple[Element, np.ndarray]]:
        """Yield each use of a node with the matrix [4, 4] from its space to the scene's, parents first."""
        local: dict[Element, np.ndarray] = {}
        stack: list[tuple[Element, np.ndarray | None]] = [(node, np.eye(4)) for node in reversed(scene.findall("node"))]
        entered: set[Element] = set()
        while stack:
            node, parent = stack.pop()
            if parent is None:
                entered.discard(node)
                continue
            if node in entered:
                raise DataError(f'node "{node.get("id")}" contains itself')
            entered.add(node)
            stack.append((node, None))
            parts.count_instance()
            if node not in local:
                local[node] = node_matrix(node)
            world = parent @ local[node]
            yield node, world
            for child in reversed(node):
                if child.tag == "node":
                    stack.append((child, world))
                elif child.tag == "instance_node":
                    stack.append((self.find(child, "url", "node"), world))

    # --- controllers ---

    def _controlled(self, instance: Element, worlds: dict[Element, np.ndarray]) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return the mesh of an <instance_controller>, and whether it is in the scene's space already.

        A skin places its vertices by its joints alone, so the node that has the instance does not apply.
        """
        chain: dict[Element, Element] = {}  # controllers and what they do, from the instance down to the geometry
        element = self.find(instance, "url", "controller")
        while element.tag == "controller":
            deformer = next((child for child in element if child.tag in ("skin", "morph")), None)
            if deformer is None or element in chain:
                raise DataError(f'controller "{element.get("id")}" has no skin or morph of a geometry')
            chain[element] = deformer
            element = self.find(deformer, "source", "geometry", "controller")
        vertices, faces = self.mesh(element)
        skinned = False
        for controller, deformer in reversed(chain.items()):
            if skinned:
                raise DataError(f'controller "{controller.get("id")}" deforms a skin, which is not read: bake it')
            if deformer.tag == "morph":
                vertices = self._morphed(deformer, vertices)
            elif (joints := self._joint_worlds(instance, deformer, worlds)) is not None:
                vertices, skinned = self._skinned(deformer, vertices, joints), True
        return vertices, faces, skinned

    def _morphed(self, morph: Element, vertices: np.ndarray) -> np.ndarray:
        """Return the base mesh mixed with the targets of a <morph> by its weights."""
        inputs = {each.get("semantic"): each for each in morph.findall("targets/input")}
        if not {"MORPH_TARGET", "MORPH_WEIGHT"} <= set(inputs):
            raise DataError("a <morph> has no targets or no weights")
        targets = [str(name) for name in self.values(inputs["MORPH_TARGET"], morph).rows[:, 0]]
        weights = self.values(inputs["MORPH_WEIGHT"], morph).rows[:, 0]
        if len(targets) != len(weights) or weights.dtype == object:
            raise DataError(f"a <morph> has {len(weights)} weights for {len(targets)} targets")
        relative = morph.get("method", "NORMALIZED") == "RELATIVE"
        mixed = vertices if relative else (1 - weights.sum()) * vertices
        for name, weight in zip(targets, weights, strict=True):
            if weight == 0:
                continue
            target = self._ids.get(("geometry", name))
            if target is None:
                raise DataError(f'morph target "{name[:100]}" is no geometry here')
            points = self.mesh(target)[0]
            if len(points) != len(vertices):
                raise DataError(f'morph target "{name[:100]}" has {len(points)} points, its base {len(vertices)}')
            mixed = mixed + weight * points
        return mixed

    def _joint_worlds(self, instance: Element, skin: Element, worlds: dict[Element, np.ndarray]) -> np.ndarray | None:
        """Return the matrices [J, 4, 4] of a skin's joints in the scene; None, with a note, if one is not there."""
        joint_input = skin.find("joints/input[@semantic='JOINT']")
        used_input = skin.find("vertex_weights/input[@semantic='JOINT']")
        if joint_input is None or used_input is None:
            raise DataError("a <skin> has no joints, or no vertex weights with joints")
        names = [str(name) for name in self.values(joint_input, skin).rows[:, 0]]
        if names != [str(name) for name in self.values(used_input, skin).rows[:, 0]]:
            raise DataError("a <skin> has other joints for its vertices than for its matrices, which is not read")
        roots = [
            self._ids[key]
            for skeleton in instance.findall("skeleton")
            if (key := ("node", (skeleton.text or "").strip().rpartition("#")[2])) in self._ids
        ]
        by_name = self._joint_nodes(tuple(roots), worlds)
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            self.notes.append(f'its skin is shown as modeled: joint "{missing[:100]}" is not in the scene')
            return None
        return np.array([worlds[by_name[name]] for name in names]).reshape(-1, 4, 4)

    def _joint_nodes(self, roots: tuple[Element, ...], worlds: dict[Element, np.ndarray]) -> dict[str, Element]:
        """Return the nodes of the scene by the names that a skin's joints have, those below its skeletons first."""
        if roots not in self._nodes_by_name:
            by_name = self._nodes_by_name[roots] = {}
            for attribute in ("sid", "id", "name"):  # names of joints are sids; a few exporters write the others
                for nodes in (*(root.iter("node") for root in roots), worlds):
                    for node in nodes:
                        if node in worlds:
                            by_name.setdefault(node.get(attribute, ""), node)
        return self._nodes_by_name[roots]

    def _skinned(self, skin: Element, vertices: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Return vertices in the scene's space: the weighted sum of what each joint's movement makes of them.

        joints: [J, 4, 4] float64, from a joint's space to the scene's.
        """
        bind_text = skin.findtext("bind_shape_matrix")
        bind = np.eye(4) if bind_text is None else affine(numbers(bind_text, np.float64, "<bind_shape_matrix>"))
        inverse_input = skin.find("joints/input[@semantic='INV_BIND_MATRIX']")
        weights_element = skin.find("vertex_weights")
        if inverse_input is None or weights_element is None:
            raise DataError("a <skin> has no inverse bind matrices or no vertex weights")
        inverses = self.matrices(inverse_input, skin)
        if len(inverses) != len(joints):
            raise DataError(f"a <skin> has {len(inverses)} inverse bind matrices for {len(joints)} joints")
        inputs = {each.get("semantic"): each for each in weights_element.findall("input")}
        if not {"JOINT", "WEIGHT"} <= set(inputs):
            raise DataError("a <skin> has no joints or no weights of its vertices")
        table = self.values(inputs["WEIGHT"], skin).rows[:, 0]
        stride = max(integer(each, "offset", 0) for each in inputs.values()) + 1
        counts = numbers(weights_element.findtext("vcount"), np.int64, "<vcount> of a skin")
        indices = numbers(weights_element.findtext("v"), np.int64, "<v> of a skin")
        if len(counts) != len(vertices) or (counts < 0).any() or not adds_up(counts, stride, len(indices)):
            raise DataError(
                f"a <skin> has weights of {len(counts)} vertices in {len(indices)} indices, its mesh has "
                f"{len(vertices)}: the file is damaged"
            )
        groups = indices.reshape(-1, stride)
        joint = groups[:, integer(inputs["JOINT"], "offset", 0)]
        weight = groups[:, integer(inputs["WEIGHT"], "offset", 0)]
        if len(groups) and (joint.min() < -1 or joint.max() >= len(joints)):
            raise DataError(f"a <skin> uses joints {joint.min()} to {joint.max()} of {len(joints)}")
        if len(groups) and (weight.min() < 0 or weight.max() >= len(table)):
            raise DataError(f"a <skin> uses weights {weight.min()} to {weight.max()} of {len(table)}")

        with np.errstate(invalid="ignore"):  # a vertex that is not finite is refused later, if a triangle uses it
            bound = vertices @ bind[:3, :3].T + bind[:3, 3]
            moves = np.concatenate([joints @ inverses, np.eye(4)[None]])[:, :3]  # the last one, -1, is the bind shape
            owner = np.repeat(np.arange(len(vertices)), counts)
            amount = table[weight].astype(np.float64)
            sums = np.zeros((len(vertices), 3))
            for axis in range(3):
                moved = (moves[joint, axis, :3] * bound[owner]).sum(axis=1) + moves[joint, axis, 3]
                sums[:, axis] = np.bincount(owner, amount * moved, minlength=len(vertices))
            totals = np.bincount(owner, amount, minlength=len(vertices))[:, None]
            # Weights need not add up to 1 exactly; a vertex without weight stays where it is bound.
            return np.where(totals > 0, sums / np.where(totals > 0, totals, 1), bound)


# Elements that have the values of a source; None where they are words.
ARRAYS: dict[str, type | None] = {
    "float_array": np.float64,
    "int_array": np.float64,
    "Name_array": None,
    "IDREF_array": None,
    "SIDREF_array": None,
}
