"""Training of vector-quantized TRELLIS sparse structures, from mesh to tokens and back."""

import importlib

__version__ = "0.6.0"

_SUBPACKAGES = ("datasets", "evaluation", "grids", "models", "runs", "tokens", "trainers")


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name == "SparseStructureTokenizer":
        return importlib.import_module(".tokenizer", __name__).SparseStructureTokenizer
    raise AttributeError(f"module {__name__} has no attribute {name}")
