"""The warpgroups of the Hopper int4 kernel (`int4_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

Weights are the first operand: they go from shared memory through registers, where they are dequantised
(`int4_unpack.py`), into the tensor cores. While these are at 64 inputs, the next 64 are dequantised; and the
warpgroups, two or four, fill each other's gaps. SIDES of them stand side by side; TURNS of them take turns at the steps
of the same outputs, and the first adds up their sums, in their order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.int4_epilogue import fetch_residual, finish
from octavo.kernels.quant.int4_shares import after_turns, place, share_of, slot_of, stage_of, step_at
from octavo.kernels.quant.int4_unpack import (
    bits_to_float,
    group_bits,
    load_words,
    next_group,
    of_half,
    operand,
    unpack,
    words_layout,
)

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def leave(acc, part_ptr, tokens, OUTPUTS: gl.constexpr, TOKENS: gl.constexpr):
    """Leaves a warpgroup's part of a tile, of its first `tokens` tokens, for the kernel that adds the parts up."""
    n = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, acc.type.layout)), 0)
    gl.store(part_ptr + m * OUTPUTS + n, acc, mask=(m < tokens) & (n < OUTPUTS))


@gluon.jit
def _bits_of_step(
    scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step, at, group_planes, last_group, GROUPS:
    gl.constexpr, EVEN: gl.constexpr,
):
    scales = group_bits(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
    minima = ()
    if minimum_ptr is not None:
        minima = group_bits(minimum_ptr, stride_minimum_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
    return scales, minima


@gluon.jit
def sum_steps(
    acc, words, x, full, empty, scale_ptr, minimum_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group,
    group_planes, stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS:
    gl.constexpr, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):
    """Adds every TURNS-th step from `k` to `end` of a tile to acc; `stage` and `phase` are the first's.

    Of x as many tokens are taken as acc has. SCALE_SUMS: not the weights are scaled, but each step's sums: that is
    fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    TOKENS: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    nothing = gl.zeros_like(acc)
    group_steps = group_planes // 4
    whole = 0
    more = TURNS
    at = 0
    left = 0
    if GROUPS == 1:
        whole = TURNS // group_steps
        more = TURNS - whole * group_steps
        at = k // group_steps
        left = (at + 1) * group_steps - k
    scales, minima = _bits_of_step(
        scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, k, at, group_planes, last_group, GROUPS,
        EVEN,
    )
    mbarrier.wait(full.index(stage), phase)
    packed = load_words(words.index(SIDES * stage + side), BLOCKS)
    s = ()
    m = ()
    s_high = ()
    m_high = ()
    if not SCALE_SUMS:
        s, m = of_half(scales, minima, scale_ptr, minimum_ptr, 0, dtype)
        s_high, m_high = of_half(scales, minima, scale_ptr, minimum_ptr, 1, dtype)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        scales, minima = _bits_of_step(
            scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, k + TURNS, at, group_planes,
            last_group, GROUPS, EVEN,
        )
    low = operand(unpack(packed, s, m, 0, dtype), dtype, layout)
    for step in range(k + TURNS, end + TURNS, TURNS):
        after, after_phase = after_turns(stage, phase, TURNS, STAGES)
        next_stage = gl.where(step < end, after, stage)  # the last step's is itself once more, and for nothing
        next_phase = gl.where(step < end, after_phase, phase)
        part = x.index(stage).slice(0, 64, 1).slice(0, TOKENS).permute((1, 0))
        if SCALE_SUMS:
            sums = warpgroup_mma(low, part, nothing, use_acc=False, is_async=True)
        else:
            sums = warpgroup_mma(low, part, acc, is_async=True)
        high = operand(unpack(packed, s_high, m_high, 1, dtype), dtype, layout)
        part = x.index(stage).slice(64, 64, 1).slice(0, TOKENS).permute((1, 0))
        sums = warpgroup_mma(high, part, sums, is_async=True)
        if not SCALE_SUMS:  # the next half unpacked goes into the registers of this step's first
            sums, low = warpgroup_mma_wait(1, deps=[sums, low])
        mbarrier.wait(full.index(next_stage), next_phase)
        packed = load_words(words.index(SIDES * next_stage + side), BLOCKS)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        if not SCALE_SUMS:
            s, m = of_half(scales, minima, scale_ptr, minimum_ptr, 0, dtype)
            s_high, m_high = of_half(scales, minima, scale_ptr, minimum_ptr, 1, dtype)
            # Those of the step after it, into the registers that are free now, or the loop would end with moves, which
            # wait for the cache: under load it takes longer than half a step of 128 tokens.
            scales, minima = _bits_of_step(
                scale_ptr, minimum_ptr, stride_scale_group, stride_minimum_group, rows, step + TURNS, at, group_planes,
                last_group, GROUPS, EVEN,
            )
        next_low = operand(unpack(packed, s, m, 0, dtype), dtype, layout)
        if BLOCKS == 1 and not SCALE_SUMS:
            # This has come already. ptxas would move the unpacking above down past the wait below; past this wait's
            # loop it does not. Two blocks are faster without.
            mbarrier.wait(full.index(next_stage), next_phase)
        sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(stage), count=1)
        if SCALE_SUMS:
            acc += sums * gl.expand_dims(bits_to_float(scales[0], scale_ptr.dtype.element_ty), 1)
            # Not before: into the same registers, for use at the end of the next step. If there were two sets of them,
            # the loop would end with moves from one to the other, which wait for the cache.
            scales = group_bits(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
        else:
            acc = sums
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def compute(
    group: gl.constexpr, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty,
    turns, left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
    stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr,
    BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
    ACTIVATED: gl.constexpr, CHAINED: gl.constexpr,
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
        if residual_ptr is not None:
            fetch_residual(residual_ptr, row, token_tile * TOKENS, M, N, ROWS, TOKENS, ACTIVATED)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
        # A stage is always the same warpgroup's, or one could take it for full before it is: STAGES divide by TURNS.
        ahead = (turn + TURNS - i % TURNS) % TURNS
        if TURNS == 1 or k + ahead < end:
            stage, phase = stage_of(i + ahead, STAGES)
            acc = sum_steps(
                acc, words, x, full, empty, scale_ptr, minimum_ptr, rows, side, stage, phase, k + ahead, end,
                last_group, group_planes, stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS,
                SIDES, TURNS, STAGES,
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
            if end - k < k_tiles:
                slot = slot_of(program, tile, programs, shared, k_tiles)
                part_ptr = workspace_ptr + (slot.to(gl.int64) * (OUTPUTS * TOKENS) + side * ROWS)
                leave(acc, part_ptr, M - token, OUTPUTS, TOKENS)
            else:
                finish(acc, out_ptr, bias_ptr, residual_ptr, row, token, M, N, ACTIVATED, CHAINED)
            if TURNS > 1:  # behind the use of what was loaded, so that it has come
                mbarrier.arrive(taken.index(side), count=1)
        parity ^= 1
