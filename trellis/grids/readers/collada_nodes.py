"""Transforms of COLLADA's nodes to matrices for column vectors (specification 1.4.1, chapter 5)."""

from xml.etree.ElementTree import Element

import numpy as np

from ...utils.errors import DataError
from .xml_tree import numbers


def node_matrix(node: Element) -> np.ndarray:
    """Return the matrix [4, 4] float64 of a node's transforms, in their order, for column vectors.

    Raise DataError if one has another number of values than its kind.
    """
    matrix = np.eye(4)
    for child in node:
        if child.tag in TRANSFORMS:
            count, transform = TRANSFORMS[child.tag]
            values = numbers(child.text, np.float64, f"<{child.tag}> of a node")
            if len(values) != count:
                raise DataError(f"<{child.tag}> of a node has {len(values)} numbers, not {count}")
            if not np.isfinite(values).all():
                raise DataError(f"<{child.tag}> of a node has a number that is not finite")
            matrix = matrix @ transform(values)
    return matrix


def affine(values: np.ndarray) -> np.ndarray:
    if len(values) != 16:
        raise DataError(f"a matrix has {len(values)} numbers, not 16")
    if np.abs(values[12:] - (0, 0, 0, 1)).max() > 1e-4:  # writers of single precision miss it a little
        raise DataError(f"a matrix has the last row {values[12:].tolist()}, not 0 0 0 1: it is no affine transform")
    return np.array([*values[:12], 0, 0, 0, 1]).reshape(4, 4)


def _translate(values: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = values
    return matrix


def _scale(values: np.ndarray) -> np.ndarray:
    return np.diag([*values, 1.0])


def _rotate(values: np.ndarray) -> np.ndarray:
    """Return the rotation about an axis x y z by an angle in degrees (Rodrigues' formula)."""
    matrix = np.eye(4)
    length = np.linalg.norm(values[:3])
    if values[3] != 0 and length > 0:
        x, y, z = values[:3] / length
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        angle = np.radians(values[3])
        matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    return matrix


def _skew(values: np.ndarray) -> np.ndarray:
    """Return the shear along the second axis that turns the first toward it by an angle in degrees (RenderMan's)."""
    first, along = values[1:4], values[4:7]
    if not (np.linalg.norm(first) > 0 and np.linalg.norm(along) > 0):
        raise DataError("<skew> of a node has an axis of no length")
    first, along = first / np.linalg.norm(first), along / np.linalg.norm(along)
    across = first - (first @ along) * along
    between = np.arctan2(np.linalg.norm(across), first @ along)  # in (0, pi)
    rest = between - np.radians(values[0])
    if not (np.linalg.norm(across) > 1e-12 and 0 < rest < np.pi):
        raise DataError(f"<skew> of a node by {values[0]:g} degrees turns its axis past the other")
    matrix = np.eye(4)
    amount = 1 / np.tan(rest) - 1 / np.tan(between)
    matrix[:3, :3] += amount * np.outer(along, across / np.linalg.norm(across))
    return matrix


def _look_at(values: np.ndarray) -> np.ndarray:
    """Return the placing of a camera at a point that looks along its -z axis to another, with a direction up."""
    eye, target, up = values.reshape(3, 3)
    back = eye - target
    right = np.cross(up, back)
    if not (np.linalg.norm(back) > 0 and np.linalg.norm(right) > 0):
        raise DataError("<lookat> of a node has no direction: its points are equal, or up is along it")
    back, right = back / np.linalg.norm(back), right / np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, eye], axis=1)
    return matrix


TRANSFORMS = {
    "matrix": (16, affine),
    "translate": (3, _translate),
    "scale": (3, _scale),
    "rotate": (4, _rotate),
    "skew": (7, _skew),
    "lookat": (9, _look_at),
}
