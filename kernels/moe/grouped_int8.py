"""The products of `grouped.py` with int8 weights alone (W8A16) on Hopper (sm_90), in Gluon.

Elsewhere, and in fp32, `grouped_int8_plain.py` does them. It is `grouped_int4.py`'s kernel with weights of a byte, read
as they lie in memory: 64 rows of them from wherever an expert's outputs begin. How they become operands, and what
bounds that, `octavo.kernels.quant.int8_hopper` says.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import launch
from octavo.kernels.moe.grouped_loads import described, fetch_of_expert, load_rows
from octavo.kernels.moe.grouped_results import write_of_pair
from octavo.kernels.moe.grouped_tiles import Tiles
from octavo.kernels.moe.schedule import unit_at
from octavo.kernels.quant.int4_shares import stage_of
from octavo.kernels.quant.int4_tiles import plane_groups
from octavo.kernels.quant.int4_unpack import bits_to_float, group_bits, words_layout
from octavo.kernels.quant.int8_compute import sum_bytes, sum_scaled_bytes
from octavo.kernels.quant.int8_tiles import scales_of_step
from octavo.kernels.quant.int8_unpack import FACTOR
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import cdiv, chains, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load_bytes(
    desc, plan_ptr, scale_ptr, weights, full, empty, N, n_tiles, k_tiles, part_steps, last_group, plane_groups,
    stride_expert, stride_group, GROUPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights; EARLY: not behind the kernel before, which writes nothing of it."""
    if not EARLY:
        wait_for_previous(CHAINED)
    work_end = gl.load(plan_ptr) * n_tiles * PARTS
    i = 0
    for work in range(gl.program_id(0), work_end, gl.num_programs(0)):
        expert, _, _, n = unit_at(plan_ptr, work // PARTS, n_tiles)
        row = expert * 2 * N + n * 128 if GATED else expert * N + n * 256
        first, end = steps_of(work % PARTS, k_tiles, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 4 * 8192 + ROWS * 256)
            for j in gl.static_range(4):
                at = row + j % 2 * 64 + (N if j >= 2 else 0) if GATED else row + j * 64
                to = weights.index(4 * stage + j)
                tma.async_copy_global_to_shared(desc, [at, step * 128], full.index(stage), to)
            if GROUPS > 0:
                fetch_of_expert(
                    scale_ptr, expert, stride_expert, stride_group, n, N, step, plane_groups, last_group, GROUPS, GATED,
                )
            i += 1


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, plan_ptr, scale_ptr, weights, x, full, empty, handed, left, taken, n_tiles, k_tiles,
    part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, EVEN: gl.constexpr,
    SCALE_SUMS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does. GROUPS: scales of a step, or 0 where there is one an output."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    packed_layout: gl.constexpr = words_layout(1)
    OF_SUMS: gl.constexpr = SCALE_SUMS or GROUPS == 0
    scale_layout: gl.constexpr = gl.SliceLayout(1, acc_layout if OF_SUMS else packed_layout)
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
        scales = scale_ptr + expert.to(gl.int64) * stride_expert
        stage, phase = stage_of(i, STAGES)
        acc = gl.zeros([64, ROWS], gl.float32, acc_layout)
        if GROUPS == 0:  # for after the steps
            bits = group_bits(scales, stride_group, outputs, 0, plane_groups, last_group, 1, True)
        if SCALE_SUMS:
            acc = sum_scaled_bytes(
                acc, weights, x, full, empty, scales, outputs, group, 0, stage, phase, first, end, last_group,
                plane_groups, stride_group, 1, 4, 1, 1, STAGES,
            )
        else:
            acc = sum_bytes(
                acc, weights, x, full, empty, scales, outputs, group, 0, stage, phase, first, end, last_group,
                plane_groups, stride_group, GROUPS, EVEN, 1, 4, 1, 1, 128, STAGES,
            )
        if GROUPS == 0:
            acc *= gl.expand_dims(bits_to_float(bits[0], scale_ptr.dtype.element_ty) * FACTOR, 1)
        i += end - first
        write_of_pair(
            acc, epilogue, expert, work % PARTS, first_row, rows, row, handed.index(pair), left.index(pair),
            taken.index(pair), phase_of_pair, IS_UP, GATED,
        )
        phase_of_pair ^= 1


@gluon.jit(do_not_specialize=["S", "part_steps", "last_group", "plane_groups", "k_tiles"])
def _grouped_int8_kernel(
    # Bound by reading the weights, a byte each. One program a multiprocessor.
    weight_desc, x_desc, out_ptr, bias_ptr, plan_ptr, scale_ptr, S, N, n_tiles, k_tiles, part_steps, last_group,
    plane_groups, stride_expert, stride_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, ROWS:
    gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED:
    gl.constexpr,
):
    x = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, ROWS, 64], x_desc.layout)
    read = gl.allocate_shared_memory(gl.int8, [4 * STAGES, 64, 128], weight_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = read._reinterpret(gl.int16, [4 * STAGES, 64, 64], pairs)
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
    epilogue = (out_ptr, bias_ptr, None, None, 0, 0, S, N)
    gl.warp_specialize([
        (_compute, (
            0, epilogue, plan_ptr, scale_ptr, weights, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            1, epilogue, plan_ptr, scale_ptr, weights, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            2, epilogue, plan_ptr, scale_ptr, weights, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_compute, (
            3, epilogue, plan_ptr, scale_ptr, weights, x, full, empty, handed, left, taken, n_tiles, k_tiles,
            part_steps, last_group, plane_groups, stride_expert, stride_group, GROUPS, EVEN, SCALE_SUMS, ROWS, STAGES,
            PARTS, GATED, CHAINED)),
        (_load_bytes, (
            weight_desc, plan_ptr, scale_ptr, read, full, empty, N, n_tiles, k_tiles, part_steps, last_group,
            plane_groups, stride_expert, stride_group, GROUPS, ROWS, STAGES, PARTS, GATED, EARLY, CHAINED)),
        (load_rows, (
            x_desc, plan_ptr, x, None, full, empty, n_tiles, k_tiles, part_steps, ROWS, ROWS, 128, 2, STAGES, PARTS,
            CHAINED)),
    ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])
# fmt: on


def grouped_int8(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    plan: torch.Tensor,
    tiles: Tiles,
    programs: int,
    gated: bool,
    planned_before: bool,
) -> None:
    """Launches it; weight: `[E, outputs, K]`, scale: `[E, groups, outputs]`."""
    assert scale is not None
    (s, n), (k, groups) = out.shape[-2:], (x.shape[1], scale.shape[1])
    k_tiles, group_size = cdiv(k, 128), k // groups
    per_step = scales_of_step(k, group_size)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    launch(
        _grouped_int8_kernel,
        (programs,),
        TensorDescriptor(weight, [weight.shape[0] * weight.shape[1], k], [k, 1], [64, 128], layout),
        described(x, tiles.rows),
        out,
        bias,
        plan,
        scale,
        s,
        n,
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
        EVEN=per_step <= 1 or per_step * group_size == 128,
        SCALE_SUMS=per_step == 1 and tiles.rows <= 32,  # more rows would spill
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=planned_before,
        CHAINED=chains(x.device),
    )
