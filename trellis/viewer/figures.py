"""Figures of the page, as Plotly's JSON. The 3D panels share one frame: x y z in voxels, in [0, R], z up."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..grids.preview import CORRECT, EXTRA, MATERIAL, MISSING
from .faces import LIGHT, outer_faces

Figure = dict[str, Any]  # or one of its traces
ADDED, REMOVED, CHOSEN = (0, 158, 115), (230, 140, 0), (214, 39, 160)
EMPTY = (236, 238, 241)
BRIGHTEST = 1.3  # largest shade of a face
CAMERA = {  # the view of grids/preview.py, with all corners of the cube in the picture
    "eye": {"x": 1.18, "y": -1.5, "z": 0.78},
    "center": {"x": 0, "y": 0, "z": -0.12},
    "up": {"x": 0, "y": 0, "z": 1},
}
HOVER = "token %{customdata[0]}<br>%{text}<extra></extra>"
BACKGROUND = "#fafafb"
CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
CUBE_TRIANGLES = np.array(
    [
        [0, 1, 3],
        [0, 3, 2],
        [4, 6, 7],
        [4, 7, 5],
        [0, 4, 5],
        [0, 5, 1],
        [2, 3, 7],
        [2, 7, 6],
        [0, 2, 6],
        [0, 6, 4],
        [1, 5, 7],
        [1, 7, 3],
    ]
)
CUBE_EDGES = [(a, b) for a in range(8) for b in range(a) if np.abs(CUBE[a] - CUBE[b]).sum() == 1]


def css(color: Sequence[float] | np.ndarray) -> str:
    """Return a color, rgb in [0, 255], as CSS."""
    return "rgb({},{},{})".format(*(int(round(value)) for value in color))


def typed(values: np.ndarray) -> dict[str, str]:
    """Return an array in the binary form of plotly.js, a quarter of the size of its digits."""
    kind = {"i": "i", "u": "u", "f": "f"}[values.dtype.kind] + str(values.dtype.itemsize)
    spec = {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()}
    return spec if values.ndim == 1 else {**spec, "shape": ", ".join(map(str, values.shape))}


def mesh_figure(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Figure:
    """Return a mesh, lit alike on both sides, since many files have faces that are turned inwards.

    vertices: [V, 3] in voxels.
    faces: [F, 3].
    """
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    normals = np.cross(b - a, c - a)
    lengths = np.linalg.norm(normals, axis=1).clip(1e-12)
    shade = 0.66 + 0.5 * np.abs(normals @ LIGHT) / np.linalg.norm(LIGHT) / lengths
    return _scene([_shaded(_mesh(vertices, faces), shade, MATERIAL, 1.0)], resolution)


def voxel_figure(grid: np.ndarray) -> Figure:
    """Return the voxels of a grid, [R, R, R] bool."""
    return _scene(_voxels(grid.astype(np.uint8), {1: (MATERIAL, 1.0)}), len(grid))


def reconstruction_figure(before: np.ndarray, after: np.ndarray) -> Figure:
    """Return the reconstruction and what edits of the ids changed in it. before, after: [R, R, R] bool."""
    solid = np.where(after, np.where(before, 1, 2), 0)
    removed = np.where(before & ~after, 3, 0)
    traces = _voxels(solid, {1: (MATERIAL, 1.0), 2: (ADDED, 1.0)}) + _voxels(removed, {3: (REMOVED, 0.55)})
    return _scene(traces, len(before))


def difference_figure(target: np.ndarray, reconstruction: np.ndarray) -> Figure:
    """Return wrong voxels, and correct ones as a veil through which they are seen. Both grids: [R, R, R] bool."""
    wrong = np.where(target & ~reconstruction, 2, np.where(reconstruction & ~target, 3, 0))
    correct = (target & reconstruction).astype(np.uint8)
    traces = _voxels(wrong, {2: (MISSING, 1.0), 3: (EXTRA, 1.0)}) + _voxels(correct, {1: (CORRECT, 0.22)})
    return _scene(traces, len(target))


class Tokens(NamedTuple):
    """The L tokens of an object on the lattice (X', Y', Z'), in order of x, y, z, with Q codes each."""

    lattice: tuple[int, int, int]
    ids: np.ndarray  # [L, Q]
    first_code: int  # ids below it are empty codes
    occupied: np.ndarray  # [L] bool: its block has a voxel in the reconstruction
    empty: np.ndarray  # [L] bool: it has the ids of an empty grid
    edited: np.ndarray  # [L] bool
    uses: np.ndarray | None  # [L] int, how often its first code occurs in the sample; None until that is known
    colors: np.ndarray  # [L, 3] uint8, the color of its first code

    @property
    def boxed(self) -> np.ndarray:
        """The tokens that the lattice shows, [L] bool: with an empty code the others, else those with voxels."""
        return ~self.empty if self.first_code else self.occupied

    def facts(self, tokens: np.ndarray, copies: int = 1) -> dict[str, Any]:
        """Return what hovering and clicks need: customdata int32 [..., 1], the token, and text [...], its codes.

        tokens: of any shape.
        copies: rows for each token.
        """
        text = np.array([self._text(token) for token in tokens.flat], dtype=object).reshape(tokens.shape)
        return {
            "customdata": typed(tokens[..., None].astype(np.int32).repeat(copies, axis=0)),
            "text": text.repeat(copies, axis=0).tolist(),
            "hovertemplate": HOVER,
        }

    def _text(self, token: int) -> str:
        first, *others = codes = self.ids[token].tolist()
        if first < self.first_code:
            return "empty"
        text = f"{'codes' if others else 'code'} {', '.join(map(str, codes))}"
        if self.uses is None:
            return text
        return f"{text}<br>{'the first is ' if others else ''}used {self.uses[token]} times in the sample"


def lattice_figure(tokens: Tokens, resolution: int) -> Figure:
    """Return the tokens that are `boxed` as colored boxes, with the `facts` of each corner."""
    shown = np.flatnonzero(tokens.boxed)
    size = resolution / np.array(tokens.lattice)
    low = np.stack(np.unravel_index(shown, tokens.lattice), 1)
    corners = (low[:, None] + 0.06 + 0.88 * CUBE) * size  # [S, 8, 3]
    triangles = 8 * np.arange(len(shown))[:, None, None] + CUBE_TRIANGLES
    boxes = {**_mesh(corners.reshape(-1, 3), triangles.reshape(-1, 3)),
             "lightposition": {"x": 2000, "y": -4000, "z": 6000},
             "lighting": {"ambient": 0.72, "diffuse": 0.4, "specular": 0.02},
             "vertexcolor": [css(color) for color in tokens.colors[shown] for _ in range(8)],
             **tokens.facts(shown, copies=8)}  # fmt: skip
    return _scene([boxes], resolution)


def layer_figure(tokens: Tokens, layer: int, chosen: int | None) -> Figure:
    """Return one layer from above, x to the right and y upwards, with the `facts` of each token."""
    lattice = tokens.lattice
    shown = np.arange(len(tokens.ids)).reshape(lattice)[:, :, layer].T  # [Y', X'], a row of the picture each
    pale = tokens.colors + (255 - tokens.colors.astype(int)) * 0.72
    tints = np.where(tokens.occupied[shown][..., None], tokens.colors[shown], pale[shown])
    tints = np.where((tokens.empty & ~tokens.occupied)[shown][..., None], np.array(EMPTY), tints)
    kinds, index = np.unique(tints.reshape(-1, 3), axis=0, return_inverse=True)
    number = len(kinds)
    scale = [[(kind + end) / number, css(color)] for kind, color in enumerate(kinds) for end in (0, 1)]
    cells = {
        "type": "heatmap",
        "z": index.reshape(shown.shape).tolist(),
        "colorscale": scale,
        "zmin": -0.5,
        "zmax": number - 0.5,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        **tokens.facts(shown),
    }
    rows, columns = np.nonzero(tokens.edited[shown])
    edited = {
        "type": "scatter",
        "x": columns.tolist(),
        "y": rows.tolist(),
        "mode": "markers",
        "hoverinfo": "skip",
        "marker": {"symbol": "diamond", "size": 7, "color": "white", "line": {"color": "black", "width": 1}},
    }
    shapes = []
    if chosen is not None and chosen in shown:
        (y,), (x,) = (index.tolist() for index in np.nonzero(shown == chosen))
        shapes = [
            {
                "type": "rect",
                "x0": x - 0.5,
                "x1": x + 0.5,
                "y0": y - 0.5,
                "y1": y + 0.5,
                "line": {"color": css(CHOSEN), "width": 3},
            }
        ]
    axis = {
        "showgrid": False,
        "zeroline": False,
        "tickfont": {"size": 10, "color": "#667"},
        "fixedrange": True,
        "dtick": max(1, max(lattice[:2]) // 8),
        "constrain": "domain",
    }
    names = {name: {"text": name, "standoff": 4} for name in "xy"}
    layout = {
        "xaxis": {**axis, "title": names["x"], "range": [-0.5, lattice[0] - 0.5]},
        "yaxis": {**axis, "title": names["y"], "range": [-0.5, lattice[1] - 0.5], "scaleanchor": "x"},
        "margin": {"l": 36, "r": 6, "t": 6, "b": 34},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
        "hoverlabel": {"align": "left"},
        "dragmode": False,
        "showlegend": False,
        "shapes": shapes,
    }
    return {"data": [cells, edited], "layout": layout}


def _mesh(vertices: np.ndarray, triangles: np.ndarray) -> dict[str, Any]:
    """Return a trace of triangles. vertices: [V, 3], in voxels; triangles: [F, 3] into them."""
    if vertices.dtype.kind == "f":
        vertices = vertices.astype(np.float32)
    indices = triangles.astype(np.uint16 if len(vertices) <= 2**16 else np.int32)
    names = dict(zip("xyzijk", (*vertices.T, *indices.T), strict=True))
    return {"type": "mesh3d", **{name: typed(values) for name, values in names.items()}, "flatshading": True}


def _shaded(mesh: Figure, shade: np.ndarray, color: tuple[int, int, int], opacity: float) -> Figure:
    """Return a trace whose triangles have a color times their shade, [F] in [0, BRIGHTEST], without other light."""
    lightest = np.clip(np.array(color) * BRIGHTEST, 0, 255)
    return {
        **mesh,
        "intensity": typed(np.clip(shade * (255 / BRIGHTEST), 0, 255).astype(np.uint8)),
        "intensitymode": "cell",
        "cmin": 0,
        "cmax": 255,
        "showscale": False,
        "opacity": opacity,
        "colorscale": [[0, "rgb(0,0,0)"], [1 / BRIGHTEST, css(color)], [1, css(lightest)]],
        "lighting": {"ambient": 1, "diffuse": 0, "specular": 0, "fresnel": 0},
        "hoverinfo": "skip",
    }


def _voxels(labels: np.ndarray, looks: dict[int, tuple[tuple[int, int, int], float]]) -> list[dict[str, Any]]:
    """Return a trace for each label that occurs. labels: [R, R, R]; looks: {label: (color, opacity)}."""
    faces = outer_faces(labels)
    traces = []
    for label, (color, opacity) in looks.items():
        own = faces.labels == label
        if not own.any():
            continue
        used, triangles = np.unique(faces.triangles[own], return_inverse=True)
        part = _mesh(faces.corners[used].astype(np.uint16), triangles.reshape(-1, 3))
        traces.append(_shaded(part, faces.shade[own], color, opacity))
    return traces


def _scene(traces: list[dict[str, Any]], resolution: int) -> Figure:
    """Return a 3D panel. The page adds the camera that all panels share, and a box around the chosen token."""
    side = {"visible": False, "range": [0, resolution], "autorange": False}
    edges = np.array([[CUBE[a], CUBE[b], CUBE[b]] for a, b in CUBE_EDGES]).reshape(-1, 3) * resolution
    x, y, z = ([None if row % 3 == 2 else value for row, value in enumerate(axis)] for axis in edges.T.tolist())
    line = {"type": "scatter3d", "mode": "lines", "hoverinfo": "skip"}
    frame = {**line, "x": x, "y": y, "z": z, "line": {"color": "#d9dce2", "width": 1.5}}
    nowhere = dict.fromkeys("xyz", [None])
    chosen = {**line, **nowhere, "line": {"color": css(CHOSEN), "width": 5}, "name": "chosen"}
    scene = {
        "xaxis": side,
        "yaxis": side,
        "zaxis": side,
        "aspectmode": "cube",
        "dragmode": "turntable",
        "camera": CAMERA,
        "bgcolor": BACKGROUND,
    }
    layout = {
        "scene": scene,
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "showlegend": False,
        "paper_bgcolor": BACKGROUND,
        "hoverlabel": {"align": "left"},
    }
    return {"data": [*traces, frame, chosen], "layout": layout}
