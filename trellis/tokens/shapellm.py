"""The file layout of ShapeLLM-Omni's tokenizer, `3DVQVAE.bin` (arXiv:2506.01853).

One state dict: `Encoder.*` and `Decoder.*` as in TRELLIS's sparse-structure VAE, `vq.embeddings.weight` [K, D]. Width
and depth of the networks follow from the shapes of the tensors.
"""

import re
from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from ..models import read_weights
from ..modules.quantizers.base import Quantizer
from ..utils.errors import CheckpointError, ConfigError

PREFIXES = {"encoder": "Encoder.", "decoder": "Decoder."}
TABLE = "vq.embeddings.weight"


def read_shapellm(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Read such a file. Raise CheckpointError if it has another layout.

    Return the models of a configuration, {"encoder" | "quantizer" | "decoder": {"name", "args"}}, and their state dict
    with the keys `encoder.*`, `quantizer.*` and `decoder.*`.
    """
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
    n_embed, embed_dim = _shape(state, TABLE, 2, f"{path}: ")
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
    """Return the sizes of an encoder or a decoder: {"in", "out": channels, "args": of its constructor}."""
    width, channels, *_ = _shape(state, "input_layer.weight", 5, where)
    depth: Counter[int] = Counter()  # residual blocks of each level
    widths: dict[int, int] = {0: width}
    blocks = sorted({int(found[1]) for key in state if (found := re.match(r"blocks\.([0-9]{1,6})\.", key))})
    level = 0
    for block in blocks:
        if f"blocks.{block}.norm1.weight" in state:
            depth[level] += 1
            widths[level] = _shape(state, f"blocks.{block}.norm1.weight", 1, where)[0]
        else:
            level += 1
    if len(set(depth.values())) != 1 or len(depth) != level + 1:
        raise CheckpointError(f"{where}blocks has {list(depth.values())} residual blocks a level; they must be equal")
    middle = {int(found[1]) for key in state if (found := re.match(r"middle_block\.([0-9]{1,6})\.", key))}
    args = {"num_res_blocks": depth[0], "channels": list(widths.values()), "num_res_blocks_middle": len(middle)}
    return {"in": channels, "out": _shape(state, "out_layer.2.weight", 5, where)[0], "args": args}


def _shape(state: dict[str, Tensor], key: str, ndim: int, where: str) -> list[int]:
    """Return the shape of a tensor, [ndim]. Raise CheckpointError if it is missing or has another number of axes."""
    if key not in state:
        raise CheckpointError(f"{where}{key} is missing: no encoder or decoder of TRELLIS's sparse structures")
    shape = list(state[key].shape)
    if len(shape) != ndim or not all(shape):
        raise CheckpointError(f"{where}{key} is {shape}; a tokenizer of ShapeLLM-Omni has {ndim} axes there")
    return shape


def shapellm_state(encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of this layout, in float32.

    Raise ConfigError if ids are not the nearest rows of one table over latent cells along z, or one is for empty
    tokens.
    """
    if quantizer.empty_code:
        raise ConfigError(
            "ShapeLLM-Omni's layout has a code for every token, but this tokenizer has an empty code (models.quantizer."
            "args.empty_code); train one without, or use save_pretrained"
        )
    table, along_z = quantizer.table(), quantizer.group[:2] == (1, 1)
    if table is None or not quantizer.nearest_of_table or not along_z:
        raise ConfigError(
            f"{type(quantizer).__name__} with group {list(quantizer.group)}: ShapeLLM-Omni's layout has one table, "
            "whose nearest row is the id of cells along z. Train a VectorQuantizer or EMAVectorQuantizer without group"
        )
    networks = {"encoder": encoder, "decoder": decoder}
    state = {
        f"{prefix}{key}": value
        for name, prefix in PREFIXES.items()
        for key, value in networks[name].state_dict().items()
    }
    return {key: value.detach().float().cpu().contiguous() for key, value in {**state, TABLE: table}.items()}
