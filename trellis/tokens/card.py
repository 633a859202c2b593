"""The model card of a tokenizer: what it is, how to use it, its scores and its data."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .parquet import TokenInfo

USAGE = """```python
from trellis import SparseStructureTokenizer

tokenizer = SparseStructureTokenizer.from_pretrained("…")
ids = tokenizer.encode("mesh.glb")
tokenizer.save_mesh(ids[0], "back.glb")
```
"""


def model_card(tokens: TokenInfo, sections: dict[str, Any], **data) -> ModelCard:
    """Return the card.

    tokens: what the tokenizer's ids mean.
    sections: {title: a dict of facts, or text}, such as "scores" and "training".
    data: fields of huggingface_hub's ModelCardData, such as `license`.
    """
    metadata = ModelCardData(library_name="trellis-vqvae", tags=["3d", "tokenizer", "vq-vae", "trellis"], **data)
    lattice = " × ".join(map(str, tokens.lattice))
    facts = {
        "tokens of an object": f"{tokens.num_tokens} on a lattice of {lattice}",
        "codes": f"{tokens.n_embed}, of which 0 stands for an empty block" if tokens.empty_code else tokens.n_embed,
        "grid": f"{tokens.resolution}³",
        "normalization": tokens.normalization,
        "up axis": tokens.up_axis,
        "hash": f"`{tokens.tokenizer_hash}`",
    }
    text = f"---\n{metadata.to_yaml()}\n---\n\n# Sparse-structure tokenizer\n\n"
    text += "Turns the surface of a 3D object, voxels of a cubic grid, into ids and back.\n\n"
    text += USAGE + "\n" + _table(facts)
    for title, content in sections.items():
        text += f"\n## {title.capitalize()}\n\n{_section(content)}"
    return ModelCard(text)


def _section(content: Any) -> str:
    if isinstance(content, dict):
        return _table({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in content.items()})
    return f"{content}\n"


def _table(rows: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
