"""The warpgroups of the Hopper int8 kernel (`int8_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

As in `int4_compute.py`, weights go from shared memory through registers into the tensor cores, SIDES warpgroups stand
side by side and TURNS take turns. Up to 64 tokens the steps are that kernel's, too. With more, half a step has a stage
of its own, and there is always a product that runs while the next half is unpacked.
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
    operand,
    words_layout,
)
from octavo.kernels.quant.int8_unpack import FACTOR, load_bytes, unpack_bytes

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
def _sum_few(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group, group_planes,
    stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, SIDES:
    gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):
    """Adds every TURNS-th step from `k` to `end` of a tile to acc; `stage` and `phase` are the first's.

    SCALE_SUMS: not the weights are scaled, but each step's sums. That is fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    nothing = gl.zeros_like(acc)
    at, left, group_steps, whole, more = _first_group(k, group_planes, TURNS, GROUPS)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k, at, group_planes, last_group, GROUPS, EVEN)
    mbarrier.wait(full.index(stage), phase)
    planes = load_bytes(weights.index(SIDES * stage + side), BLOCKS, 128)
    s = ()
    s_high = ()
    if not SCALE_SUMS:
        s = _factors(scales, scale_ptr, 0, dtype)
        s_high = _factors(scales, scale_ptr, 1, dtype)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        scales = _bits_of_step(
            scale_ptr, stride_scale_group, rows, k + TURNS, at, group_planes, last_group, GROUPS, EVEN
        )
    low = operand(unpack_bytes(planes, s, 0, dtype), dtype, layout)
    for step in range(k + TURNS, end + TURNS, TURNS):
        after, after_phase = after_turns(stage, phase, TURNS, STAGES)
        next_stage = gl.where(step < end, after, stage)  # the last step's is itself once more, and for nothing
        next_phase = gl.where(step < end, after_phase, phase)
        part = x.index(2 * stage).permute((1, 0))
        if SCALE_SUMS:
            sums = warpgroup_mma(low, part, nothing, use_acc=False, is_async=True)
        else:
            sums = warpgroup_mma(low, part, acc, is_async=True)
        high = operand(unpack_bytes(planes, s_high, 1, dtype), dtype, layout)
        sums = warpgroup_mma(high, x.index(2 * stage + 1).permute((1, 0)), sums, is_async=True)
        if not SCALE_SUMS:  # the next half unpacked goes into the registers of this step's first
            sums, low = warpgroup_mma_wait(1, deps=[sums, low])
        mbarrier.wait(full.index(next_stage), next_phase)
        planes = load_bytes(weights.index(SIDES * next_stage + side), BLOCKS, 128)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        if not SCALE_SUMS:
            s = _factors(scales, scale_ptr, 0, dtype)
            s_high = _factors(scales, scale_ptr, 1, dtype)
            scales = _bits_of_step(
                scale_ptr, stride_scale_group, rows, step + TURNS, at, group_planes, last_group, GROUPS, EVEN
            )
        next_low = operand(unpack_bytes(planes, s, 0, dtype), dtype, layout)
        sums, low, high, next_low = warpgroup_mma_wait(0, deps=[sums, low, high, next_low])
        low = next_low
        mbarrier.arrive(empty.index(stage), count=1)
        if SCALE_SUMS:
            scale = bits_to_float(scales[0], scale_ptr.dtype.element_ty) * FACTOR
            acc += sums * gl.expand_dims(scale, 1)
            # Not before: see `int4_compute.py`.
            scales = _bits_of_step(
                scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN
            )
        else:
            acc = sums
        stage = after
        phase = after_phase
    return acc


@gluon.jit
def _sum_many(
    acc, weights, x, full, empty, scale_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group, group_planes,
    stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, BLOCKS: gl.constexpr, SIDES: gl.constexpr, STAGES:
    gl.constexpr,
):
    """Adds the steps from `k` to `end` of a tile to acc, two stages each; `stage` and `phase` are the first's."""
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    at, left, group_steps, whole, more = _first_group(k, group_planes, 1, GROUPS)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k, at, group_planes, last_group, GROUPS, EVEN)
    s = _factors(scales, scale_ptr, 0, dtype)
    s_high = _factors(scales, scale_ptr, 1, dtype)
    if GROUPS == 1:
        at, left = next_group(at, left, group_steps, whole, more)
    scales = _bits_of_step(scale_ptr, stride_scale_group, rows, k + 1, at, group_planes, last_group, GROUPS, EVEN)
    mbarrier.wait(full.index(stage), phase)
    planes = load_bytes(weights.index(SIDES * stage + side), BLOCKS, 64)
    low = operand(unpack_bytes(planes, s, 0, dtype), dtype, layout)
    high = low
    before = stage
    for step in range(k, end):
        second, second_phase = after_turns(stage, phase, 1, STAGES)
        after, after_phase = after_turns(second, second_phase, 1, STAGES)
        next_stage = gl.where(step + 1 < end, after, second)  # the last step's is its own, and for nothing
        next_phase = gl.where(step + 1 < end, after_phase, second_phase)
        acc = warpgroup_mma(low, x.index(stage).permute((1, 0)), acc, is_async=True)
        acc, high = warpgroup_mma_wait(1, deps=[acc, high])  # the product before has ended
        mbarrier.arrive(empty.index(before), count=1, pred=step > k)
        mbarrier.wait(full.index(second), second_phase)
        planes = load_bytes(weights.index(SIDES * second + side), BLOCKS, 64)
        high = operand(unpack_bytes(planes, s_high, 0, dtype), dtype, layout)
        acc = warpgroup_mma(high, x.index(second).permute((1, 0)), acc, is_async=True)
        acc, low = warpgroup_mma_wait(1, deps=[acc, low])
        mbarrier.arrive(empty.index(stage), count=1)
        if GROUPS == 1:
            at, left = next_group(at, left, group_steps, whole, more)
        s = _factors(scales, scale_ptr, 0, dtype)
        s_high = _factors(scales, scale_ptr, 1, dtype)
        scales = _bits_of_step(
            scale_ptr, stride_scale_group, rows, step + 2, at, group_planes, last_group, GROUPS, EVEN
        )
        mbarrier.wait(full.index(next_stage), next_phase)
        planes = load_bytes(weights.index(SIDES * next_stage + side), BLOCKS, 64)
        low = operand(unpack_bytes(planes, s, 0, dtype), dtype, layout)
        before = second
        stage = after
        phase = after_phase
    acc, high = warpgroup_mma_wait(0, deps=[acc, high])
    mbarrier.arrive(empty.index(before), count=1)
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
        if INPUTS == 128:
            # A stage is always the same warpgroup's, or one could take it for full before it is: STAGES divide by
            # TURNS.
            ahead = (turn + TURNS - i % TURNS) % TURNS
            if TURNS == 1 or k + ahead < end:
                stage, phase = stage_of(i + ahead, STAGES)
                acc = _sum_few(
                    acc, weights, x, full, empty, scale_ptr, rows, side, stage, phase, k + ahead, end, last_group,
                    group_planes, stride_scale_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, SIDES, TURNS, STAGES,
                )
        else:
            stage, phase = stage_of(2 * i, STAGES)
            acc = _sum_many(
                acc, weights, x, full, empty, scale_ptr, rows, side, stage, phase, k, end, last_group, group_planes,
                stride_scale_group, GROUPS, EVEN, BLOCKS, SIDES, STAGES,
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
