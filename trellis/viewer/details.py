"""Scores of an object, and facts and pictures of the chosen token."""

import base64
import io
from typing import Any

import numpy as np
from dash import html

from ..grids.preview import BACKGROUND, MATERIAL, render_voxels
from .backend import Backend
from .code_usage import CodeUsage, UsageCounter
from .page_state import EditedObject

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
SOMETIMES = 0.25  # voxels of a code's block that are occupied less often are not drawn


def score_tiles(backend: Backend, shown: EditedObject) -> list:
    """Return the tiles of scores and counts, with the change that edits made."""
    scores = backend.scores(shown.grid, backend.decode(shown.ids))
    before = backend.scores(shown.grid, backend.decode(shown.before)) if shown.edits else scores
    tiles = []
    for key, (title, form, hint, upwards) in SCORES.items():
        change = scores[key] - before[key]
        note, mood = "", ""
        if abs(change) >= 5e-5:
            note, mood = f"{change:+.4f}".replace("-", "−"), "good" if (change > 0) == upwards else "bad"
        tiles.append(tile(title, form.format(scores[key]), hint, note, mood))
    empty = backend.empty(shown.ids)
    codes = sum(len(np.unique(own[own >= backend.first_code])) for own in backend.of_tokens(shown.ids).T)
    tiles.append(tile("ids", f"{backend.num_tokens:,}", "what a language model would read and write for this object"))
    if backend.octree is not None:
        masks, learned = backend.octree.lengths(shown.ids)
        hint = (
            "length as an octree: masks of the blocks that hold something, and codes of the tokens that are not empty"
        )
        tiles.append(tile("as octree", f"{masks + learned:,}", hint, f"{masks:,} + {learned:,}"))
    tiles += [
        tile(
            "empty tokens",
            f"{empty.sum():,}",
            "tokens whose block has no voxel" if backend.empty_code else "tokens as an empty grid has at their place",
            f"{100 * empty.mean():.0f} %",
        ),
        tile("different codes", f"{codes:,}", "in this object"),
        tile("edited", str(len(shown.edits)), "ids that differ from the encoder's"),
    ]
    return tiles


def tile(title: str, value: str, hint: str, note: str = "", mood: str = "") -> Any:
    """Return a number with its title. mood: "good", "bad" or "", the style of the note."""
    parts = [html.Span(title, className="label"), html.B(value), html.Div(note, className=f"change {mood}")]
    return html.Div(parts, className="tile", title=hint)


def token_card(backend: Backend, usage: UsageCounter, shown: EditedObject, token: int, part: int) -> list:
    """Return facts and pictures of a token's code number `part`; of an empty token, facts alone."""
    index = token * backend.codes_per_token + part
    code, before = int(shown.ids[index]), int(shown.before[index])
    codes = backend.of_tokens(shown.ids)[token]
    at = np.unravel_index(token, backend.lattice)
    voxels = ", ".join(
        f"{axis} {cell * size}–{(cell + 1) * size - 1}"
        for axis, cell, size in zip("xyz", at, backend.block, strict=True)
    )
    notes = [f"the encoder chose {code_name(backend, before)}"] if code != before else []
    if not backend.empty_code:
        notes.insert(0, "empty space" if code == backend.empty_ids[index] else "not empty space")
    facts: list[tuple[str, Any]] = [
        ("code", [html.B(code_name(backend, code)), f" ({'; '.join(notes)})" if notes else ""]),
        ("stands for", f"voxels {voxels}"),
    ]
    if code < backend.first_code:
        return [html.Div(fact_table(facts), className="facts")]
    if len(codes) > 1:
        facts.insert(1, ("all its codes", ", ".join(map(str, codes))))
    used = usage.of(code, part)
    facts.append(("used", usage_text(usage, used)))
    repeated = backend.repeated(codes)
    missing = "not in the sample" if used.voxels is None else "no voxels"
    pictures = [
        picture(
            average_picture(used.voxels),
            "on average",
            "its own block, averaged over the code's tokens in the sample; the paler a voxel, the rarer",
            missing,
        ),
        picture(
            drawn(repeated, repeated) if repeated.any() else None,
            "among 26 copies",
            "its own block, with the same token at the 26 places around it and empty space beyond",
            "no voxels",
        ),
    ]
    return [html.Div([fact_table(facts), html.Div(pictures, className="pictures")], className="facts")]


def code_name(backend: Backend, code: int) -> str:
    """Return what the page calls a code."""
    return str(code) if code >= backend.first_code else "empty, id 0"


def fact_table(facts: list[tuple[str, Any]]) -> Any:
    """Return a table of names and values."""
    return html.Table([html.Tr([html.Th(name), html.Td(value)]) for name, value in facts])


def progress_text(usage: UsageCounter) -> tuple[str, bool]:
    """Return how far counting has come, and whether it has ended."""
    if usage.problem:
        return f"counting codes ended after {usage.done} objects: {usage.problem}", True
    if usage.done == usage.sampled:
        return f"codes counted over {usage.done} objects" if usage.sampled else "", True
    return f"counting codes: {usage.done} of {usage.sampled} objects", False


def usage_text(usage: UsageCounter, used: CodeUsage) -> str:
    """Return a sentence on how often a code occurs."""
    if not usage.sampled:
        return "unknown: there is no data set to count over"
    if not used.tokens:
        return f"never in {usage.done} objects"
    what = "the tokens that are not empty" if usage.backend.empty_code else "all tokens"
    times = "once" if used.tokens == 1 else f"{used.tokens:,} times"
    return (
        f"{times} in {usage.done} objects ({100 * used.share:.2g} % of {what}), in "
        f"{used.objects} of them; rank {used.rank:,} of {usage.backend.codebook_size:,}"
    )


def average_picture(voxels: np.ndarray | None) -> np.ndarray | None:
    """Return a picture of voxels [bx, by, bz], given how often each is occupied; None if hardly any is."""
    if voxels is None or not (voxels >= SOMETIMES).any():
        return None
    return drawn(voxels >= SOMETIMES, voxels)


def drawn(voxels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return a picture [H, W, 3] of voxels, bool of any shape; the closer a strength is to 0, the paler the voxel."""
    side = max(voxels.shape)
    margins = [((side - size) // 2, side - size - (side - size) // 2) for size in voxels.shape]
    strength = np.pad(strength, margins)[..., None]
    return render_voxels(np.pad(voxels, margins), np.array(MATERIAL) * strength + np.array(BACKGROUND) * (1 - strength))


def picture(image: np.ndarray | None, title: str, hint: str, otherwise: str) -> Any:
    """Return an image with its title, or the text `otherwise` in its place."""
    from PIL import Image

    if image is None:
        content: Any = html.Div(otherwise, className="nothing")
    else:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        content = html.Img(src="data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), alt=title)
    return html.Figure([content, html.Figcaption(title)], title=hint)
