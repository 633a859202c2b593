"""The page's parts, and what it keeps in the visitor's tab."""

from typing import Any

from dash import dcc, html

from ..grids.meshes import MESH_SUFFIXES
from ..grids.preview import CORRECT, EXTRA, MISSING
from .figures import css
from .uploads import MAX_BYTES
from .workbench import Workbench

PANELS = {"mesh": "Mesh", "voxels": "Voxels", "reconstruction": "Reconstruction", "difference": "Missing and extra"}
UP_AXES = {"z": "z up (most STL)", "y": "y up (glTF)", "keep": "axes as they are"}
Component = Any  # of Dash, which is loaded only as the page is made
BLANK = {"data": [], "layout": {"xaxis": {"visible": False}, "yaxis": {"visible": False}}}
GRAPH = {"displayModeBar": False, "scrollZoom": True, "doubleClick": False}


def page(workbench: Workbench) -> Component:
    parts = {"object": ("Object", object_tab(workbench))}
    if workbench.run_dir is not None:
        parts["curves"] = "Training curves", curves_tab(workbench)
    tabs = [
        dcc.Tab(content, label=title, value=value, className="tab", selected_className="on")
        for value, (title, content) in parts.items()
    ]
    return html.Div(
        [
            html.Header(
                [
                    html.H1("From mesh to tokens and back"),
                    html.Div(about(workbench), className="about"),
                    html.Span(id="progress", className="progress"),
                ]
            ),
            dcc.Tabs(tabs, id="tabs", value="object", className="tabs"),
            html.Div(id="message", role="alert", className="message"),
            # All that makes a visit: no other tab sees it, and the server forgets it with each answer.
            *(dcc.Store(id=name) for name in ("object", "edits", "chosen", "marked", "axes", "counted")),
            dcc.Interval(id="poll", interval=2000),
            *(dcc.Store(id=f"figure-{name}") for name in (*PANELS, "lattice")),
            dcc.Store(
                id="facts",
                data={
                    "lattice": workbench.lattice,
                    "block": workbench.block,
                    "suffixes": MESH_SUFFIXES,
                    "max_bytes": MAX_BYTES,
                },
            ),
            dcc.Download(id="download"),
        ]
    )


def about(workbench: Workbench) -> list:
    lattice = "×".join(map(str, workbench.lattice))
    each = f" of {workbench.codes_per_token} codes" if workbench.codes_per_token > 1 else ""
    return [
        html.B(workbench.name),
        html.Span(f"{workbench.resolution}³ voxels"),
        html.Span(f"{lattice} tokens{each}"),
        html.Span(f"{workbench.n_embed} codes"),
        html.Span(f"hash {workbench.hash[:8]}", title=f"sha256 over weights and settings: {workbench.hash}"),
    ]


def object_tab(workbench: Workbench) -> Component:
    return html.Div([toolbar(workbench), panels(), html.Div(id="scores", className="scores"), tokens(workbench)])


def toolbar(workbench: Workbench) -> Component:
    axes = list(UP_AXES) if workbench.tokenizer.normalization == "cube" else ["y"]
    words = [html.B("Drop a mesh"), html.Span("anywhere on the page, or click here to choose a file")]
    drop = html.Div(
        words,
        id="drop",
        className="drop",
        role="button",
        tabIndex=0,
        title=f"{' '.join(MESH_SUFFIXES)}, up to {MAX_BYTES // 2**20} MiB",
    )
    parts = [
        drop,
        labelled(
            "axes of the file",
            dcc.Dropdown(
                {axis: UP_AXES[axis] for axis in axes},
                workbench.tokenizer.up_axis,
                id="up-axis",
                clearable=False,
                searchable=False,
                className="narrow",
            ),
        ),
    ]
    if workbench.dataset is not None:
        picker = dcc.Dropdown([], id="pick", placeholder="type to search …", clearable=False, className="wide")
        buttons = [
            html.Button(text, id=f"{name}-object", n_clicks=0, title=f"{name} object")
            for name, text in (("previous", "‹"), ("next", "›"), ("random", "random"))
        ]
        title = f"or an object of the data set ({len(workbench.dataset)})"
        parts.append(labelled(title, html.Div([picker, *buttons], className="pick")))
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
    return html.Div(parts, className="toolbar")


def labelled(text: str, part, **style) -> Component:
    return html.Div([html.Span(text, className="label"), part], className="labelled", style=style or None)


def panels() -> Component:
    legend = {"difference": [chip(MISSING, "missing"), chip(EXTRA, "extra"), chip(CORRECT, "correct")]}
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
    reset = html.Button("reset view", id="reset-view", n_clicks=0, className="link")
    hint = html.Div(["drag to turn all, scroll to zoom, ", reset], className="turn")
    return html.Div([*parts, hint], className="panels")


def heading(title: str, name: str) -> Component:
    return html.Div([html.H2(title), html.Span(id=f"caption-{name}", className="caption")], className="heading")


def graph(name: str, className: str = "graph", **config) -> Component:
    return dcc.Graph(id=name, config={**GRAPH, **config}, className=className, responsive=True, figure=BLANK)


def chip(colour: tuple[int, int, int], text: str) -> Component:
    return html.Span([html.I(style={"background": css(colour)}), text], className="chip")


def tokens(workbench: Workbench) -> Component:
    layers = workbench.lattice[2]
    slider = dcc.Slider(
        0, layers - 1, 1, value=layers // 2, id="layer-number", marks=None, updatemode="drag", allow_direct_input=False
    )
    lattice = html.Section(
        [
            heading("Tokens", "lattice"),
            graph("panel-lattice"),
            html.Div("Boxes: tokens with voxels, coloured by code.", className="legend"),
        ],
        className="panel",
    )
    layer = html.Section(
        [
            heading("One layer from above", "layer"),
            graph("layer", "graph layer", scrollZoom=False),
            html.Div(slider, className="slider"),
            html.Div("Pale: without voxels; grey: empty id; ◇: edited.", className="legend"),
        ],
        className="panel",
    )
    card = html.Section(
        [
            heading("The chosen token", "token"),
            html.Div("What a code stands for, and how to change it, is shown here.", id="token", className="token"),
            html.Div(editor(workbench), id="editor", className="editor hidden"),
        ],
        className="panel wide",
    )
    return html.Div([lattice, layer, card], className="tokens")


def editor(workbench: Workbench) -> list:
    part = dcc.Dropdown(
        {str(q): f"code {q + 1} of {workbench.codes_per_token}" for q in range(workbench.codes_per_token)},
        "0",
        id="part",
        clearable=False,
        searchable=False,
        className="narrow",
    )
    number = dcc.Input(id="code", type="number", min=0, max=workbench.n_embed - 1, step=1, className="number")
    several = {} if workbench.codes_per_token > 1 else {"display": "none"}
    return [
        labelled("which of its codes", part, **several),
        html.Label([html.Span("set the code to", className="label"), number], className="labelled"),
        html.Div(
            [
                html.Button(text, id=f"edit-{name}", n_clicks=0, title=title, className=style)
                for name, text, title, style in (
                    ("set", "set", "put this code in place of the token's", "main"),
                    ("similar", "a similar code", "the next one in the codebook by distance", ""),
                    ("empty", "empty", "what empty space has here", ""),
                    ("undo", "undo", "take the last edit back", ""),
                    ("reset", "reset all", "take all edits back", ""),
                )
            ],
            className="buttons",
        ),
    ]


def curves_tab(workbench: Workbench) -> Component:
    return html.Div(
        [
            html.Div(
                [
                    html.Span(str(workbench.run_dir / "log.txt"), className="caption"),
                    html.Button("read again", id="read-curves", n_clicks=0),
                ],
                className="curves-head",
            ),
            dcc.Graph(id="curves", config={"displayModeBar": False}, className="curves"),
        ],
        className="curves-tab",
    )
