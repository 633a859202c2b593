"""Chairs, tables, lamps, vessels and houses.

Each draws proportions and parts from a generator and returns the parts. z is up and units are free; parts
overlap where real ones do.
"""

import numpy as np
from numpy.random import Generator
from trimesh import Trimesh

from dataset_toolkits.shapes.primitives import (
    bar,
    box,
    circle,
    disc,
    ellipsoid,
    lathe,
    mesh_of,
    mirrored,
    prism,
    rectangle,
    spline,
    sweep,
    tilted,
)

Parts = list[Trimesh]


def legs(rng: Generator, width: float, depth: float, height: float, radius: float) -> Parts:
    """Make four legs below height, at the corners of a rectangle: square posts, or tapered and splayed."""
    if rng.random() < 0.4:
        side = radius * 1.8
        post = box((width / 2 - side / 2, depth / 2 - side / 2, height / 2), (side, side, height))
    else:
        splay = rng.uniform(0, 0.15) * height
        top = np.array([width / 2 - 1.5 * radius, depth / 2 - 1.5 * radius, height])
        post = bar(top, top + (splay, splay, -height), radius, radius * rng.uniform(0.5, 0.9))
    return mirrored(mirrored([post], 0), 1)


def chair(rng: Generator) -> Parts:
    """Make a chair with a slatted or solid back, maybe armrests; or a swivel chair on a star of feet."""
    width, depth = rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.1)
    seat, back = rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.5)
    thick = rng.uniform(0.06, 0.16)
    swivel = rng.random() < 0.3
    if swivel:
        feet = 5
        reach = rng.uniform(0.5, 0.6)
        tips = circle(reach, feet)
        parts = [bar((0, 0, 0.16), (x, y, 0.06), 0.06, 0.04) for x, y in tips]
        parts += [ellipsoid((x, y, 0.06), (0.07, 0.07, 0.06), 2) for x, y in tips]
        parts += [disc(0.06, 0.1, seat, 16)]
    else:
        parts = legs(rng, width, depth, seat, rng.uniform(0.05, 0.08))
        if rng.random() < 0.5:  # stretchers
            low = seat * rng.uniform(0.25, 0.5)
            parts += mirrored([box((width / 2 - 0.09, 0, low), (0.06, depth - 0.15, 0.06))], 0)
    if swivel or rng.random() < 0.3:  # a cushion
        parts.append(ellipsoid((0, 0, seat), (width / 2, depth / 2, thick)))
    else:
        parts.append(box((0, 0, seat), (width, depth, thick)))

    top = seat + back
    lean = rng.uniform(3, 14)
    behind = depth / 2 - 0.05
    style = rng.integers(3)
    if style == 0:
        panel = [box((0, behind, seat + back * 0.58), (width * 0.96, 0.08, back * 0.84))]
        if swivel:
            panel.append(box((0, behind + 0.05, seat + back * 0.15), (0.14, 0.06, back * 0.5)))
    else:
        panel = mirrored([bar((width / 2 - 0.06, behind, seat), (width / 2 - 0.06, behind, top), 0.05)], 0)
        panel.append(box((0, behind, top - 0.08), (width - 0.06, 0.08, rng.uniform(0.12, 0.24))))
        count = int(rng.integers(2, 5))
        for t in (np.arange(count) + 0.5) / count:
            if style == 1:
                x = (t - 0.5) * (width - 0.2)
                panel.append(box((x, behind, seat + back * 0.5), (0.07, 0.05, back * 0.95)))
            else:
                panel.append(box((0, behind, seat + back * 0.85 * t), (width - 0.1, 0.05, back * 0.12)))
    parts += [tilted(mesh, -lean, (1, 0, 0), (0, behind, seat)) for mesh in panel]
    if rng.random() < 0.4:
        rise, x = rng.uniform(0.3, 0.45), width / 2 - 0.03
        rest = [
            box((x, 0, seat + rise), (0.1, depth * 0.85, 0.06)),
            bar((x, -depth * 0.35, seat), (x, -depth * 0.35, seat + rise), 0.04),
        ]
        parts += mirrored(rest, 0)
    return parts


def table(rng: Generator) -> Parts:
    """Make a rectangular table on four legs or two trestles, or a round one on legs or a turned column."""
    width, depth, height = rng.uniform(1.2, 2.2), rng.uniform(0.8, 1.2), rng.uniform(0.6, 1.1)
    thick = rng.uniform(0.05, 0.1)
    if rng.random() < 0.4:
        radius = rng.uniform(0.6, 0.95)
        parts = [disc(radius, height - thick, height, 48)]
        if rng.random() < 0.6:
            waist = rng.uniform(0.06, 0.14)
            heights = np.array([0, 0.05, 0.12, 0.5, 0.9, 1]) * (height - thick)
            radii = np.array([0.6, 0.58, 0.2, 0, 0.15, 0.4]) * radius * 0.9 + waist
            parts.append(lathe([(0, 0), *spline(np.column_stack([radii, heights]), 30)]))
        else:
            parts += legs(rng, radius * 1.4, radius * 1.4, height - thick, 0.06)
        return parts
    parts = [box((0, 0, height - thick / 2), (width, depth, thick))]
    if rng.random() < 0.25:
        foot = box((width * 0.36, 0, 0.04), (0.14, depth * 0.85, 0.08))
        post = box((width * 0.36, 0, height / 2), (0.1, depth * 0.3, height - thick))
        beam = box((0, 0, height * 0.35), (width * 0.72, 0.07, 0.12))
        return parts + mirrored([foot, post], 0) + [beam]
    parts += legs(rng, width * 0.96, depth * 0.94, height - thick, rng.uniform(0.05, 0.08))
    if rng.random() < 0.5:  # an apron below the top
        deep = rng.uniform(0.1, 0.18)
        outline = rectangle(width * 0.9, depth * 0.86), rectangle(width * 0.9 - 0.1, depth * 0.86 - 0.1)
        parts.append(prism(outline[0], height - thick - deep, height - thick, hole=outline[1]))
    if rng.random() < 0.35:  # a shelf, or drawers on one side
        parts.append(box((0, 0, height * 0.3), (width * 0.9, depth * 0.88, 0.05)))
    elif rng.random() < 0.4:
        parts.append(box((width * 0.3, 0, height * 0.6), (width * 0.3, depth * 0.85, height * 0.65)))
    return parts


def lamp(rng: Generator) -> Parts:
    """Make a standing lamp on a foot or a tripod, straight or with a bent neck, and an open shade."""
    height, foot = rng.uniform(1.3, 2.2), rng.uniform(0.3, 0.45)
    top, bottom, tall = rng.uniform(0.18, 0.35), rng.uniform(0.36, 0.55), rng.uniform(0.35, 0.55)
    bent = rng.random() < 0.4
    reach = rng.uniform(0.5, 0.9) if bent else 0.0
    if bent or rng.random() < 0.6:
        parts = [lathe([(0, 0), (foot, 0), (foot, 0.05), (foot * 0.3, 0.12), (0, 0.13)])]
    else:
        knot = height * rng.uniform(0.45, 0.7)
        parts = [bar((0, 0, knot), (x, y, 0), 0.04) for x, y in circle(foot * 1.3, 3)]
    if bent:
        path = spline(
            [(0, 0, 0.05), (-0.05, 0, height * 0.6), (reach * 0.45, 0, height * 1.05), (reach, 0, height * 0.85)], 32
        )
    else:
        bulge = rng.uniform(0.05, 0.25)
        if rng.random() < 0.4:  # a turned body
            z = np.linspace(0.05, height * 0.8, 24)
            wave = np.sin(np.linspace(0, np.pi * rng.integers(1, 4), 24)) ** 2
            parts.append(lathe(np.column_stack([0.04 + bulge * wave, z])))
        path = np.array([(0, 0, 0.05), (0, 0, height)])
    parts.append(sweep(path, rng.uniform(0.03, 0.05)))
    end = path[-1]
    if rng.random() < 0.65:
        shade = np.array([(bottom, end[2] - tall * 0.75), (top, end[2] + tall * 0.25)])
    else:  # a dome
        angles = np.linspace(0, np.pi / 2, 12)
        shade = np.column_stack([bottom * np.cos(angles), end[2] - tall * 0.5 + tall * 0.7 * np.sin(angles)])
    parts.append(lathe(shade, 40).apply_translation((end[0], end[1], 0)))
    parts.append(ellipsoid(end - (0, 0, tall * 0.2), (0.11, 0.11, 0.15), 2))
    return parts


def vessel(rng: Generator) -> Parts:
    """Make a vase, bottle, goblet, jug or cup: a turned wall with a thickness, maybe with a handle or two."""
    height = rng.uniform(0.9, 1.8)
    kind = rng.integers(4)
    radii = {
        0: [
            rng.uniform(0.2, 0.35),
            rng.uniform(0.4, 0.6),
            rng.uniform(0.35, 0.6),
            rng.uniform(0.12, 0.3),
            rng.uniform(0.2, 0.4),
        ],  # vase
        1: [0.34, 0.38, rng.uniform(0.34, 0.4), rng.uniform(0.1, 0.14), rng.uniform(0.1, 0.13)],  # bottle
        2: [rng.uniform(0.3, 0.4), 0.07, 0.07, rng.uniform(0.3, 0.45), rng.uniform(0.3, 0.4)],  # goblet
        3: [
            rng.uniform(0.35, 0.5),
            rng.uniform(0.4, 0.55),
            rng.uniform(0.4, 0.55),
            rng.uniform(0.4, 0.5),
            rng.uniform(0.4, 0.55),
        ],  # cup
    }[int(kind)]
    if kind == 3:
        height = rng.uniform(0.7, 1.2)
    outer = spline(np.column_stack([radii, np.linspace(0, height, len(radii))]), 40)
    wall = rng.uniform(0.03, 0.06)
    floor = height * 0.55 if kind == 2 else wall
    inside = outer[outer[:, 1] > floor] - (wall, 0)
    profile = np.concatenate([[(0, 0)], outer, inside[::-1], [(0, inside[0, 1])]])
    parts = [lathe(profile.clip((0, 0), None), 48)]
    if kind in (0, 3) and rng.random() < 0.6:
        low, high = height * rng.uniform(0.15, 0.35), height * rng.uniform(0.65, 0.85)
        at = np.interp([low, high], outer[:, 1], outer[:, 0])
        out = at.max() + rng.uniform(0.2, 0.35)
        handle = spline(
            [
                (at[0] - 0.02, 0, low),
                (out, 0, low * 0.7 + high * 0.3),
                (out, 0, low * 0.2 + high * 0.8),
                (at[1] - 0.02, 0, high),
            ],
            28,
        )
        grips = [sweep(handle, rng.uniform(0.035, 0.055))]
        parts += mirrored(grips, 0) if kind == 0 else grips
    if kind == 1 and rng.random() < 0.5:
        parts.append(disc(outer[-1, 0] + 0.03, height - 0.02, height + 0.1))
    return parts


def house(rng: Generator) -> Parts:
    """Make a house with a gabled, hipped or flat roof and eaves, door, windows, maybe a chimney, wing or porch."""
    width, depth, height = rng.uniform(1.3, 2.2), rng.uniform(0.9, 1.4), rng.uniform(0.6, 1.2)
    rise, eave = rng.uniform(0.4, 0.9), rng.uniform(0.05, 0.15)

    def block(x: float, y: float, width: float, depth: float, height: float, rise: float) -> Parts:
        half, side = width / 2 + eave, depth / 2 + eave
        style = rng.integers(3)
        ridge = half if style == 0 else half * rng.uniform(0.1, 0.6)
        roof = np.array(
            [
                (-half, -side, 0),
                (half, -side, 0),
                (half, side, 0),
                (-half, side, 0),
                (-ridge, 0, rise),
                (ridge, 0, rise),
            ]
        ) + (x, y, height)
        faces = np.array([(0, 1, 5), (0, 5, 4), (2, 3, 4), (2, 4, 5), (1, 2, 5), (3, 0, 4), (0, 2, 1), (0, 3, 2)])
        walls = box((x, y, height / 2), (width, depth, height))
        if style == 2 and rng.random() < 0.5:
            return [walls, box((x, y, height + 0.05), (2 * half, 2 * side, 0.1))]
        return [walls, mesh_of(roof, faces)]

    parts = block(0, 0, width, depth, height, rise)
    front = -depth / 2
    parts.append(box((0, front, height * 0.3), (0.22, 0.08, height * 0.6)))
    windows = int(rng.integers(1, 3))
    for k in range(windows):
        x = (k + 1) / (windows + 1) * (width / 2) + 0.12
        frame = tilted(prism(rectangle(0.24, 0.26), 0, 0.06, hole=rectangle(0.15, 0.17)), 90, (1, 0, 0))
        parts += mirrored([frame.apply_translation((x, front + 0.01, height * 0.55))], 0)
    if rng.random() < 0.6:
        parts.append(box((width * 0.28, depth * 0.18, height + rise * 0.65), (0.16, 0.16, rise * 0.9)))
    if rng.random() < 0.4:
        low = height * rng.uniform(0.55, 0.8)
        parts += block(-width * 0.55, -depth * 0.35, width * 0.5, depth * 0.9, low, rise * 0.6)
    if rng.random() < 0.4:
        deep = rng.uniform(0.3, 0.45)
        parts.append(box((0, front - deep / 2, 0.03), (width * 0.6, deep, 0.06)))
        parts.append(box((0, front - deep / 2, height * 0.72), (width * 0.6, deep, 0.06)))
        foot = np.array([width * 0.27, front - deep * 0.85, 0])
        parts += mirrored([bar(foot, foot + (0, 0, height * 0.7), 0.04)], 0)
    return parts
