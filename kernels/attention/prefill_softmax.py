"""The softmax of the prefill kernel (`prefill.py`), where all but the products is spent: each instruction of it counts.

A warpgroup's rows lie as products leave them: a lane has two of each eight numbers of a row, and the same two of the
row eight further down, in this order. Code below in PTX relies on that, for what the compiler does not find by itself:

- Sums so far are multiplied only by warps of which a row's maximum has grown by SLACK bits, as FlashAttention-4 does.
- Each lane adds up its own weights of a row; the four parts become one when a tile of queries is at its end.
- Maxima are taken in a tree, since those of a chain wait for each other.
- A key is out of sight by one comparison with a constant. The compiler keeps the number of each key in a register, and
  compares twice. Alone, 0.96 to 1 of the time.

All of it together: 0.91 to 0.95 of the time with heads of 128, 0.94 with heads of 256, 0.98 to 1 with heads of 96.
Three warpgroups, of heads of 64, do without the first and the third: with them, and no product of their own under way
meanwhile, they took as long for 4 × 4k and 1.03 times as long for 2 × 8k.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.attention.prefill_tiles import END, POSITION, START, field

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off

SLACK = gl.constexpr(8.0)
"""A row's weights are relative to an older maximum until it has grown by as many bits, and below 2^8 or so: fp16 holds
them. Of 16 bits they are beside a float8 cache too, whose scale results are multiplied by in the end."""


@gluon.constexpr_function
def _cut_code(count, keep):
    """Minus infinity where a key's number in the tile, a constant and what the lane's place adds, is not to `keep`."""
    lines = [
        "{ .reg .pred p; .reg .s32 lane, first, second;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1;",
        f"sub.s32 first, ${2 * count}, lane; sub.s32 second, ${2 * count + 2}, lane;",
    ]
    for i in range(count):
        bound = "second" if i & 2 else "first"
        lines.append(f"setp.{keep}.s32 p, {bound}, {i // 4 * 8 + i % 2}; selp.f32 ${i}, ${i}, 0fFF800000, p;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _rescale_code(count):
    lines = [
        "{ .reg .pred p;",
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000; setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff; @!p bra SKIP;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i % 4 // 2 * 2};" for i in range(count)),
        "SKIP: }",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _in_place(count, register):
    """Constraints of code that has all of a lane's numbers in place, as the first operand; the second, to read."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + [register] * count)


@gluon.jit
def _cut(scores, bound, keep: gl.constexpr):
    """Scores without those of the keys that a row, by its bound, does not see."""
    COUNT: gl.constexpr = scores.shape[0] * scores.shape[1] // 128
    bound = gl.zeros_like(scores).to(gl.int32) + bound
    return gl.inline_asm_elementwise(
        _cut_code(COUNT, keep), _in_place(COUNT, "r"), [scores, bound], dtype=gl.float32, is_pure=True, pack=COUNT,
    )


@gluon.jit
def rows_times(x, factor):
    layout: gl.constexpr = x.type.layout
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def rows_times_if_any(x, factor):
    """The same, skipped by warps all of whose rows have a factor of 1.

    No row's bits depend on the others of its warp: 1 is what it has, exactly, whose maximum does not change, and times
    1 a number is what it was.
    """
    layout: gl.constexpr = x.type.layout
    COUNT: gl.constexpr = x.shape[0] * x.shape[1] // 128
    factor = gl.zeros_like(x) + gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, layout)), 1)
    return gl.inline_asm_elementwise(
        _rescale_code(COUNT), _in_place(COUNT, "f"), [x, factor], dtype=gl.float32, is_pure=True, pack=COUNT,
    )


@gluon.jit
def sums_of_lanes(weights):
    """[rows, 4]: what each of the four lanes that share a row adds up of it."""
    x = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(x, 3), 1)


@gluon.jit
def _maxima(x):
    """Of each row: of its quarters, number by number, in two levels, and then of what is left."""
    ROWS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))
    a, b = gl.split(gl.permute(gl.reshape(gl.maximum(a, b), [ROWS, 2, HALF // 2]), (0, 2, 1)))
    return gl.convert_layout(gl.max(gl.maximum(a, b), 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def softmax(
    scores, top, total, tile, entries, done, row, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, FROM: gl.constexpr, SOFTCAP: gl.constexpr, PACK: gl.constexpr, BLOCK_N: gl.constexpr, LAZY:
    gl.constexpr,
):
    """Weights of a tile, in base 2 and relative to `top`, which is returned, as are the sums of the lanes and by what
    the sums of values are to be multiplied.

    EDGE: not every row sees every key. FROM: the first keys may be out of sight. LAZY: `top` is left where a row's
    maximum has grown by no more than SLACK, which is decided of each row by itself.
    """
    if SOFTCAP:
        x = scores * score_scale
        t = gl.exp2(-gl.maximum(x, -x))
        scores = cap * gl.where(x < 0, t - 1.0, 1.0 - t) / (1.0 + t)
        score_scale = 1.0
    if EDGE:
        # Bounds are read again each time, and few: kept, or compared before the scores are there, they would spill. The
        # shift is what keeps all that is of a row alone, such as its token and the window before it, from being kept:
        # POSITION + row // PACK it is, as PACK divides 16, and positions, which may be below zero, are below 2^27.
        at = gl.expand_dims((field(entries, done, POSITION, 4) * 16 + row * (16 // PACK)) >> 4, 1)
        end = field(entries, done, END, 4)
        if CAUSAL:
            end = gl.minimum(at + 1, end)
        scores = _cut(scores, end - tile * BLOCK_N, "gt")
        if FROM:
            start = field(entries, done, START, 4)
            if WINDOW:
                start = gl.maximum(at - window + 1, start)
            scores = _cut(scores, start - tile * BLOCK_N, "le")
    if LAZY:
        new_top = _maxima(scores) * score_scale
        new_top = gl.where(new_top > top + SLACK, new_top, top)
    else:
        new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    shift = new_top
    if EDGE:
        shift = gl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
    rescale = gl.exp2(top - shift)
    weights = gl.exp2(scores * score_scale - gl.expand_dims(shift, 1))
    return weights, new_top, rows_times(total, rescale) + sums_of_lanes(weights), rescale


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """Pairs of numbers side by side, rounded to 16 bits, as 32 bits."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    code: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(code, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(x, dtype: gl.constexpr):
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1,
    )
    return gl.reshape(gl.join(low, high), [x.shape[0], 2 * x.shape[1]]).to(dtype, bitcast=True)
