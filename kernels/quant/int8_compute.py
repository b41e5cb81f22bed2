"""The warpgroups of the Hopper int8 kernel (`int8_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

As in `int4_compute.py`, weights go from shared memory through registers into the tensor cores, SIDES warpgroups stand
side by side and TURNS take turns; the steps are that kernel's, too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.int4_compute import leave, of_step
from octavo.kernels.quant.int4_epilogue import finish
from octavo.kernels.quant.int4_shares import place, round_at, share_of, slot_of, stage_after, stage_of
from octavo.kernels.quant.int4_unpack import (
    bits_to_float,
    group_bits,
    of_half,
    words_layout,
)
from octavo.kernels.quant.int8_unpack import FACTOR, unpack_bytes
from octavo.kernels.tiles import wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _factors(scales, scale_ptr, half: gl.constexpr, dtype: gl.constexpr, STEPS: gl.constexpr):
    """Of each step's scales, if there are any, those of a half, as `unpack_bytes` takes them."""
    s = ()
    if len(scales) > 0:
        for j in gl.static_range(STEPS):
            more, _ = of_half(of_step(scales, j, STEPS), (), scale_ptr, None, half, dtype, FACTOR)
            s = s + more
    return s


@gluon.jit
def _scales_of_steps(
    scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS: gl.constexpr, EVEN: gl.constexpr,
    STEPS: gl.constexpr,
):
    scales = ()
    if GROUPS > 0:
        scales = group_bits(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS)
    return scales


@gluon.jit
def sum_scaled_bytes(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, turn: gl.constexpr, stage, phase, k, end,
    last_group, plane_groups, stride_scale_group, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STEPS:
    gl.constexpr, STAGES: gl.constexpr,
):
    """Adds to acc this turn's steps of a tile's rounds from `k` to before `end`; `stage` and `phase` are round k's.

    Not the weights are scaled, but each step's sums. That is fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    ROUND: gl.constexpr = TURNS * STEPS
    nothing = gl.zeros_like(acc)
    step = k * ROUND + turn * STEPS
    scales = group_bits(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, 1, True, STEPS)
    mbarrier.wait(full.index(stage * TURNS + turn), phase)
    at = ((stage * TURNS + turn) * SIDES + side) * STEPS
    low = unpack_bytes(weights.index(at), (), 0, BLOCKS, 128, dtype, layout)
    for i in range(k + 1, end + 1):
        step = i * ROUND + turn * STEPS
        after, after_phase = stage_after(stage, phase, STAGES)
        next_stage = gl.where(i < end, after, stage)  # the last round's is itself once more, and for nothing
        next_phase = gl.where(i < end, after_phase, phase)
        now = stage * TURNS + turn
        following = next_stage * TURNS + turn
        high = low
        for j in gl.static_range(STEPS):
            at = (now * SIDES + side) * STEPS + j
            tokens = 2 * (now * STEPS + j)
            sums = warpgroup_mma(low, x.index(tokens).permute((1, 0)), nothing, use_acc=False, is_async=True)
            if j > 0:  # what is unpacked goes into the registers of what has been multiplied
                sums, high = warpgroup_mma_wait(1, deps=[sums, high])
            high = unpack_bytes(weights.index(at), (), 1, BLOCKS, 128, dtype, layout)
            sums = warpgroup_mma(high, x.index(tokens + 1).permute((1, 0)), sums, is_async=True)
            if BLOCKS > 1 or STEPS > 1:
                sums, low = warpgroup_mma_wait(1, deps=[sums, low])
            if j + 1 < STEPS:
                low = unpack_bytes(weights.index(at + 1), (), 0, BLOCKS, 128, dtype, layout)
            if j == 0:
                first = sums
        mbarrier.wait(full.index(following), next_phase)
        at = (following * SIDES + side) * STEPS
        next_low = unpack_bytes(weights.index(at), (), 0, BLOCKS, 128, dtype, layout)
        if STEPS == 2:
            first, sums, low, high, next_low = warpgroup_mma_wait(0, deps=[first, sums, low, high, next_low])
        else:
            sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(stage), count=1)
        if STEPS == 2:
            acc += first * gl.expand_dims(bits_to_float(scales[0], scale_ptr.dtype.element_ty) * FACTOR, 1)
        acc += sums * gl.expand_dims(bits_to_float(scales[STEPS - 1], scale_ptr.dtype.element_ty) * FACTOR, 1)
        # Not before: see `int4_compute.py`.
        scales = group_bits(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, 1, True, STEPS)
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def sum_bytes(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, turn: gl.constexpr, stage, phase, k, end,
    last_group, plane_groups, stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, BLOCKS: gl.constexpr, SIDES:
    gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr,
):
    """The same with the weights scaled, or nothing. With 64 INPUTS a round, of one step then, has two stages.

    One product more could be on its way at the end of a round, but operands in registers ptxas does not take from one
    turn of a loop into the next: it would wait for each instruction.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    HALVES: gl.constexpr = INPUTS // 64
    ROUND: gl.constexpr = TURNS * STEPS
    step = k * ROUND + turn * STEPS
    scales = _scales_of_steps(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS)
    s = _factors(scales, scale_ptr, 0, dtype, STEPS)
    s_high = _factors(scales, scale_ptr, 1, dtype, STEPS)
    step += ROUND
    scales = _scales_of_steps(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS)
    now = stage * TURNS + turn
    mbarrier.wait(full.index(now), phase)
    at = (now * SIDES + side) * STEPS
    low = unpack_bytes(weights.index(at), of_step(s, 0, STEPS), 0, BLOCKS, INPUTS, dtype, layout)
    for i in range(k, end):
        second, second_phase = stage, phase
        if HALVES == 1:
            second, second_phase = stage_after(stage, phase, STAGES)
        after, after_phase = stage_after(second, second_phase, STAGES)
        next_stage = gl.where(i + 1 < end, after, second)  # the last round's is its own, and for nothing
        next_phase = gl.where(i + 1 < end, after_phase, second_phase)
        now = stage * TURNS + turn
        then = second * TURNS + turn
        following = next_stage * TURNS + turn
        sums = acc
        high = low
        for j in gl.static_range(STEPS):
            tokens = HALVES * (now * STEPS + j)
            sums = warpgroup_mma(low, x.index(tokens).permute((1, 0)), sums, is_async=True)
            if HALVES == 1:
                mbarrier.wait(full.index(then), second_phase)
            if j > 0:
                sums, high = warpgroup_mma_wait(1, deps=[sums, high])
            at = (then * SIDES + side) * STEPS + j
            high = unpack_bytes(weights.index(at), of_step(s_high, j, STEPS), 1, BLOCKS, INPUTS, dtype, layout)
            tokens = HALVES * (then * STEPS + j) + HALVES - 1
            sums = warpgroup_mma(high, x.index(tokens).permute((1, 0)), sums, is_async=True)
            # The next 64 inputs go into the registers of this step's first.
            sums, low = warpgroup_mma_wait(1, deps=[sums, low])
            if j + 1 < STEPS:
                low = unpack_bytes(weights.index(at + 1), of_step(s, j + 1, STEPS), 0, BLOCKS, INPUTS, dtype, layout)
        if HALVES == 1:
            mbarrier.arrive(empty.index(stage), count=1)
        s = _factors(scales, scale_ptr, 0, dtype, STEPS)
        s_high = _factors(scales, scale_ptr, 1, dtype, STEPS)
        # Of the round after the next; see `int4_compute.py`.
        step = (i + 2) * ROUND + turn * STEPS
        scales = _scales_of_steps(
            scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS
        )
        mbarrier.wait(full.index(following), next_phase)
        at = (following * SIDES + side) * STEPS
        next_low = unpack_bytes(weights.index(at), of_step(s, 0, STEPS), 0, BLOCKS, INPUTS, dtype, layout)
        if BLOCKS == 1:
            # This has come already, but ptxas moves no unpacking down past it, as it would past the wait below.
            mbarrier.wait(full.index(following), next_phase)
        sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(second), count=1)
        acc = sums
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def compute_bytes(
    group: gl.constexpr, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken,
    shares, early, M, N, last_group, plane_groups, stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr,
    SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr,
    STEPS: gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
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
    rounds = shares[3]
    first, own, count = share_of(program, programs, shares)
    if early == 0:  # scales are read ahead of what has come
        wait_for_previous(CHAINED)
    i = 0
    parity = 0
    while i < count:
        tile, k = round_at(i, first, own, program, programs, shares)
        row_tile, token_tile = place(tile, shares[4], shares[5], shares[6])
        row = row_tile * OUTPUTS + side * ROWS
        rows = row + gl.arange(0, ROWS, layout=scale_layout)
        rows = gl.where(rows < N, rows, 0)
        end = rounds
        if i < own:
            end = gl.minimum(rounds, k + own - i)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
        if GROUPS == 0:  # for after the steps
            scales = group_bits(scale_ptr, stride_scale_group, rows, 0, plane_groups, last_group, 1, True)
        stage, phase = stage_of(128 // INPUTS * i, STAGES)
        if SCALE_SUMS:
            acc = sum_scaled_bytes(
                acc, weights, x, full, empty, scale_ptr, rows, side, turn, stage, phase, k, end, last_group,
                plane_groups, stride_scale_group, BLOCKS, SIDES, TURNS, STEPS, STAGES,
            )
        else:
            acc = sum_bytes(
                acc, weights, x, full, empty, scale_ptr, rows, side, turn, stage, phase, k, end, last_group,
                plane_groups, stride_scale_group, GROUPS, EVEN, BLOCKS, SIDES, TURNS, STEPS, INPUTS, STAGES,
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
            if end - k < rounds:
                slot = slot_of(program, tile, programs, rounds, shares[2])
                part_ptr = workspace_ptr + (slot.to(gl.int64) * (OUTPUTS * TOKENS) + side * ROWS)
                leave(acc, part_ptr, M - token, OUTPUTS, TOKENS)
            else:
                finish(acc, out_ptr, bias_ptr, None, row, token, M, N, False, CHAINED)
            if TURNS > 1:  # behind the use of what was loaded, so that it has come
                mbarrier.arrive(taken.index(side), count=1)
        parity ^= 1
