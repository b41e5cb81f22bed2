"""The warpgroups of the Hopper int4 kernel (`int4_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

Weights are the first operand: they go from shared memory through registers, where they are dequantised
(`int4_unpack.py`), into the tensor cores. While these are at 64 inputs, the next 64 are dequantised; and the two
warpgroups fill each other's gaps. SIDES of them stand side by side; TURNS of them take turns at the same outputs, of
STEPS steps each, and the first adds up their sums, in their order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.int4_epilogue import fetch_residual, finish
from octavo.kernels.quant.int4_shares import place, round_at, share_of, slot_of, stage_after, stage_of
from octavo.kernels.quant.int4_unpack import (
    bits_to_float,
    group_bits,
    load_words,
    of_half,
    operand,
    unpack,
    words_layout,
)
from octavo.kernels.tiles import wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def leave(acc, part_ptr, tokens, OUTPUTS: gl.constexpr, TOKENS: gl.constexpr):
    """Leaves a warpgroup's part of a tile, of its first `tokens` tokens, for the kernel that adds the parts up."""
    n = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, acc.type.layout)), 0)
    gl.store(part_ptr + m * OUTPUTS + n, acc, mask=(m < tokens) & (n < OUTPUTS))


@gluon.jit
def _bits_of_steps(
    scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step, plane_groups, last_group, GROUPS:
    gl.constexpr, EVEN: gl.constexpr, STEPS: gl.constexpr,
):
    scales = group_bits(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS)
    minima = ()
    if minimum_ptr is not None:
        minima = group_bits(
            minimum_ptr, stride_minimum_group, rows, step, plane_groups, last_group, GROUPS, EVEN, STEPS
        )
    return scales, minima


@gluon.jit
def of_step(values, j: gl.constexpr, STEPS: gl.constexpr):
    """Of values of as many each for STEPS steps those of step j."""
    COUNT: gl.constexpr = len(values) // STEPS
    chosen = ()
    for i in gl.static_range(COUNT):
        chosen = chosen + (values[j * COUNT + i],)  # type: ignore[assignment]  # noqa: RUF005
    return chosen


@gluon.jit
def _factors(scales, minima, scale_ptr, minimum_ptr, half: gl.constexpr, dtype: gl.constexpr, STEPS: gl.constexpr):
    """Of each step's scales and minima those of a half, as `unpack` takes them."""
    s = ()
    m = ()
    for j in gl.static_range(STEPS):
        more_s, more_m = of_half(
            of_step(scales, j, STEPS), of_step(minima, j, STEPS), scale_ptr, minimum_ptr, half, dtype
        )
        s = s + more_s
        m = m + more_m
    return s, m


@gluon.jit
def sum_steps(
    acc, words, x, full, empty, scale_ptr, minimum_ptr, rows, side: gl.constexpr, turn: gl.constexpr, stage, phase, k,
    end, last_group, plane_groups, stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, EVEN: gl.constexpr,
    SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Adds to acc this turn's steps of a tile's rounds from `k` to before `end`; `stage` and `phase` are round k's.

    Of x as many tokens are taken as acc has. SCALE_SUMS: not the weights are scaled, but each step's sums: that is
    fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    ROUND: gl.constexpr = TURNS * STEPS
    TOKENS: gl.constexpr = acc.shape[1]
    nothing = gl.zeros_like(acc)
    step = k * ROUND + turn * STEPS
    scales, minima = _bits_of_steps(
        scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step, plane_groups, last_group, GROUPS,
        EVEN, STEPS,
    )
    now = stage * TURNS + turn
    mbarrier.wait(full.index(now), phase)
    packed = load_words(words.index((now * SIDES + side) * STEPS), BLOCKS)
    s = ()
    m = ()
    s_high = ()
    m_high = ()
    if not SCALE_SUMS:
        s, m = _factors(scales, minima, scale_ptr, minimum_ptr, 0, dtype, STEPS)
        s_high, m_high = _factors(scales, minima, scale_ptr, minimum_ptr, 1, dtype, STEPS)
        scales, minima = _bits_of_steps(
            scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step + ROUND, plane_groups,
            last_group, GROUPS, EVEN, STEPS,
        )
    low = operand(unpack(packed, of_step(s, 0, STEPS), of_step(m, 0, STEPS), 0, dtype), dtype, layout)
    for i in range(k + 1, end + 1):
        step = i * ROUND + turn * STEPS
        after, after_phase = stage_after(stage, phase, STAGES)
        next_stage = gl.where(i < end, after, stage)  # the last round's is itself once more, and for nothing
        next_phase = gl.where(i < end, after_phase, phase)
        now = stage * TURNS + turn
        following = next_stage * TURNS + turn
        sums = acc
        high = low
        for j in gl.static_range(STEPS):
            part = x.index(now * STEPS + j).slice(0, 64, 1).slice(0, TOKENS).permute((1, 0))
            if SCALE_SUMS:
                sums = warpgroup_mma(low, part, nothing, use_acc=False, is_async=True)
            else:
                sums = warpgroup_mma(low, part, sums, is_async=True)
            if j > 0:  # what is unpacked goes into the registers of what has been multiplied
                sums, high = warpgroup_mma_wait(1, deps=[sums, high])
            high = operand(
                unpack(packed, of_step(s_high, j, STEPS), of_step(m_high, j, STEPS), 1, dtype), dtype, layout
            )
            part = x.index(now * STEPS + j).slice(64, 64, 1).slice(0, TOKENS).permute((1, 0))
            sums = warpgroup_mma(high, part, sums, is_async=True)
            if j + 1 < STEPS:
                packed = load_words(words.index((now * SIDES + side) * STEPS + j + 1), BLOCKS)
            if STEPS > 1 or not SCALE_SUMS:
                sums, low = warpgroup_mma_wait(1, deps=[sums, low])
            if j + 1 < STEPS:
                low = operand(
                    unpack(packed, of_step(s, j + 1, STEPS), of_step(m, j + 1, STEPS), 0, dtype), dtype, layout
                )
            if j == 0:
                first = sums
        mbarrier.wait(full.index(following), next_phase)
        packed = load_words(words.index((following * SIDES + side) * STEPS), BLOCKS)
        if not SCALE_SUMS:
            s, m = _factors(scales, minima, scale_ptr, minimum_ptr, 0, dtype, STEPS)
            s_high, m_high = _factors(scales, minima, scale_ptr, minimum_ptr, 1, dtype, STEPS)
            # Those of the round after it, into the registers that are free now, or the loop would end with moves, which
            # wait for the cache: under load it takes longer than half a step of 128 tokens.
            scales, minima = _bits_of_steps(
                scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step + ROUND, plane_groups,
                last_group, GROUPS, EVEN, STEPS,
            )
        next_low = operand(unpack(packed, of_step(s, 0, STEPS), of_step(m, 0, STEPS), 0, dtype), dtype, layout)
        if BLOCKS == 1 and not SCALE_SUMS:
            # This has come already. ptxas would move the unpacking above down past the wait below; past this wait's
            # loop it does not. Two blocks are faster without.
            mbarrier.wait(full.index(following), next_phase)
        if SCALE_SUMS and STEPS == 2:
            first, sums, low, high, next_low = warpgroup_mma_wait(0, deps=[first, sums, low, high, next_low])
        else:
            sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(stage), count=1)
        if SCALE_SUMS:
            if STEPS == 2:
                acc += first * gl.expand_dims(bits_to_float(scales[0], scale_ptr.dtype.element_ty), 1)
            acc += sums * gl.expand_dims(bits_to_float(scales[STEPS - 1], scale_ptr.dtype.element_ty), 1)
            # Not before: into the same registers, for use at the end of the next round. If there were two sets of them,
            # the loop would end with moves from one to the other, which wait for the cache.
            scales = group_bits(scale_ptr, stride_scale_group, rows, step, plane_groups, last_group, 1, True, STEPS)
        else:
            acc = sums
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def compute(
    group: gl.constexpr, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty,
    turns, left, taken, shares, early, M, N, last_group, plane_groups, stride_scale_group, stride_minimum_group, GROUPS:
    gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES:
    gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, ACTIVATED: gl.constexpr, CHAINED:
    gl.constexpr,
):
    """What warpgroup number `group` does."""
    ROWS: gl.constexpr = 64 * BLOCKS
    OUTPUTS: gl.constexpr = SIDES * ROWS
    side: gl.constexpr = group % SIDES
    turn: gl.constexpr = group // SIDES
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    packed_layout: gl.constexpr = words_layout(BLOCKS)
    scale_layout: gl.constexpr = gl.SliceLayout(1, acc_layout if SCALE_SUMS else packed_layout)
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
        if residual_ptr is not None:
            fetch_residual(residual_ptr, row, token_tile * TOKENS, M, N, ROWS, TOKENS, ACTIVATED)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
        stage, phase = stage_of(i, STAGES)
        acc = sum_steps(
            acc, words, x, full, empty, scale_ptr, minimum_ptr, rows, side, turn, stage, phase, k, end, last_group,
            plane_groups, stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, SIDES, TURNS,
            STEPS, STAGES,
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
            token = token_tile * TOKENS
            if end - k < rounds:
                slot = slot_of(program, tile, programs, rounds, shares[2])
                part_ptr = workspace_ptr + (slot.to(gl.int64) * (OUTPUTS * TOKENS) + side * ROWS)
                leave(acc, part_ptr, M - token, OUTPUTS, TOKENS)
            else:
                finish(acc, out_ptr, bias_ptr, residual_ptr, row, token, M, N, ACTIVATED, CHAINED)
            if TURNS > 1:  # behind the use of what was loaded, so that it has come
                mbarrier.arrive(taken.index(side), count=1)
        parity ^= 1
