"""The products of `grouped.py` for tens to hundreds of rows an expert on Hopper (sm_90), in Gluon.

Weights are the first operand, so that a tile can have as many rows as its expert has: up to ROWS, of 256 also up to
half, or TAIL more, in one or two parts. An expert with a few rows more than ROWS has no tile of its own for them, which
would read the weights again and take as long as a half tile. Two warpgroups have 64 outputs each. With SiLU × gate the
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

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _multiply(
    weight, x, more, full, acc, tail, far, i, group: gl.constexpr, WIDTH: gl.constexpr, TAILS: gl.constexpr, CHUNKS:
    gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
):
    """Issues the products of step i, as soon as its operands are there; the FIRST of a tile begin its sums."""
    TAIL: gl.constexpr = tail.shape[1]
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    for j in gl.static_range(CHUNKS):
        at = stage * CHUNKS + j
        mine = weight.index(at).slice(group * 64, 64)
        rows = x.index(at).slice(0, WIDTH).permute((1, 0))
        acc = warpgroup_mma(mine, rows, acc, use_acc=not FIRST or j > 0, is_async=True)
        if TAILS > 0:
            rows = more.index(at).slice(0, TAIL).permute((1, 0))
            tail = warpgroup_mma(mine, rows, tail, use_acc=not FIRST or j > 0, is_async=True)
        if TAILS > 1:
            rows = more.index(at).slice(TAIL, TAIL).permute((1, 0))
            far = warpgroup_mma(mine, rows, far, use_acc=not FIRST or j > 0, is_async=True)
    return acc, tail, far


@gluon.jit
def _wait(acc, tail, far, LATER: gl.constexpr, TAILS: gl.constexpr):
    """Waits for all products but those of the last LATER chunks."""
    if TAILS > 1:
        acc, tail, far = warpgroup_mma_wait(3 * LATER, deps=[acc, tail, far])
    elif TAILS > 0:
        acc, tail = warpgroup_mma_wait(2 * LATER, deps=[acc, tail])
    else:
        acc = warpgroup_mma_wait(LATER, deps=[acc])
    return acc, tail, far


@gluon.jit
def _sum(
    weight, x, more, full, empty, acc, tail, far, i, count, group: gl.constexpr, WIDTH: gl.constexpr, TAILS:
    gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums over `count` steps, of a warpgroup's outputs by WIDTH rows, and by those of TAILS tails behind them."""
    acc, tail, far = _multiply(weight, x, more, full, acc, tail, far, i, group, WIDTH, TAILS, CHUNKS, STAGES, True)
    acc, tail, far = _wait(acc, tail, far, CHUNKS, TAILS)
    i += 1
    for _ in range(1, count):
        acc, tail, far = _multiply(weight, x, more, full, acc, tail, far, i, group, WIDTH, TAILS, CHUNKS, STAGES, False)
        acc, tail, far = _wait(acc, tail, far, CHUNKS, TAILS)
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        i += 1
    acc, tail, far = _wait(acc, tail, far, 0, TAILS)
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
    return acc, tail, far, i


@gluon.jit
def _halves_of_each(parts):
    halved = ()
    for j in gl.static_range(len(parts)):
        halved = halved + halves(parts[j])
    return halved


@gluon.jit
def write_tall(acc, epilogue, expert, part, first_row, rows, first_n, GATED: gl.constexpr):
    """What becomes of the sums of a warpgroup's outputs by rows, 16 of them at a time."""
    parts = (acc,)
    for _ in gl.static_range((acc.shape[1] // 16).bit_length() - 1):
        parts = _halves_of_each(parts)
    WIDTH: gl.constexpr = parts[0].shape[1]
    for j in gl.static_range(len(parts)):
        if rows > j * WIDTH:
            write(parts[j], epilogue, expert, part, first_row + j * WIDTH, rows - j * WIDTH, first_n, GATED)


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
    weight, x, more, full, empty, acc, tail, far, i, count, group: gl.constexpr, ROWS: gl.constexpr, BLOCK_K:
    gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums by a half of ROWS, in the registers of the left half of acc."""
    HALF: gl.constexpr = ROWS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, BLOCK_K // CHUNKS // 4])
    left, right = halves(acc)
    left = gl.convert_layout(left, layout, assert_trivial=True)
    left, tail, far, i = _sum(weight, x, more, full, empty, left, tail, far, i, count, group, HALF, 0, CHUNKS, STAGES)
    left = gl.convert_layout(left, right.type.layout, assert_trivial=True)
    both = gl.join(left, right).permute((0, 2, 1)).reshape([64, ROWS])
    return gl.convert_layout(both, acc.type.layout, assert_trivial=True), tail, far, i


@gluon.jit
def _sum_with_tails(
    weight, x, more, full, empty, acc, tail, far, i, count, rows, group: gl.constexpr, ROWS: gl.constexpr, TAILS:
    gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums by ROWS and all tails, or by the first of two."""
    if TAILS > 1:
        if rows <= ROWS + tail.shape[1]:
            acc, tail, far, i = _sum(
                weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, 1, CHUNKS, STAGES
            )
        else:
            acc, tail, far, i = _sum(
                weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, 2, CHUNKS, STAGES
            )
    else:
        acc, tail, far, i = _sum(weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, 1, CHUNKS, STAGES)
    return acc, tail, far, i


@gluon.jit
def _sum_as_many(
    weight, x, more, full, empty, acc, tail, far, i, count, rows, group: gl.constexpr, ROWS: gl.constexpr, TAILS:
    gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):
    """Sums by as many rows as a tile has, more or less."""
    if ROWS >= 256:
        if rows <= ROWS // 2:
            acc, tail, far, i = _sum_half(
                weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, BLOCK_K, CHUNKS, STAGES
            )
        elif rows <= ROWS:
            acc, tail, far, i = _sum(
                weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, 0, CHUNKS, STAGES
            )
        else:
            acc, tail, far, i = _sum_with_tails(
                weight, x, more, full, empty, acc, tail, far, i, count, rows, group, ROWS, TAILS, CHUNKS, STAGES
            )
    elif rows <= ROWS:
        acc, tail, far, i = _sum(weight, x, more, full, empty, acc, tail, far, i, count, group, ROWS, 0, CHUNKS, STAGES)
    else:
        acc, tail, far, i = _sum_with_tails(
            weight, x, more, full, empty, acc, tail, far, i, count, rows, group, ROWS, TAILS, CHUNKS, STAGES
        )
    return acc, tail, far, i


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS:
    gl.constexpr, TAIL: gl.constexpr, TAILS: gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES:
    gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    COLS: gl.constexpr = 32 if GATED else 64
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    K: gl.constexpr = BLOCK_K // CHUNKS // 4
    LONG: gl.constexpr = 128 if x.dtype == gl.int8 and ROWS > 128 else ROWS  # Triton has no wider one for int8
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LONG, K])
    NEAR: gl.constexpr = TAIL // TAILS
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NEAR, K])
    wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        part = work % PARTS
        first, end = steps_of(part, steps, part_steps)
        first_n = (2 * n + group) * COLS
        acc = cleared(gl.zeros([64, ROWS], SUM, acc_layout))
        tail = cleared(gl.zeros([64, NEAR], SUM, tail_layout))
        far = tail
        if TAILS > 1:
            far = cleared(gl.zeros([64, NEAR], SUM, tail_layout))
        acc, tail, far, i = _sum_as_many(
            weight, x, more, full, empty, acc, tail, far, i, end - first, rows, group, ROWS, TAILS, BLOCK_K, CHUNKS,
            STAGES,
        )
        write_tall(acc, epilogue, expert, part, first_row, rows, first_n, GATED)
        if rows > ROWS:
            write_tall(tail, epilogue, expert, part, first_row + ROWS, rows - ROWS, first_n, GATED)
            if TAILS > 1:
                write_tall(far, epilogue, expert, part, first_row + ROWS + NEAR, rows - ROWS - NEAR, first_n, GATED)


@gluon.jit(do_not_specialize=["S", "part_steps"])
def _grouped_tall_kernel(
    # Bound by reading the weights, or by the tensor cores. One program a multiprocessor.
    x_desc, weight_desc, out_ptr, bias_ptr, plan_ptr, x_scale_ptr, weight_scale_ptr, S, N, stride_expert, stride_output,
    n_tiles, steps, part_steps, ROWS: gl.constexpr, TAIL: gl.constexpr, TAILS: gl.constexpr, BOX: gl.constexpr,
    BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY:
    gl.constexpr, CHAINED: gl.constexpr,
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
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    epilogue = (out_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, stride_expert, stride_output, S, N)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS, TAIL, TAILS,
            BLOCK_K, CHUNKS, STAGES, PARTS, GATED, CHAINED)),
        (_compute, (
            1, epilogue, plan_ptr, x, more, weight, full, empty, n_tiles, steps, part_steps, ROWS, TAIL, TAILS,
            BLOCK_K, CHUNKS, STAGES, PARTS, GATED, CHAINED)),
        (load_weights, (
            weight_desc, plan_ptr, loaded, full, empty, N, n_tiles, steps, part_steps, ROWS + TAIL, 128, BOX, BLOCK_K,
            CHUNKS, STAGES, PARTS, GATED, EARLY, CHAINED)),
        (load_rows, (
            x_desc, plan_ptr, x, more, full, empty, n_tiles, steps, part_steps, ROWS + TAIL, BOX, BLOCK_K, CHUNKS,
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
        TAILS=tiles.tails,
        BOX=tiles.box,
        BLOCK_K=tiles.block_k,
        CHUNKS=tiles.block_k * weight.element_size() // COPIED_BYTES,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=planned_before,
        CHAINED=chains(x.device),
    )
