"""Organs, plants and animals.

Each draws proportions and parts from a generator and returns the parts. z is up and units are free; parts
overlap where real ones do.
"""

import numpy as np
from numpy.random import Generator
from trimesh import Trimesh

from dataset_toolkits.shapes.primitives import (
    bar,
    ellipsoid,
    grid_surface,
    lathe,
    mesh_of,
    mirrored,
    spline,
    sweep,
    tilted,
)

Parts = list[Trimesh]


def organ(rng: Generator) -> Parts:
    """Make a smooth organ: one to three swollen lobes, bent like a kidney, with vessels running out of some."""

    def lobe(radii: np.ndarray, bumps: float) -> Trimesh:
        ball = ellipsoid((0, 0, 0), (1, 1, 1), 4)
        directions = rng.normal(size=(6, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        swell = np.exp(3 * (ball.vertices @ directions.T - 1)) @ rng.uniform(-bumps, bumps, 6)
        points = ball.vertices * (1 + swell)[:, None] * radii
        bend = rng.uniform(0.2, 1.0) / radii[2]
        points[:, 0] += bend * points[:, 2] ** 2 * 0.5
        return mesh_of(points, ball.faces)

    parts = [lobe(rng.uniform((0.45, 0.4, 0.7), (0.7, 0.65, 1.0)), 0.6)]
    for _ in range(int(rng.integers(3))):
        smaller = lobe(rng.uniform((0.3, 0.3, 0.35), (0.45, 0.45, 0.6)), 0.4)
        turned = tilted(smaller, rng.uniform(-50, 50), (0, 1, 0))
        parts.append(turned.apply_translation(rng.uniform((0.2, -0.35, -0.6), (0.7, 0.35, 0.7))))
    for _ in range(int(rng.integers(4))):
        start = np.array([0.1, rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.3)])
        reach = np.array([rng.uniform(-0.5, 0.9), rng.uniform(-0.6, 0.6), rng.uniform(0.8, 1.3)])
        path = spline([start, start + reach * (0.3, 0.3, 0.6), start + reach], 20)
        parts.append(sweep(path, np.linspace(rng.uniform(0.1, 0.16), 0.08, 20), 16))
    return parts


def branch(
    rng: Generator,
    start: np.ndarray,
    direction: np.ndarray,
    length: float,
    radius: float,
    depth: int,
    tips: list[np.ndarray],
) -> Parts:
    """Make a curved limb that divides into two or three thinner ones, `depth` times; appends where they end."""
    bend = rng.normal(scale=0.18 * length, size=3)
    end = start + direction * length
    path = spline([start, (start + end) / 2 + bend, end], 10)
    parts = [sweep(path, np.linspace(radius, radius * 0.72, 10), 10)]
    if depth == 0:
        tips.append(end)
        return parts
    count = int(rng.integers(2, 4))
    side = np.cross(direction, rng.normal(size=3))
    side /= np.linalg.norm(side)
    for k in range(count):
        turn = 2 * np.pi * (k + rng.uniform(-0.15, 0.15)) / count
        outward = np.cos(turn) * side + np.sin(turn) * np.cross(direction, side)
        heading = direction + outward * rng.uniform(0.5, 0.9)
        heading /= np.linalg.norm(heading)
        parts += branch(rng, end, heading, length * rng.uniform(0.6, 0.8), radius * 0.72, depth - 1, tips)
    return parts


def plant(rng: Generator) -> Parts:
    """Make a tree with crowns of leaves, a bare tree (or a tree of blood vessels), a conifer, or a pot plant."""
    tips: list[np.ndarray] = []
    up = np.array([0.0, 0.0, 1.0])
    kind = rng.integers(4)
    if kind == 0:
        parts = branch(rng, np.zeros(3), up, rng.uniform(0.7, 1.1), rng.uniform(0.09, 0.14), 1, tips)
        for tip in tips:
            size = rng.uniform(0.35, 0.55)
            crown = ellipsoid(tip, (size, size, size * rng.uniform(0.7, 1)))
            parts.append(crown)
        return parts
    if kind == 1:
        return branch(rng, np.zeros(3), up, rng.uniform(0.6, 0.9), rng.uniform(0.11, 0.15), 3, tips)
    if kind == 2:
        tiers, height, radius = int(rng.integers(3, 6)), rng.uniform(1.8, 2.6), rng.uniform(0.5, 0.75)
        parts = [bar((0, 0, 0), (0, 0, height * 0.3), 0.1)]
        for k in range(tiers):
            low = height * (0.2 + 0.62 * k / tiers)
            wide = radius * (1 - 0.75 * k / tiers)
            parts.append(lathe([(0, low + 0.06), (wide, low), (0.02, low + height * 0.85 / tiers)], 24))
        return parts
    pot, tall = rng.uniform(0.28, 0.4), rng.uniform(0.4, 0.6)
    parts = [
        lathe([(0, 0), (pot * 0.75, 0), (pot, tall), (pot * 0.88, tall), (pot * 0.84, tall * 0.85), (0, tall * 0.85)])
    ]
    leaves, turn = int(rng.integers(6, 12)), rng.uniform(0, 2 * np.pi)
    for k in range(leaves):
        angle = turn + 2.4 * k  # the golden angle, as leaves have it
        reach, lift, wide = rng.uniform(0.5, 0.9), rng.uniform(0.6, 1.2), rng.uniform(0.1, 0.17)
        spine = spline([(0, tall * 0.85), (reach * 0.35, tall + lift * 0.7), (reach, tall + lift * 0.75)], 12)
        breadth = wide * np.sin(np.linspace(0.15, np.pi, 12)) ** 0.7
        across = np.linspace(-1, 1, 3)
        out = np.array([np.cos(angle), np.sin(angle)])
        flat = spine[:, None, :1] * out + (breadth[:, None] * across)[..., None] * (-out[1], out[0])
        rise = spine[:, 1:] + 0.3 * breadth[:, None] * np.abs(across)
        parts.append(grid_surface(np.concatenate([flat, rise[..., None]], axis=2)))
    return parts


def animal(rng: Generator) -> Parts:
    """Make a four-legged animal: long or stout, with a neck, snout, ears or horns, and a tail."""
    length, girth = rng.uniform(0.9, 1.4), rng.uniform(0.25, 0.4)
    leg, neck = rng.uniform(0.45, 0.85), rng.uniform(0.2, 0.7)
    back = leg + girth * 0.8
    spine = spline([(-length / 2, 0, back), (0, 0, back - rng.uniform(0, 0.06)), (length / 2, 0, back)], 24)
    shape = np.sin(np.linspace(0.2, np.pi - 0.2, 24)) ** 0.5  # rump and chest are rounded off
    parts = [sweep(spine, girth * shape, 24, squash=rng.uniform(0.75, 0.95))]
    thick = rng.uniform(0.055, 0.08)
    for x in (-length * 0.38, length * 0.38):
        knee = rng.uniform(-0.05, 0.05)
        path = spline(
            [(x, girth * 0.5, back - girth * 0.2), (x + knee, girth * 0.55, leg * 0.5), (x, girth * 0.55, 0)], 12
        )
        parts += mirrored([sweep(path, np.linspace(thick * 2, thick, 12))], 1)
    shoulder = np.array([length * 0.42, 0, back + girth * 0.15])
    head = shoulder + (rng.uniform(0.2, 0.4), 0, neck)
    parts.append(
        sweep(
            spline([shoulder - (0.05, 0, 0.1), (shoulder + head) / 2 + (0.03, 0, 0), head], 12),
            np.linspace(girth * 0.6, 0.14, 12),
            16,
        )
    )
    size = rng.uniform(0.16, 0.22)
    parts.append(ellipsoid(head, (size * 1.1, size * 0.85, size * 0.9)))
    snout = head + (size * rng.uniform(0.9, 1.5), 0, -size * 0.3)
    parts.append(bar(head, snout, size * 0.6, size * 0.4, 14))
    if rng.random() < 0.6:
        ear = tilted(ellipsoid((0, 0, 0), (0.04, 0.08, rng.uniform(0.1, 0.22)), 2), -30, (1, 0, 0))
        parts += mirrored([ear.apply_translation(head + (-0.05, size * 0.7, size))], 1)
    else:
        tip = head + (rng.uniform(-0.2, 0.1), size * 1.5, size * rng.uniform(1.5, 2.5))
        horn = spline([head + (0, size * 0.4, size * 0.5), head + (-0.08, size * 1.3, size * 1.2), tip], 10)
        parts += mirrored([sweep(horn, np.linspace(0.05, 0.02, 10), 8)], 1)
    rump = np.array([-length / 2, 0, back + 0.02])
    drop = rng.uniform(-0.5, 0.4)
    tail = spline([rump + (0.08, 0, 0), rump + (-0.15, 0, 0.05 + drop * 0.2), rump + (-0.28, 0, drop)], 14)
    parts.append(sweep(tail, np.linspace(0.06, 0.035, 14), 10))
    return parts
