"""The products of `grouped.py` with int8 weights alone where `grouped_int8.py` can't do them: in Triton, for any GPU.

As in `octavo.kernels.quant.int8` the integers, which are exact in every float dtype, are multiplied, and the products
scaled in fp32. Weights are the first operand. A step of inputs lies in one group.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_tiles import Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import silu_times
from octavo.kernels.tiles import cdiv, chains, let_next_start, wait_for_previous


@triton.jit(do_not_specialize=["stride_x"])
def _grouped_int8_plain_kernel(
    # Bound by reading the weights, and by making numbers of x's dtype of them.
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    plan_ptr,
    N,
    K,
    n_tiles,
    group_size,
    stride_x,
    stride_expert,
    stride_group,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    COLS: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for unit in range(tl.program_id(0), tl.load(plan_ptr) * n_tiles, tl.num_programs(0)):
        expert, first_row, rows, n_tile = unit_at(plan_ptr, unit, n_tiles)
        m = tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK_K)
        n = n_tile * COLS + tl.arange(0, COLS)
        inside = tl.minimum(n, N - 1)  # outputs past the last repeat it, and are never stored
        x_rows = (first_row + tl.minimum(m, rows - 1)).to(tl.int64) * stride_x
        x_ptrs = x_ptr + x_rows[None, :] + c[:, None]  # [BLOCK_K, ROWS]
        weight_row = inside.to(tl.int64) + expert.to(tl.int64) * (2 * N if GATED else N)
        weight_ptrs = weight_ptr + weight_row[:, None] * K + c[None, :]  # [COLS, BLOCK_K]
        up_ptrs = weight_ptrs + tl.cast(N, tl.int64) * K
        scale_ptrs = scale_ptr + expert.to(tl.int64) * stride_expert + inside
        acc = tl.zeros([COLS, ROWS], tl.float32)
        up = acc
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptrs + k)
            group_ptrs = scale_ptrs + tl.cast(k // group_size, tl.int64) * stride_group
            w = tl.load(weight_ptrs + k).to(x.dtype)
            acc += tl.dot(w, x, input_precision="ieee") * tl.load(group_ptrs).to(tl.float32)[:, None]
            if GATED:
                w = tl.load(up_ptrs + k).to(x.dtype)
                up += tl.dot(w, x, input_precision="ieee") * tl.load(group_ptrs + N).to(tl.float32)[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * N + inside).to(tl.float32)[:, None]
        if GATED:
            acc = silu_times(acc, up)
        out_ptrs = out_ptr + (first_row + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


def grouped_int8_plain(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    plan: torch.Tensor,
    tiles: Tiles,
    programs: int,
    gated: bool,
) -> None:
    """Launches it; the arguments are those of `octavo.kernels.moe.grouped_int8.grouped_int8`."""
    assert scale is not None
    n, k = out.shape[-1], x.shape[1]
    launch(
        _grouped_int8_plain_kernel,
        (programs,),
        out,
        x,
        weight,
        bias,
        scale,
        plan,
        n,
        k,
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
        BLOCK_K=tiles.block_k,
        GATED=gated,
        CHAINED=chains(x.device),
    )
