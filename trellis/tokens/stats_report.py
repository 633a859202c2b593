"""Pictures and a summary in words of the numbers that scripts/token_stats.py measures (keys: tokens/stats.py).

Every sentence follows from the numbers alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import ConfigError
from ..utils.files import atomic_write
from .octree import MASKS
from .stats import COMPRESSORS, FOLDS, ORDERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXTS = {
    "nothing": "nothing",
    "place": "its position",
    "previous_raster": "the id before, raster order",
    "previous_morton": "the id before, Morton order",
    "neighbour_x": "the neighbor along x",
    "neighbour_y": "the neighbor along y",
    "neighbour_z": "the neighbor along z",
    "neighbours_xyz": "the neighbors along x, y and z",
}
NAMES = {"raster": "raster", "morton": "Morton"}
SAME = 0.01  # orders whose numbers differ by less than this share are called equal
COLORS = ("#9eb2ce", "#3a5a8c")


def require_matplotlib() -> None:
    """Raise ConfigError, with the command that installs it, if matplotlib cannot be loaded."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the pictures need matplotlib ({error}): pip install matplotlib") from error


# --- pictures -----------------------------------------------------------------------------------------------------


def draw(result: dict, folder: Path) -> list[str]:
    """Write the pictures into a folder. Return their names."""
    from matplotlib.figure import Figure

    pictures = {"entropy": _draw_entropy, "codes": _draw_codes, "runs": _draw_runs, "sizes": _draw_sizes}
    for name, fill in pictures.items():
        figure = Figure(figsize=(8, 4), layout="constrained")
        fill(figure, result)
        with atomic_write(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
    return [f"{name}.png" for name in pictures]


def _draw_entropy(figure: "Figure", result: dict) -> None:
    axes = figure.subplots()
    for shift, (key, label) in enumerate((("plug_in", "counted (biased low)"), ("held_out", "on other objects"))):
        bars = [(row, entry[key]) for row, entry in enumerate(result["entropy"].values()) if entry[key] is not None]
        axes.barh(
            [row + 0.4 * shift - 0.2 for row, _ in bars],
            [bits for _, bits in bars],
            0.4,
            label=label,
            color=COLORS[shift],
        )
    axes.axvline(result["log2_n_embed"], color="gray", linestyle=":", label="log2 K")
    axes.set_yticks(range(len(result["entropy"])), [CONTEXTS[name] for name in result["entropy"]])
    axes.invert_yaxis()
    axes.set(xlabel="bits of an id", title="Entropy of an id, knowing …")
    axes.legend()


def _draw_codes(figure: "Figure", result: dict) -> None:
    axes = figure.subplots()
    codes, shares = zip(*((entry["codes"], entry["share"]) for entry in result["codebook"]["coverage"]), strict=True)
    axes.plot(codes, shares, marker="o", color=COLORS[1])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="most frequent codes", ylabel="share of all ids", ylim=(0, 1.02), title="The codes that ids use")
    axes.grid(alpha=0.3)


def _draw_runs(figure: "Figure", result: dict) -> None:
    for axes, (kind, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("equal", "Runs of equal tokens"), ("empty", "Runs of empty ids")),
        strict=True,
    ):
        axes.set(title=title, xlabel="length, from")
        runs = {order: result["runs"][order][kind] for order in ORDERS}
        if runs["raster"] is None:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        for shift, order in enumerate(ORDERS):
            heights = [number / result["objects"] for number in runs[order]["doubling"]]
            axes.bar(
                [i + 0.4 * shift - 0.2 for i in range(len(heights))],
                heights,
                0.4,
                label=NAMES[order],
                color=COLORS[shift],
            )
        bins = range(max(len(runs[order]["doubling"]) for order in ORDERS))
        axes.set_xticks(bins, [2**i for i in bins])
        axes.set_yscale("symlog", linthresh=1)
        axes.legend()
    figure.axes[0].set_ylabel("runs in an object")


def _draw_sizes(figure: "Figure", result: dict) -> None:
    rows = {label: raw if squeezed is None else squeezed["median"] for label, raw, squeezed in _sizes(result)}
    axes = figure.subplots()
    bars = axes.barh(list(rows), list(rows.values()), color=[COLORS["grid" in label] for label in rows])
    axes.bar_label(bars, fmt="{:.0f}", padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel="bytes of an object, median", title="Sizes")


# --- the reading --------------------------------------------------------------------------------------------------


def reading(result: dict, pictures: list[str]) -> str:
    """Return what the numbers say, as Markdown."""
    parts = [
        "# What a language model will see\n",
        _subject(result),
        "## Entropy\n",
        _entropy(result),
        "## Order, runs and empty tokens\n",
        _lengths(result),
        "## Sizes\n",
        _bytes(result),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    return "\n".join(parts) + "\n"


def _subject(result: dict) -> str:
    lattice = "×".join(map(str, result["lattice"]))
    Q = result["codes_per_token"]
    number, total, bits = result["objects"], result["objects_in_all"], result["log2_n_embed"]
    objects = f"{number} objects" if number == total else f"{number} of {total} objects, at equal distances"
    return (
        f"{objects}, each of {result['ids_per_object']} ids: a lattice of {lattice}"
        f"{f' with {Q} codes a token' if Q > 1 else ''}, out of {result['n_embed']} codes. At {bits:.2f} bits an id "
        f"that is {result['ids_per_object'] * bits / 8:.0f} bytes an object. Tokenizer "
        f"{result['tokenizer_hash'][:12]}, {result['precision']}.\n"
    )


def _entropy(result: dict) -> str:
    book, entropy = result["codebook"], result["entropy"]
    half = next(entry for entry in book["coverage"] if entry["share"] >= 0.5)
    half_of_ids = "One code makes" if half["codes"] == 1 else f"The {half['codes']} most frequent codes make"
    text = [
        f"{book['usage']:.1%} of the codes occur. Single ids carry {book['entropy']:.2f} bits, as if "
        f"{book['perplexity']:.0f} codes were used equally often; within one object "
        f"{book['object_entropy']['median']:.2f} bits, as if {book['object_perplexity']['median']:.1f} (median). "
        f"{half_of_ids} up {half['share']:.0%} of all ids.\n"
    ]
    head = ["knowing", "counted, bits an id", "on other objects", "bits an object, median", "contexts"]
    rows = [
        [CONTEXTS[name], f"{entry['plug_in']:.3f}", *_held_out(entry), str(entry["contexts"])]
        for name, entry in entropy.items()
    ]
    text.append(_table(head, rows))
    if entropy["nothing"]["held_out"] is None:
        return "\n".join([*text, "One object alone leaves none to test on; counts by themselves are biased low.\n"])
    held_out = {name: entry["held_out"] for name, entry in entropy.items()}
    best = min(held_out, key=lambda name: held_out[name])
    if best == "nothing":
        text.append("None of these contexts helps on other objects, with as many objects as there are here.")
    else:
        text.append(
            f"Of these, an id is best guessed from {CONTEXTS[best]}: {held_out[best]:.3f} bits on other "
            f"objects, {1 - held_out[best] / held_out['nothing']:.0%} below single ids, a perplexity of "
            f"{2 ** held_out[best]:.1f}."
        )
    before = [held_out[f"previous_{order}"] for order in ORDERS]
    text.append(_compare("With the id before known, an id takes", before, "bits"))
    biased = max(entropy, key=lambda name: entropy[name]["held_out"] - entropy[name]["plug_in"])
    gap = entropy[biased]["held_out"] - entropy[biased]["plug_in"]
    text.append(
        f"The two estimates are furthest apart ({gap:.2f} bits) for {CONTEXTS[biased]}, with "
        f"{entropy[biased]['contexts']} contexts: counts are too low there, and a model fitted on this few "
        "objects too high."
    )
    text.append(
        f'("On other objects": objects are divided into at most {FOLDS} parts, each measured by a model '
        "fitted on the others, by Witten-Bell interpolation. A language model sees more context than this.)\n"
    )
    return "\n".join(text)


def _held_out(entry: dict) -> tuple[str, str]:
    if entry["held_out"] is None:
        return "-", "-"
    return f"{entry['held_out']:.3f}", f"{entry['bits_per_object']['median']:.0f}"


def _lengths(result: dict) -> str:
    empty, sparse, T = result["empty"], result["sparse"], result["ids_per_object"]
    equal = [result["runs"][order]["equal"] for order in ORDERS]
    numbers = [runs["per_object"] for runs in equal]
    text = [
        _compare("As runs of equal tokens an object has", numbers, "runs", whole=True)
        + f" The longest has {max(runs['longest'] for runs in equal)} tokens."
    ]
    if octree := result["octree"]:
        values = octree["values"]
        text.append(
            f"The octree form has {octree['masks']['mean']:.0f} masks and {octree['codes']['mean']:.0f} codes in the "
            f"mean object, {values['mean']:.0f} values in all ({values['p5']:.0f} to {values['p95']:.0f} for 5 to 95 % "
            f"of objects), out of {result['n_embed'] + MASKS}. Single masks carry {octree['mask_entropy']:.2f} bits, "
            f"single codes {octree['code_entropy']:.2f}: {octree['bits_per_object']:.0f} bits an object."
        )
    if empty is None:
        text.append("Empty tokens and the sparse form were not measured: --tokenizer tells what is empty.\n")
        return "\n".join(text)
    share = empty["share"]
    text.append(
        f"{share['mean']:.1%} of the ids are the empty grid's at the same position (5 to 95 % of objects: "
        f"{share['p5']:.1%} to {share['p95']:.1%}); an empty grid has {empty['different']} different ids."
    )
    if "places_without_voxels" in empty:
        text.append(f"{empty['places_without_voxels']:.1%} of the positions have no voxel.")
        for name, which in (("without_voxels", "these"), ("with_voxels", "the positions with voxels")):
            if part := empty[name]:
                text.append(
                    f"Of {which}, {part['empty_ids']:.1%} have the empty grid's ids; in all they have "
                    f"{part['different']} different ids, of {part['entropy']:.2f} bits."
                )
    keys = ("mean", "median", "p5", "p95")
    rows = [[NAMES[order], *(f"{sparse[order][key]:.0f}" for key in keys)] for order in ORDERS]
    medians = [sparse[order]["median"] for order in ORDERS]
    text += [
        f"\nThe sparse form writes a run of empty ids as one value, out of {result['n_embed'] + T}. Its length, beside "
        f"{T}:\n",
        _table(["order", "mean", "median", "5 %", "95 %"], rows),
        _compare("Its median length is", medians, "values", whole=True)
        + f" That is {min(medians) / T:.0%} of the ids at best. Morton order is shorter for "
        f"{sparse['shorter_in_morton']:.0%} of the objects, raster order for {sparse['shorter_in_raster']:.0%}.\n",
    ]
    return "\n".join(text)


def _bytes(result: dict) -> str:
    rows = []
    for label, raw, squeezed in _sizes(result):
        mean, median = (raw, raw) if squeezed is None else (squeezed["mean"], squeezed["median"])
        rows.append([label, f"{mean:.0f}", f"{median:.0f}"])
    some = f" ({result['bytes']['objects']} objects)" if result["bytes"]["objects"] < result["objects"] else ""
    text = [_table([f"bytes of an object, each by itself{some}", "mean", "median"], rows)]
    squeezed = {label: entry["median"] for label, _, entry in _sizes(result) if entry and "grid" not in label}
    best = min(squeezed, key=lambda label: squeezed[label])
    text.append(f"Of the general compressors on ids, the best is {best}: {squeezed[best]:.0f} bytes (median).")
    if grid := result["bytes"]["grid"]:
        size = grid["deflate"]["median"]
        packed = result["bytes"]["ids"]["packed"]["raw"]
        text.append(
            f"The grid itself takes {size:.0f} bytes after deflate, {size / squeezed[best]:.1f} times that, "
            f"and {size / packed:.1f} times the packed ids as they are. (It is exact, ids need not be.)"
        )
    bits = [entry["bits_per_object"]["median"] for entry in result["entropy"].values() if entry["bits_per_object"]]
    if bits:
        text.append(f"The best of the models above needs {min(bits) / 8:.0f} bytes for an object it has not seen.")
    return "\n".join(text) + "\n"


def _sizes(result: dict) -> list[tuple[str, int, dict | None]]:
    """Return (label, uncompressed bytes, summary of the compressed bytes or None), in the order of the table."""
    n_embed = result["n_embed"]
    names = {
        "packed": f"ids packed to {max(1, (n_embed - 1).bit_length())} bits",
        "whole": f"ids of {16 if n_embed <= 2**16 else 32} bits",
    }
    rows: list[tuple[str, int, dict | None]] = []
    if grid := result["bytes"]["grid"]:
        rows.append(("grid, a bit a voxel", grid["raw"], None))
        rows += [(f"grid, {name}", grid["raw"], grid[name]) for name in COMPRESSORS]
    for layout, sizes in result["bytes"]["ids"].items():
        rows.append((names[layout], sizes["raw"], None))
        rows += [
            (f"{names[layout]}, {NAMES[order]} order, {name}", sizes["raw"], sizes[name][order])
            for name in COMPRESSORS
            for order in ORDERS
        ]
    return rows


def _compare(what: str, values: Sequence[float], unit: str, *, whole: bool = False) -> str:
    """Return a sentence that compares two values, in the order of ORDERS."""
    raster, morton = values
    numbers = (f"{raster:.0f}", f"{morton:.0f}") if whole else (f"{raster:.3g}", f"{morton:.3g}")
    if abs(raster - morton) <= SAME * max(raster, morton):
        verdict = f"the same within {SAME:.0%}"
    else:
        better, worse = sorted((raster, morton))
        verdict = f"{NAMES['raster' if raster < morton else 'morton']} order by {1 - better / worse:.0%} less"
    return f"{what} {numbers[0]} {unit} in raster and {numbers[1]} in Morton order ({verdict})."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
