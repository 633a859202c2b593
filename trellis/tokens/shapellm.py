"""The file layout of ShapeLLM-Omni's tokenizer, `3DVQVAE.bin` (arXiv:2506.01853).

One state dict: `Encoder.*` and `Decoder.*` as in TRELLIS's sparse-structure VAE, `vq.embeddings.weight` [K, D]. Nothing
in it says how wide or deep the networks are; the shapes of its tensors do.
"""

import re
from collections import Counter
from pathlib import Path

from torch import Tensor

from ..models import read_weights
from ..utils.errors import CheckpointError

PREFIXES = {"encoder": "Encoder.", "decoder": "Decoder."}
TABLE = "vq.embeddings.weight"


def read_shapellm(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Returns the models of a configuration, {"encoder" | "quantizer" | "decoder": {"name", "args"}}, and their state
    dict with the keys `encoder.*`, `quantizer.*` and `decoder.*`. Raises CheckpointError where the file is none of
    this layout."""
    state = read_weights(path)
    groups = {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
    other = [key for key in state if key != TABLE and not key.startswith(tuple(PREFIXES.values()))]
    if TABLE not in state or not all(groups.values()) or other:
        found = ", ".join(sorted({key.partition(".")[0] for key in state})[:5])
        raise CheckpointError(
            f"{path}: holds {found or 'nothing'}; a tokenizer of ShapeLLM-Omni has {TABLE}, Encoder.* and Decoder.*"
        )
    encoder, decoder = (_network(group, f"{path}: {PREFIXES[name]}") for name, group in groups.items())
    n_embed, embed_dim = state[TABLE].shape
    latent_channels = decoder["in"]
    models = {
        "encoder": {
            "name": "SparseStructureEncoder",
            "args": {"in_channels": encoder["in"], "latent_channels": latent_channels, **encoder["args"]},
        },
        "quantizer": {
            "name": "VectorQuantizer",
            "args": {"n_embed": n_embed, "embed_dim": embed_dim, "latent_channels": latent_channels},
        },
        "decoder": {
            "name": "SparseStructureDecoder",
            "args": {"out_channels": decoder["out"], "latent_channels": latent_channels, **decoder["args"]},
        },
    }
    weights = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    return models, {**weights, "quantizer.embeddings.weight": state[TABLE]}


def _network(state: dict[str, Tensor], where: str) -> dict:
    """Sizes of an encoder or a decoder: {"in", "out", "args"}, of its first and last convolution."""
    for key in ("input_layer.weight", "out_layer.2.weight"):
        if key not in state:
            raise CheckpointError(f"{where}{key} is missing: no encoder or decoder of TRELLIS's sparse structures")
    first = state["input_layer.weight"]
    depth: Counter[int] = Counter()  # residual blocks of each level
    widths: dict[int, int] = {0: len(first)}
    blocks = sorted({int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))})
    level = 0
    for block in blocks:
        if f"blocks.{block}.norm1.weight" in state:
            depth[level] += 1
            widths[level] = len(state[f"blocks.{block}.norm1.weight"])
        else:
            level += 1
    if len(set(depth.values())) != 1 or len(depth) != level + 1:
        raise CheckpointError(f"{where}blocks has {list(depth.values())} residual blocks a level; they must be equal")
    middle = {int(found[1]) for key in state if (found := re.match(r"middle_block\.(\d+)\.", key))}
    args = {"num_res_blocks": depth[0], "channels": list(widths.values()), "num_res_blocks_middle": len(middle)}
    return {"in": first.shape[1], "out": len(state["out_layer.2.weight"]), "args": args}


def shapellm_state(encoder: dict[str, Tensor], decoder: dict[str, Tensor], table: Tensor) -> dict[str, Tensor]:
    """The state dict of that layout, in float32. table: [K, D]."""
    state = {
        f"{prefix}{key}": value
        for prefix, part in (("Encoder.", encoder), ("Decoder.", decoder))
        for key, value in part.items()
    }
    return {key: value.detach().float().cpu().contiguous() for key, value in {**state, TABLE: table}.items()}
