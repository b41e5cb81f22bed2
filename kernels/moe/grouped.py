"""Products by experts: each row of x times the weights of the expert that it belongs to, rows being sorted by expert.

    y[s, n] = Σₖ x[s, k] · w[e(s), n, k] + bias[e(s), n]
    with SiLU × gate: y[s, n] = silu(Σₖ x[s, k] · w[e(s), n, k]) · Σₖ x[s, k] · w[e(s), N + n, k]

Sums are fp32 and rounded once. The plan of tiles comes from `octavo.kernels.moe.schedule`. On Hopper `grouped_few`,
`grouped_tall` and `grouped_hopper` of `octavo.kernels.moe` do what the copy engine can load, by how many rows an expert
has; the kernel here does the rest, and all on other GPUs: its programs walk units of a tile by a column of outputs. Few
rows have the weights as the first operand.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import INTERPRET, launch
from octavo.kernels.moe.grouped_few import grouped_few
from octavo.kernels.moe.grouped_hopper import grouped_hopper
from octavo.kernels.moe.grouped_int4 import grouped_int4
from octavo.kernels.moe.grouped_int4_plain import grouped_int4_plain
from octavo.kernels.moe.grouped_int4_tall import grouped_int4_tall
from octavo.kernels.moe.grouped_int8 import grouped_int8
from octavo.kernels.moe.grouped_int8_plain import grouped_int8_plain
from octavo.kernels.moe.grouped_tall import grouped_tall
from octavo.kernels.moe.grouped_tiles import Scales, Tiles
from octavo.kernels.moe.schedule import most_tiles, unit_at
from octavo.kernels.quant.epilogue import silu_times
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    let_next_start,
    wait_for_previous,
)

NONE = Scales()


@triton.jit(do_not_specialize=["stride_x"])
def _grouped_kernel(
    # Few rows: bound by reading the weights. Many: by the tensor cores. A program walks its units of work.
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    plan_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    N,
    K,
    n_tiles,
    stride_x,
    stride_expert,
    stride_output,
    blocks,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    TURNED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    COLS: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    k = tl.arange(0, BLOCK_K)[None, :]
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for unit in range(tl.program_id(0), tl.load(plan_ptr) * n_tiles, tl.num_programs(0)):
        expert, first_row, rows, n_tile = unit_at(plan_ptr, unit, n_tiles)
        m = tl.arange(0, ROWS)
        n = n_tile * COLS + tl.arange(0, COLS)
        x_ptrs = x_ptr + (first_row + tl.minimum(m, rows - 1)).to(tl.int64)[:, None] * stride_x + k
        weight_row = tl.minimum(n, N - 1).to(tl.int64) + expert.to(tl.int64) * (2 * N if GATED else N)
        weight_ptrs = weight_ptr + weight_row[:, None] * K + k
        up_ptrs = weight_ptrs + tl.cast(N, tl.int64) * K
        acc = tl.zeros([COLS, ROWS] if TURNED else [ROWS, COLS], SUM)
        up = acc
        for start in range(0, K, BLOCK_K):
            mask = k < K - start
            x = tl.load(x_ptrs + start, mask=mask, other=0.0)  # [ROWS, BLOCK_K]
            w = tl.load(weight_ptrs + start, mask=mask, other=0.0)  # [COLS, BLOCK_K]
            if BLOCKS:
                at = start // 128
                x_scale = tl.load(x_scale_ptr + (first_row + m) * blocks + at, mask=m < rows, other=0.0)
                scale_ptrs = weight_scale_ptr + expert * stride_expert + at
                scale = tl.load(scale_ptrs + tl.minimum(n, N - 1) // 128 * stride_output)
                acc += tl.dot(w, x.T) * (scale[:, None] * x_scale[None, :])
            elif TURNED:
                acc = tl.dot(w, x.T, acc, input_precision="ieee", out_dtype=SUM)
            else:
                acc = tl.dot(x, w.T, acc, input_precision="ieee", out_dtype=SUM)
            if GATED:
                w = tl.load(up_ptrs + start, mask=mask, other=0.0)
                if BLOCKS:
                    scale = tl.load(scale_ptrs + (N + tl.minimum(n, N - 1)) // 128 * stride_output)
                    up += tl.dot(w, x.T) * (scale[:, None] * x_scale[None, :])
                elif TURNED:
                    up = tl.dot(w, x.T, up, input_precision="ieee", out_dtype=SUM)
                else:
                    up = tl.dot(x, w.T, up, input_precision="ieee", out_dtype=SUM)
        if TURNED:
            m, n = m[None, :], n[:, None]
        else:
            m, n = m[:, None], n[None, :]
        acc, up = acc.to(tl.float32), up.to(tl.float32)
        if weight_scale_ptr is not None and not BLOCKS:
            x_scale = tl.load(x_scale_ptr + first_row + m, mask=m < rows, other=0.0)
            scale_ptrs = weight_scale_ptr + expert * stride_expert + n * stride_output
            acc *= x_scale * tl.load(scale_ptrs, mask=n < N, other=0.0)
            if GATED:
                up *= x_scale * tl.load(scale_ptrs + N * stride_output, mask=n < N, other=0.0)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            acc = silu_times(acc, up)
        out_ptrs = out_ptr + (first_row + m).to(tl.int64) * N + n
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < rows) & (n < N))


def may_copy(properties: DeviceProperties, *operands: torch.Tensor) -> bool:
    """Whether the copy engine can load them as they lie."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and all(
            a.dtype != torch.float32
            and not (a.stride(-2) * a.element_size() | a.shape[-1] * a.element_size() | a.data_ptr()) % 16
            for a in operands
        )
    )


def grouped(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: torch.Tensor,
    tiles: Tiles,
    *,
    gated: bool,
    scales: Scales = NONE,
    planned_before: bool = False,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Launches it.

    Args:
        out: `[parts, S, N]`, where there are parts in fp32; rows that are no expert's are not written.
        x: `[S, K]`.
        weight: `[E, N, K]`, or `[E, 2 · N, K]` if gated, contiguous; int4 as `octavo.int4_pack` packs each expert's.
        bias: None, or `[E, N]`, contiguous.
        plan: from `octavo.kernels.moe.schedule`, for tiles of as many rows.
        gated: whether the result is SiLU × gate.
        scales: of quantised operands, int8 or e4m3: `y = sums · x_scale · weight_scale`; of weights alone in groups,
            with their minima.
        planned_before: whether another kernel ran between the one that made the plan and this.
        out_scale: None, or `[S, N / 128]`, fp32: then out is e4m3, and this its scales by groups of 128. Beside scales
            of blocks, gated, with "many" tiles alone.
    """
    experts, k = weight.shape[0], x.shape[1]
    s, n = out.shape[-2:]
    n_tiles = cdiv(n, tiles.outputs // 2 if gated else tiles.outputs)
    units = most_tiles(s, experts, tiles.rows) * n_tiles * tiles.parts
    programs = min(device_properties(x.device).num_sms * tiles.programs_per_sm, units)
    if tiles.kernel == "int4":
        grouped_int4(out, x, weight, scales, plan, tiles, programs, gated, planned_before)
        return
    if tiles.kernel == "int4_tall":
        grouped_int4_tall(out, x, weight, scales, plan, tiles, programs, gated, planned_before)
        return
    if tiles.kernel == "int4_plain":
        grouped_int4_plain(out, x, weight, scales, plan, tiles, programs, gated)
        return
    if tiles.kernel == "int8":
        grouped_int8(out, x, weight, bias, scales.weight, plan, tiles, programs, gated, planned_before)
        return
    if tiles.kernel == "int8_plain":
        grouped_int8_plain(out, x, weight, bias, scales.weight, plan, tiles, programs, gated)
        return
    if tiles.kernel == "few":
        grouped_few(out, x, weight, bias, scales, plan, tiles, n_tiles, programs, gated, planned_before)
        return
    if tiles.kernel == "tall":
        grouped_tall(out, x, weight, bias, scales, plan, tiles, n_tiles, programs, gated, planned_before)
        return
    if tiles.kernel == "many":
        grouped_hopper(out, x, weight, bias, scales, plan, tiles, n_tiles, programs, gated, out_scale)
        return
    launch(
        _grouped_kernel,
        (programs,),
        out,
        x,
        weight,
        bias,
        plan,
        scales.x,
        scales.weight,
        n,
        k,
        n_tiles,
        x.stride(0),
        *scales.strides,
        scales.blocks,
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        BLOCK_K=tiles.block_k,
        BLOCKS=scales.blocks > 0,
        GATED=gated,
        TURNED=tiles.rows <= 64,
        CHAINED=chains(x.device),
    )
