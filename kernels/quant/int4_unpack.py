"""How packed int4 weights become the first operand of a product in the Hopper int4 kernel (`int4_hopper.py`).

A nibble is put into the mantissa of 128 (bf16) or 1024 (fp16), which costs one instruction for two weights, and 128 + 8
subtracted, which leaves q - 8; then one fma makes it a weight, rounded once:

    w = (q - 8) · scale + (minimum + 8 · scale)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def unpack(words, scales, minima, half: gl.constexpr, dtype: gl.constexpr):
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
def operand(pairs, dtype: gl.constexpr, layout: gl.constexpr):
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
def load_words(tile, BLOCKS: gl.constexpr):
    """A packed tile, pairs of words `[outputs, 16]`."""
    words = gl.reshape(tile.load(tile_layout(BLOCKS)), [64 * BLOCKS, 16])
    return gl.convert_layout(words, words_layout(BLOCKS), assert_trivial=True)


@gluon.jit
def group_of(plane, plane_groups):
    """The group of 32 inputs: their number divided, by a product with what `int4_tiles.plane_groups` gives."""
    return (plane * plane_groups.to(gl.int64) >> 30).to(gl.int32)


@gluon.jit
def group_bits(
    ptr, stride, rows, step, plane_groups, last_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, STEPS: gl.constexpr = 1
):
    """The bits of the scales, or minima, of STEPS steps from `step` on.

    Of each step one, or where groups are smaller one of each half (64 inputs) or plane (32); EVEN: these are groups.
    They are in registers of 32 bits: of two values of 16 that a loop carries ptxas makes one register, at the end of
    the step in which they are loaded, and that waits for the cache.
    """
    load: gl.constexpr = load_asm(ptr.dtype.element_ty.primitive_bitwidth)
    values = ()
    for j in gl.static_range(STEPS * GROUPS):
        if GROUPS > 1 and EVEN:
            at = step * GROUPS + j
        else:
            at = group_of(step * 4 + j * (4 // GROUPS), plane_groups)
        at = gl.minimum(at, last_group).to(gl.int64)
        bits = gl.inline_asm_elementwise(
            load, "=r,l", (ptr + at * stride + rows,), dtype=gl.int32, is_pure=False, pack=1
        )
        values = values + (bits,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@gluon.jit
def bits_to_float(bits, dtype: gl.constexpr):
    """What was loaded as bits, in fp32."""
    if dtype.primitive_bitwidth == 16:
        bits = bits.to(gl.uint16)
    return bits.to(dtype, bitcast=True).to(gl.float32)


@gluon.jit
def of_half(
    scales, minima, scale_ptr, minimum_ptr, half: gl.constexpr, dtype: gl.constexpr, FACTOR: gl.constexpr = 1
):
    """Of a step's scales and minima those of a half, as `unpack` takes them; without minima, FACTOR as large."""
    s = ()
    m = ()
    COUNT: gl.constexpr = (len(scales) + 1) // 2
    START: gl.constexpr = half * (len(scales) // 2)
    for j in gl.static_range(COUNT):
        scale = bits_to_float(scales[START + j], scale_ptr.dtype.element_ty)
        if FACTOR != 1:
            scale = scale * FACTOR
        s = s + (_twice(scale, dtype),)  # type: ignore[assignment]  # noqa: RUF005
        if len(minima):
            minimum = bits_to_float(minima[START + j], minimum_ptr.dtype.element_ty)
            m = m + (_twice(minimum + 8 * scale, dtype),)  # type: ignore[assignment]  # noqa: RUF005
    return s, m
