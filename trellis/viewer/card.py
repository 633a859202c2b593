"""What the page says in words, numbers and small pictures: scores, and the token that was chosen."""

import base64
import io
from typing import Any

import numpy as np
from dash import html

from ..grids.preview import BACKGROUND, MATERIAL, render_voxels
from .usage import CodeUsage, Usage
from .visit import Visit
from .workbench import Workbench

# key: (title, format, explanation, whether more is better)
SCORES = {
    "iou": ("IoU", "{:.4f}", "voxels in both, as a share of those in either", True),
    "f_score": (
        "F-score",
        "{:.4f}",
        "at one voxel: harmonic mean of the shares of voxels at most one voxel from the other grid",
        True,
    ),
    "chamfer": ("chamfer", "{:.4f}", "mean distance to the nearest voxel of the other grid, in voxels", False),
    "precision": ("precision", "{:.4f}", "share of the reconstruction's voxels that are in the input", True),
    "recall": ("recall", "{:.4f}", "share of the input's voxels that are in the reconstruction", True),
}
SOMETIMES = 0.25  # how often a voxel of a code's block is occupied, to be drawn


def score_tiles(workbench: Workbench, visit: Visit) -> list:
    scores = workbench.scores(visit.grid, workbench.decode(visit.ids))
    before = workbench.scores(visit.grid, workbench.decode(visit.before)) if visit.edits else scores
    tiles = []
    for key, (title, form, hint, upwards) in SCORES.items():
        change = scores[key] - before[key]
        note, mood = "", ""
        if abs(change) >= 5e-5:
            note, mood = f"{change:+.4f}", "good" if (change > 0) == upwards else "bad"
        tiles.append(tile(title, form.format(scores[key]), hint, note, mood))
    empties, total = workbench.empties(visit.ids), workbench.num_tokens
    tiles += [
        tile("ids", f"{total:,}", "what a language model would read and write for this object"),
        tile(
            "empty ids",
            f"{empties:,}",
            "ids that are those of an empty grid at their place",
            f"{100 * empties / total:.0f} %",
        ),
        tile("different codes", f"{len(np.unique(visit.ids)):,}", "in this object"),
        tile("edited", str(len(visit.edits)), "ids that differ from the encoder's"),
    ]
    return tiles


def tile(title: str, value: str, hint: str, note: str = "", mood: str = "") -> Any:
    parts = [html.Span(title, className="label"), html.B(value), html.Span(note, className=f"change {mood}")]
    return html.Div(parts, className="tile", title=hint)


def token_card(workbench: Workbench, usage: Usage, visit: Visit, token: int, part: int) -> list:
    """Facts and pictures of a token's code number `part`."""
    place = token * workbench.codes_per_token + part
    code, before = int(visit.ids[place]), int(visit.before[place])
    at = np.unravel_index(token, workbench.lattice)
    used = usage.of(code, part)
    cells = ", ".join(
        f"{axis} {index * size}–{(index + 1) * size - 1}"
        for axis, index, size in zip("xyz", at, workbench.block, strict=True)
    )
    kind = "empty space" if code == workbench.empty_ids[place] else "not empty space"
    facts = [
        ("code", [html.B(str(code)), f" ({kind}" + (f"; the encoder chose {before})" if code != before else ")")]),
        ("stands for", f"voxels {cells}"),
        ("used", usage_text(usage, used)),
    ]  # fmt: skip
    repeated = workbench.code_repeated(code, part)
    missing = "not in the sample" if used.voxels is None else "no voxels"
    pictures = [
        picture(
            average_picture(used.voxels),
            "on average",
            "its own block, as decoded on average where the code occurs in the sample; the paler, the rarer",
            missing,
        ),
        picture(
            drawn(repeated, repeated) if repeated.any() else None,
            "among 26 copies",
            "its own block, with the same code in the 26 tokens around it and empty space farther out",
            "no voxels",
        ),
    ]
    table = html.Table([html.Tr([html.Th(name), html.Td(value)]) for name, value in facts])
    return [html.Div([table, html.Div(pictures, className="pictures")], className="facts")]


def progress_text(usage: Usage) -> tuple[str, bool]:
    """How far counting has come, and whether it has ended."""
    if usage.problem:
        return f"counting codes ended after {usage.done} objects: {usage.problem}", True
    if usage.done == usage.sampled:
        return f"codes counted over {usage.done} objects" if usage.sampled else "", True
    return f"counting codes: {usage.done} of {usage.sampled} objects", False


def usage_text(usage: Usage, used: CodeUsage) -> str:
    if not usage.sampled:
        return "unknown: there is no data set to count over"
    if not used.tokens:
        return f"never in {usage.done} objects"
    return (
        f"{used.tokens:,} times in {usage.done} objects ({100 * used.share:.2g} % of all tokens), in "
        f"{used.objects} of them; rank {used.rank:,} of {usage.workbench.n_embed:,}"
    )


def average_picture(voxels: np.ndarray | None) -> np.ndarray | None:
    """voxels: [bx, by, bz], how often each is occupied."""
    if voxels is None or not (voxels >= SOMETIMES).any():
        return None
    return drawn(voxels >= SOMETIMES, voxels)


def drawn(voxels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] of voxels, bool of any shape; the closer their strength is to 0, the paler."""
    side = max(voxels.shape)
    margins = [((side - size) // 2, side - size - (side - size) // 2) for size in voxels.shape]
    strength = np.pad(strength, margins)[..., None]
    return render_voxels(np.pad(voxels, margins), np.array(MATERIAL) * strength + np.array(BACKGROUND) * (1 - strength))


def picture(image: np.ndarray | None, title: str, hint: str, otherwise: str) -> Any:
    from PIL import Image

    if image is None:
        content = html.Div(otherwise, className="nothing")
    else:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        content = html.Img(src="data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), alt=title)
    return html.Figure([content, html.Figcaption(title)], title=hint)
