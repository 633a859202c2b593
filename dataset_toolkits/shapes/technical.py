"""Gears, brackets, vehicles, springs and open shells.

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
    grid_surface,
    lathe,
    mirrored,
    prism,
    rectangle,
    side_prism,
    sweep,
    tilted,
)

Parts = list[Trimesh]


def gear(rng: Generator) -> Parts:
    """Make a spur gear with bore and hub, solid or spoked, lying or upright, maybe on a shaft or with a pinion."""
    teeth, radius, thick = int(rng.integers(10, 25)), 1.0, rng.uniform(0.15, 0.5)
    depth, hub, bore = rng.uniform(0.1, 0.2), rng.uniform(0.28, 0.4), rng.uniform(0.12, 0.2)

    def rim(teeth: int, radius: float) -> np.ndarray:
        # Each tooth has eight points: rise, top, fall, valley.
        pattern = np.tile([0, 0.5, 1, 1, 1, 0.5, 0, 0], teeth)
        return circle(1, 8 * teeth) * (radius - depth * (1 - pattern))[:, None]

    outline = rim(teeth, radius)
    count = len(outline)
    spoked = rng.random() < 0.5
    inner = radius - depth - rng.uniform(0.12, 0.2) if spoked else bore
    parts = [prism(outline, 0, thick, hole=circle(inner, count))]
    parts.append(prism(circle(hub, 48), -thick * 0.3, thick * 1.3, hole=circle(bore, 48)))
    if spoked:
        arms = int(rng.integers(3, 7))
        middle = (hub + inner) / 2 - 0.02
        for k in range(arms):
            arm = box((middle, 0, thick / 2), (inner - hub + 0.1, rng.uniform(0.14, 0.16), thick * 0.6))
            parts.append(tilted(arm, 360 * k / arms, (0, 0, 1)))
    if rng.random() < 0.4:
        parts.append(disc(bore, -rng.uniform(0.3, 0.9), thick + rng.uniform(0.3, 0.9)))
    if rng.random() < 0.35:
        few = int(rng.integers(8, 12))
        small = few / teeth * (radius - depth / 2) + depth / 2
        pinion = prism(rim(few, small), 0, thick, hole=circle(small * 0.3, 8 * few))
        parts.append(pinion.apply_translation((radius + small - depth * 0.8, 0, 0)))
    if rng.random() < 0.5:
        parts = [tilted(part, 90, (1, 0, 0)) for part in parts]
    return parts


def plate(width: float, depth: float, thick: float, bore: float) -> Trimesh:
    """Make a plate about the origin with a round hole of radius `bore` in the middle."""
    return prism(rectangle(width, depth), 0, thick, hole=circle(bore))


def bracket(rng: Generator) -> Parts:
    """Make an L or U bracket of drilled plates, with gussets or a bearing eye."""
    width, thick = rng.uniform(0.6, 1.3), rng.uniform(0.08, 0.18)
    long, tall = rng.uniform(0.9, 1.5), rng.uniform(0.7, 1.4)
    bore = rng.uniform(0.15, 0.3) * min(width, long)
    parts = [plate(long, width, thick, bore)]

    def wall(x: float) -> Trimesh:
        upright = plate(tall, width, thick, rng.uniform(0.15, 0.3) * min(width, tall))
        upright = tilted(upright, -90, (0, 1, 0))
        return upright.apply_translation((x + thick, 0, tall / 2 + thick * 0.5))

    style = rng.integers(3)
    parts.append(wall(-long / 2))
    if style == 0:
        parts.append(wall(long / 2 - thick))
    else:
        if style == 1:
            run, rise = long * rng.uniform(0.4, 0.8), tall * rng.uniform(0.4, 0.8)
            corner = np.array([-long / 2 + thick, thick])
            outline = np.array([corner, corner + (run, 0), corner + (0, rise)])
            rib = side_prism(outline, 0, thick * 0.8)
            sides = [0.0, width - thick * 0.8] if width > 0.8 else [width / 2 - thick * 0.4]
            parts += [rib.copy().apply_translation((0, y - width / 2, 0)) for y in sides]
        else:
            eye = rng.uniform(0.3, 0.45) * width
            ring = prism(circle(eye), 0, rng.uniform(0.3, 0.6), hole=circle(eye * 0.6))
            ring = tilted(ring, -90, (0, 1, 0))
            parts.append(ring.apply_translation((-long / 2, 0, tall / 2 + thick * 0.5)))
    if rng.random() < 0.5:  # bolts
        for x, y in ((0.4, 0.4), (0.4, -0.4)):
            head = disc(0.07, 0, 0.08 + thick, 6)
            parts.append(head.apply_translation((x * long, y * width, 0)))
    return parts


def vehicle(rng: Generator) -> Parts:
    """Make a car, a van or a lorry: a body by its side view, wheels with rims, maybe a load or a roof rack."""
    length, width, wheel = rng.uniform(1.9, 2.6), rng.uniform(0.8, 1.0), rng.uniform(0.18, 0.26)
    floor, belt = wheel * 0.8, wheel * 0.8 + rng.uniform(0.28, 0.42)
    nose, tail = -length / 2, length / 2
    roof = belt + rng.uniform(0.25, 0.45)
    kind = rng.integers(3)
    axles = [nose + length * 0.2, tail - length * 0.2]
    if kind == 0:
        hood, glass, rear = nose + length * 0.27, nose + length * 0.42, tail - length * rng.uniform(0.16, 0.3)
        body = np.array([(nose, floor), (nose, belt * 0.9), (hood, belt), (tail, belt), (tail, floor)])
        cabin = np.array([(hood, belt - 0.03), (glass, roof), (rear, roof), (tail - length * 0.06, belt - 0.03)])
        parts = [side_prism(body, -width / 2, width / 2), side_prism(cabin, -width * 0.43, width * 0.43)]
        if rng.random() < 0.3:
            rail = bar((glass, width * 0.3, roof + 0.06), (rear, width * 0.3, roof + 0.06), 0.03)
            parts += mirrored([rail], 1)
    elif kind == 1:
        top = roof + rng.uniform(0.1, 0.4)
        slope = nose + length * rng.uniform(0.08, 0.2)
        body = np.array([(nose, floor), (nose, belt), (slope, top), (tail, top), (tail, floor)])
        parts = [side_prism(body, -width / 2, width / 2)]
    else:
        cab = nose + length * rng.uniform(0.25, 0.32)
        high = roof + rng.uniform(0.05, 0.2)
        body = np.array([(nose, floor), (nose, belt), (nose + 0.12, high), (cab, high), (cab, floor)])
        parts = [
            side_prism(body, -width / 2, width / 2),
            box(((cab + tail) / 2, 0, floor + 0.06), (tail - cab + 0.1, width * 0.8, 0.12)),
        ]
        start = cab + 0.06
        middle, span = (start + tail) / 2, tail - start
        load = rng.integers(3)
        if load == 0:
            parts.append(box((middle, 0, (floor + high) / 2 + 0.2), (span, width, high - floor + 0.16)))
        elif load == 1:
            size = (high - floor) * 0.52
            tank = sweep([(start, 0, floor + 0.1 + size), (tail, 0, floor + 0.1 + size)], size, 28)
            parts.append(tank)
        else:  # an open bed
            side = box((middle, width / 2, floor + 0.24), (span, 0.05, 0.3))
            parts += mirrored([side], 1) + [box((tail, 0, floor + 0.24), (0.05, width, 0.3))]
        axles.insert(1, tail - length * 0.2 - 2.3 * wheel)
    tyre = [
        (wheel * 0.5, -0.02),
        (wheel * 0.55, -0.07),
        (wheel * 0.9, -0.08),
        (wheel, -0.05),
        (wheel, 0.05),
        (wheel * 0.9, 0.08),
        (wheel * 0.55, 0.07),
        (wheel * 0.5, 0.02),
    ]
    for x in axles:
        turned = [tilted(mesh, 90, (1, 0, 0)) for mesh in (lathe(tyre, 28), disc(wheel * 0.5, -0.03, 0.03, 16))]
        parts += mirrored([mesh.apply_translation((x, width / 2, wheel)) for mesh in turned], 1)
    return parts


def spring(rng: Generator) -> Parts:
    """Make a coil spring, straight or conical, maybe between plates; or a knot or chain of rings."""
    kind = rng.integers(4)
    wire = rng.uniform(0.05, 0.09)
    if kind <= 1:
        turns, height, radius = rng.uniform(3, 7), rng.uniform(0.9, 2.0), rng.uniform(0.35, 0.55)
        t = np.linspace(0, 1, int(turns * 28))
        wide = radius * (1 - rng.uniform(0, 0.6) * t * (kind == 1))
        angle = 2 * np.pi * turns * t
        parts = [sweep(np.column_stack([wide * np.cos(angle), wide * np.sin(angle), height * t]), wire)]
        if rng.random() < 0.5:
            parts += [
                disc(radius + 0.1, -wire - 0.06, -wire),
                disc(wide[-1] + 0.1, height + wire, height + wire + 0.06),
            ]
        if rng.random() < 0.3:
            parts.append(disc(rng.uniform(0.08, 0.14), -wire, height + wire, 16))
        return parts
    if kind == 2:
        p, q = [(2, 3), (2, 5), (3, 4), (3, 5)][int(rng.integers(4))]
        t = np.linspace(0, 2 * np.pi, 320, endpoint=False)
        inner = rng.uniform(0.3, 0.42)
        ring = 1 + inner * np.cos(q * t)
        knot = np.column_stack([ring * np.cos(p * t), ring * np.sin(p * t), 1.4 * inner * np.sin(q * t)])
        parts = [sweep(knot, wire * 1.3, closed=True)]
        return [tilted(part, 90, (1, 0, 0)) for part in parts] if rng.random() < 0.5 else parts
    links, long = int(rng.integers(2, 4)), rng.uniform(0.42, 0.6)
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    loop = np.column_stack([long * np.cos(t), 0.3 * np.sin(t), np.zeros(40)])
    wire = rng.uniform(0.08, 0.12)
    link = sweep(loop, wire, closed=True)
    return [
        tilted(link.copy(), 90 * (k % 2), (1, 0, 0)).apply_translation((k * (2 * long - 3 * wire), 0, 0))
        for k in range(links)
    ]


def shell(rng: Generator) -> Parts:
    """Make an open sheet without thickness: a bowl, half pipe, vault on posts, saddle roof or bent ribbon."""
    u, v = np.meshgrid(np.linspace(-1, 1, 33), np.linspace(-1, 1, 33), indexing="ij")
    kind = rng.integers(5)
    if kind == 0:
        angles = np.linspace(0, rng.uniform(0.35, 0.62) * np.pi, 20)
        bowl = np.column_stack([np.sin(angles), -rng.uniform(0.5, 1.1) * np.cos(angles)])
        foot = lathe([(0.3, bowl[0, 1] - 0.12), (0.3, bowl[0, 1] + 0.05)])
        return [lathe(bowl, 48, squash=rng.uniform(0.7, 1)), foot]
    if kind == 1:
        arc = np.pi * rng.uniform(0.4, 0.75)
        bend = rng.uniform(-0.5, 0.5)
        points = np.stack(
            [u * rng.uniform(0.8, 1.5), 0.6 * np.sin(v * arc) + bend * u**2, -0.6 * np.cos(v * arc)], axis=2
        )
        return [grid_surface(points)]
    if kind == 2:
        long, high = rng.uniform(0.8, 1.4), rng.uniform(0.4, 0.8)
        points = np.stack([u * long, v * 0.7, high + 0.5 * np.sqrt(1 - (0.98 * v) ** 2)], axis=2)
        post = bar((long - 0.06, 0.64, 0), (long - 0.06, 0.64, high + 0.12), 0.05)
        return [grid_surface(points), *mirrored(mirrored([post], 0), 1)]
    if kind == 3:
        lift = rng.uniform(0.3, 0.6)
        points = np.stack([u, v * rng.uniform(0.7, 1), lift * (u**2 - v**2)], axis=2)
        return [grid_surface(points), *mirrored([bar((0.95, 0, -lift), (0.95, 0, lift * 0.9), 0.05)], 0)]
    turns = rng.uniform(0.7, 1.6)
    angle = u * np.pi * turns
    radius = 0.45 + 0.12 * (u + 1) * turns
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), rng.uniform(0.3, 0.7) * v], axis=2)
    return [grid_surface(points)]
