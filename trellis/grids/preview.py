"""Images of occupancy grids, drawn on the CPU without a display.

The view is isometric with z up, from +x, -y and above: x runs to the lower right, y to the upper right. Every
exposed face that looks towards the viewer is drawn, the farthest first, which in a lattice is an exact depth
order. Numpy only; Pillow is needed to write text and files.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from ..utils.files import written_aside

BACKGROUND = (250, 250, 251)
MATERIAL = (158, 178, 206)
CORRECT, MISSING, EXTRA = (205, 208, 213), (222, 52, 48), (34, 104, 214)
TEXT, RULE = (45, 50, 60), (225, 227, 231)
OUTLINE, HIDDEN = 0.72, 0.25  # brightness beside a nearer part; strength of wrong cells behind others
MARGIN, CAPTION, HEADING = 14, 30, 44  # pixels of a contact sheet
SAMPLES = 3  # per pixel and axis
CELL = (7, 4, 8)  # samples: half a cell's width, half its depth, its height; near 30 degrees
FACES = np.array([(0, 0, 1), (0, -1, 0), (1, 0, 0)])  # normals of the faces that are seen: top, left, right
LIGHT = np.array([0.22, -0.55, 0.80])  # top brightest, right darkest


def render_voxels(grid: np.ndarray, colors: np.ndarray | tuple[int, int, int] = MATERIAL) -> np.ndarray:
    """Draw a grid.

    grid: [R, R, R], occupied where non-zero, axes x y z.
    colors: one rgb in [0, 255] for all cells, or [R, R, R, 3], of which those of occupied cells are used.
    Returns [H, W, 3] uint8; the size depends on R only: 342 x 299 for 64, about as large for others.
    Raises ValueError for a grid of another shape.
    """
    grid = np.asarray(grid) != 0
    if grid.ndim != 3 or len(set(grid.shape)) != 1:
        raise ValueError(f"grid must be [R, R, R], not {list(grid.shape)}")
    resolution = len(grid)
    cells, faces = _visible_faces(grid)
    colors = np.asarray(colors, dtype=np.float32)
    rgb = colors[tuple(cells.T)] if colors.ndim == 4 else np.broadcast_to(colors, (len(cells), 3))
    rgb = np.clip(rgb * _shade(grid, cells, faces)[:, None], 0, 255)

    enlarge = max(1, round(64 / resolution))  # small grids get larger cells
    step = SAMPLES * max(1, round(resolution / 64))
    hits, nearness = _draw(cells, faces, resolution, enlarge, step)
    palette = np.concatenate([rgb, np.array([BACKGROUND], dtype=np.float32)])  # -1 is the background
    samples = palette[hits] * _outlines(nearness)[..., None]
    height, width = hits.shape[0] // step, hits.shape[1] // step
    pixels = samples.reshape(height, step, width, step, 3).mean(axis=(1, 3))
    return pixels.round().astype(np.uint8)


def _visible_faces(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cell [F, 3] and direction [F] (into FACES) of the faces without a neighbour, farthest first."""
    padded = np.pad(grid, 1)
    found = []
    for normal in FACES:
        x, y, z = (slice(1 + shift, shift - 1 or None) for shift in normal)
        found.append(np.argwhere(grid & ~padded[x, y, z]))
    cells = np.concatenate(found)
    faces = np.repeat(np.arange(len(FACES)), [len(part) for part in found])
    order = np.argsort(cells @ FACES.sum(0), kind="stable")
    return cells[order], faces[order]


def _shade(grid: np.ndarray, cells: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the brightness of each face, [F] float32.

    The light falls on a mix of the face's own normal, which shows cells, and the slope of the blurred grid,
    which shows form. Faces in hollows, with much of the grid before them, are darker.
    """
    margin = 6
    padded = np.pad(grid, margin).astype(np.float32)
    near = _blur(padded, 1, 2)
    far = _blur(near, 3, 1)
    front = cells + FACES[faces] + margin
    slope = np.stack(
        [near[tuple((front - axis).T)] - near[tuple((front + axis).T)] for axis in np.eye(3, dtype=int)], axis=1
    )
    slope /= np.linalg.norm(slope, axis=1, keepdims=True) + 1e-3
    normal = slope + 0.6 * FACES[faces]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    light = np.maximum(normal @ LIGHT, 0) / np.linalg.norm(LIGHT)
    hollow = np.clip((far[tuple(front.T)] - 0.16) / 0.35, 0, 1)
    return ((0.46 + 0.80 * light) * (1 - 0.5 * hollow)).astype(np.float32)


def _blur(values: np.ndarray, radius: int, times: int) -> np.ndarray:
    """Box blur along each axis; the ends wrap around, into the margin."""
    for axis in range(3):
        for _ in range(times):
            total = values.copy()
            for shift in range(1, radius + 1):
                total += np.roll(values, shift, axis) + np.roll(values, -shift, axis)
            values = total / (2 * radius + 1)
    return values


def _draw(
    cells: np.ndarray, faces: np.ndarray, resolution: int, enlarge: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which face each sample sees, -1 for none, and how near that is; [H, W], multiples of step."""
    half, depth, height = (enlarge * length for length in CELL)
    shape = -(-(2 * depth + height) * resolution // step) * step, -(-2 * half * resolution // step) * step

    # The six-sided outline of a cell, divided among its three faces; neighbours tile without gaps.
    row, column = np.mgrid[: 2 * depth + height, : 2 * half] + 0.5
    rim = np.abs(column - half) / half * depth
    top = (row >= rim) & (row < 2 * depth - rim)
    side = (row >= 2 * depth - rim) & (row < 2 * depth - rim + height)
    sprites = np.stack(
        [
            np.ravel_multi_index(np.nonzero(part), shape)
            for part in (top, side & (column < half), side & (column > half))
        ]
    )

    x, y, z = cells.T
    origin = ((x - y + resolution - 1) * depth + (resolution - 1 - z) * height) * shape[1] + (x + y) * half
    hits = np.full(shape, -1, dtype=np.int32)
    targets = origin[:, None] + sprites[faces]
    # Of several values for one sample numpy keeps the last, which is the nearest.
    hits.reshape(-1)[targets.ravel()] = np.repeat(np.arange(len(cells), dtype=np.int32), sprites.shape[1])
    nearness = np.append(x - y + z, -4 * resolution)[hits]
    return hits, nearness


def _outlines(nearness: np.ndarray) -> np.ndarray:
    """Return a factor for each sample, [H, W] float32: darker beside something much nearer."""
    factor = np.ones(nearness.shape, dtype=np.float32)
    for view, values in ((factor, nearness), (factor.T, nearness.T)):
        jump = np.diff(values, axis=0)
        view[:-1][jump > 3] = OUTLINE
        view[1:][jump < -3] = OUTLINE
    return factor


def render_difference(target: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Draw two grids [R, R, R] as one: correct cells light grey, missing ones red, extra ones blue.

    Wrong cells hidden behind others shine through faintly, so that no error goes unseen. Returns an image as
    `render_voxels` does.
    """
    target, reconstruction = np.asarray(target) != 0, np.asarray(reconstruction) != 0
    wrong = target ^ reconstruction
    colors = np.where(wrong[..., None], np.where(target[..., None], MISSING, EXTRA), CORRECT)
    image = render_voxels(target | reconstruction, colors).astype(np.float32)
    errors = render_voxels(wrong, colors)
    behind = (errors != np.array(BACKGROUND)).any(axis=2, keepdims=True)
    return np.where(behind, image + HIDDEN * (errors - image), image).round().astype(np.uint8)


def contact_sheet(rows: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> np.ndarray:
    """Draw objects side by side: input, reconstruction, and their difference (see `render_difference`).

    rows: at least one (target, reconstruction, caption); the grids as for `render_voxels`, all of one R. A
        caption too long for its place loses its middle.
    Returns [H, W, 3] uint8: one object per line, or two where there are more than four.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("a contact sheet needs at least one object")
    panels = [_panel(*row) for row in rows]
    across = 1 if len(panels) <= 4 else 2
    lines = [panels[start : start + across] for start in range(0, len(panels), across)]
    heights = [max(panel.height for panel in line) for line in lines]
    width = panels[0].width
    gap = 2 * MARGIN
    size = across * (width + gap), HEADING + sum(heights) + gap * len(lines)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    top = HEADING
    for line, height in zip(lines, heights, strict=True):
        for column, panel in enumerate(line):
            left = MARGIN + column * (width + gap)
            draw.line((left, top, left + width, top), RULE)
            sheet.paste(panel, (left, top + MARGIN + height - panel.height))
        top += height + gap
    for column in range(across):
        for place, heading in enumerate(("input", "reconstruction", "difference")):
            centre = MARGIN + column * (width + gap) + (place + 0.5) * width / 3
            draw.text((centre, HEADING / 2), heading, TEXT, ImageFont.load_default(17), anchor="mm")
    return np.array(sheet)


def _panel(target: np.ndarray, reconstruction: np.ndarray, caption: str):
    """Return one object's three pictures, cut to its height, and a line of text below, as a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    target, reconstruction = np.asarray(target) != 0, np.asarray(reconstruction) != 0
    pictures = np.concatenate(
        [render_voxels(target), render_voxels(reconstruction), render_difference(target, reconstruction)], axis=1
    )
    drawn = np.flatnonzero((pictures != np.array(BACKGROUND)).any(axis=(1, 2)))
    if drawn.size:
        pictures = pictures[drawn[0] : drawn[-1] + 1]
    height, width = pictures.shape[:2]
    panel = Image.new("RGB", (width, height + CAPTION), BACKGROUND)
    panel.paste(Image.fromarray(pictures), (0, 0))

    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    right, line = width, height + CAPTION - 9
    for text, color in (
        (f"{(reconstruction & ~target).sum()} extra", EXTRA),
        (f"{(target & ~reconstruction).sum()} missing", MISSING),
        (f"{target.sum()} voxels", TEXT),
    ):
        draw.text((right, line), text, color, font, anchor="rm")
        right -= draw.textlength(text, font) + 14
    caption = _shorten(caption, lambda text: draw.textlength(text, font) <= right)
    draw.text((0, line), caption, TEXT, font, anchor="lm")
    return panel


def _shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Return the text on one line, without its middle where it does not fit."""
    text = " ".join(text.split())
    shortened, kept = text, len(text)
    while kept and not fits(shortened):
        kept -= 1
        shortened = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    return shortened


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write an image [H, W, 3] uint8 as PNG, aside and renamed."""
    from PIL import Image

    with written_aside(path) as aside:
        Image.fromarray(image).save(aside, format="PNG")
