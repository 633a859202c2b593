"""dataset.py sheet: pictures of objects side by side."""

import argparse

import numpy as np

from dataset_toolkits.report import count
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.preview import BACKGROUND, TEXT, render_voxels, save_png
from trellis.utils.errors import ConfigError
from trellis.utils.progress import waiting

from .families import check_iou, find
from .objects import bits_of, check_new, open_roots

ACROSS = 8  # objects in a line
LARGEST = 1000  # objects of a sheet
CAPTION = 22  # pixels
LETTERS = 42  # of a caption


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.objects <= LARGEST:
        raise ConfigError(f"--objects {args.objects}: must lie between 1 and {LARGEST}.")
    if args.output.suffix.lower() != ".png":
        raise ConfigError(f"--output {args.output}: is to be a picture; give a name that ends in .png")
    check_iou(args.iou)
    check_new(args.output, "--output")
    dataset = open_roots(args)
    lines = _family_lines(dataset, args) if args.families else _sample_lines(dataset, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(args.output, sheet(dataset, lines))
    print(f"{args.output}: {count(sum(map(len, lines)), 'object')} of {len(dataset)}")


def _sample_lines(dataset: SparseStructure, args: argparse.Namespace) -> list[np.ndarray]:
    number = min(args.objects, len(dataset))
    chosen = np.sort(np.random.default_rng(args.seed).choice(len(dataset), number, replace=False))
    return np.split(chosen, range(ACROSS, number, ACROSS))


def _family_lines(dataset: SparseStructure, args: argparse.Namespace) -> list[np.ndarray]:
    lines, left = [], args.objects
    for family in find(dataset, args.iou).families():
        if left < 2:
            break
        lines.append(family[: min(ACROSS, left)])
        left -= len(lines[-1])
    if not lines:
        raise ConfigError(f"--families: no two objects overlap with an IoU of {args.iou}; lower --iou")
    return lines


def sheet(dataset: SparseStructure, lines: list[np.ndarray]) -> np.ndarray:
    """Draw objects, those of each line [n] beside each other, with their names. Return [H, W, 3] uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    rows = []
    with waiting("drawing", sum(map(len, lines))) as progress:
        for line in lines:
            pictures = []
            for index, row in zip(line.tolist(), bits_of(dataset, line), strict=True):
                bits = np.unpackbits(row, count=dataset.resolution**3)
                picture = render_voxels(bits.reshape((dataset.resolution,) * 3))
                panel = Image.new("RGB", (picture.shape[1], picture.shape[0] + CAPTION), BACKGROUND)
                panel.paste(Image.fromarray(picture), (0, 0))
                name = " ".join(dataset.name(index).split())
                caption = f"{dataset.entries[index].split} {name if len(name) <= LETTERS else '…' + name[-LETTERS:]}"
                ImageDraw.Draw(panel).text((4, picture.shape[0] + CAPTION // 2), caption, TEXT, font, anchor="lm")
                pictures.append(np.array(panel))
                progress(progress.done + 1)
            rows.append(np.concatenate(pictures, axis=1))
    width = max(row.shape[1] for row in rows)
    sheet = np.full((sum(row.shape[0] for row in rows), width, 3), BACKGROUND, np.uint8)
    top = 0
    for row in rows:
        sheet[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0]
    return sheet
