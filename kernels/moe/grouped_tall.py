"""The products of `grouped.py` for tens to hundreds of rows an expert on Hopper (sm_90), in Gluon.

Weights are the first operand, so that a tile can have as many rows as its expert has: up to ROWS, of 256 also up to
half, or TAIL more. An expert with a few rows more than ROWS has no tile of its own for them, which would read the
weights again and take as long as a half tile. Two warpgroups have 64 outputs each. With SiLU × gate the copy engine
puts eight rows of gate and the same eight of up below each other, so that a thread has both of an output. Rows of x are
copied BOX at a time, and boxes past an expert's last row are not.
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

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_few import write_turned
from octavo.kernels.moe.grouped_loads import described, gate_and_up, gate_beside_up, scaled
from octavo.kernels.moe.grouped_tiles import COPIED_BYTES, Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import halves, silu_times
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import cdiv, chains, let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load_weights(
    desc, plan_ptr, weight, full, empty, N, n_tiles, steps, part_steps, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights; EARLY: not behind the kernel before, which writes none nor the plan."""
    if not EARLY:
        wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, _, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 128 * 128 * CHUNKS)
            for j in gl.static_range(CHUNKS):
                at = step * BLOCK_K + j * (BLOCK_K // CHUNKS)
                to = weight.index(stage * CHUNKS + j)
                if GATED:  # blocks of eight rows
                    row = [expert * (N // 4) + n * 8, 0, 0, at]
                    tma.async_copy_global_to_shared(desc, row, full.index(stage), to)
                else:
                    tma.async_copy_global_to_shared(desc, [expert * N + n * 128, at], full.index(stage), to)
            i += 1


@gluon.jit
def _load_rows(
    desc, plan_ptr, x, more, full, empty, n_tiles, steps, part_steps, ROWS: gl.constexpr, TAIL: gl.constexpr, BOX:
    gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, CHAINED:
    gl.constexpr,
):
    """What the warp does that loads rows of x: those past an expert's last in a box are loaded too, and not written."""
    BOXES: gl.constexpr = (ROWS + TAIL) // BOX
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        _, first_row, rows, _ = unit_at(plan_ptr, work // PARTS, n_tiles)
        boxes = (rows + BOX - 1) // BOX
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            for j in gl.static_range(BOXES):
                mbarrier.expect(full.index(stage), (j + 1) * BOX * 128 * CHUNKS, pred=boxes == j + 1)
            for j in gl.static_range(BOXES):
                if j < boxes:
                    for chunk in gl.static_range(CHUNKS):
                        at = [first_row + j * BOX, step * BLOCK_K + chunk * (BLOCK_K // CHUNKS)]
                        if j * BOX < ROWS:
                            to = x.index(stage * CHUNKS + chunk).slice(j * BOX, BOX)
                        else:
                            to = more.index(stage * CHUNKS + chunk).slice(j * BOX - ROWS, BOX)
                        tma.async_copy_global_to_shared(desc, at, full.index(stage), to)
            i += 1


@gluon.jit
def _multiply(
    weight, x, more, full, acc, tail, i, group: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, CHUNKS:
    gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
):
    """Issues the products of step i, as soon as its operands are there; the FIRST of a tile begin its sums."""
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    for j in gl.static_range(CHUNKS):
        at = stage * CHUNKS + j
        mine = weight.index(at).slice(group * 64, 64)
        rows = x.index(at).slice(0, WIDTH).permute((1, 0))
        acc = warpgroup_mma(mine, rows, acc, use_acc=not FIRST or j > 0, is_async=True)
        if TAIL > 0:
            rows = more.index(at).permute((1, 0))
            tail = warpgroup_mma(mine, rows, tail, use_acc=not FIRST or j > 0, is_async=True)
    return acc, tail


@gluon.jit
def _wait(acc, tail, LATER: gl.constexpr, TAIL: gl.constexpr):
    """Waits for all products but those of the last LATER chunks."""
    if TAIL > 0:
        acc, tail = warpgroup_mma_wait(2 * LATER, deps=[acc, tail])
    else:
        acc = warpgroup_mma_wait(LATER, deps=[acc])
    return acc, tail


@gluon.jit
def _sum(
    weight, x, more, full, empty, acc, tail, i, count, group: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums over `count` steps, of a warpgroup's outputs by WIDTH rows, and by the TAIL rows behind them."""
    acc, tail = _multiply(weight, x, more, full, acc, tail, i, group, WIDTH, TAIL, CHUNKS, STAGES, True)
    acc, tail = _wait(acc, tail, CHUNKS, TAIL)
    i += 1
    for _ in range(1, count):
        acc, tail = _multiply(weight, x, more, full, acc, tail, i, group, WIDTH, TAIL, CHUNKS, STAGES, False)
        acc, tail = _wait(acc, tail, CHUNKS, TAIL)
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        i += 1
    acc, tail = _wait(acc, tail, 0, TAIL)
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
    return acc, tail, i


@gluon.jit
def _halves_of_each(parts):
    halved = ()
    for j in gl.static_range(len(parts)):
        halved = halved + halves(parts[j])
    return halved


@gluon.jit
def write_tall(acc, epilogue, expert, part, first_row, rows, first_n, GATED: gl.constexpr):
    """What becomes of the sums of a warpgroup's outputs by rows, 16 of them at a time."""
    N = epilogue[7]
    parts = (acc,)
    for _ in gl.static_range((acc.shape[1] // 16).bit_length() - 1):
        parts = _halves_of_each(parts)
    WIDTH: gl.constexpr = parts[0].shape[1]
    for j in gl.static_range(len(parts)):
        if rows > j * WIDTH:
            at, left = first_row + j * WIDTH, rows - j * WIDTH
            if GATED:
                gate, up = gate_and_up(parts[j])
                gate = scaled(gate, epilogue, expert, at, left, first_n, N, 1)
                up = scaled(up, epilogue, expert, at, left, N + first_n, 2 * N, 1)
                write_turned(silu_times(gate, up), epilogue, None, expert, 0, at, left, first_n)
            else:
                y = scaled(parts[j], epilogue, expert, at, left, first_n, N, 1)
                write_turned(y, epilogue, epilogue[1], expert, part, at, left, first_n)


@gluon.jit
def cleared(acc):
    """Zeros, which compilers take for unknown.

    Else each branch ahead of which sums are zeros has registers of its own for them, of which there are not enough, and
    ptxas has each product wait for the one before.
    """
    CODE: gl.constexpr = "=r,r" if acc.dtype == gl.int32 else "=f,f"
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", CODE, [acc], dtype=acc.dtype, is_pure=False, pack=1)


@gluon.jit
def _sum_half(
    weight, x, more, full, empty, acc, tail, i, count, group: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums by a half of ROWS, in the registers of the left half of acc."""
    HALF: gl.constexpr = ROWS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, BLOCK_K // CHUNKS // 4])
    left, right = halves(acc)
    left = gl.convert_layout(left, layout, assert_trivial=True)
    left, tail, i = _sum(weight, x, more, full, empty, left, tail, i, count, group, HALF, 0, CHUNKS, STAGES)
    left = gl.convert_layout(left, right.type.layout, assert_trivial=True)
    both = gl.join(left, right).permute((0, 2, 1)).reshape([64, ROWS])
    return gl.convert_layout(both, acc.type.layout, assert_trivial=True), tail, i


@gluon.jit
def _sum_as_many(
    weight, x, more, full, empty, acc, tail, i, count, rows, group: gl.constexpr, ROWS: gl.constexpr, TAIL:
    gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums by as many rows as a tile has, more or less."""
    if ROWS >= 256:
        if rows <= ROWS // 2:
            acc, tail, i = _sum_half(
                weight, x, more, full, empty, acc, tail, i, count, group, ROWS, BLOCK_K, CHUNKS, STAGES
            )
        elif rows <= ROWS:
            acc, tail, i = _sum(weight, x, more, full, empty, acc, tail, i, count, group, ROWS, 0, CHUNKS, STAGES)
        else:
            acc, tail, i = _sum(weight, x, more, full, empty, acc, tail, i, count, group, ROWS, TAIL, CHUNKS, STAGES)
    elif rows <= ROWS:
        acc, tail, i = _sum(weight, x, more, full, empty, acc, tail, i, count, group, ROWS, 0, CHUNKS, STAGES)
    else:
        acc, tail, i = _sum(weight, x, more, full, empty, acc, tail, i, count, group, ROWS, TAIL, CHUNKS, STAGES)
    return acc, tail, i


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS:
    gl.constexpr, TAIL: gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS:
    gl.constexpr, GATED: gl.constexpr, CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    COLS: gl.constexpr = 32 if GATED else 64
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    K: gl.constexpr = BLOCK_K // CHUNKS // 4
    LONG: gl.constexpr = 128 if x.dtype == gl.int8 and ROWS > 128 else ROWS  # Triton has no wider one for int8
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LONG, K])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, K])
    wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        part = work % PARTS
        first, end = steps_of(part, steps, part_steps)
        first_n = (2 * n + group) * COLS
        acc = cleared(gl.zeros([64, ROWS], SUM, acc_layout))
        tail = cleared(gl.zeros([64, TAIL], SUM, tail_layout))
        acc, tail, i = _sum_as_many(
            weight, x, more, full, empty, acc, tail, i, end - first, rows, group, ROWS, TAIL, BLOCK_K, CHUNKS, STAGES
        )
        write_tall(acc, epilogue, expert, part, first_row, rows, first_n, GATED)
        if rows > ROWS:
            write_tall(tail, epilogue, expert, part, first_row + ROWS, rows - ROWS, first_n, GATED)


@gluon.jit(do_not_specialize=["S", "part_steps"])
def _grouped_tall_kernel(
    # Bound by reading the weights, or by the tensor cores. One program a multiprocessor.
    x_desc, weight_desc, out_ptr, bias_ptr, plan_ptr, x_scale_ptr, weight_scale_ptr, S, N, stride_expert, stride_output,
    n_tiles, steps, part_steps, ROWS: gl.constexpr, TAIL: gl.constexpr, BOX: gl.constexpr, BLOCK_K: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED:
    gl.constexpr,
):
    WIDTH: gl.constexpr = BLOCK_K // CHUNKS
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, ROWS, WIDTH], x_desc.layout)
    more = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, TAIL, WIDTH], x_desc.layout)
    if GATED:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 8, 2, 8, WIDTH], weight_desc.layout)
    else:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 128, WIDTH], weight_desc.layout)
    weight = loaded._reinterpret(dtype, [STAGES * CHUNKS, 128, WIDTH], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    epilogue = (out_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, stride_expert, stride_output, S, N)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS, TAIL, BLOCK_K,
            CHUNKS, STAGES, PARTS, GATED, CHAINED)),
        (_compute, (
            1, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS, TAIL, BLOCK_K,
            CHUNKS, STAGES, PARTS, GATED, CHAINED)),
        (_load_weights, (
            weight_desc, plan_ptr, loaded, full, empty, N, n_tiles, steps, part_steps, BLOCK_K, CHUNKS, STAGES, PARTS,
            GATED, EARLY, CHAINED)),
        (_load_rows, (
            x_desc, plan_ptr, x, more, full, empty, n_tiles, steps, part_steps, ROWS, TAIL, BOX, BLOCK_K, CHUNKS,
            STAGES, PARTS, CHAINED)),
    ], [4, 1, 1], [240, 24, 24])
# fmt: on


def grouped_tall(
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
        _grouped_tall_kernel,
        (programs,),
        described(x, tiles.box),
        gate_beside_up(weight, tiles.outputs) if gated else described(weight, tiles.outputs),
        out,
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
        device=x.device,
        num_warps=4,
        ROWS=tiles.rows,
        TAIL=tiles.tail,
        BOX=tiles.box,
        BLOCK_K=tiles.block_k,
        CHUNKS=tiles.block_k * weight.element_size() // COPIED_BYTES,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=planned_before,
        CHAINED=chains(x.device),
    )
