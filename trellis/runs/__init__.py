"""A run folder, read and written without the trainers."""

from .open import Run, open_run

__all__ = ["Run", "open_run"]
