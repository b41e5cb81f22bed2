"""The products of `grouped.py` with int4 weights where `grouped_int4.py` can't do them: in Triton, for any GPU.

As in `octavo.kernels.quant.int4` the integers q − 8 are multiplied, which are exact in every float dtype, and the
products scaled in fp32. Weights are the first operand.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_tiles import Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import silu_times
from octavo.kernels.tiles import cdiv, chains, let_next_start, wait_for_previous


@triton.jit
def _packed_ptrs(packed_ptr, expert, n, row_tiles, k_tiles):
    """Where the words of outputs n begin, `[OUTPUTS, 32]`; the next 128 inputs lie 2048 further on."""
    tile = (expert * row_tiles + n // 64).to(tl.int64)
    return packed_ptr + (tile * k_tiles * 2048 + n % 64 * 32)[:, None] + tl.arange(0, 32)[None, :]


@triton.jit
def _add_plane(acc, words, x, x_sum, scale_ptr, minimum_ptr, at, plane: tl.constexpr):
    w = (((words >> (4 * plane)) & 15) - 8).to(x.dtype)  # [OUTPUTS, 32]
    scale = tl.load(scale_ptr + at).to(tl.float32)
    acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
    if minimum_ptr is not None:
        acc += (tl.load(minimum_ptr + at).to(tl.float32) + 8 * scale)[:, None] * x_sum[None, :]
    return acc


@triton.jit(do_not_specialize=["stride_x"])
def _grouped_int4_plain_kernel(
    # Bound by reading the weights, and by unpacking them.
    out_ptr,
    x_ptr,
    packed_ptr,
    scale_ptr,
    minimum_ptr,
    plan_ptr,
    N,
    K,
    row_tiles,
    n_tiles,
    group_size,
    stride_x,
    stride_expert,
    stride_group,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    COLS: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    k_tiles = tl.cdiv(K, 128)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for unit in range(tl.program_id(0), tl.load(plan_ptr) * n_tiles, tl.num_programs(0)):
        expert, first_row, rows, n_tile = unit_at(plan_ptr, unit, n_tiles)
        m = tl.arange(0, ROWS)
        n = n_tile * COLS + tl.arange(0, COLS)
        inside = tl.minimum(n, N - 1)  # outputs past the last repeat it, and are never stored
        x_rows = (first_row + tl.minimum(m, rows - 1)).to(tl.int64) * stride_x
        x_ptrs = x_ptr + x_rows[None, :] + tl.arange(0, 32)[:, None]  # [32, ROWS]
        word_ptrs = _packed_ptrs(packed_ptr, expert, inside, row_tiles, k_tiles)
        up_ptrs = _packed_ptrs(packed_ptr, expert, N + inside, row_tiles, k_tiles)
        of_expert = expert.to(tl.int64) * stride_expert + inside
        acc = tl.zeros([COLS, ROWS], tl.float32)
        up = acc
        for tile in range(k_tiles):
            words = tl.load(word_ptrs + tile * 2048)  # [COLS, 32]
            if GATED:
                up_words = tl.load(up_ptrs + tile * 2048)
            for plane in tl.static_range(4):
                k = tile * 128 + plane * 32
                # K may end before the last tile does: what is left of it adds zeros, with the last group's scale.
                x = tl.load(x_ptrs + k, mask=k < K, other=0.0)  # [32, ROWS]
                at = of_expert + (tl.minimum(k, K - 32) // group_size).to(tl.int64) * stride_group
                x_sum = tl.sum(x.to(tl.float32), 0)  # [ROWS]
                acc = _add_plane(acc, words, x, x_sum, scale_ptr, minimum_ptr, at, plane)
                if GATED:
                    up = _add_plane(up, up_words, x, x_sum, scale_ptr, minimum_ptr, at + N, plane)
        if GATED:
            acc = silu_times(acc, up)
        out_ptrs = out_ptr + (first_row + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


def grouped_int4_plain(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: Scales,
    plan: torch.Tensor,
    tiles: Tiles,
    programs: int,
    gated: bool,
) -> None:
    """Launches it; the arguments are those of `octavo.kernels.moe.grouped_int4.grouped_int4`."""
    scale = scales.weight
    assert scale is not None
    n, k = out.shape[-1], x.shape[1]
    launch(
        _grouped_int4_plain_kernel,
        (programs,),
        out,
        x,
        packed,
        scale,
        scales.minimum,
        plan,
        n,
        k,
        packed.shape[1],
        cdiv(n, tiles.outputs // 2 if gated else tiles.outputs),
        k // scale.shape[1],
        x.stride(0),
        scale.stride(0),
        scale.stride(1),
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        GATED=gated,
        CHAINED=chains(x.device),
    )
