"""Quantizers: one algorithm per file, all returning `Quantized`."""
