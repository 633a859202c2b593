"""Triton kernels for CUDA devices. All but `launch` import Triton, so they are imported only to run a kernel."""
