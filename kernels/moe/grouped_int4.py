"""The products of `grouped.py` with int4 weights on Hopper (sm_90), in Gluon; else `grouped_int4_plain.py` does it.

Made of the parts of `octavo.kernels.quant.int4_hopper`, which says what bounds them. Four warpgroups have 64 outputs
each, side by side; with SiLU × gate two of them have those of gate and two the same of up, whose sums they hand over
in shared memory. Two warps load, and run ahead of the unit of work that is being multiplied.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_loads import described, fetch_of_expert, load_rows
from octavo.kernels.moe.grouped_results import write_of_pair
from octavo.kernels.moe.grouped_tiles import Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.int4_compute import sum_steps
from octavo.kernels.quant.int4_shares import stage_of
from octavo.kernels.quant.int4_tiles import groups_of_step, plane_groups
from octavo.kernels.quant.int4_unpack import words_layout
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import cdiv, chains, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load_packed(
    desc, plan_ptr, scale_ptr, minimum_ptr, packed, full, empty, N, row_tiles, n_tiles, k_tiles, part_steps, last_group,
    plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS:
    gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights; EARLY: not behind the kernel before, which writes nothing of it."""
    if not EARLY:
        wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, _, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, k_tiles, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 4 * 4096 + ROWS * 256)
            for j in gl.static_range(4):
                tile = n * 2 + j % 2 + (N // 64 if j >= 2 else 0) if GATED else n * 4 + j
                at = ((expert * row_tiles + tile) * k_tiles + step) * 32
                tma.async_copy_global_to_shared(desc, [at, 0], full.index(stage), packed.index(4 * stage + j))
            fetch_of_expert(
                scale_ptr, expert, stride_expert, stride_group, n, N, step, plane_groups, last_group, GROUPS, GATED,
            )
            if minimum_ptr is not None:
                fetch_of_expert(
                    minimum_ptr, expert, stride_expert, stride_group, n, N, step, plane_groups, last_group, GROUPS,
                    GATED,
                )
            i += 1


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, handed, left, taken,
    n_tiles, k_tiles, part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, EVEN:
    gl.constexpr, SCALE_SUMS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED:
    gl.constexpr, CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    packed_layout: gl.constexpr = words_layout(1)
    scale_layout: gl.constexpr = gl.SliceLayout(1, acc_layout if SCALE_SUMS else packed_layout)
    pair: gl.constexpr = group % 2
    IS_UP: gl.constexpr = GATED and group >= 2
    N = epilogue[7]
    wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    phase_of_pair = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        first, end = steps_of(work % PARTS, k_tiles, part_steps)
        row = n * 128 + pair * 64 if GATED else n * 256 + group * 64
        outputs = row + gl.arange(0, 64, layout=scale_layout)
        outputs = gl.where(outputs < N, outputs, 0)
        if IS_UP:
            outputs += N
        stage, phase = stage_of(i, STAGES)
        minima = None
        if minimum_ptr is not None:
            minima = minimum_ptr + expert.to(gl.int64) * stride_expert
        acc = gl.zeros([64, ROWS], gl.float32, acc_layout)
        acc = sum_steps(
            acc, words, x, full, empty, scale_ptr + expert.to(gl.int64) * stride_expert, minima, outputs, group, 0,
            stage, phase, first, end, last_group, plane_groups, stride_group, stride_group, GROUPS, EVEN, SCALE_SUMS, 1,
            4, 1, 1, STAGES,
        )
        i += end - first
        write_of_pair(
            acc, epilogue, expert, work % PARTS, first_row, rows, row, handed.index(pair), left.index(pair),
            taken.index(pair), phase_of_pair, IS_UP, GATED,
        )
        phase_of_pair ^= 1


@gluon.jit(do_not_specialize=["S", "part_steps", "last_group", "plane_groups", "k_tiles"])
def _grouped_int4_kernel(
    # Bound by reading the weights, half a byte each. One program a multiprocessor.
    packed_desc, x_desc, out_ptr, plan_ptr, scale_ptr, minimum_ptr, S, N, row_tiles, n_tiles, k_tiles, part_steps,
    last_group, plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS:
    gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY:
    gl.constexpr, CHAINED: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, ROWS, 128], x_desc.layout)
    x_read = x._reinterpret(dtype, [2 * STAGES, ROWS, 64], x_desc.layout)
    packed = gl.allocate_shared_memory(gl.int16, [4 * STAGES, 32, 64], packed_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = packed._reinterpret(gl.int32, [4 * STAGES, 32, 32], pairs)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    left = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    handed = gl.allocate_shared_memory(gl.float32, [2, 64 if GATED else 1, ROWS if GATED else 1], flat)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=4)
    for i in gl.static_range(2):
        mbarrier.init(left.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()
    epilogue = (out_ptr, None, None, None, 0, 0, S, N)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            1, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            2, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            3, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_load_packed, (
            packed_desc, plan_ptr, scale_ptr, minimum_ptr, packed, full, empty, N, row_tiles, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, ROWS, STAGES, PARTS, GATED,
            EARLY, CHAINED)),
        (load_rows, (
            x_desc, plan_ptr, x_read, None, full, empty, n_tiles, k_tiles, part_steps, ROWS, ROWS, 128, 2, STAGES,
            PARTS, CHAINED)),
    ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])
# fmt: on


def grouped_int4(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: Scales,
    plan: torch.Tensor,
    tiles: Tiles,
    programs: int,
    gated: bool,
    planned_before: bool,
) -> None:
    """Launches it; packed: `[E, ceil(outputs / 64), ceil(K / 128), 64, 32]`, scales: `[E, groups, outputs]`."""
    s, n = out.shape[-2:]
    row_tiles, k_tiles = packed.shape[1:3]
    scale, minimum = scales.weight, scales.minimum
    assert scale is not None
    groups = scale.shape[1]
    group_size = x.shape[1] // groups
    per_step = groups_of_step(group_size)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    launch(
        _grouped_int4_kernel,
        (programs,),
        TensorDescriptor(packed, [packed.numel() // 64, 64], [64, 1], [32, 64], layout),
        described(x, tiles.rows),
        out,
        plan,
        scale,
        minimum,
        s,
        n,
        row_tiles,
        cdiv(n, tiles.outputs // 2 if gated else tiles.outputs),
        k_tiles,
        cdiv(k_tiles, tiles.parts),
        groups - 1,
        plane_groups(group_size),
        scale.stride(0),
        scale.stride(1),
        device=x.device,
        num_warps=4,
        GROUPS=per_step,
        EVEN=per_step == 1 or per_step * group_size == 128,
        SCALE_SUMS=minimum is None and group_size % 128 == 0 and tiles.rows <= 32,  # more rows would spill
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=planned_before,
        CHAINED=chains(x.device),
    )
