"""Training of vector-quantised TRELLIS sparse structures, from mesh to tokens and back."""

__version__ = "0.1.0"
