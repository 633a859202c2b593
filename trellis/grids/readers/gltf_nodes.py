"""The nodes of a glTF 2.0 file: their tree, their transforms and which of them the scene shows.

Specification 2.0.1, section 3.5 (scenes, nodes, transformations); KHR_node_visibility, MSFT_lod.
"""

from collections.abc import Sequence

import numpy as np

from ...utils.errors import DataError
from .gltf_file import Item

# The fields of a node's transform with their defaults.
TRANSFORM = {"translation": (0.0, 0.0, 0.0), "rotation": (0.0, 0.0, 0.0, 1.0), "scale": (1.0, 1.0, 1.0)}
AFFINE = np.array([0.0, 0.0, 0.0, 1.0])  # the last row of a matrix; writers of single precision miss it a little


class Nodes:
    """All nodes of a file.

    items: their JSON.
    parents: for each node its parent, -1 for a root.
    worlds: [n, 4, 4] float64, the transforms to the space of the scene. They act on columns.
    """

    def __init__(self, tree: Item):
        """Raise DataError if the nodes are no forest or a transform is none."""
        self.items = tree.items("nodes")
        # Once each: a list that names a node twice means no second copy of it.
        self.children = [list(dict.fromkeys(item.indices("children", len(self.items), "nodes"))) for item in self.items]
        self.parents = self._parents()
        order = self._reach([number for number, parent in enumerate(self.parents) if parent < 0])
        if len(order) < len(self.items):
            lost = min(set(range(len(self.items))) - set(order))
            raise DataError(f"{self.items[lost].path} is below itself or below a node that is")
        self.worlds = self._locals()
        with np.errstate(over="ignore", invalid="ignore"):  # load_mesh refuses vertices that are not finite
            for number in order:
                if self.parents[number] >= 0:
                    self.worlds[number] = self.worlds[self.parents[number]] @ self.worlds[number]

    def shown(self, tree: Item) -> tuple[list[int], list[str]]:
        """Return the nodes that the scene shows, and notes on what it leaves out."""
        notes = []
        scenes = tree.items("scenes")
        if scenes:
            chosen = tree.index("scene", len(scenes), "scenes") if "scene" in tree else 0
            roots = scenes[chosen].indices("nodes", len(self.items), "nodes")
            self._check_roots(roots, f"{scenes[chosen].path}.nodes")
            if len(scenes) > 1:
                notes.append(f"scene {chosen} of its {len(scenes)} is read")
        else:
            roots = [number for number, parent in enumerate(self.parents) if parent < 0]
        hidden = {number for number, item in enumerate(self.items) if _is_hidden(item)}
        coarse = self._coarse_levels()
        nodes = self._reach(roots, hidden | coarse)
        everything = set(self._reach(roots)) if hidden or coarse else set()
        if hidden & everything:
            notes.append("nodes that it hides (KHR_node_visibility) are left out")
        if coarse & everything:
            notes.append("its lower levels of detail (MSFT_lod) are left out")
        return nodes, notes

    def _parents(self) -> list[int]:
        parents = [-1] * len(self.items)
        for number, children in enumerate(self.children):
            for child in children:
                if parents[child] >= 0:
                    raise DataError(f"{self.items[child].path} has two parents, {parents[child]} and {number}")
                parents[child] = number
        return parents

    def _reach(self, roots: Sequence[int], without: set[int] | frozenset[int] = frozenset()) -> list[int]:
        """Return the nodes below and with the roots, each once. `without` and what is below it is left out."""
        reached = [root for root in dict.fromkeys(roots) if root not in without]
        seen = {*reached, *without}
        for number in reached:  # it grows
            new = [child for child in self.children[number] if child not in seen]
            seen.update(new)
            reached += new
        return reached

    def _check_roots(self, roots: list[int], path: str) -> None:
        """Raise DataError if a scene lists a child whose parent moves it but is not shown: it has two places then.

        The specification allows roots of trees only, but writers list children of a parent that moves nothing.
        """
        moved = {root for root in roots if self.parents[root] >= 0 and not is_identity(self.worlds[self.parents[root]])}
        if moved and moved - set(self._reach([root for root in roots if root not in moved])):
            raise DataError(f"{path} has {min(moved)}, a child of node {self.parents[min(moved)]}, which moves it")

    def _locals(self) -> np.ndarray:
        """Return the nodes' own transforms, [n, 4, 4] float64."""
        columns = {
            key: np.array([item.numbers(key, default) for item in self.items]).reshape(-1, len(default))
            for key, default in TRANSFORM.items()
        }
        locals_ = compose(columns["translation"], columns["rotation"], columns["scale"], "nodes[{}].rotation")
        for number, item in enumerate(self.items):
            if "matrix" not in item:
                continue
            matrix = item.numbers("matrix", (0.0,) * 16).reshape(4, 4).T
            check_affine(matrix, f"{item.path}.matrix")
            for key, default in TRANSFORM.items():
                if not np.array_equal(columns[key][number], default):
                    raise DataError(f"{item.path} has both matrix and {key}, of which glTF allows one")
            locals_[number, :3] = matrix[:3]
        return locals_

    def _coarse_levels(self) -> set[int]:
        """Return the nodes that MSFT_lod names as lower levels of detail of another."""
        coarse = set()
        for number, item in enumerate(self.items):
            levels = item.extension("MSFT_lod") if "extensions" in item else None
            if levels is not None:
                coarse |= set(levels.indices("ids", len(self.items), "nodes")) - {number}
        return coarse


def compose(translations: np.ndarray, rotations: np.ndarray, scales: np.ndarray, path: str) -> np.ndarray:
    """Return the transforms T R S, [n, 4, 4] float64.

    translations: [n, 3], scales: [n, 3].
    rotations: [n, 4], quaternions x y z w; of length 1, to which they are brought.
    path: where they are, for messages; {} stands for the number.
    Raise DataError if a quaternion is zero.
    """
    lengths = np.linalg.norm(rotations, axis=1, keepdims=True)
    if not lengths.all():
        raise DataError(f"{path.format(int(lengths[:, 0].argmin()))} is zero, which is no rotation")
    x, y, z, w = (rotations / lengths).T
    matrices = np.zeros((len(rotations), 4, 4))
    matrices[:, 0, 0] = 1 - 2 * (y * y + z * z)
    matrices[:, 1, 1] = 1 - 2 * (x * x + z * z)
    matrices[:, 2, 2] = 1 - 2 * (x * x + y * y)
    matrices[:, 0, 1], matrices[:, 1, 0] = 2 * (x * y - z * w), 2 * (x * y + z * w)
    matrices[:, 0, 2], matrices[:, 2, 0] = 2 * (x * z + y * w), 2 * (x * z - y * w)
    matrices[:, 1, 2], matrices[:, 2, 1] = 2 * (y * z - x * w), 2 * (y * z + x * w)
    matrices[:, :3, :3] *= scales[:, None]
    matrices[:, :3, 3] = translations
    matrices[:, 3, 3] = 1
    return matrices


def is_identity(matrices: np.ndarray) -> bool:
    """Return whether transforms [..., 4, 4] change nothing."""
    return bool((matrices == np.eye(4)).all())


def check_affine(matrix: np.ndarray, path: str) -> None:
    """Raise DataError if the last row of a matrix is not 0 0 0 1."""
    if not np.allclose(matrix[3], AFFINE, rtol=0, atol=1e-3):
        raise DataError(f"{path} has the last row {matrix[3].tolist()}; glTF demands 0 0 0 1")


def _is_hidden(item: Item) -> bool:
    visibility = item.extension("KHR_node_visibility") if "extensions" in item else None
    return visibility is not None and not visibility.flag("visible", True)
