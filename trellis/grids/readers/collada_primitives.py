"""Primitives of COLLADA's meshes to triangles (specification 1.4.1, chapter 5)."""

from xml.etree.ElementTree import Element

import numpy as np

from ...utils.errors import ConfigError, DataError
from .polygons import triangulate
from .strips import split_fans, split_strips
from .xml_tree import integer, numbers

PRIMITIVES = ("triangles", "polylist", "polygons", "tristrips", "trifans")


def adds_up(counts: np.ndarray, stride: int, length: int) -> bool:
    """Return whether groups of these many entries, of `stride` indices each, make `length` indices; counts >= 0."""
    return not (counts > length).any() and int(counts.sum()) * stride == length  # so the sum cannot overflow


class Primitive:
    """One element of PRIMITIVES.

    offset, stride: an entry has `stride` indices, of which the one at `offset` is the vertex.
    vertices: [V, 3] float64, that the indices count.
    """

    def __init__(self, element: Element, geometry: str, offset: int, stride: int, vertices: np.ndarray):
        self.element = element
        self.name = f'<{element.tag}> of geometry "{geometry}"'
        self.offset, self.stride, self.vertices = offset, stride, vertices

    def faces(self) -> np.ndarray:
        """Return the triangles [F, 3] int64. Raise DataError if counts, indices and vertices do not fit together."""
        kind = self.element.tag
        lists = [self.corners(p) for p in self.element.findall("p")]
        corners = np.concatenate([np.zeros(0, dtype=np.int64), *lists])
        count = integer(self.element, "count", -1 if lists else 0)
        if kind == "triangles":
            if len(corners) % 3 or count not in (-1, len(corners) // 3):
                raise DataError(f"{self.name} has {len(corners)} corners for {count} triangles: the file is damaged")
            return corners.reshape(-1, 3)
        if kind == "polylist":
            sizes = numbers(self.element.findtext("vcount"), np.int64, f"<vcount> in {self.name}")
            if (sizes < 0).any() or count not in (-1, len(sizes)) or not adds_up(sizes, 1, len(corners)):
                raise DataError(
                    f"{self.name} has {len(corners)} corners and {len(sizes)} sizes for {count} polygons: "
                    "the file is damaged"
                )
            return triangulate(self.vertices, corners, sizes)
        holed = self.element.findall("ph")
        if count > len(lists) + len(holed):
            raise DataError(f"{self.name} has {len(lists) + len(holed)} of {count} parts: the file is damaged")
        sizes = np.array([len(each) for each in lists], dtype=np.int64)
        if kind == "tristrips":
            return split_strips(corners, sizes)
        if kind == "trifans":
            return split_fans(corners, sizes)
        return np.concatenate([triangulate(self.vertices, corners, sizes), *map(self.with_holes, holed)])

    def corners(self, element: Element) -> np.ndarray:
        """Return the vertices [C] int64 that a <p> or <h> lists."""
        indices = numbers(element.text, np.int64, f"<{element.tag}> in {self.name}")
        if len(indices) % self.stride:
            raise DataError(
                f"{self.name} has {len(indices)} indices, no multiple of {self.stride}: the file is damaged"
            )
        corners = indices[self.offset :: self.stride]
        if len(corners) and (corners.min() < 0 or corners.max() >= len(self.vertices)):
            raise DataError(f"{self.name} uses vertices {corners.min()} to {corners.max()} of {len(self.vertices)}")
        return corners

    def with_holes(self, element: Element) -> np.ndarray:
        """Return the triangles [F, 3] int64 of a <ph>: a polygon with holes, cut in the plane of its outline."""
        try:
            import mapbox_earcut
        except ModuleNotFoundError as error:
            raise ConfigError(f"a Python package is missing ({error}): pip install mapbox_earcut") from error
        rings = [self.corners(ring) for ring in element if ring.tag in ("p", "h")]
        rings = [ring for ring in rings if len(ring) >= 3]
        if element.find("p") is None or not rings:
            return np.zeros((0, 3), dtype=np.int64)
        corners = np.concatenate(rings)
        points = self.vertices[corners]
        if not np.isfinite(points).all():
            raise DataError(f"{self.name} has a polygon with a vertex that is not finite")
        points = points - points[0]
        points /= max(np.abs(points).max(), np.finfo(float).tiny)  # the products of tiny lengths would underflow
        outline = points[: len(rings[0])]
        normal = np.cross(outline, np.roll(outline, -1, axis=0)).sum(axis=0)  # Newell's
        if not np.linalg.norm(normal) > 0:
            return np.zeros((0, 3), dtype=np.int64)
        axis = np.cross(normal, np.eye(3)[np.abs(normal).argmin()])
        plane = np.stack([points @ (axis / np.linalg.norm(axis)), points @ _unit(np.cross(normal, axis))], axis=1)
        ends = np.cumsum([len(ring) for ring in rings]).astype(np.uint32)
        return corners[mapbox_earcut.triangulate_float64(plane, ends).reshape(-1, 3).astype(np.int64)]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
