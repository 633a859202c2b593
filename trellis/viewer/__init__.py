"""A page in the browser to look at a tokenizer: `python -m trellis.viewer --run outputs/stage2`.

Built on Dash: viser has one scene and one camera for the whole page, and the 3D views of Gradio know neither linked
cameras nor clicks. What a visitor looks at, with their edits, is kept in the visitor's tab and sent with every request.
The server keeps none of it, so tabs cannot mix.

    __main__.py    the command and its flags
    serve.py       loads tokenizer and data, starts the server
    app.py         the Dash application, uploads, errors as sentences
    layout.py      the parts of the page
    callbacks.py   what the page asks the server
    page_state.py  an object and its edits, as they travel between tab and server
    backend.py     what the page shows, computed: ids, reconstructions, scores
    code_usage.py  how often each code occurs in the data
    uploads.py     opens mesh files in worker processes
    figures.py     the 3D panels and the lattice, as Plotly's JSON
    faces.py       the outer faces of voxels as shaded triangles
    details.py     scores, and facts about the chosen token
    curves.py      training curves of a run
"""
