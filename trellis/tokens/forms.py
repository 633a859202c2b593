"""The forms in which files and texts hold an object's ids.

"dense"         all T ids, in order of the lattice
"octree"        masks of the blocks that hold something, then the codes there: octree.py, breadth-first
"octree-depth"  the same, depth-first

The octree forms need a tokenizer with an empty code. All are exact: each gives the same ids back.
"""

from typing import TYPE_CHECKING, Literal, cast, get_args

from ..utils.errors import ConfigError

if TYPE_CHECKING:
    from .octree import Octree

Form = Literal["dense", "octree", "octree-depth"]
FORMS: tuple[Form, ...] = get_args(Form)


def form_of(wanted: str | None, empty_code: bool) -> Form:
    """Return a form: None stands for "octree" with an empty code, for "dense" without.

    Raise ConfigError for a form that there is not, and for an octree without an empty code.
    """
    if wanted is None:
        return "octree" if empty_code else "dense"
    if wanted not in FORMS:
        raise ConfigError(f"form is {wanted!r}; it must be {', '.join(FORMS)}")
    if wanted != "dense" and not empty_code:
        raise ConfigError(
            f"form is {wanted!r}, but the tokenizer has no id for empty blocks (empty_code): take 'dense'"
        )
    return cast(Form, wanted)


def octree_of(form: Form, lattice: tuple[int, int, int], n_embed: int, codes_per_token: int) -> "Octree | None":
    """Return what writes and reads an octree form, None for the dense one."""
    if form == "dense":
        return None
    from .octree import Octree  # with torch, which programs that only list FORMS do without

    return Octree(lattice, n_embed, codes_per_token, "depth" if form == "octree-depth" else "breadth")
