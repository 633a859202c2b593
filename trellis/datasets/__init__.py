"""Datasets by class name."""

from ..utils.registry import Registry

DATASETS = Registry(__name__, {"SparseStructure": ".sparse_structure"})

__all__ = ["DATASETS", *DATASETS.classes]


def __getattr__(name: str):
    if name in DATASETS.classes:
        return DATASETS.get(name, "trellis.datasets")
    raise AttributeError(f"module {__name__} has no attribute {name}")
