"""The warpgroups of the Hopper int8 kernel (`int8_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

As in `int4_compute.py`, weights go from shared memory through registers into the tensor cores, SIDES warpgroups stand
side by side and TURNS take turns; the steps are that kernel's, too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.int4_compute import leave
from octavo.kernels.quant.int4_epilogue import finish
from octavo.kernels.quant.int4_shares import after_turns, place, share_of, slot_of, stage_of, step_at
from octavo.kernels.quant.int4_unpack import (
    bits_to_float,
    group_bits,
    next_group,
    of_half,
    words_layout,
)
from octavo.kernels.quant.int8_unpack import FACTOR, unpack_bytes

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _bits_of_step(
    scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS: gl.constexpr, EVEN: gl.constexpr,
):
    scales = ()
    if GROUPS > 0:
        scales = group_bits(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
    return scales


@gluon.jit
def _factors(scales, scale_ptr, half: gl.constexpr, dtype: gl.constexpr):
    """Of a step's scales those of a half, as `unpack_bytes` takes them."""
    s = ()
    if len(scales) > 0:
        s, _ = of_half(scales, (), scale_ptr, None, half, dtype, FACTOR)
    return s


@gluon.jit
def _first_group(k, group_planes, TURNS: gl.constexpr, GROUPS: gl.constexpr):
    """The group of step k, how many steps from it on are left of it, and what `next_group` takes from there."""
    group_steps = group_planes // 4
    whole, more, at, left = 0, TURNS, 0, 0
    if GROUPS == 1:
        whole = TURNS // group_steps
        more = TURNS - whole * group_steps
        at = k // group_steps
        left = (at + 1) * group_steps - k
    return at, left, group_steps, whole, more


@gluon.jit
def sum_scaled_bytes(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group, group_planes,
    stride_scale_group, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):
    """Adds every TURNS-th step from `k` to `end` of a tile to acc; `stage` and `phase` are the first's.

    Not the weights are scaled, but each step's sums. That is fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    nothing = gl.zeros_like(acc)
    at, left, group_steps, whole, more = _first_group(k, group_planes, TURNS, 1)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k, at, group_planes, last_group, 1, True)
    mbarrier.wait(full.index(stage), phase)
    low = unpack_bytes(weights.index(SIDES * stage + side), (), 0, BLOCKS, 128, dtype, layout)
    for step in range(k + TURNS, end + TURNS, TURNS):
        after, after_phase = after_turns(stage, phase, TURNS, STAGES)
        next_stage = gl.where(step < end, after, stage)  # the last step's is itself once more, and for nothing
        next_phase = gl.where(step < end, after_phase, phase)
        sums = warpgroup_mma(low, x.index(2 * stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        high = unpack_bytes(weights.index(SIDES * stage + side), (), 1, BLOCKS, 128, dtype, layout)
        sums = warpgroup_mma(high, x.index(2 * stage + 1).permute((1, 0)), sums, is_async=True)
        if BLOCKS > 1:  # the next half unpacked goes into the registers of this step's first
            sums, low = warpgroup_mma_wait(1, deps=[sums, low])
        mbarrier.wait(full.index(next_stage), next_phase)
        next_low = unpack_bytes(weights.index(SIDES * next_stage + side), (), 0, BLOCKS, 128, dtype, layout)
        at, left = next_group(at, left, group_steps, whole, more)
        sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(stage), count=1)
        acc += sums * gl.expand_dims(bits_to_float(scales[0], scale_ptr.dtype.element_ty) * FACTOR, 1)
        # Not before: see `int4_compute.py`.
        scales = _bits_of_step(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, 1, True)
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def sum_bytes(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group, group_planes,
    stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS:
    gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr,
):
    """The same with the weights scaled, or nothing. A step has one stage, or with 64 INPUTS two; those take no turns.

    One product more could be on its way at the end of a step, but operands in registers ptxas does not take from one
    turn of a loop into the next: it would wait for each instruction.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    HALVES: gl.constexpr = INPUTS // 64
    at, left, group_steps, whole, more = _first_group(k, group_planes, TURNS, GROUPS)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k, at, group_planes, last_group, GROUPS, EVEN)
    s = _factors(scales, scale_ptr, 0, dtype)
    s_high = _factors(scales, scale_ptr, 1, dtype)
    if GROUPS == 1:
        at, left = next_group(at, left, group_steps, whole, more)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k + TURNS, at, group_planes, last_group, GROUPS, EVEN)
    mbarrier.wait(full.index(stage), phase)
    low = unpack_bytes(weights.index(SIDES * stage + side), s, 0, BLOCKS, INPUTS, dtype, layout)
    for step in range(k, end, TURNS):
        second, second_phase = stage, phase
        if HALVES == 1:
            second, second_phase = after_turns(stage, phase, 1, STAGES)
        after, after_phase = after_turns(second, second_phase, TURNS, STAGES)
        next_stage = gl.where(step + TURNS < end, after, second)  # the last step's is its own, and for nothing
        next_phase = gl.where(step + TURNS < end, after_phase, second_phase)
        sums = warpgroup_mma(low, x.index(HALVES * stage).permute((1, 0)), acc, is_async=True)
        if HALVES == 1:
            mbarrier.wait(full.index(second), second_phase)
        high = unpack_bytes(weights.index(SIDES * second + side), s_high, 1, BLOCKS, INPUTS, dtype, layout)
        sums = warpgroup_mma(high, x.index(HALVES * second + HALVES - 1).permute((1, 0)), sums, is_async=True)
        # The next 64 inputs go into the registers of this step's first.
        sums, low = warpgroup_mma_wait(1, deps=[sums, low])
        if HALVES == 1:
            mbarrier.arrive(empty.index(stage), count=1)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        s = _factors(scales, scale_ptr, 0, dtype)
        s_high = _factors(scales, scale_ptr, 1, dtype)
        # Of the step after the next; see `int4_compute.py`.
        scales = _bits_of_step(
            scale_ptr, stride_scale_group, rows, step + 2 * TURNS, at, group_planes, last_group, GROUPS, EVEN
        )
        mbarrier.wait(full.index(next_stage), next_phase)
        next_low = unpack_bytes(weights.index(SIDES * next_stage + side), s, 0, BLOCKS, INPUTS, dtype, layout)
        if BLOCKS == 1:
            # This has come already, but ptxas moves no unpacking down past it, as it would past the wait below.
            mbarrier.wait(full.index(next_stage), next_phase)
        sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(second), count=1)
        acc = sums
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def compute_bytes(
    group: gl.constexpr, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
    k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group, GROUPS:
    gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES:
    gl.constexpr, TURNS: gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    """What warpgroup number `group` does. GROUPS: scales of a step, or 0 where there is one an output."""
    ROWS: gl.constexpr = 64 * BLOCKS
    OUTPUTS: gl.constexpr = SIDES * ROWS
    side: gl.constexpr = group % SIDES
    turn: gl.constexpr = group // SIDES
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    packed_layout: gl.constexpr = words_layout(BLOCKS)
    OF_SUMS: gl.constexpr = SCALE_SUMS or GROUPS == 0
    scale_layout: gl.constexpr = gl.SliceLayout(1, acc_layout if OF_SUMS else packed_layout)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, steps = share_of(program, programs, tiles, shared, k_tiles)
    i = 0
    parity = 0
    while i < steps:
        tile, k = step_at(i, first, own, program, programs, shared, k_tiles)
        row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
        row = row_tile * OUTPUTS + side * ROWS
        rows = gl.minimum(row + gl.arange(0, ROWS, layout=scale_layout), N - 1)
        end = k_tiles
        if i < own:
            end = gl.minimum(k_tiles, k + own - i)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
        if GROUPS == 0:  # for after the steps
            scales = group_bits(scale_ptr, stride_scale_group, rows, 0, 0, group_planes, last_group, 1, True)
        # A stage is always the same warpgroup's, or one could take it for full before it is: STAGES divide by TURNS.
        ahead = (turn + TURNS - i % TURNS) % TURNS
        if TURNS == 1 or k + ahead < end:
            stage, phase = stage_of(128 // INPUTS * (i + ahead), STAGES)
            if SCALE_SUMS:
                acc = sum_scaled_bytes(
                    acc, weights, x, full, empty, scale_ptr, rows, side, stage, phase, k + ahead, end, last_group,
                    group_planes, stride_scale_group, BLOCKS, SIDES, TURNS, STAGES,
                )
            else:
                acc = sum_bytes(
                    acc, weights, x, full, empty, scale_ptr, rows, side, stage, phase, k + ahead, end, last_group,
                    group_planes, stride_scale_group, GROUPS, EVEN, BLOCKS, SIDES, TURNS, INPUTS, STAGES,
                )
        i += end - k
        if turn > 0:
            mbarrier.wait(taken.index(side), parity ^ 1)
            turns.index((turn - 1) * SIDES + side).store(acc)
            mbarrier.arrive(left.index(side), count=1)
        else:
            if TURNS > 1:
                mbarrier.wait(left.index(side), parity)
                for other in gl.static_range(TURNS - 1):
                    acc += turns.index(other * SIDES + side).load(acc_layout)
            if GROUPS == 0:
                acc *= gl.expand_dims(bits_to_float(scales[0], scale_ptr.dtype.element_ty) * FACTOR, 1)
            token = token_tile * TOKENS
            if end - k < k_tiles:
                slot = slot_of(program, tile, programs, shared, k_tiles)
                part_ptr = workspace_ptr + (slot.to(gl.int64) * (OUTPUTS * TOKENS) + side * ROWS)
                leave(acc, part_ptr, M - token, OUTPUTS, TOKENS)
            else:
                finish(acc, out_ptr, bias_ptr, None, row, token, M, N, False, CHAINED)
            if TURNS > 1:  # behind the use of what was loaded, so that it has come
                mbarrier.arrive(taken.index(side), count=1)
        parity ^= 1
