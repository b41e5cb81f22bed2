"""The kernel of `gemv`, and of `linear` for one token: sums by CUDA cores.

The time is that of reading the weights. Programs have some outputs each and keep as many of the weights on their way as
shared memory has room for; no tensor core is needed. On Hopper the first weights of each come into the cache (L2) while
the kernel ahead still runs: those of a decode step are short, and a product that begins cold loses as much time as they
take.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import launch
from octavo.kernels.quant.epilogue import silu_times
from octavo.kernels.tiles import cdiv, chains, let_next_start, row_offset, row_strides, wait_for_previous


@dataclass(frozen=True)
class _Tiles:
    rows: int
    """Of weights: with SiLU and gate, of gate and of up together."""
    block_k: int
    num_warps: int
    num_stages: int


def choose_tiles(itemsize: int) -> _Tiles:
    """8 rows of 2048 bytes at a time and four of those under way: three programs a multiprocessor on Hopper.

    16 rows of 1024 bytes took up to 12 % longer on an H100, with 8 warps of 2048 bytes up to 5 %.
    """
    return _Tiles(8, 2048 // itemsize, 4, 4)


@triton.jit
def _prefetch(ptrs):
    """Has the cache (L2) fetch the lines of 128 bytes that these pointers lie in; a hint, which nothing waits for."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["T", "x_inner"])
def _gemv_kernel(
    # Bound by reading the weights once. One program some outputs of a token.
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    T,
    N,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINE: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    OUTPUTS: tl.constexpr = ROWS // 2 if GATED else ROWS
    token = tl.program_id(0) % T
    first = tl.program_id(0) // T * OUTPUTS
    r = tl.arange(0, ROWS)
    row = tl.minimum(first + r % OUTPUTS, N - 1) + r // OUTPUTS * N  # of gate, then of up; past the last, it again
    weight_ptr += row.to(tl.int64)[:, None] * K
    if CHAINED:
        lines = tl.arange(0, STAGES * BLOCK_K // LINE)[None, :] * LINE
        _prefetch(weight_ptr + tl.minimum(lines, K - 1))
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    x_ptr += row_offset(token, x_inner, stride_x_outer, stride_x_inner)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask = k < K - start
        x = tl.load(x_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + (start + k)[None, :], mask=mask[None, :], other=0.0)  # [ROWS, BLOCK_K]
        sums += w.to(tl.float32) * x[None, :]
    y = tl.sum(sums, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    n = first + tl.arange(0, OUTPUTS)
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(y, [2, OUTPUTS])))
        y = silu_times(gate, up)
    tl.store(out_ptr + token.to(tl.int64) * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def linear_one(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> None:
    """Launches it, for each token by itself."""
    k, n = x.shape[-1], out.shape[-1]
    tokens, tiles = x.numel() // k, choose_tiles(x.element_size())
    launch(
        _gemv_kernel,
        (tokens * cdiv(n, tiles.rows // 2 if gated else tiles.rows),),
        out,
        x,
        weight,
        bias,
        tokens,
        n,
        k,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        GATED=gated,
        ROWS=tiles.rows,
        BLOCK_K=tiles.block_k,
        LINE=128 // x.element_size(),
        STAGES=tiles.num_stages,
        CHAINED=chains(x.device),
    )
