"""glTF 2.0 (.glb, .gltf): the triangles that its scene shows, in the pose that the file gives without animation.

Departure: an animated skin whose pose fills the same box as its model is shown as modeled, see `_Meshes.place`.

Specification 2.0.1, https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html, section 3.7 (meshes, morph targets,
skins); EXT_mesh_gpu_instancing, KHR_mesh_primitive_restart. Materials are not read. `gltf_file` has the container,
`gltf_accessors` the numbers, `gltf_nodes` the tree of transforms.
Axes: V vertices, F triangles, I instances, J joints.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.errors import DataError
from ..geometry import COARSEST, Geometry
from .gltf_accessors import DRACO, MESHOPT, Accessors, Draco, Values
from .gltf_file import Item, open_file
from .gltf_nodes import TRANSFORM, Nodes, check_affine, compose, is_identity

POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6  # modes; 1 to 3 are lines
INSTANCING = "EXT_mesh_gpu_instancing"
INSTANCE = {key.upper(): default for key, default in TRANSFORM.items()}  # its attributes
RESTART = "KHR_mesh_primitive_restart"
READ = {"KHR_mesh_quantization", "KHR_node_visibility", "MSFT_lod", DRACO, INSTANCING, RESTART}
# Extensions that leave the triangles as they are; a file may require them.
PLAIN = re.compile(
    r"[A-Z0-9]+_(materials?|textures?|lights?|image|audio|xmp|physics|character|avatar)(_\w+)?"
    r"|KHR_(techniques_webgl|animation\w*|interactivity|behavior|node_(select|hover)ability|blend)"
    r"|KHR_(implicit_shapes|collision_shapes|gaussian_splatting)"
    r"|EXT_(structural_metadata|feature_metadata|mesh_features|instance_features|mesh_manifold|bmesh_encoding|blend)"
    r"|(EXT_mesh|BENTLEY)_primitive_restart|EXT_mesh_primitive_edge_visibility"
    r"|MSFT_packing_\w+|CESIUM_(primitive_outline|RTC)|(KHR|EXT|CESIUM)_geopose|AGI_stk_metadata|GRIFFEL_bim_data"
    r"|FB_(geometry_metadata|ngon_encoding)|GODOT_single_root|MOZ_(lightmap|hubs_components)|OMI_\w+|VRM|VRMC_\w+"
)
# A small file may show one mesh many times. More vertices and triangles than this are read only from a large file.
MANY = 30_000_000
FRAME = "its skins are shown as modeled, not in the frame of its animation that it was saved in"


def read(path: Path) -> Geometry:
    """Read the triangles of the scene, or its points if it has none. glTF is y-up.

    Raise DataError with the reason if the file is damaged, refers to what is not there or requires an extension that
    would change its triangles and is not read; ConfigError if it is packed with Draco and DracoPy is missing.
    """
    file = open_file(path)
    required = _check_extensions(file.tree)
    nodes = Nodes(file.tree)
    shown, notes = nodes.shown(file.tree)
    meshes = _Meshes(file.tree, Accessors(file, path.parent), nodes, required)
    shown = [number for number in shown if "mesh" in nodes.items[number]]
    if meshes.items and not shown:
        raise DataError("its scene shows none of its meshes" + "".join(f"; {note}" for note in notes))
    parts = [part for number in shown for part in meshes.place(number, points=False)]
    if not parts:
        parts = [part for number in shown for part in meshes.place(number, points=True)]
    vertices, faces = _join(parts)
    return Geometry(vertices, faces, "y", (*notes, *meshes.notes))


def _check_extensions(tree: Item) -> set[str]:
    """Return the required extensions. Raise DataError for one that could change the triangles and is not read."""
    required = tree.texts("extensionsRequired")
    for name in required:
        if name in MESHOPT:
            raise DataError(f"requires {name}, which is not read: {MESHOPT[name]}")
        if name not in READ and not PLAIN.fullmatch(name):
            raise DataError(f"requires {name[:80]}, which is not read: export it without this extension")
    return {*required, *({RESTART} & set(tree.texts("extensionsUsed")))}


class _Primitive(NamedTuple):
    """A primitive's triangles or points.

    elements: how many its accessors have.
    rows: [V] those of them that the faces or points use, None for all.
    positions: [V, 3] float32, or float64 if they are stored as integers.
    faces: [F, 3] int64 in [0, V); F is 0 for points.
    """

    item: Item
    draco: Draco | None
    elements: int
    rows: np.ndarray | None
    positions: np.ndarray
    faces: np.ndarray


class _Part(NamedTuple):
    """Vertices [V, 3] and faces [F, 3] in the space of the scene.

    step: the distance of two neighboring coordinates there, as far as float32 made it; 0 for integers.
    """

    vertices: np.ndarray
    faces: np.ndarray
    step: float


class _Meshes:
    """The meshes of a file and how nodes place them.

    notes: what of the placing a user should know.
    """

    def __init__(self, tree: Item, accessors: Accessors, nodes: Nodes, required: set[str]):
        self.items = tree.items("meshes")
        self.skins = tree.items("skins")
        self.accessors = accessors
        self.nodes = nodes
        self.required = required
        self.notes: dict[str, None] = {}
        self._primitives: dict[tuple[int, bool], list[_Primitive]] = {}
        self._joints: dict[int, np.ndarray] = {}
        self._animated = {  # nodes that an animation moves
            channel.item("target").whole("node", -1)
            for animation in (tree.items("animations") if self.skins else ())
            for channel in animation.items("channels")
        }
        self._total = 0

    def place(self, number: int, points: bool) -> list[_Part]:
        """Return what the mesh of a node shows in the scene: its triangles, or its points."""
        node = self.nodes.items[number]
        key = node.index("mesh", len(self.items), "meshes"), points
        if key not in self._primitives:
            primitives = (self._primitive(item, points) for item in self.items[key[0]].items("primitives"))
            self._primitives[key] = [primitive for primitive in primitives if primitive is not None]
        weights = (node if "weights" in node else self.items[key[0]]).numbers("weights")
        instancing = node.extension(INSTANCING)
        if "skin" in node and instancing is not None:
            raise DataError(f"{node.path} has a skin and {INSTANCING}, for which the extension has no rule")
        world = self.nodes.worlds[number]
        with np.errstate(over="ignore", invalid="ignore"):  # load_mesh refuses vertices that are not finite
            shapes = [(primitive, self._morphed(primitive, weights)) for primitive in self._primitives[key]]
            if "skin" not in node:
                return [self._instances(*shape, world, instancing) for shape in shapes]
            notes = dict(self.notes)
            posed = [self._skinned(*shape, node) for shape in shapes]
            if posed and self._is_animated(node):
                # The joints of an animated file are left in some frame of it. If that fills the same box as the model
                # itself, as in a wheel half turned or a breath taken, the model is the better shape.
                modeled = [self._instances(*shape, world, None) for shape in shapes]
                if _fill_one_box(posed, modeled):
                    self.notes = notes | {FRAME: None}
                    return modeled
        return posed

    def _is_animated(self, node: Item) -> bool:
        """Return whether an animation moves a joint of a node's skin."""
        skin = self.skins[node.index("skin", len(self.skins), "skins")]
        return bool(self._animated & set(skin.indices("joints", len(self.nodes.items), "nodes")))

    def _primitive(self, item: Item, points: bool) -> _Primitive | None:
        """Return a primitive, None if it is of another kind than asked for."""
        mode = item.whole("mode", TRIANGLES)
        if mode > FAN:
            raise item.wrong("mode", "0 to 6")
        attributes = item.item("attributes")
        if mode not in ((POINTS,) if points else (TRIANGLES, STRIP, FAN)):
            return None
        draco = self._draco(item, attributes) if mode in (TRIANGLES, STRIP) else None
        if draco is None and not self._has_positions(item, attributes):
            return None
        position = self._attribute(attributes, draco, "POSITION", 3)
        count = len(position.stored)
        order = draco.faces.ravel() if draco else self._order(item, count)
        stop = np.iinfo(order.dtype).max
        if draco:
            faces = draco.faces
        elif points:
            faces = np.zeros((0, 3), dtype=np.int64)
        else:
            faces = _triangles(mode, order, item, RESTART in self.required)
            order = faces.ravel()
        if not len(order):
            return None
        if order.max() >= count:
            restart = "; it is a primitive restart, which needs " + RESTART if order.max() == stop else ""
            raise DataError(f"{item.path} uses vertex {order.max()} of {count}{restart}")
        rows = _used(order, count)
        if rows is not None:
            faces = np.searchsorted(rows, faces)
        return _Primitive(item, draco, count, rows, position.rows(rows).floats(), faces)

    def _has_positions(self, item: Item, attributes: Item) -> bool:
        """Return whether a primitive has positions. The specification has one without skipped.

        Raise DataError if they are where this module does not look.
        """
        if "POSITION" in attributes and self.accessors.has_data(self.accessors.accessor(attributes, "POSITION")):
            return True
        others = [name for name in item.item("extensions").value if name != DRACO and not PLAIN.fullmatch(name)]
        if others:
            raise DataError(f"{item.path} has its positions in {others[0][:80]}, which is not read: export it without")
        if "POSITION" in attributes:
            raise DataError(f"{attributes.path}.POSITION has no data: its accessor has no bufferView")
        return False

    def _draco(self, item: Item, attributes: Item) -> Draco | None:
        """Unpack the Draco data of a primitive, unless it has the same as plain data."""
        extension = item.extension(DRACO)
        if extension is None:
            return None
        owners = [(owner, key) for owner, key in ((attributes, "POSITION"), (item, "indices")) if key in owner]
        plain = all(self.accessors.has_data(self.accessors.accessor(owner, key)) for owner, key in owners)
        if plain and DRACO not in self.required:
            return None
        return Draco(self.accessors, extension)

    def _attribute(self, attributes: Item, draco: Draco | None, name: str, width: int, zeros: bool = False) -> Values:
        if draco is not None and name in draco:
            return draco.values(name, width, self.accessors.accessor(attributes, name))
        return self.accessors.values(attributes, name, f"VEC{width}", zeros)

    def _order(self, item: Item, count: int) -> np.ndarray:
        """Return the vertices in the order in which a primitive uses them, [n] of an unsigned type or int64."""
        if "indices" not in item:
            return np.arange(count)
        indices = self.accessors.values(item, "indices", "SCALAR").stored[:, 0]
        if indices.dtype.kind != "u":
            raise DataError(f"{item.path}.indices are not of an unsigned type")
        return indices

    def _morphed(self, primitive: _Primitive, weights: np.ndarray) -> np.ndarray:
        """Return the positions with the weighted displacements of the morph targets."""
        targets = primitive.item.items("targets") if weights.any() else []
        if weights[len(targets) :].any():
            raise DataError(f"{primitive.item.path} has {len(targets)} targets for {len(weights)} weights")
        positions = primitive.positions
        for weight, target in zip(weights, targets, strict=False):  # missing weights are 0
            if weight == 0 or "POSITION" not in target:
                continue
            values = self.accessors.values(target, "POSITION", "VEC3", zeros=True)
            self._check_count(values, primitive)
            positions = positions + weight * values.rows(primitive.rows).floats().astype(np.float64)
            self.notes["its morph targets are applied with their weights"] = None
        return positions

    def _check_count(self, values: Values, primitive: _Primitive) -> None:
        if len(values.stored) != primitive.elements:
            raise DataError(f"{values.path} has {len(values.stored)} elements, and the positions {primitive.elements}")

    def _instances(
        self, primitive: _Primitive, positions: np.ndarray, world: np.ndarray, instancing: Item | None
    ) -> _Part:
        """Return a primitive placed by the transform of its node, once or at each instance."""
        matrices = world[None]
        if instancing is not None:
            matrices = world @ self._instance_matrices(instancing)
        self._count(primitive, len(matrices))
        step = _step(primitive.positions)
        if len(matrices) == 1 and is_identity(matrices):
            return _Part(positions, primitive.faces, step)
        linear = matrices[:, :3, :3]
        vertices = positions.astype(np.float64) @ linear.transpose(0, 2, 1) + matrices[:, None, :3, 3]
        faces = np.repeat(primitive.faces[None], len(matrices), axis=0)
        mirrored = np.linalg.det(linear) < 0
        faces[mirrored] = faces[mirrored, :, ::-1]
        faces += len(positions) * np.arange(len(matrices))[:, None, None]
        return _Part(vertices.reshape(-1, 3), faces.reshape(-1, 3), step * _largest(linear))

    def _instance_matrices(self, instancing: Item) -> np.ndarray:
        """Return the transforms of the instances, [I, 4, 4]; one if no attribute gives any."""
        attributes = instancing.item("attributes")
        given = {
            name: self.accessors.values(attributes, name, f"VEC{len(default)}")
            for name, default in INSTANCE.items()
            if name in attributes
        }
        counts = {len(values.stored) for values in given.values()} or {1}
        if len(counts) > 1:
            raise DataError(f"{attributes.path} have {min(counts)} to {max(counts)} elements, not equally many")
        count = counts.pop()
        translations, rotations, scales = (
            given[name].floats().astype(np.float64) if name in given else np.tile(default, (count, 1))
            for name, default in INSTANCE.items()
        )
        return compose(translations, rotations, scales, f"{attributes.path}.ROTATION {{}}")

    def _skinned(self, primitive: _Primitive, positions: np.ndarray, node: Item) -> _Part:
        """Return a primitive posed by the joints of a skin. The transform of its own node does not apply."""
        skin = node.index("skin", len(self.skins), "skins")
        if skin not in self._joints:
            self._joints[skin] = self._joint_matrices(self.skins[skin])
        matrices = self._joints[skin]
        blended = np.zeros((len(positions), 3, 4))
        total = np.zeros(len(positions))
        used = np.zeros(len(matrices), dtype=bool)
        for joints, shares in self._influences(primitive, node, len(matrices)):
            blended += shares[:, None, None] * matrices[joints, :3]
            total += shares
            used[joints[shares != 0]] = True
        loose = total == 0  # the specification has none, but writers leave vertices of no joint so
        if loose.any():
            blended[loose], total[loose], used[0] = matrices[0, :3], 1, True
            self.notes["vertices without skin weights follow the first joint of their skin"] = None
        self._count(primitive, 1)
        moved = np.abs(matrices[used] - matrices[used][0]).max()
        if moved > 1e-3 * np.abs(matrices[used][0]).max():  # inverse bind matrices are float32, and often rounded more
            self.notes["its skins are posed by their joints"] = None
        blended /= total[:, None, None]
        vertices = np.einsum("vij,vj->vi", blended[:, :, :3], positions.astype(np.float64)) + blended[:, :, 3]
        return _Part(vertices, primitive.faces, _step(primitive.positions) * _largest(matrices[used, :3, :3]))

    def _influences(self, primitive: _Primitive, node: Item, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield joints [V] int64 in [0, number) and their shares [V] float64, once for each that a vertex may have."""
        attributes = primitive.item.item("attributes")
        sets = 0
        while sets == 0 or f"WEIGHTS_{sets}" in attributes:
            names = f"JOINTS_{sets}", f"WEIGHTS_{sets}"
            if not all(name in attributes for name in names):
                raise DataError(f"{attributes.path} has no {' and '.join(names)}, which {node.path}.skin needs")
            joints = self._attribute(attributes, primitive.draco, names[0], 4, zeros=True)
            weights = self._attribute(attributes, primitive.draco, names[1], 4)
            if joints.stored.dtype.kind != "u":
                raise DataError(f"{attributes.path}.{names[0]} is not of an unsigned type")
            for values in (joints, weights):
                self._check_count(values, primitive)
            # Integers always stand for fractions here.
            shares = weights.rows(primitive.rows)._replace(normalized=True).floats().astype(np.float64)
            numbers = np.where(shares != 0, joints.rows(primitive.rows).stored, 0).astype(np.int64)
            if numbers.max(initial=0) >= number:
                raise DataError(f"{joints.path} has joint {numbers.max()} of {number}")
            yield from zip(numbers.T, shares.T, strict=True)
            sets += 1

    def _joint_matrices(self, skin: Item) -> np.ndarray:
        """Return what a skin's joints do to vertices in the pose of the file, [J, 4, 4] float64."""
        joints = skin.indices("joints", len(self.nodes.items), "nodes")
        if not joints:
            raise skin.wrong("joints", "an array of nodes")
        worlds = self.nodes.worlds[joints]
        if "inverseBindMatrices" not in skin:
            return worlds
        bind = self.accessors.values(skin, "inverseBindMatrices", "MAT4").stored[: len(joints)]
        if len(bind) < len(joints):
            raise DataError(f"{skin.path}.inverseBindMatrices has {len(bind)} elements for {len(joints)} joints")
        bind = bind.astype(np.float64).reshape(-1, 4, 4).transpose(0, 2, 1)
        for matrix in bind:
            check_affine(matrix, f"{skin.path}.inverseBindMatrices")
        bind[:, 3] = (0, 0, 0, 1)
        return worlds @ bind

    def _count(self, primitive: _Primitive, copies: int) -> None:
        """Raise DataError if what is shown so far and copies of a primitive are more than the file can mean."""
        self._total += (len(primitive.positions) + len(primitive.faces)) * copies
        if self._total > max(MANY, 4 * self.accessors.loaded_bytes()):
            raise DataError(f"its scene repeats meshes until they have more than {MANY} vertices and triangles")


def _triangles(mode: int, order: np.ndarray, item: Item, restart: bool) -> np.ndarray:
    """Return the triangles that a primitive draws, [F, 3] int64 (section 3.7.2.1).

    order: [n] the vertices as the primitive uses them.
    restart: whether the largest number of their type ends a strip or fan and begins another.
    Triangles of a strip or fan that use a vertex twice only lead to its next part, and are left out.
    """
    if mode == TRIANGLES:
        if len(order) % 3:
            raise DataError(f"{item.path} has {len(order)} indices for triangles, no multiple of 3")
        return order.reshape(-1, 3).astype(np.int64)
    stops = order == np.iinfo(order.dtype).max if restart else np.zeros(len(order), dtype=bool)
    order = order.astype(np.int64)
    first = np.arange(max(len(order) - 2, 0))
    # Where the strip or fan of each vertex begins.
    begin = np.maximum.accumulate(np.where(stops, np.arange(len(order)) + 1, 0))[: len(first)]
    first = first[~(stops[:-2] | stops[1:-1] | stops[2:])] if len(first) else first
    begin = begin[first]
    if mode == STRIP:
        odd = (first - begin) % 2
        faces = np.stack([order[first], order[first + 1 + odd], order[first + 2 - odd]], axis=1)
    else:
        faces = np.stack([order[first + 1], order[first + 2], order[begin]], axis=1)
    twice = (faces == np.roll(faces, 1, axis=1)).any(axis=1)
    return faces[~twice]


def _used(order: np.ndarray, count: int) -> np.ndarray | None:
    """Return the elements of `order` in [0, count), sorted and each once; None if it has all."""
    if len(order) * 4 < count:  # parts of one large array of vertices
        return np.unique(order).astype(np.int64)
    used = np.zeros(count, dtype=bool)
    used[order] = True
    return None if used.all() else used.nonzero()[0]


def _step(positions: np.ndarray) -> float:
    """Return the distance of float32 numbers at the largest coordinate; 0 for integers, which are exact."""
    if positions.dtype != np.float32:
        return 0.0
    return float(np.spacing(np.abs(positions).max(initial=0)))


def _fill_one_box(parts: list[_Part], others: list[_Part]) -> bool:
    """Return whether the bounding boxes of two shapes agree to a cell of a grid that the first fills."""
    boxes = []
    for shape in (parts, others):
        vertices = np.concatenate([part.vertices for part in shape])
        boxes.append(np.stack([vertices.min(axis=0), vertices.max(axis=0)]))
    extent = np.ptp(boxes[0], axis=0).max()
    return bool(np.abs(boxes[0] - boxes[1]).max() <= COARSEST * extent)


def _largest(linear: np.ndarray) -> float:
    """Return how much matrices [n, 3, 3] enlarge a coordinate's step at most."""
    return float(np.abs(linear).max(initial=0))


def _join(parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices and faces of all parts as one: float32 if all are, else float64.

    Raise DataError if float32 made the coordinates coarser than a cell before they were transformed.
    """
    if not parts:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    vertices = np.concatenate([part.vertices for part in parts])
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
    if vertices.dtype != np.float32:  # else load_mesh sees it
        with np.errstate(over="ignore", invalid="ignore"):
            extent = np.ptp(vertices, axis=0).max()
            step = max(part.step for part in parts)
        if step > COARSEST * extent > 0:
            raise DataError(
                f"its coordinates are too coarse: single precision has steps of {step:.3g} there, and the object "
                f"measures {extent:.3g}. Export it nearer to the origin"
            )
    return vertices, faces
