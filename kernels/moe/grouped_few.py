"""The products of `grouped.py` for few rows an expert on Hopper (sm_90), in Gluon; elsewhere `grouped.py`'s kernel.

The time is that of reading the weights. Programs walk their units of work, and one warp loads weights by TMA as far
ahead as shared memory has room, beyond the unit that is being multiplied: memory is never waited for but at the start.
Weights are the first operand, which has 64 rows at least; a tile has one or two times as many. With SiLU × gate the
copy engine puts eight rows of gate and the same eight of up below each other, so that a thread has both of an output.
Rows of x are copied BOX at a time, and boxes past an expert's last row are not.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_loads import described, gate_beside_up, load_rows, load_weights
from octavo.kernels.moe.grouped_results import write
from octavo.kernels.moe.grouped_tiles import COPIED_BYTES, Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import halves
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import cdiv, chains, wait_for_previous

REGISTERS = {1: 168, 2: 128}
"""A thread's, on average, with one program a multiprocessor and with two."""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _scales_at(x_scale_ptrs, weight_scale_ptrs, m, rows, block, blocks):
    """Those of a block of inputs: of rows of x, and of outputs; past the last block, for nothing, the last."""
    at = gl.minimum(block, blocks - 1)
    return gl.load(x_scale_ptrs + at, mask=m < rows, other=0.0), gl.load(weight_scale_ptrs + at)


@gluon.jit
def _compute(
    epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, ROWS: gl.constexpr, OUTPUTS: gl.constexpr,
    BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
    PROMOTED: gl.constexpr, BLOCKS: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warpgroup does. PROMOTED: sums, of which tensor cores keep 14 bits, are taken out at each step.

    BLOCKS: and scaled. The next block's scales are read while a block is multiplied.
    """
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, BLOCK_K // CHUNKS // 4])
    zeros = gl.zeros([OUTPUTS, ROWS], SUM, layout)
    acc = zeros
    results = epilogue
    if BLOCKS:  # sums are scaled as they are added up
        results = (epilogue[0], epilogue[1], None, None, 0, 0, epilogue[6], epilogue[7])
    wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        part = work % PARTS
        first, end = steps_of(part, steps, part_steps)
        if PROMOTED or BLOCKS:
            acc = zeros
        if BLOCKS:
            N, blocks = epilogue[7], epilogue[8]
            m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
            row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, layout))
            if GATED:
                row = gl.minimum(n * (OUTPUTS // 2) + row // 16 * 8 + row % 8, N - 1) + row // 8 % 2 * N
            else:
                row = gl.minimum(n * OUTPUTS + row, N - 1)
            x_scale_ptrs = epilogue[2] + (first_row + m) * blocks
            weight_scale_ptrs = epilogue[3] + expert * epilogue[4] + row // 128 * epilogue[5]
            x_scale, w_scale = _scales_at(x_scale_ptrs, weight_scale_ptrs, m, rows, first * CHUNKS, blocks)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            if BLOCKS:
                for j in gl.static_range(CHUNKS):
                    second = x.index(stage * CHUNKS + j).permute((1, 0))
                    first_operand = weight.index(stage * CHUNKS + j)
                    sums = warpgroup_mma(first_operand, second, zeros, use_acc=False, is_async=True)
                    scale = gl.expand_dims(w_scale, 1) * gl.expand_dims(x_scale, 0)
                    block = step * CHUNKS + j + 1
                    x_scale, w_scale = _scales_at(x_scale_ptrs, weight_scale_ptrs, m, rows, block, blocks)
                    sums = warpgroup_mma_wait(0, deps=[sums])
                    acc += sums * scale
                mbarrier.arrive(empty.index(stage), count=1)
            elif PROMOTED:
                sums = zeros
                for j in gl.static_range(CHUNKS):
                    second = x.index(stage * CHUNKS + j).permute((1, 0))
                    first_operand = weight.index(stage * CHUNKS + j)
                    sums = warpgroup_mma(first_operand, second, sums, use_acc=j > 0, is_async=True)
                sums = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(empty.index(stage), count=1)
                acc += sums
            else:
                for j in gl.static_range(CHUNKS):
                    second = x.index(stage * CHUNKS + j).permute((1, 0))
                    add = True if j > 0 else step > first
                    acc = warpgroup_mma(weight.index(stage * CHUNKS + j), second, acc, use_acc=add, is_async=True)
                acc = warpgroup_mma_wait(CHUNKS, deps=[acc])
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=step > first)
            i += 1
        if not (PROMOTED or BLOCKS):
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        first_n = n * (OUTPUTS // 2 if GATED else OUTPUTS)
        if ROWS == 128:  # one half after the other, so that nothing spills
            left, right = halves(acc)
            write(left, results, expert, part, first_row, rows, first_n, GATED)
            write(right, results, expert, part, first_row + ROWS // 2, rows - ROWS // 2, first_n, GATED)
        else:
            write(acc, results, expert, part, first_row, rows, first_n, GATED)


@gluon.jit(do_not_specialize=["S", "part_steps"])
def _grouped_few_kernel(
    # Bound by reading the weights. One or two programs a multiprocessor.
    x_desc, weight_desc, out_ptr, bias_ptr, plan_ptr, x_scale_ptr, weight_scale_ptr, S, N, stride_expert, stride_output,
    blocks, n_tiles, steps, part_steps, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, BOX: gl.constexpr, BLOCK_K:
    gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, PROMOTED:
    gl.constexpr, BLOCKS: gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr, CHAINED: gl.constexpr,
):
    WIDTH: gl.constexpr = BLOCK_K // CHUNKS
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CHUNKS, ROWS, WIDTH], x_desc.layout)
    dtype: gl.constexpr = x_desc.dtype
    if GATED:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, OUTPUTS // 16, 2, 8, WIDTH], weight_desc.layout)
    else:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, OUTPUTS, WIDTH], weight_desc.layout)
    weight = loaded._reinterpret(dtype, [STAGES * CHUNKS, OUTPUTS, WIDTH], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    epilogue = (out_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, stride_expert, stride_output, S, N, blocks)
    gl.warp_specialize([
        (_compute, (
            epilogue, plan_ptr, x, weight, full, empty, n_tiles, steps, part_steps, ROWS, OUTPUTS, BLOCK_K, CHUNKS,
            STAGES, PARTS, GATED, PROMOTED, BLOCKS, CHAINED)),
        (load_weights, (
            weight_desc, plan_ptr, loaded, full, empty, N, n_tiles, steps, part_steps, ROWS, OUTPUTS, BOX, BLOCK_K,
            CHUNKS, STAGES, PARTS, GATED, EARLY, CHAINED)),
        (load_rows, (
            x_desc, plan_ptr, x, None, full, empty, n_tiles, steps, part_steps, ROWS, BOX, BLOCK_K, CHUNKS, STAGES,
            PARTS, CHAINED)),
    ], [1, 1], [24, 24])
# fmt: on


def grouped_few(
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
    planned_before: bool,
) -> None:
    """Launches it; the arguments are those of `octavo.kernels.moe.grouped.grouped`."""
    s, n = out.shape[-2:]
    steps = cdiv(weight.shape[-1], tiles.block_k)
    launch(
        _grouped_few_kernel,
        (programs,),
        described(x, tiles.box or tiles.rows),
        gate_beside_up(weight, tiles.outputs) if gated else described(weight, tiles.outputs),
        out,
        bias,
        plan,
        scales.x,
        scales.weight,
        s,
        n,
        *scales.strides,
        scales.blocks,
        n_tiles,
        steps,
        cdiv(steps, tiles.parts),
        device=x.device,
        num_warps=4,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        BOX=tiles.box or tiles.rows,
        BLOCK_K=tiles.block_k,
        CHUNKS=tiles.block_k * weight.element_size() // COPIED_BYTES,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        PROMOTED=weight.dtype == torch.float8_e4m3fn and tiles.rows < 128,  # else there are no registers for it
        BLOCKS=scales.blocks > 0,
        EARLY=planned_before,
        REGISTERS=REGISTERS[tiles.programs_per_sm],
        CHAINED=chains(x.device),
    )
