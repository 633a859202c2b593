"""Parts of a scene, placed by matrices, as one mesh. For formats whose scenes use a part more than once."""

import numpy as np

from ...utils.errors import DataError

# Instances of instances can make a small file endless; a scene as large as this is far beyond what is voxelized.
MAX_INSTANCES = 1_000_000
MAX_SIZE = 20_000_000  # triangles, or vertices


class Parts:
    """Collects placed meshes. All arrays are copies or new, so parts may share theirs."""

    def __init__(self) -> None:
        self.vertices: list[np.ndarray] = []
        self.faces: list[np.ndarray] = []
        self.vertex_count = 0
        self.triangle_count = 0
        self.instances = 0

    def count_instance(self) -> None:
        """Count a node or component that is visited. Raise DataError if they are too many."""
        self.instances += 1
        if self.instances > MAX_INSTANCES:
            raise DataError(f"has more than {MAX_INSTANCES:,} nodes, counting each use of a part: take its parts apart")

    def add(self, vertices: np.ndarray, faces: np.ndarray, matrix: np.ndarray) -> None:
        """Add a mesh, vertices [V, 3] and faces [F, 3], moved by a matrix [4, 4] float64 (of column vectors).

        Raise DataError if the scene gets too large.
        """
        self.triangle_count += len(faces)
        for count, what in ((self.triangle_count, "triangles"), (self.vertex_count + len(vertices), "vertices")):
            if count > MAX_SIZE:
                raise DataError(f"has more than {MAX_SIZE:,} {what}, counting each use of a part: simplify it")
        if not (matrix == np.eye(4)).all():
            with np.errstate(invalid="ignore"):  # a vertex that is not finite is refused later, if a triangle uses it
                vertices = vertices @ matrix[:3, :3].T + matrix[:3, 3]
        self.vertices.append(vertices)
        self.faces.append(faces + self.vertex_count)
        self.vertex_count += len(vertices)

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all vertices [V, 3] float64 and faces [F, 3] int64; both may be empty."""
        vertices = np.concatenate([np.zeros((0, 3)), *self.vertices])
        return vertices, np.concatenate([np.zeros((0, 3), dtype=np.int64), *self.faces])
