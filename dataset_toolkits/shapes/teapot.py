"""Write the Utah teapot as a mesh file: a real object that everyone may pass on, to try a tokenizer with.

    python dataset_toolkits/shapes/teapot.py --output docs/teapot.glb

Martin Newell measured his own teapot and published it as bicubic Bézier patches (The Utilization of Procedure Models
in Digital Image Synthesis, PhD thesis, University of Utah, 1975; with the bottom that was added later: F. Crow, The
Origins of the Teapot, IEEE Computer Graphics and Applications 7(1), 1987). The numbers below are all that defines the
32 patches: 24 of them are quarters of six profiles turned about z, eight are halves of handle and spout.
Departure: two control points of the knob are at 0.8 and 0.45 there, and here, like all others, at 0.8 and 0.56 · 0.8.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import trimesh

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any folder

from dataset_toolkits.shapes.primitives import grid_surface, mesh_of
from trellis.grids.surface import save_mesh
from trellis.utils.command import run_command

# Profiles: four control points (radius, height), from the inside or the bottom outwards or upwards.
ROUND = {
    "rim": ((1.4, 2.4), (1.3375, 2.53125), (1.4375, 2.53125), (1.5, 2.4)),
    "body": ((1.5, 2.4), (1.75, 1.875), (2.0, 1.35), (2.0, 0.9)),
    "foot": ((2.0, 0.9), (2.0, 0.45), (1.5, 0.225), (1.5, 0.15)),
    "bottom": ((1.5, 0.15), (1.5, 0.075), (1.425, 0.0), (0.0, 0.0)),
    "knob": ((0.0, 3.15), (0.8, 3.15), (0.0, 2.85), (0.2, 2.7)),
    "lid": ((0.2, 2.7), (0.4, 2.55), (1.3, 2.55), (1.3, 2.4)),
}
QUARTER = 0.56  # of the radius, the middle control points of a quarter of a circle
# Tubes of two patches that share the fourth row: x and z of one side, x and z of the other side, half the width in y.
TUBES = {
    "handle": (
        (-1.6, 2.025, -1.5, 2.25, 0.3), (-2.3, 2.025, -2.5, 2.25, 0.3), (-2.7, 2.025, -3.0, 2.25, 0.3),
        (-2.7, 1.8, -3.0, 1.8, 0.3),
        (-2.7, 1.575, -3.0, 1.35, 0.3), (-2.5, 1.125, -2.65, 0.9375, 0.3), (-2.0, 0.9, -1.9, 0.6, 0.3),
    ),
    "spout": (
        (1.7, 1.425, 1.7, 0.6, 0.66), (2.6, 1.425, 3.1, 0.825, 0.66), (2.3, 2.1, 2.4, 2.025, 0.25),
        (2.7, 2.4, 3.3, 2.4, 0.25),
        (2.8, 2.475, 3.525, 2.49375, 0.25), (2.9, 2.475, 3.45, 2.5125, 0.15), (2.8, 2.4, 3.2, 2.4, 0.15),
    ),
}  # fmt: skip
STEPS = 8  # along an edge of a patch
DECIMALS = 5  # of coordinates, so that processors that differ in the last bit write the same mesh


def patches() -> np.ndarray:
    """Return the control points of the 32 patches, [32, 4, 4, 3] float64, z up, in Newell's unit."""
    found = []
    for profile in np.array(list(ROUND.values())):
        radius, height = profile[:, :1], profile[:, 1:]  # [4, 1]
        x, y = radius * [1, 1, QUARTER, 0], radius * [0, QUARTER, 1, 1]
        for _ in range(4):
            found.append(np.stack([x, y, np.broadcast_to(height, x.shape)], axis=-1))
            x, y = -y, x
    for rows in np.array(list(TUBES.values())):
        x0, z0, x1, z1, width = rows.T
        for y in (width, -width):
            half = np.stack([x0, x0, x1, x1, 0 * y, y, y, 0 * y, z0, z0, z1, z1]).reshape(3, 4, 7).T  # [7, 4, 3]
            half = half if y[0] > 0 else half[:, ::-1]  # so that all patches face outwards
            found += [half[:4], half[3:]]
    return np.stack(found)


def teapot(steps: int = STEPS) -> trimesh.Trimesh:
    """Return the surface as 2·steps² triangles a patch, less those without area, z up, in Newell's unit."""
    t = np.linspace(0, 1, steps + 1)[:, None]
    bernstein = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])  # [steps + 1, 4]
    sheets = [grid_surface(points) for points in np.einsum("ui,vj,pijk->pvuk", bernstein, bernstein, patches())]
    points = np.concatenate([sheet.vertices for sheet in sheets]).round(DECIMALS) + 0.0  # -0.0 becomes 0.0
    vertices, number = np.unique(points, axis=0, return_inverse=True)
    faces = np.concatenate([sheet.faces + i * len(sheets[0].vertices) for i, sheet in enumerate(sheets)])
    return mesh_of(vertices, number.reshape(-1)[faces])


def write(args: argparse.Namespace) -> None:
    save_mesh(teapot(), args.output, to_y_up=args.output.endswith(".glb"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="file to write: .glb (y-up, as glTF says), .obj, .ply or .stl")
    return run_command(write, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
