"""Triton kernels for CUDA devices. Imported only where a CUDA tensor needs one."""
