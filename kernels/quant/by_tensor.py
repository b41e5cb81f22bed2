"""Quantising a whole tensor by one scale, which is computed from it or given.

A computed scale takes two launches: the first writes one maximum a program, the second takes the maximum of those in
each of its programs. The order of a maximum does not matter, so the result is deterministic, and nothing has to be
reset between calls.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.rounding import magnitude, rounded, rounding, scale_of
from octavo.kernels.tiles import (
    cdiv,
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    row_offset,
    row_strides,
    wait_for_previous,
)


@dataclass(frozen=True)
class _Tiles:
    block: int
    num_warps: int


def choose_tiles(width: int) -> _Tiles:
    """Elements of one program; enough that reading the maxima of all programs beside them is little."""
    block = min(next_power_of_2(width), 4096)
    return _Tiles(block, max(block // 512, 1))


@triton.jit(do_not_specialize=["tiles", "blocks", "x_inner"])
def _largest_kernel(
    # Bound by memory: x read once. As many programs as fill the GPU, whatever the size of x.
    largest_ptr,
    x_ptr,
    tiles,
    N,
    blocks,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    program = tl.program_id(0)
    largest = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        cols = tile % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        row_ptr = x_ptr + row_offset(tile // blocks, x_inner, stride_x_outer, stride_x_inner)
        x = tl.load(row_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(x))
    tl.store(largest_ptr + program, tl.max(largest, 0))


@triton.jit(do_not_specialize=["tiles", "blocks", "x_inner"])
def _by_tensor_kernel(
    # Bound by memory: x read once, a byte an element written; one program a block of a row, or of all of x.
    q_ptr,
    scale_ptr,
    x_ptr,
    largest_ptr,
    tiles,
    N,
    blocks,
    count,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    DYNAMIC: tl.constexpr,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    # From the end, which was read last before and may still be in the cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile // blocks
    cols = tile % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = (cols < N) & (tile < tiles)  # an empty x has a program all the same, for its scale
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if DYNAMIC:
        at = tl.arange(0, BLOCK_COUNT)
        scale = scale_of(tl.max(tl.load(largest_ptr + at, mask=at < count, other=0.0), 0), LIMIT)
        tl.store(scale_ptr, scale, mask=tile == 0)
    else:
        scale = tl.load(scale_ptr)
    q = rounded(x * tl.div_rn(1.0, scale), q_ptr.dtype.element_ty, LIMIT, NATIVE)
    tl.store(q_ptr + row.to(tl.int64) * N + cols, q, mask=mask)


def by_tensor_cuda(
    x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    q = empty(x.shape, dtype, x.device)
    out = empty((1,) if scale is None else (0,), torch.float32, x.device)
    tiles = choose_tiles(x.shape[-1])
    width, strides = x.shape[-1], row_strides("x", x)
    if x.is_contiguous() and 0 < x.numel() < 2**30:
        width, strides = x.numel(), (1, 0, 0)  # one row, which ends in one broken block
    blocks = cdiv(width, tiles.block)
    total = x.numel() // width * blocks
    count = 4 * device_properties(x.device).num_sms
    largest = None
    if scale is None:
        largest = empty((count,), torch.float32, x.device)
        launch(
            _largest_kernel,
            (count,),
            largest,
            x,
            total,
            width,
            blocks,
            *strides,
            device=x.device,
            num_warps=tiles.num_warps,
            BLOCK=tiles.block,
            CHAINED=chains(x.device),
        )
    launch(
        _by_tensor_kernel,
        (max(total, 1) if scale is None else total,),
        q,
        out if scale is None else scale,
        x,
        largest,
        total,
        width,
        blocks,
        count,
        *strides,
        device=x.device,
        num_warps=tiles.num_warps,
        DYNAMIC=scale is None,
        **rounding(dtype, x.device),
        BLOCK_COUNT=next_power_of_2(count),
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return q, out
