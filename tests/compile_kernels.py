"""Compile every Triton kernel for an H200, without needing one: `python tests/compile_kernels.py`.

Triton's interpreter accepts what its compiler refuses, so tests run this beside it.
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trellis.modules.kernels import norm_silu, one_channel

TARGET = GPUTarget("cuda", 90, 32)
HALF = ("x", "out", "grad", "residual", "residual_grad", "grad_x", "h", "b")
TYPES = {**{f"{name}_ptr": "*bf16" for name in HALF}, "eps": "fp32"}


def compile_kernel(kernel, warps: int, types: dict[str, str] = TYPES, **constants) -> None:
    """Pointers are to float32 and other arguments int32 where `types` does not say; 16 divides all of them."""
    signature = {}
    for name in kernel.arg_names:
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    aligned = [(i,) for i, kind in enumerate(signature.values()) if kind.startswith(("*", "i"))]
    source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    triton.compile(source, target=TARGET, options={"num_warps": warps})
    print(kernel.__name__, {**constants, **types})


def main() -> None:
    for channels in (32, 512):
        forward = norm_silu._blocks(channels, norm_silu.FORWARD_TILE)
        backward = norm_silu._blocks(channels, norm_silu.BACKWARD_TILE)
        for types in (TYPES, {**TYPES, "out_ptr": "*fp32"}):
            compile_kernel(norm_silu._norm_silu_kernel, norm_silu.FORWARD_WARPS, types, HAS_SHIFT=True, **forward)
        compile_kernel(norm_silu._add_kernel, norm_silu.FORWARD_WARPS, **forward)
        for residual, sums in itertools.product((False, True), (False, True)):
            for types in (TYPES, {**TYPES, "grad_ptr": "*fp32"}):
                compile_kernel(
                    norm_silu._norm_silu_backward_kernel,
                    norm_silu.BACKWARD_WARPS,
                    types,
                    HAS_SHIFT=not residual,
                    HAS_RESIDUAL=residual,
                    NEEDS_SUMS=sums,
                    **backward,
                )
    sizes = {"BLOCK_V": one_channel.BLOCK_V, "C": 32, "BLOCK_C": 32}
    compile_kernel(one_channel._expand_kernel, one_channel.NUM_WARPS, **sizes)
    for many, precision in (("*bf16", "tf32"), ("*fp16", "tf32"), ("*fp32", "ieee")):
        types = {"h_ptr": many, "b_ptr": many}
        compile_kernel(one_channel._per_tap_kernel, one_channel.NUM_WARPS, types, **sizes, PRECISION=precision)
        compile_kernel(one_channel._weight_grad_kernel, one_channel.NUM_WARPS, types, **sizes, PRECISION=precision)
    compile_kernel(one_channel._gather_kernel, one_channel.NUM_WARPS, {"out_ptr": "*fp32"}, BLOCK_V=one_channel.BLOCK_V)


if __name__ == "__main__":
    main()
