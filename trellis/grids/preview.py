"""Images of occupancy grids, drawn on the CPU without a display.

The view is isometric with z up, from +x, -y and above: x runs to the lower right, y to the upper right. Every
exposed face that looks towards the viewer is drawn, the farthest first, which is an exact depth order in a grid.
Needs numpy only, and Pillow to write text and files.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from ..utils.files import atomic_write
from .shading import slope_and_hollow

BACKGROUND = (250, 250, 251)
MATERIAL = (158, 178, 206)
CORRECT, MISSING, EXTRA = (205, 208, 213), (222, 52, 48), (34, 104, 214)
TEXT, RULE = (45, 50, 60), (225, 227, 231)
OUTLINE = 0.72  # brightness beside a nearer part
HIDDEN = 0.25  # strength of wrong voxels behind others
MARGIN, CAPTION, HEADING = 14, 30, 44  # pixels in a contact sheet
SAMPLES = 3  # per pixel and axis
VOXEL = (7, 4, 8)  # samples: half a voxel's width, half its depth, its height; near 30 degrees
FACES = np.array([(0, 0, 1), (0, -1, 0), (1, 0, 0)])  # normals of the visible faces: top, left, right
LIGHT = np.array([0.22, -0.55, 0.80])  # top brightest, right darkest


def render_voxels(grid: np.ndarray, colors: np.ndarray | tuple[int, int, int] = MATERIAL) -> np.ndarray:
    """Draw a grid.

    grid: [R, R, R], occupied where not zero, axes x y z.
    colors: rgb in [0, 255], one for all voxels or [R, R, R, 3].
    Return [H, W, 3] uint8. The size depends on R only: 342 x 299 for 64, about as large for others.
    Raise ValueError for a grid of another shape.
    """
    grid = np.asarray(grid) != 0
    if grid.ndim != 3 or len(set(grid.shape)) != 1:
        raise ValueError(f"grid must be [R, R, R], not {list(grid.shape)}")
    resolution = len(grid)
    voxels, faces = _visible_faces(grid)
    colors = np.asarray(colors, dtype=np.float32)
    rgb = colors[tuple(voxels.T)] if colors.ndim == 4 else np.broadcast_to(colors, (len(voxels), 3))
    rgb = np.clip(rgb * _shade(grid, voxels, faces)[:, None], 0, 255)

    enlarge = max(1, round(64 / resolution))  # small grids get larger voxels
    step = SAMPLES * max(1, round(resolution / 64))
    hits, nearness = _draw(voxels, faces, resolution, enlarge, step)
    palette = np.concatenate([rgb, np.array([BACKGROUND], dtype=np.float32)])  # -1 is the background
    samples = palette[hits] * _outlines(nearness)[..., None]
    height, width = hits.shape[0] // step, hits.shape[1] // step
    pixels = samples.reshape(height, step, width, step, 3).mean(axis=(1, 3))
    return pixels.round().astype(np.uint8)


def _visible_faces(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return voxel [F, 3] and direction [F] (into FACES) of the faces without a neighbor, farthest first."""
    padded = np.pad(grid, 1)
    found = []
    for normal in FACES:
        x, y, z = (slice(1 + shift, shift - 1 or None) for shift in normal)
        found.append(np.argwhere(grid & ~padded[x, y, z]))
    voxels = np.concatenate(found)
    faces = np.repeat(np.arange(len(FACES)), [len(part) for part in found])
    order = np.argsort(voxels @ FACES.sum(0), kind="stable")
    return voxels[order], faces[order]


def _shade(grid: np.ndarray, voxels: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the brightness of each face, [F] float32; see `shading`."""
    slope, hollow = slope_and_hollow(grid, voxels, FACES[faces])
    normal = slope + 0.6 * FACES[faces]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    light = np.maximum(normal @ LIGHT, 0) / np.linalg.norm(LIGHT)
    return ((0.46 + 0.80 * light) * (1 - 0.5 * hollow)).astype(np.float32)


def _draw(
    voxels: np.ndarray, faces: np.ndarray, resolution: int, enlarge: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which face each sample sees, -1 for none, and how near it is; both [H, W], multiples of step."""
    half, depth, height = (enlarge * length for length in VOXEL)
    shape = -(-(2 * depth + height) * resolution // step) * step, -(-2 * half * resolution // step) * step

    # The six-sided outline of a voxel, divided among its three faces; neighbors tile without gaps.
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

    x, y, z = voxels.T
    origin = ((x - y + resolution - 1) * depth + (resolution - 1 - z) * height) * shape[1] + (x + y) * half
    hits = np.full(shape, -1, dtype=np.int32)
    targets = origin[:, None] + sprites[faces]
    # If several values go to one sample, numpy keeps the last, which is the nearest.
    hits.reshape(-1)[targets.ravel()] = np.repeat(np.arange(len(voxels), dtype=np.int32), sprites.shape[1])
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
    """Draw two grids [R, R, R] as one: correct voxels light gray, missing ones red, extra ones blue.

    Wrong voxels behind others shine through faintly, so that no error is hidden. Return an image as `render_voxels`.
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

    rows: at least one (target, reconstruction, caption); grids as for `render_voxels`, all of one R. A caption that
        is too long loses its middle.
    Return [H, W, 3] uint8: one object per line, or two if there are more than four.
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
        for index, heading in enumerate(("input", "reconstruction", "difference")):
            center = MARGIN + column * (width + gap) + (index + 0.5) * width / 3
            draw.text((center, HEADING / 2), heading, TEXT, ImageFont.load_default(17), anchor="mm")
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
    """Return the text on one line, without its middle if it does not fit."""
    text = " ".join(text.split())
    shortened, kept = text, len(text)
    while kept and not fits(shortened):
        kept -= 1
        shortened = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    return shortened


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write an image [H, W, 3] uint8 as PNG, atomically."""
    from PIL import Image

    with atomic_write(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")
