"""Tiles of the W8A8 product whose inputs are dealt out to several programs, on Hopper: their parts, added up in order.

Programs of one tile leave the sums of their inputs in memory, and a second kernel adds them up and does what follows.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.w8a8_epilogue import finish
from octavo.kernels.tiles import cdiv, chains, let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def steps_of(part, steps, part_steps):
    """The first step of a part of a tile, and that behind its last."""
    first = part * part_steps
    return first, gl.minimum(first + part_steps, steps)


@gluon.jit
def leave_part(acc, parts_ptr, part, first_m, first_n, M, N, TURNED: gl.constexpr):
    """Leaves a warpgroup's sums of one part of the inputs; rows are outputs if TURNED."""
    layout: gl.constexpr = acc.type.layout
    rows = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    if TURNED:
        m, n = first_m + cols, first_n + rows
    else:
        m, n = first_m + rows, first_n + cols
    gl.store(parts_ptr + (part * M + m).to(gl.int64) * N + n, acc, mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["M", "stride_x_scale", "stride_x_zero"])
def _add_parts_kernel(
    # Bound by memory, which is the cache: parts read once, the output written once.
    out_ptr, parts_ptr, x_scale_ptr, weight_scale_ptr, x_zero_ptr, weight_sum_ptr, bias_ptr, residual_ptr, M, N,
    stride_x_scale, stride_weight_scale, stride_x_zero, PARTS: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATED:
    tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    first_m, first_n = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    m = first_m + tl.arange(0, ROWS)[:, None]
    n = first_n + tl.arange(0, COLS)[None, :]
    mask = (m < M) & (n < N)
    acc = tl.load(parts_ptr + m.to(tl.int64) * N + n, mask=mask, other=0)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(parts_ptr + (part * M + m).to(tl.int64) * N + n, mask=mask, other=0)
    epilogue = (
        out_ptr, M, N, x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale, x_zero_ptr, stride_x_zero,
        weight_sum_ptr, bias_ptr, residual_ptr,
    )
    finish(acc, first_m, first_n, epilogue, False, BLOCKS, ACTIVATED)
# fmt: on


def room_for_parts(parts: int, m: int, n: int, weight: torch.Tensor) -> torch.Tensor | None:
    """Memory for the sums of that many parts, of all tokens and outputs; None for one, which needs none."""
    dtype = torch.int32 if weight.dtype == torch.int8 else torch.float32
    return empty((parts, m, n), dtype, weight.device) if parts > 1 else None


def add_parts(
    out: torch.Tensor,
    parts: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    blocks: bool,
    activated: bool,
    strides: tuple[int, int, int],
) -> None:
    """Adds them up and writes the result; `strides` are those of the scales and zero points."""
    (count, m, n), rows, cols = parts.shape, 16, 64
    launch(
        _add_parts_kernel,
        (cdiv(m, rows), cdiv(n, cols)),
        out,
        parts,
        x_scale,
        weight_scale,
        x_zero,
        weight_sum,
        bias,
        residual,
        m,
        n,
        *strides,
        device=out.device,
        num_warps=2,
        PARTS=count,
        BLOCKS=blocks,
        ACTIVATED=activated,
        ROWS=rows,
        COLS=cols,
        CHAINED=chains(out.device),
    )
