"""The products of `grouped.py` with int4 weights for many rows an expert on Hopper (sm_90), in Gluon.

Made of the parts of `octavo.kernels.quant.int4_hopper`, which says what bounds them: to unpack a weight costs as much
whatever it is multiplied with, so a tile has up to 256 rows. Two warpgroups have 64 outputs each. With SiLU × gate the
copy engine puts eight outputs of gate and the same eight of up below each other, so that a thread has both of an
output: of packed tiles of both, half each. A tile of a half as many rows or a quarter takes the tensor cores less.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_loads import described, expect, load_rows
from octavo.kernels.moe.grouped_tall import cleared, write_tall
from octavo.kernels.moe.grouped_tiles import Scales, Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.epilogue import halves
from octavo.kernels.quant.int4_compute import sum_steps
from octavo.kernels.quant.int4_loads import fetch_scales
from octavo.kernels.quant.int4_shares import stage_of
from octavo.kernels.quant.int4_tiles import groups_of_step, plane_groups
from octavo.kernels.quant.int4_unpack import words_layout
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import cdiv, chains, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _fetch(ptr, stride_group, n, N, step, plane_groups, last_group, GROUPS: gl.constexpr, GATED: gl.constexpr):
    """Has the scales, or minima, of a step brought into the cache (L2)."""
    if GATED:
        fetch_scales(ptr, stride_group, n * 64, N, step, plane_groups, last_group, GROUPS, 1)
        fetch_scales(ptr + N, stride_group, n * 64, N, step, plane_groups, last_group, GROUPS, 1)
    else:
        fetch_scales(ptr, stride_group, n * 128, N, step, plane_groups, last_group, GROUPS, 2)


@gluon.jit
def _load_packed(
    desc, plan_ptr, scale_ptr, minimum_ptr, packed, full, empty, N, row_tiles, n_tiles, k_tiles, part_steps, last_group,
    plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS:
    gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights; EARLY: not behind the kernel before, which writes none nor the plan."""
    if not EARLY:
        wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        scales = scale_ptr + expert.to(gl.int64) * stride_expert
        first, end = steps_of(work % PARTS, k_tiles, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            expect(full.index(stage), rows, ROWS, ROWS // 4, 256, 2 * 4096)
            for j in gl.static_range(2):
                to = packed.index(2 * stage + j)
                if GATED:  # half of a packed tile of gate, and of one of up: of each four lines, which have eight rows
                    at = ((expert * row_tiles + n) * k_tiles + step) * 8 + 4 * j
                    tma.async_copy_global_to_shared(desc, [at, 0, 0, 0], full.index(stage), to)
                else:
                    at = ((expert * row_tiles + n * 2 + j) * k_tiles + step) * 32
                    tma.async_copy_global_to_shared(desc, [at, 0], full.index(stage), to)
            _fetch(scales, stride_group, n, N, step, plane_groups, last_group, GROUPS, GATED)
            if minimum_ptr is not None:
                minima = minimum_ptr + expert.to(gl.int64) * stride_expert
                _fetch(minima, stride_group, n, N, step, plane_groups, last_group, GROUPS, GATED)
            i += 1


@gluon.jit
def _sum(
    acc, steps, minima, stride_group, group: gl.constexpr, GROUPS: gl.constexpr, EVEN: gl.constexpr, STAGES:
    gl.constexpr,
):
    words, x, full, empty, scales, outputs, stage, phase, first, end, last_group, plane_groups = steps
    return sum_steps(
        acc, words, x, full, empty, scales, minima, outputs, group, 0, stage, phase, first, end, last_group,
        plane_groups, stride_group, stride_group, GROUPS, EVEN, False, 1, 2, 1, 1, STAGES,
    )


@gluon.jit
def _left_half(acc):
    """The left half of its columns as sums of their own, in the same registers, and the right one."""
    left, right = halves(acc)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1] // 2, 16])
    return gl.convert_layout(left, layout, assert_trivial=True), right


@gluon.jit
def _with_right_half(left, right):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * left.shape[1], 16])
    left = gl.convert_layout(left, right.type.layout, assert_trivial=True)
    both = gl.join(left, right).permute((0, 2, 1)).reshape([64, 2 * left.shape[1]])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def _sum_half(
    acc, steps, minima, stride_group, group: gl.constexpr, GROUPS: gl.constexpr, EVEN: gl.constexpr, STAGES:
    gl.constexpr,
):
    left, right = _left_half(acc)
    left = _sum(left, steps, minima, stride_group, group, GROUPS, EVEN, STAGES)
    return _with_right_half(left, right)


@gluon.jit
def _sum_quarter(
    acc, steps, minima, stride_group, group: gl.constexpr, GROUPS: gl.constexpr, EVEN: gl.constexpr, STAGES:
    gl.constexpr,
):
    left, right = _left_half(acc)
    left = _sum_half(left, steps, minima, stride_group, group, GROUPS, EVEN, STAGES)
    return _with_right_half(left, right)


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, n_tiles, k_tiles,
    part_steps, last_group, plane_groups, stride_expert, stride_group, ROWS: gl.constexpr, GROUPS: gl.constexpr, EVEN:
    gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    layout: gl.constexpr = gl.SliceLayout(1, words_layout(1))
    acc = gl.zeros([64, ROWS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))
    N = epilogue[7]
    wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, first_row, rows, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        part = work % PARTS
        first, end = steps_of(part, k_tiles, part_steps)
        row = gl.arange(0, 64, layout=layout)
        if GATED:
            first_n = n * 64 + group * 32
            outputs = gl.minimum(first_n + row // 16 * 8 + row % 8, N - 1) + row // 8 % 2 * N
        else:
            first_n = n * 128 + group * 64
            outputs = gl.minimum(first_n + row, N - 1)
        scales = scale_ptr + expert.to(gl.int64) * stride_expert
        stage, phase = stage_of(i, STAGES)
        minima = None
        if minimum_ptr is not None:
            minima = minimum_ptr + expert.to(gl.int64) * stride_expert
        steps = words, x, full, empty, scales, outputs, stage, phase, first, end, last_group, plane_groups
        acc = cleared(acc)
        if rows <= ROWS // 4:
            acc = _sum_quarter(acc, steps, minima, stride_group, group, GROUPS, EVEN, STAGES)
        elif rows <= ROWS // 2:
            acc = _sum_half(acc, steps, minima, stride_group, group, GROUPS, EVEN, STAGES)
        else:
            acc = _sum(acc, steps, minima, stride_group, group, GROUPS, EVEN, STAGES)
        write_tall(acc, epilogue, expert, part, first_row, rows, first_n, GATED)
        i += end - first


@gluon.jit(do_not_specialize=["S", "part_steps", "last_group", "plane_groups", "k_tiles"])
def _grouped_int4_tall_kernel(
    # Bound by the tensor cores, and by unpacking the weights. One program a multiprocessor.
    packed_desc, x_desc, out_ptr, plan_ptr, scale_ptr, minimum_ptr, S, N, row_tiles, n_tiles, k_tiles, part_steps,
    last_group, plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, ROWS, 128], x_desc.layout)
    x_read = x._reinterpret(dtype, [2 * STAGES, ROWS, 64], x_desc.layout)
    if GATED:
        packed = gl.allocate_shared_memory(gl.int16, [2 * STAGES, 4, 2, 4, 64], packed_desc.layout)
    else:
        packed = gl.allocate_shared_memory(gl.int16, [2 * STAGES, 32, 64], packed_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = packed._reinterpret(gl.int32, [2 * STAGES, 32, 32], pairs)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    epilogue = (out_ptr, None, None, None, 0, 0, S, N)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, n_tiles, k_tiles, part_steps,
            last_group, plane_groups, stride_expert, stride_group, ROWS, GROUPS, EVEN, STAGES, PARTS, GATED, CHAINED)),
        (_compute, (
            1, epilogue, plan_ptr, scale_ptr, minimum_ptr, words, x, full, empty, n_tiles, k_tiles, part_steps,
            last_group, plane_groups, stride_expert, stride_group, ROWS, GROUPS, EVEN, STAGES, PARTS, GATED, CHAINED)),
        (_load_packed, (
            packed_desc, plan_ptr, scale_ptr, minimum_ptr, packed, full, empty, N, row_tiles, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, ROWS, STAGES, PARTS, GATED,
            EARLY, CHAINED)),
        (load_rows, (
            x_desc, plan_ptr, x_read, None, full, empty, n_tiles, k_tiles, part_steps, ROWS, ROWS // 4, 128, 2, STAGES,
            PARTS, CHAINED)),
    ], [4, 1, 1], [240, 24, 24])
# fmt: on


def _packed_desc(packed: torch.Tensor, gated: bool) -> TensorDescriptor:
    """Packed tiles as lines of 128 bytes, two outputs each; gated: four of gate's, four of up's, four times."""
    lines = packed.numel() // 64
    if not gated:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return TensorDescriptor(packed, [lines, 64], [64, 1], [32, 64], layout)
    experts = packed.shape[0]
    up = packed.stride(0) // 2  # from gate's tiles to those of up, as many
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape = [(2 * experts - 1) * up // 256, 2, 4, 64]
    return TensorDescriptor(packed, shape, [256, up, 64, 1], [4, 2, 4, 64], layout)


def grouped_int4_tall(
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
    launch(
        _grouped_int4_tall_kernel,
        (programs,),
        _packed_desc(packed, gated),
        described(x, tiles.rows // 4),
        out,
        plan,
        scale,
        minimum,
        s,
        n,
        row_tiles,
        cdiv(n, 64 if gated else 128),
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
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=planned_before,
        CHAINED=chains(x.device),
    )
