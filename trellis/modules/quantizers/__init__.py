"""Quantizers: one algorithm per file, all returning `Quantized`."""

from .common import Quantized
from .vq import VectorQuantizer

__all__ = ["Quantized", "VectorQuantizer"]
