"""What the Hopper kernels of products by experts share: where a unit's operands are, and how they are loaded."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.moe.grouped_tiles import COPIED_BYTES
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.int4_loads import fetch_scales
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def load_weights(
    desc, plan_ptr, weight, full, empty, N, n_tiles, steps, part_steps, ROWS: gl.constexpr, OUTPUTS: gl.constexpr,
    BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY:
    gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights, two halves of a tile: of gate and of up, or one below the other.

    EARLY: not behind the kernel before, which writes neither them nor the plan.
    """
    HALF: gl.constexpr = OUTPUTS // 2
    if not EARLY:
        wait_for_previous(CHAINED)
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
            mbarrier.expect(full.index(stage), (ROWS + OUTPUTS) * 128 * CHUNKS)
            for j in gl.static_range(CHUNKS):
                at = step * BLOCK_K + j * (BLOCK_K // CHUNKS)
                to = weight.index(stage * CHUNKS + j)
                tma.async_copy_global_to_shared(desc, [left, at], full.index(stage), to.slice(0, HALF))
                tma.async_copy_global_to_shared(desc, [right, at], full.index(stage), to.slice(HALF, HALF))
            i += 1


@gluon.jit
def load_rows(
    desc, plan_ptr, x, full, empty, n_tiles, steps, part_steps, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES:
    gl.constexpr, PARTS: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads rows of x: those past an expert's last are loaded too, and not written."""
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        _, first_row, _, _ = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            for j in gl.static_range(CHUNKS):
                at = [first_row, step * BLOCK_K + j * (BLOCK_K // CHUNKS)]
                tma.async_copy_global_to_shared(desc, at, full.index(stage), x.index(stage * CHUNKS + j))
            i += 1


@gluon.jit
def fetch_of_expert(
    ptr, expert, stride_expert, stride_group, n, N, step, group_planes, last_group, GROUPS: gl.constexpr, GATED:
    gl.constexpr,
):
    """Has the scales, or minima, of a step of a tile of 256 outputs, or twice 128, brought into the cache."""
    ptr += expert.to(gl.int64) * stride_expert
    if GATED:
        fetch_scales(ptr, stride_group, n * 128, N, step, group_planes, last_group, GROUPS, 2)
        fetch_scales(ptr + N, stride_group, n * 128, N, step, group_planes, last_group, GROUPS, 2)
    else:
        fetch_scales(ptr, stride_group, n * 256, N, step, group_planes, last_group, GROUPS, 4)


@gluon.jit
def scaled(
    acc, epilogue, expert, first_row, rows, first_n, end_n, ROW_DIM: gl.constexpr,
):
    """Sums as fp32, times the scales of their rows and of the outputs from `first_n` to `end_n`, where there are any.

    ROW_DIM: which dimension is that of the rows of x.
    """
    x_scale_ptr, weight_scale_ptr, stride_expert, stride_output = epilogue[2:6]
    y = acc.to(gl.float32)
    if weight_scale_ptr is not None:
        OUTPUT_DIM: gl.constexpr = 1 - ROW_DIM
        m = gl.arange(0, y.shape[ROW_DIM], layout=gl.SliceLayout(OUTPUT_DIM, y.type.layout))
        n = first_n + gl.arange(0, y.shape[OUTPUT_DIM], layout=gl.SliceLayout(ROW_DIM, y.type.layout))
        x_scale = gl.load(x_scale_ptr + first_row + m, mask=m < rows, other=0.0)
        y *= gl.expand_dims(x_scale, OUTPUT_DIM)
        scale_ptrs = weight_scale_ptr + expert * stride_expert + n * stride_output
        y *= gl.expand_dims(gl.load(scale_ptrs, mask=n < end_n, other=0.0), ROW_DIM)
    return y
# fmt: on


def described(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """`x`, whose leading dimensions are one after the other, as a matrix for copies of `rows` rows."""
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    stride = x.stride(-2) if count > 1 else width
    return TensorDescriptor(x, [count, width], [stride, 1], [rows, COPIED_BYTES * 8 // bits], layout)
