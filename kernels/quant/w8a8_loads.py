"""How the Hopper kernels of the W8A8 product, `w8a8_few.py` and `w8a8_hopper.py`, see and multiply what they load."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.quant.stream_k import SCALE_BLOCK

BLOCK_K = 128
"""Inputs of a step: as many bytes as the copy engine's widest swizzle takes."""


@gluon.jit
def prefetch(ptr, first_n, first_k, N, K, ROWS: gl.constexpr, SIZE: gl.constexpr):
    """Has the cache (L2) fetch SIZE bytes of each of ROWS outputs' weights.

    It is a hint, which may come before the kernel ahead has written them: `quantize_int8` makes weights as it makes
    activations. So copies to shared memory wait for it.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    k = gl.minimum(first_k, K - SIZE)
    for first in gl.static_range(0, ROWS, 32):
        rows = gl.minimum(first_n + first + gl.arange(0, 32, layout=layout), N - 1)
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [ptr + rows.to(gl.int64) * K + k, SIZE],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def scale_ptrs(epilogue, first_m, first_n, first_step, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Where a step's scales are, of a tile's tokens and of its outputs, which are of one block."""
    m = gl.minimum(first_m + gl.arange(0, TOKENS, layout=layout), epilogue[1] - 1)  # what is past the last repeats it
    x_scale_ptrs = epilogue[3] + m.to(gl.int64) * epilogue[4] + first_step
    return x_scale_ptrs, epilogue[5] + first_n // SCALE_BLOCK * epilogue[6] + first_step


@gluon.jit
def multiply(
    x, weight, full, acc, i, group: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr
):
    """Issues the products of step i, as soon as its operands are there; the FIRST of a tile begin its sums."""
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    rows = x.index(stage).slice(group * ROWS, ROWS)
    return warpgroup_mma(rows, weight.index(stage).permute((1, 0)), acc, use_acc=not FIRST, is_async=True)


def described(x: torch.Tensor, shape: list[int], stride: int, rows: int) -> TensorDescriptor:
    """`x` as a matrix whose rows are `stride` apart, for copies of `rows` of them; a single row's is never used."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(x, shape, [stride if shape[0] > 1 else shape[1], 1], [rows, BLOCK_K], layout)
