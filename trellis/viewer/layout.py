"""The parts of the page, and what it keeps in the visitor's tab."""

from pathlib import Path
from typing import Any

from dash import dcc, html

from ..grids.preview import CORRECT, EXTRA, MISSING
from .backend import Backend
from .figures import css
from .uploads import MAX_BYTES, UPLOAD_SUFFIXES

PANELS = {"mesh": "Mesh", "voxels": "Voxels", "reconstruction": "Reconstruction", "difference": "Difference"}
WHICH_HAVE_CODES = {"dense": "every token has a code", "sparse": "only tokens whose block has a voxel have a code"}
COPIED = {  # by the form of the text
    "dense": "all ids, as words for a language model",
    "octree": "masks of the blocks that hold something, and the codes there, as words for a language model",
}
UP_AXES = {"auto": "as the file says", "y": "y up", "z": "z up", "keep": "as they are"}
Component = Any  # of Dash, which has no common type for a part of a page
BLANK = {"data": [], "layout": {"xaxis": {"visible": False}, "yaxis": {"visible": False}}}
GRAPH = {"displayModeBar": False, "scrollZoom": True, "doubleClick": False}


def page(backend: Backend, upload: str) -> Component:
    """Return the whole page. upload: path of the address for uploads, as the browser knows it."""
    parts = {"object": ("Object", object_tab(backend))}
    if backend.run_dir is not None:
        parts["curves"] = "Training curves", curves_tab(backend.run_dir)
    tabs = [
        dcc.Tab(content, label=title, value=value, className="tab", selected_className="on")
        for value, (title, content) in parts.items()
    ]
    return html.Div(
        [
            html.Header(
                [
                    html.H1("From mesh to tokens and back"),
                    html.Div(about(backend), className="about"),
                    html.Span(id="progress", className="progress"),
                ]
            ),
            dcc.Tabs(tabs, id="tabs", value="object", className="tabs", mobile_breakpoint=0),
            html.Div(id="message", role="alert", className="message"),
            # What a visitor looks at: no other tab sees it, and the server forgets it with each answer.
            *(dcc.Store(id=name) for name in ("object", "edits", "chosen", "marked", "axes", "counted")),
            dcc.Interval(id="poll", interval=2000),
            *(dcc.Store(id=f"figure-{name}") for name in (*PANELS, "lattice")),
            dcc.Store(
                id="facts",
                data={
                    "lattice": backend.lattice,
                    "block": backend.block,
                    "suffixes": UPLOAD_SUFFIXES,
                    "max_bytes": MAX_BYTES,
                    "upload": upload,
                },
            ),
            dcc.Download(id="download"),
        ]
    )


def about(backend: Backend) -> list:
    lattice = "×".join(map(str, backend.lattice))
    each = f" of {backend.codes_per_token} codes" if backend.codes_per_token > 1 else ""
    codes, kind = f"{backend.n_embed} codes", "dense"
    if backend.empty_code:
        codes, kind = f"{backend.codebook_size} codes + empty (id 0)", "sparse"
    parts = [
        html.B(backend.name),
        html.Span(f"{backend.resolution}³ voxels"),
        html.Span(kind, title=WHICH_HAVE_CODES[kind]),
        html.Span(f"{lattice} tokens{each}"),
        html.Span(codes),
        html.Span(f"hash {backend.hash[:8]}", title=f"sha256 over weights and settings: {backend.hash}"),
    ]
    if (transformer := backend.tokenizer.transformer) is not None:
        layers = " + ".join(map(str, transformer.layers))
        title = "layers of attention over the tokens, before and after the codebook"
        parts.insert(-1, html.Span(f"transformer, {layers} layers", title=title))
    return parts


def object_tab(backend: Backend) -> Component:
    return html.Div([toolbar(backend), panels(), html.Div(id="scores", className="scores"), tokens(backend)])


def toolbar(backend: Backend) -> Component:
    axes = list(UP_AXES) if backend.tokenizer.normalization == "cube" else ["auto", "y"]
    words = [html.B("Drop a mesh"), html.Span("anywhere, or click to choose a file")]
    drop = html.Div(
        words,
        id="drop",
        className="drop",
        role="button",
        tabIndex=0,
        title=f"{' '.join(UPLOAD_SUFFIXES)}, up to {MAX_BYTES // 2**20} MiB",
    )
    parts = [
        drop,
        labelled(
            "axes of the file",
            dcc.Dropdown(
                {axis: UP_AXES[axis] for axis in axes},
                backend.tokenizer.up_axis,
                id="up-axis",
                clearable=False,
                searchable=False,
                className="narrow",
            ),
        ),
    ]
    if backend.dataset is not None:
        picker = dcc.Dropdown([], id="pick", placeholder="type to search …", clearable=False, className="wide")
        buttons = [
            html.Button(text, id=f"{name}-object", n_clicks=0, title=f"{name} object")
            for name, text in (("previous", "‹"), ("next", "›"), ("random", "random"))
        ]
        title = f"or an object of the data set ({len(backend.dataset)})"
        parts.append(labelled(title, html.Div([picker, *buttons], className="pick"), "labelled picker"))
    else:
        parts.append(html.Div("no data set: give --data_dir to pick objects and to count codes", className="hint"))
    saves = [
        html.Button(text, id=f"save-{kind}", n_clicks=0, title=title)
        for kind, text, title in (
            ("glb", "GLB", "the reconstruction's smoothed surface"),
            ("ply", "PLY", "the reconstruction's smoothed surface"),
            ("voxels", "voxels", "the reconstruction's voxels as points, as voxelize.py writes them (.ply)"),
            ("tokens", "tokens", "the ids, with what they depend on (.json)"),
        )
    ]
    parts.append(labelled("download", html.Div(saves, className="buttons")))
    copies = [
        dcc.Clipboard(form, id=f"copy-{form}", copied_children="copied", title=COPIED[form], className="copy")
        for form in backend.forms
    ]
    parts.append(labelled("copy text", html.Div(copies, className="buttons")))
    return html.Div(parts, className="toolbar")


def labelled(text: str, part, className: str = "labelled", **style) -> Component:
    return html.Div([html.Span(text, className="label"), part], className=className, style=style or None)


def panels() -> Component:
    reset = html.Button("reset view", id="reset-view", n_clicks=0, className="link")
    legend: dict[str, Any] = {
        "mesh": html.Span(["drag to turn all, scroll to zoom, ", reset]),
        "difference": [chip(MISSING, "missing"), chip(EXTRA, "extra"), chip(CORRECT, "correct")],
    }
    parts = []
    for name, title in PANELS.items():
        parts.append(
            html.Section(
                [
                    heading(title, name),
                    graph(f"panel-{name}"),
                    html.Div(legend.get(name, []), id=f"legend-{name}", className="legend"),
                ],
                className="panel",
            )
        )
    return html.Div(parts, className="panels")


def heading(title: str, name: str) -> Component:
    return html.Div([html.H2(title), html.Span(id=f"caption-{name}", className="caption")], className="heading")


def graph(name: str, className: str = "graph", **config) -> Component:
    settings: Any = {**GRAPH, **config}
    return dcc.Graph(id=name, config=settings, className=className, responsive=True, figure=BLANK)


def chip(color: tuple[int, int, int], text: str) -> Component:
    return html.Span([html.I(style={"background": css(color)}), text], className="chip")


def tokens(backend: Backend) -> Component:
    layers = backend.lattice[2]
    boxed, empty = ("non-empty tokens", "empty") if backend.empty_code else ("tokens with voxels", "empty id")
    code = "first code" if backend.codes_per_token > 1 else "code"
    slider = dcc.Slider(
        0, layers - 1, 1, value=layers // 2, id="layer-number", marks=None, updatemode="drag", allow_direct_input=False
    )
    lattice = html.Section(
        [
            heading("Tokens", "lattice"),
            graph("panel-lattice"),
            html.Div(f"Boxes: {boxed}, colored by {code}.", className="legend"),
        ],
        className="panel",
    )
    layer = html.Section(
        [
            heading("One layer from above", "layer"),
            graph("layer", "graph layer", scrollZoom=False),
            html.Div(slider, className="slider"),
            html.Div(f"Pale: without voxels; gray: {empty}; ◇: edited.", className="legend"),
        ],
        className="panel",
    )
    card = html.Section(
        [
            heading("The chosen token", "token"),
            html.Div("What a code stands for, and how to change it, is shown here.", id="token", className="token"),
            html.Div(editor(backend), id="editor", className="editor hidden"),
        ],
        className="panel wide",
    )
    return html.Div([lattice, layer, card], className="tokens")


def editor(backend: Backend) -> list:
    part = dcc.Dropdown(
        {str(q): f"code {q + 1} of {backend.codes_per_token}" for q in range(backend.codes_per_token)},
        "0",
        id="part",
        clearable=False,
        searchable=False,
        className="narrow",
    )
    # Without limits: in place of a number beyond them the browser would send nothing. The server says what is wrong.
    number = dcc.Input(id="code", type="number", step="any", className="number")
    several = {} if backend.codes_per_token > 1 else {"display": "none"}
    empty = "no voxel here: id 0" if backend.empty_code else "the code that empty space has here"
    whole = "; an empty one gets it for all of its codes" if backend.empty_code and backend.codes_per_token > 1 else ""
    return [
        labelled("which of its codes", part, **several),
        html.Label([html.Span("set the code to", className="label"), number], className="labelled"),
        html.Div(
            [
                html.Button(text, id=f"edit-{name}", n_clicks=0, title=title, className=style)
                for name, text, title, style in (
                    ("set", "set", "give the token this code" + whole, "main"),
                    ("similar", "a similar code", "the next code by distance in the codebook", ""),
                    ("empty", "empty", empty, ""),
                    ("undo", "undo", "take the last edit back", ""),
                    ("reset", "reset all", "take all edits back", ""),
                )
            ],
            className="buttons",
        ),
    ]


def curves_tab(run_dir: Path) -> Component:
    return html.Div(
        [
            html.Div(
                [
                    html.Button("read again", id="read-curves", n_clicks=0),
                    html.B(id="state"),
                    html.Span(str(run_dir / "log.txt"), className="caption"),
                ],
                className="curves-head",
            ),
            html.Div(id="curves", className="curves"),
        ],
        className="curves-tab",
    )


def curve_panels(figures: dict[str, dict[str, Any]]) -> list:
    """Return a panel for each {title: figure} of a run's curves."""
    if not figures:
        return [html.Div("There is no curve yet: the run has logged no step.", className="hint")]
    return [
        html.Section(
            [
                html.Div(html.H2(title), className="heading"),
                dcc.Graph(figure=figure, config={"displayModeBar": False}, className="graph curve", responsive=True),
            ],
            className="panel",
        )
        for title, figure in figures.items()
    ]
