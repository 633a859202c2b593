"""Quantizers: one algorithm per file, all returning `Quantized`."""

from .base import Quantized, Quantizer
from .ema_vq import EMAVectorQuantizer
from .fsq import FiniteScalarQuantizer
from .ibq import IndexBackpropagationQuantizer
from .lfq import LookupFreeQuantizer
from .product_vq import ProductVectorQuantizer
from .residual_vq import ResidualVectorQuantizer
from .rotation import RotationVectorQuantizer
from .simvq import SimVQ
from .vq import VectorQuantizer

__all__ = [
    "EMAVectorQuantizer",
    "FiniteScalarQuantizer",
    "IndexBackpropagationQuantizer",
    "LookupFreeQuantizer",
    "ProductVectorQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualVectorQuantizer",
    "RotationVectorQuantizer",
    "SimVQ",
    "VectorQuantizer",
]
