"""Trainers by class name."""

from ..utils.registry import Registry

TRAINERS = Registry(
    __name__,
    {
        "SparseStructureVaeTrainer": ".vae.sparse_structure_vae",
        "SparseStructureVqVaeTrainer": ".vae.sparse_structure_vqvae",
    },
)

__all__ = ["TRAINERS", *TRAINERS.classes]


def __getattr__(name: str):
    if name in TRAINERS.classes:
        return TRAINERS.get(name, "trellis.trainers")
    raise AttributeError(f"module {__name__} has no attribute {name}")
