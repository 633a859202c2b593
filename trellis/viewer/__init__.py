"""A page in the browser for looking at a tokenizer: `python -m trellis.viewer --run outputs/stage2`.

Built on Dash, since viser has one scene and one camera for all of the page, and Gradio's 3D views know neither linked
cameras nor clicks. What a visitor looks at, with their edits, is kept in the visitor's tab and comes along with every
request: the server keeps nothing of a visit, so tabs cannot mix.
"""
