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
def expect(full, rows, ROWS: gl.constexpr, BOX: gl.constexpr, ROW_BYTES: gl.constexpr, MORE: gl.constexpr):
    """The bytes of a step: those of a tile's rows of x, of up to ROWS, that are copied BOX at a time, and MORE."""
    if BOX == ROWS:
        mbarrier.expect(full, ROWS * ROW_BYTES + MORE)
    else:
        boxes = (rows + BOX - 1) // BOX
        for j in gl.static_range(ROWS // BOX):
            mbarrier.expect(full, (j + 1) * BOX * ROW_BYTES + MORE, pred=boxes == j + 1)


@gluon.jit
def load_weights(
    desc, plan_ptr, weight, full, empty, N, n_tiles, steps, part_steps, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, BOX:
    gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED:
    gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights: of gate and of up eight in turns, if gated.

    EARLY: not behind the kernel before, which writes neither them nor the plan.
    """
    if not EARLY:
        wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            expect(full.index(stage), rows, ROWS, BOX, 128 * CHUNKS, OUTPUTS * 128 * CHUNKS)
            for j in gl.static_range(CHUNKS):
                at = step * BLOCK_K + j * (BLOCK_K // CHUNKS)
                to = weight.index(stage * CHUNKS + j)
                if GATED:  # blocks of eight rows
                    row = [expert * (N // 4) + n * (OUTPUTS // 16), 0, 0, at]
                    tma.async_copy_global_to_shared(desc, row, full.index(stage), to)
                else:
                    tma.async_copy_global_to_shared(desc, [expert * N + n * OUTPUTS, at], full.index(stage), to)
            i += 1


@gluon.jit
def load_rows(
    desc, plan_ptr, x, tail, full, empty, n_tiles, steps, part_steps, ROWS: gl.constexpr, BOX: gl.constexpr, BLOCK_K:
    gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads rows of x, of up to ROWS, BOX at a time; those behind what x has room for in tail.

    Rows past an expert's last in a box are loaded too, and not written.
    """
    NEAR: gl.constexpr = x.shape[1]
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        _, first_row, rows, _ = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            for box in gl.static_range(ROWS // BOX):
                for j in gl.static_range(CHUNKS):
                    at = [first_row + box * BOX, step * BLOCK_K + j * (BLOCK_K // CHUNKS)]
                    if box * BOX < NEAR:
                        to = x.index(stage * CHUNKS + j).slice(box * BOX, BOX)
                    else:
                        to = tail.index(stage * CHUNKS + j).slice(box * BOX - NEAR, BOX)
                    tma.async_copy_global_to_shared(desc, at, full.index(stage), to, pred=box == 0 or rows > box * BOX)
            i += 1


@gluon.jit
def fetch_of_expert(
    ptr, expert, stride_expert, stride_group, n, N, step, plane_groups, last_group, GROUPS: gl.constexpr, GATED:
    gl.constexpr,
):
    """Has the scales, or minima, of a step of a tile of 256 outputs, or twice 128, brought into the cache."""
    ptr += expert.to(gl.int64) * stride_expert
    if GATED:
        fetch_scales(ptr, stride_group, n * 128, N, step, plane_groups, last_group, GROUPS, 2)
        fetch_scales(ptr + N, stride_group, n * 128, N, step, plane_groups, last_group, GROUPS, 2)
    else:
        fetch_scales(ptr, stride_group, n * 256, N, step, plane_groups, last_group, GROUPS, 4)
# fmt: on


def gate_beside_up(weight: torch.Tensor, outputs: int) -> TensorDescriptor:
    """`[E, 2 · N, K]`, N a multiple of eight, for copies of eight rows of gate, the same of up, and so on."""
    experts, rows, k = weight.shape
    bits, n = 8 * weight.element_size(), rows // 2
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)
    shape, strides = [(2 * experts - 1) * n // 8, 2, 8, k], [8 * k, n * k, k, 1]
    return TensorDescriptor(weight, shape, strides, [outputs // 16, 2, 8, COPIED_BYTES * 8 // bits], layout)


def described(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """`x`, whose leading dimensions are one after the other, as a matrix for copies of `rows` rows."""
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    stride = x.stride(-2) if count > 1 else width
    return TensorDescriptor(x, [count, width], [stride, 1], [rows, COPIED_BYTES * 8 // bits], layout)
