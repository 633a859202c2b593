"""Triton kernels for CUDA devices. All but `launch` import Triton, and only what needs a kernel imports them."""
