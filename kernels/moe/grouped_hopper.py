"""The products of `grouped.py` for many rows an expert on Hopper (sm_90), in Gluon; elsewhere `grouped.py`'s kernel.

A persistent program on each multiprocessor computes tiles of 128 rows by 256 outputs, with SiLU × gate 128 of gate and
the same 128 of up: two warps load by TMA for two warpgroups, 64 rows each. A warpgroup issues a step's products while
those of the step before run, and writes results while the first products of the next tile run. Of an expert's last tile
one that has no rows skips its products, so that at most 63 rows an expert are computed in vain.

Beside scales of blocks sums are taken out at each step, of 128 outputs at a time, as in
`octavo.kernels.quant.w8a8_promoted`; the other warpgroup multiplies then. A tile has 128 results of SiLU × gate of a
row, a group of what the next product takes: they are written quantised.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.gluon_layouts import bytes_layout, wide_layout
from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_loads import described, load_rows
from octavo.kernels.moe.grouped_results import scaled
from octavo.kernels.moe.grouped_tiles import Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import halves, silu_times
from octavo.kernels.quant.rounding import magnitude, rounded, scale_of
from octavo.kernels.quant.w8a8_loads import multiply
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.quant.w8a8_promoted import promoted
from octavo.kernels.tiles import cdiv

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load_weights(
    desc, plan_ptr, weight, full, empty, N, n_tiles, steps, part_steps, ROWS: gl.constexpr, OUTPUTS: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
):
    """What the warp does that loads weights, two halves of a tile: of gate and of up, or one below the other."""
    HALF: gl.constexpr = OUTPUTS // 2
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, _, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        left = expert * (2 * N) + n * HALF if GATED else expert * N + n * OUTPUTS
        right = left + (N if GATED else HALF)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (ROWS + OUTPUTS) * 128)
            at, to = step * BLOCK_K, weight.index(stage)
            tma.async_copy_global_to_shared(desc, [left, at], full.index(stage), to.slice(0, HALF))
            tma.async_copy_global_to_shared(desc, [right, at], full.index(stage), to.slice(HALF, HALF))
            i += 1


@gluon.jit
def _results(acc, epilogue, expert, part, first_row, rows, first_n, GATED: gl.constexpr):
    """What is made of a warpgroup's sums: the left and the right half of its outputs, or SiLU × gate twice."""
    bias_ptr, N = epilogue[1], epilogue[7]
    DTYPE: gl.constexpr = epilogue[0].dtype.element_ty
    HALF: gl.constexpr = acc.shape[1] // 2
    layout: gl.constexpr = wide_layout(acc.shape[0], HALF)
    left, right = halves(acc)
    left = scaled(left, epilogue, expert, first_row, rows, first_n, N, 0)
    if GATED:
        right = scaled(right, epilogue, expert, first_row, rows, N + first_n, 2 * N, 0)
        left = silu_times(left, right)
    else:
        right = scaled(right, epilogue, expert, first_row, rows, first_n + HALF, N, 0)
        if bias_ptr is not None:
            n = first_n + gl.arange(0, HALF, layout=gl.SliceLayout(0, left.type.layout))
            bias_ptrs = bias_ptr + expert.to(gl.int64) * N + n
            bias = gl.load(bias_ptrs, mask=(n < N) & (part == 0), other=0.0)
            left += gl.expand_dims(bias.to(gl.float32), 0)
            bias = gl.load(bias_ptrs + HALF, mask=(n < N - HALF) & (part == 0), other=0.0)
            right += gl.expand_dims(bias.to(gl.float32), 0)
    left = gl.convert_layout(left.to(DTYPE), layout)
    if GATED:
        right = left
    else:
        right = gl.convert_layout(right.to(DTYPE), layout)
    return left, right


@gluon.jit
def _write(y, epilogue, part, first_row, rows, first_n):
    out_ptr, S, N = epilogue[0], epilogue[6], epilogue[7]
    layout: gl.constexpr = y.type.layout
    m = gl.expand_dims(gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout)), 1)
    n = first_n + gl.expand_dims(gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    at = (part * S + first_row + m).to(gl.int64) * N + n
    gl.store(out_ptr + at, y, mask=(m < rows) & (n < N))


@gluon.jit
def _write_halves(left, right, epilogue, part, first_row, rows, first_n, GATED: gl.constexpr):
    _write(left, epilogue, part, first_row, rows, first_n)
    if not GATED:
        _write(right, epilogue, part, first_row, rows, first_n + left.shape[1])


@gluon.jit
def _compute_plain(
    group: gl.constexpr, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    HALF_ROWS: gl.constexpr = ROWS // 2
    COLS: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    DTYPE: gl.constexpr = epilogue[0].dtype.element_ty
    LATE: gl.constexpr = DTYPE.primitive_bitwidth == 16
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    WIDTH: gl.constexpr = 128 if x.dtype == gl.int8 else OUTPUTS  # of an instruction: Triton has no wider one for int8
    acc = gl.zeros([HALF_ROWS, OUTPUTS], SUM, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, BLOCK_K // 4]))
    last_row, last_rows, last_n, last_part = 0, 0, 0, 0  # no results are there yet
    if LATE:
        left = gl.zeros([HALF_ROWS, OUTPUTS // 2], DTYPE, wide_layout(HALF_ROWS, OUTPUTS // 2))
        right = left
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        part = work % PARTS
        first, end = steps_of(part, steps, part_steps)
        first_row += group * HALF_ROWS
        rows -= group * HALF_ROWS
        if rows > 0:
            acc = multiply(x, weight, full, acc, i, group, HALF_ROWS, STAGES, True)
            if LATE:
                _write_halves(left, right, epilogue, last_part, last_row, last_rows, last_n, GATED)
            acc = warpgroup_mma_wait(1, deps=[acc])
            i += 1
            for _ in range(first + 1, end):
                acc = multiply(x, weight, full, acc, i, group, HALF_ROWS, STAGES, False)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
                i += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            if LATE:
                left, right = _results(acc, epilogue, expert, part, first_row, rows, n * COLS, GATED)
                last_row, last_rows, last_n, last_part = first_row, rows, n * COLS, part
            else:
                now_left, now_right = _results(acc, epilogue, expert, part, first_row, rows, n * COLS, GATED)
                _write_halves(now_left, now_right, epilogue, part, first_row, rows, n * COLS, GATED)
        else:
            for _ in range(first, end):
                mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(empty.index(i % STAGES), count=1)
                i += 1
    if LATE:
        _write_halves(left, right, epilogue, last_part, last_row, last_rows, last_n, GATED)


@gluon.jit
def _write_quantized(y, out_scale_ptr, epilogue, first_row, rows, n):
    """y as e4m3, and the scales of its rows, which are those of block n of 128 inputs of the next product."""
    LIMIT: gl.constexpr = 448.0
    layout: gl.constexpr = y.type.layout
    blocks = epilogue[7] // 128
    scale = scale_of(gl.max(magnitude(y), 1), LIMIT)
    m = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    gl.store(out_scale_ptr + (first_row + m) * blocks + n, scale, mask=m < rows)
    q = rounded(y * gl.expand_dims(1.0 / scale, 1), epilogue[0].dtype.element_ty, LIMIT, True)
    _write(gl.convert_layout(q, bytes_layout(y.shape[0], y.shape[1])), epilogue, 0, first_row, rows, n * 128)


@gluon.jit
def _block_scales(x_ptrs, left_ptr, right_ptr, step):
    """Those of a step's rows, and of its 128 outputs to the left and to the right."""
    return gl.load(x_ptrs + step), gl.load(left_ptr + step), gl.load(right_ptr + step)


@gluon.jit
def _compute_in_blocks(
    group: gl.constexpr, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, blocks, ROWS:
    gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
):
    """What warpgroup number `group` does beside scales of blocks, which are read while a step is multiplied."""
    HALF_ROWS: gl.constexpr = ROWS // 2
    zeros = gl.zeros([HALF_ROWS, 128], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
    DTYPE: gl.constexpr = epilogue[0].dtype.element_ty
    out_layout: gl.constexpr = wide_layout(HALF_ROWS, 128)
    x_scale_ptr, weight_scale_ptr, stride_expert, stride_output = epilogue[2:6]
    N, out_scale_ptr = epilogue[7], epilogue[8]
    sums = zeros
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, steps, part_steps)
        first_row += group * HALF_ROWS
        rows -= group * HALF_ROWS
        if rows > 0:
            m = gl.minimum(gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, zeros.type.layout)), rows - 1)
            x_ptrs = x_scale_ptr + (first_row + m).to(gl.int64) * blocks
            left_block = n if GATED else 2 * n
            right_block = N // 128 + n if GATED else gl.minimum(2 * n + 1, (N - 1) // 128)
            weight_ptr = weight_scale_ptr + expert.to(gl.int64) * stride_expert
            left_ptr, right_ptr = weight_ptr + left_block * stride_output, weight_ptr + right_block * stride_output
            left, right = zeros, zeros
            x_scale, left_scale, right_scale = _block_scales(x_ptrs, left_ptr, right_ptr, first)
            for step in range(first, end):
                stage = i % STAGES
                mbarrier.wait(full.index(stage), i // STAGES & 1)
                mine = x.index(stage).slice(group * HALF_ROWS, HALF_ROWS)
                lower, upper = weight.index(stage).slice(0, 128), weight.index(stage).slice(128, 128)
                sums = warpgroup_mma(mine, lower.permute((1, 0)), sums, use_acc=False, is_async=True)
                of_left, of_right = x_scale * left_scale, x_scale * right_scale
                x_scale, left_scale, right_scale = _block_scales(
                    x_ptrs, left_ptr, right_ptr, gl.minimum(step + 1, end - 1)
                )
                sums = warpgroup_mma_wait(0, deps=[sums])
                left = promoted(left, sums, of_left, True)
                sums = warpgroup_mma(mine, upper.permute((1, 0)), sums, use_acc=False, is_async=True)
                sums = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(empty.index(stage), count=1)
                right = promoted(right, sums, of_right, True)
                i += 1
            if out_scale_ptr is not None:
                _write_quantized(silu_times(left, right), out_scale_ptr, epilogue, first_row, rows, n)
            elif GATED:
                y = gl.convert_layout(silu_times(left, right).to(DTYPE), out_layout)
                _write(y, epilogue, 0, first_row, rows, n * 128)
            else:
                part = work % PARTS
                _write(gl.convert_layout(left.to(DTYPE), out_layout), epilogue, part, first_row, rows, n * 256)
                _write(gl.convert_layout(right.to(DTYPE), out_layout), epilogue, part, first_row, rows, n * 256 + 128)
        else:
            for _ in range(first, end):
                mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(empty.index(i % STAGES), count=1)
                i += 1


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, blocks, ROWS:
    gl.constexpr, OUTPUTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED:
    gl.constexpr, BLOCKS: gl.constexpr,
):
    if BLOCKS:
        _compute_in_blocks(
            group, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, blocks, ROWS, STAGES, PARTS,
            GATED)
    else:
        _compute_plain(
            group, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, ROWS, OUTPUTS, BLOCK_K,
            STAGES, PARTS, GATED)


@gluon.jit(do_not_specialize=["S", "part_steps"])
def _grouped_hopper_kernel(
    # Bound by the tensor cores. One program a multiprocessor.
    x_desc, weight_desc, out_ptr, out_scale_ptr, bias_ptr, plan_ptr, x_scale_ptr, weight_scale_ptr, S, N, stride_expert,
    stride_output, n_tiles, steps, part_steps, blocks, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, BLOCKS: gl.constexpr,
):
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, BLOCK_K], x_desc.layout)
    weight = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, OUTPUTS, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    epilogue = (out_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, stride_expert, stride_output, S, N, out_scale_ptr)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, blocks, ROWS, OUTPUTS, BLOCK_K,
            STAGES, PARTS, GATED, BLOCKS)),
        (_compute, (
            1, epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, blocks, ROWS, OUTPUTS, BLOCK_K,
            STAGES, PARTS, GATED, BLOCKS)),
        (_load_weights, (
            weight_desc, plan_ptr, weight, full, empty, N, n_tiles, steps, part_steps, ROWS, OUTPUTS, BLOCK_K, STAGES,
            PARTS, GATED)),
        (load_rows, (
            x_desc, plan_ptr, x, None, full, empty, n_tiles, steps, part_steps, ROWS, ROWS, BLOCK_K, 1, STAGES, PARTS,
            False)),
    ], [4, 1, 1], [240, 24, 24])
# fmt: on


def grouped_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales,
    plan: torch.Tensor,
    tiles: Tiles,
    n_tiles: int,
    programs: int,
    gated: bool,
    out_scale: torch.Tensor | None,
) -> None:
    """Launches it; the arguments are those of `octavo.kernels.moe.grouped.grouped`."""
    s, n = out.shape[-2:]
    steps = cdiv(weight.shape[-1], tiles.block_k)
    launch(
        _grouped_hopper_kernel,
        (programs,),
        described(x, tiles.rows),
        described(weight, tiles.outputs // 2),
        out,
        out_scale,
        bias,
        plan,
        scales.x,
        scales.weight,
        s,
        n,
        *scales.strides,
        n_tiles,
        steps,
        cdiv(steps, tiles.parts),
        scales.blocks,
        device=x.device,
        num_warps=4,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        BLOCK_K=tiles.block_k,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        BLOCKS=scales.blocks > 0,
    )
