"""The warpgroups of the Hopper int4 kernel (`int4_hopper.py`) that compute, each 64 · BLOCKS outputs of a tile.

Weights are the first operand: they go from shared memory through registers, where they are dequantised, into the tensor
cores. While these are at 64 inputs, the next 64 are dequantised; and the warpgroups, two or four, fill each other's
gaps. SIDES of them stand side by side; TURNS of them take turns at the steps of the same outputs, and the first adds up
their sums, in their order.

Dequantising: a nibble is put into the mantissa of 128 (bf16) or 1024 (fp16), which costs one instruction for two
weights, and 128 + 8 subtracted, which leaves q - 8; then one fma makes it a weight, rounded once:

    w = (q - 8) · scale + (minimum + 8 · scale)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.quant.int4_epilogue import fetch_residual, finish
from octavo.kernels.quant.int4_shares import after_turns, place, share_of, slot_of, stage_of, step_at

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.constexpr_function
def tile_layout(blocks):
    """Pairs of packed words as they are copied, two rows of 16 side by side; a thread has what a product wants."""
    more = [[32 << i, 0] for i in range(blocks.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[4, 0], [0, 4], [0, 8], *more],
        lane_bases=[[0, 1], [0, 2], [0, 16], [1, 0], [2, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32 * blocks, 32],
    )


@gluon.constexpr_function
def words_layout(blocks):
    """The same with one row below the other: outputs by pairs of words."""
    more = [[64 << i, 0] for i in range(blocks.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], *more],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64 * blocks, 16],
    )


@gluon.constexpr_function
def unpack_asm(half, bf16, scales, minima):
    """PTX that makes a pair of words, four weights each, into two pairs: of planes 2 · half and 2 · half + 1.

    Operands: two results, the words, then the scales (0: none, 1: one for both planes, 2: one a plane) and, if there
    are any, as many minima; each of them twice in its register.
    """
    kind, magic, one, middle = ("bf16x2", 0x4300, 0x3F80, 0xC308) if bf16 else ("f16x2", 0x6400, 0x3C00, 0xE408)
    lines = [".reg .b32 one, middle, word;"]
    for name, value in (("one", one), ("middle", middle)):
        lines.append(f"mov.b32 {name}, {value << 16 | value:#x};")
    for plane in range(2):
        shift = 8 * half + 4 * plane
        result, word = f"${plane}", "$2"
        if shift:
            lines.append(f"shr.u32 word, $2, {shift};")
            word = "word"
        lines.append(f"lop3.b32 {result}, {word}, 0xF000F, {magic << 16 | magic:#x}, 0xEA;")
        lines.append(f"fma.rn.{kind} {result}, {result}, one, middle;")
        scale = f"${3 + plane * (scales - 1)}"
        minimum = f"${3 + scales + plane * (scales - 1)}"
        if scales and minima:
            lines.append(f"fma.rn.{kind} {result}, {result}, {scale}, {minimum};")
        elif scales:
            lines.append(f"mul.{kind} {result}, {result}, {scale};")
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def load_asm(bits):
    """PTX that loads what no kernel writes, of 16 or 32 bits, into a register of 32."""
    return f"ld.global.nc.u{bits} $0, [$1];"


@gluon.constexpr_function
def unpack_constraints(operands):
    return ",".join(["=&r"] * 2 + ["r"] * operands)


@gluon.jit
def _unpack(words, scales, minima, half: gl.constexpr, dtype: gl.constexpr):
    """Pairs of weights of two planes, each `[outputs, 16]`; without scales q - 8.

    scales, minima: tuples of `[outputs]` as `_twice` makes them, of none, one or two (one a plane).
    """
    bf16: gl.constexpr = dtype == gl.bfloat16
    asm: gl.constexpr = unpack_asm(half, bf16, len(scales), len(minima))
    constraints: gl.constexpr = unpack_constraints(1 + len(scales) + len(minima))
    operands = (words,)
    for j in gl.static_range(len(scales)):
        operands = operands + (gl.expand_dims(scales[j], 1),)  # type: ignore[assignment]  # noqa: RUF005
    for j in gl.static_range(len(minima)):
        operands = operands + (gl.expand_dims(minima[j], 1),)  # type: ignore[assignment]  # noqa: RUF005
    return gl.inline_asm_elementwise(
        asm, constraints, operands, dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _twice(value, dtype: gl.constexpr):
    """The value in that dtype, twice in a register."""
    bits = value.to(dtype).to(gl.uint16, bitcast=True).to(gl.uint32)
    return (bits << 16 | bits).to(gl.int32, bitcast=True)


@gluon.jit
def _halves(pairs):
    """Two bytes each of pairs `[outputs, 16]`, as `[outputs, 16, 2]`; shifts would be instructions, this is none."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", (pairs,), dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.join(low, high)


@gluon.jit
def _operand(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """Pairs of weights of a step's planes as the first operand of a product, `[outputs, 64]` or `[outputs, 128]`."""
    OUTPUTS: gl.constexpr = pairs[0].shape[0]
    w = gl.join(_halves(pairs[0]), _halves(pairs[1]))  # [outputs, 16, 2, 2]
    if len(pairs) == 2:
        w = gl.permute(w, (0, 3, 1, 2))
    else:
        w = gl.join(w, gl.join(_halves(pairs[2]), _halves(pairs[3])))  # [outputs, 16, 2, 2, 2]
        w = gl.permute(w, (0, 4, 3, 1, 2))
    w = gl.reshape(w.to(dtype, bitcast=True), [OUTPUTS, 32 * len(pairs)])
    return gl.convert_layout(w, layout, assert_trivial=True)


@gluon.jit
def _load_words(tile, BLOCKS: gl.constexpr):
    """A packed tile, pairs of words `[outputs, 16]`."""
    words = gl.reshape(tile.load(tile_layout(BLOCKS)), [64 * BLOCKS, 16])
    return gl.convert_layout(words, words_layout(BLOCKS), assert_trivial=True)


@gluon.jit
def _next_group(group, left, group_steps, whole, more):
    """The group of a warpgroup's next step, and how many steps from that on are left of it.

    Groups are of `group_steps` whole steps; to the next step of this warpgroup it is `whole` groups and `more` steps.
    """
    ends = left <= more
    return group + whole + ends.to(gl.int32), left - more + gl.where(ends, group_steps, 0)


@gluon.jit
def _groups(ptr, stride, rows, step, group, group_planes, last_group, GROUPS: gl.constexpr, EVEN: gl.constexpr):
    """The bits of a step's scales, or minima: one, or where groups are smaller, of each half (64 inputs) or plane (32).

    They are in registers of 32 bits: of two values of 16 that a loop carries ptxas makes one register, at the end of
    the step in which they are loaded, and that waits for the cache.
    """
    load: gl.constexpr = load_asm(ptr.dtype.element_ty.primitive_bitwidth)
    values = ()
    for j in gl.static_range(GROUPS):
        if GROUPS == 1:
            at = group
        elif EVEN:
            at = step * GROUPS + j
        else:
            at = (step * 4 + j) // group_planes
        at = gl.minimum(at, last_group).to(gl.int64)
        bits = gl.inline_asm_elementwise(
            load, "=r,l", (ptr + at * stride + rows,), dtype=gl.int32, is_pure=False, pack=1
        )
        values = values + (bits,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@gluon.jit
def _value(bits, dtype: gl.constexpr):
    """What was loaded as bits, in fp32."""
    if dtype.primitive_bitwidth == 16:
        bits = bits.to(gl.uint16)
    return bits.to(dtype, bitcast=True).to(gl.float32)


@gluon.jit
def _of_half(scales, minima, scale_ptr, minimum_ptr, half: gl.constexpr, dtype: gl.constexpr):
    """Of a step's scales and minima those of a half, as `_unpack` takes them."""
    s = ()
    m = ()
    COUNT: gl.constexpr = (len(scales) + 1) // 2
    START: gl.constexpr = half * (len(scales) // 2)
    for j in gl.static_range(COUNT):
        scale = _value(scales[START + j], scale_ptr.dtype.element_ty)
        s = s + (_twice(scale, dtype),)  # type: ignore[assignment]  # noqa: RUF005
        if len(minima):
            minimum = _value(minima[START + j], minimum_ptr.dtype.element_ty)
            m = m + (_twice(minimum + 8 * scale, dtype),)  # type: ignore[assignment]  # noqa: RUF005
    return s, m


@gluon.jit
def _leave(acc, part_ptr, tokens, OUTPUTS: gl.constexpr, TOKENS: gl.constexpr):
    """Leaves a warpgroup's part of a tile, of its first `tokens` tokens, for the kernel that adds the parts up."""
    n = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, acc.type.layout)), 0)
    gl.store(part_ptr + m * OUTPUTS + n, acc, mask=(m < tokens) & (n < OUTPUTS))


@gluon.jit
def _sum(
    acc, words, x, full, empty, scale_ptr, minimum_ptr, rows, side: gl.constexpr, stage, phase, k, end, last_group,
    group_planes, stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS:
    gl.constexpr, BLOCKS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):
    """Adds every TURNS-th step from `k` to `end` of a tile to acc; `stage` and `phase` are the first's.

    SCALE_SUMS: not the weights are scaled, but each step's sums. That is fewer instructions for few tokens.
    """
    dtype: gl.constexpr = x.dtype
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    s = ()
    m = ()
    minima = ()
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
    scales = _groups(scale_ptr, stride_scale_group, rows, k, at, group_planes, last_group, GROUPS, EVEN)
    if minimum_ptr is not None:
        minima = _groups(minimum_ptr, stride_minimum_group, rows, k, at, group_planes, last_group, GROUPS, EVEN)
    mbarrier.wait(full.index(stage), phase)
    if not SCALE_SUMS:
        s, m = _of_half(scales, minima, scale_ptr, minimum_ptr, 0, dtype)
    packed = _load_words(words.index(SIDES * stage + side), BLOCKS)
    low = _unpack(packed, s, m, 0, dtype)
    AGAIN: gl.constexpr = BLOCKS == 2 and (GROUPS > 1 or minimum_ptr is not None)
    for step in range(k + TURNS, end + TURNS, TURNS):
        after, after_phase = after_turns(stage, phase, TURNS, STAGES)
        next_stage = gl.where(step < end, after, stage)  # the last step's is itself once more, and for nothing
        next_phase = gl.where(step < end, after_phase, phase)
        w = _operand(low, dtype, layout)
        part = x.index(stage).slice(0, 64, 1).permute((1, 0))
        if SCALE_SUMS:
            sums = warpgroup_mma(w, part, nothing, use_acc=False, is_async=True)
        else:
            sums = warpgroup_mma(w, part, acc, is_async=True)
            s, m = _of_half(scales, minima, scale_ptr, minimum_ptr, 1, dtype)
        if AGAIN:
            packed = _load_words(words.index(SIDES * stage + side), BLOCKS)
        high = _unpack(packed, s, m, 1, dtype)
        if GROUPS == 1:
            at, left = _next_group(at, left, group_steps, whole, more)
        if not SCALE_SUMS:
            scales = _groups(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
        if minimum_ptr is not None:
            minima = _groups(minimum_ptr, stride_minimum_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
        sums, w, high_0, high_1 = warpgroup_mma_wait(0, deps=[sums, w, high[0], high[1]])
        w = _operand((high_0, high_1), dtype, layout)
        sums = warpgroup_mma(w, x.index(stage).slice(64, 64, 1).permute((1, 0)), sums, is_async=True)
        mbarrier.wait(full.index(next_stage), next_phase)
        if not SCALE_SUMS:
            s, m = _of_half(scales, minima, scale_ptr, minimum_ptr, 0, dtype)
        packed = _load_words(words.index(SIDES * next_stage + side), BLOCKS)
        low = _unpack(packed, s, m, 0, dtype)
        if not (BLOCKS == 2 and acc.shape[1] == 128):
            # This has come already. ptxas would move the above down past the wait below; past this wait's loop it does
            # not. The largest tile is up to a tenth faster without: the two warpgroups overlap each other.
            mbarrier.wait(full.index(next_stage), next_phase)
        if AGAIN:
            sums, w, low_0, low_1 = warpgroup_mma_wait(0, deps=[sums, w, low[0], low[1]])
        else:
            sums, w, low_0, low_1, packed = warpgroup_mma_wait(0, deps=[sums, w, low[0], low[1], packed])
        low = (low_0, low_1)
        mbarrier.arrive(empty.index(stage), count=1)
        if SCALE_SUMS:
            acc += sums * gl.expand_dims(_value(scales[0], scale_ptr.dtype.element_ty), 1)
            # Not before: into the same registers, for use at the end of the next step. If there were two sets of them,
            # the loop would end with moves from one to the other, which wait for the cache.
            scales = _groups(scale_ptr, stride_scale_group, rows, step, at, group_planes, last_group, GROUPS, EVEN)
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
            acc = _sum(
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
                _leave(acc, part_ptr, M - token, OUTPUTS, TOKENS)
            else:
                finish(acc, out_ptr, bias_ptr, residual_ptr, row, token, M, N, ACTIVATED, CHAINED)
            if TURNS > 1:  # behind the use of what was loaded, so that it has come
                mbarrier.arrive(taken.index(side), count=1)
        parity ^= 1
