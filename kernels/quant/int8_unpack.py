"""How int8 weights become the first operand of a product in the Hopper int8 kernel (`int8_hopper.py`).

Weights lie in shared memory as in memory, `[outputs, inputs]`, and what a thread wants of an output is two neighbouring
inputs of every eight: 16 bits, which it loads by themselves. That is 32 loads for 64 outputs by 128 inputs, without a
conflict of banks, where 4 of 16 bytes would do; but those would ask for tokens whose inputs are in another order.

The two bytes, as unsigned numbers u = q + 128, are spread to the low bytes of two halves. In bf16 these bits are
u · 2⁻¹³³, whether the number is subnormal (u < 128) or not; in fp16, with the exponent of 1024, they are 1024 + u.
Either way one fma makes them (u - 128) / 64, exactly. It is three instructions for two weights. The 64 is put into the
scale: for bf16 to give integers, the factor of the fma would have to be 2¹³³, which is too large.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.quant.int4_unpack import operand, words_layout

FACTOR = gl.constexpr(64)
"""What scales are multiplied by, since weights have been divided by it."""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.constexpr_function
def bytes_layout(blocks, inputs):
    """Outputs by pairs of inputs as they are copied; a thread has what a product wants."""
    along = [[0, 4 << i] for i in range((inputs // 8).bit_length() - 1)]
    more = [[64 << i, 0] for i in range(blocks.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *along, *more],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64 * blocks, inputs // 2],
    )


@gluon.constexpr_function
def unpack_bytes_asm(bf16, scaled):
    """PTX that makes two bytes two weights, in one register; `scaled`: times a third operand, a scale twice."""
    kind, bits, factor, middle = ("bf16x2", 0x80, 0x7F00, 0xC000) if bf16 else ("f16x2", 0x6480, 0x2400, 0xCC80)
    lines = [".reg .b32 both, factor, middle;"]
    for name, value in (("factor", factor), ("middle", middle)):
        lines.append(f"mov.b32 {name}, {value << 16 | value:#x};")
    lines.append("cvt.u32.u16 both, $1;")
    lines.append("prmt.b32 both, both, 0, 0x4140;")
    lines.append(f"xor.b32 both, both, {bits << 16 | bits:#x};")
    lines.append(f"fma.rn.{kind} $0, both, factor, middle;")
    if scaled:
        lines.append(f"mul.{kind} $0, $0, $2;")
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def _unpack_plane(pairs, scales, dtype: gl.constexpr):
    bf16: gl.constexpr = dtype == gl.bfloat16
    asm: gl.constexpr = unpack_bytes_asm(bf16, len(scales) > 0)
    if len(scales) > 0:
        return gl.inline_asm_elementwise(
            asm, "=r,h,r", (pairs, gl.expand_dims(scales[0], 1)), dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(asm, "=r,h", (pairs,), dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _split(pairs):
    """The first and the second half of the inputs."""
    return pairs.reshape([pairs.shape[0], 2, pairs.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def unpack_bytes(
    tile, scales, half: gl.constexpr, BLOCKS: gl.constexpr, INPUTS: gl.constexpr, dtype: gl.constexpr, layout:
    gl.constexpr,
):
    """Loads 64 of a tile's inputs, the first or the second if it has more: a product's first operand `[outputs, 64]`.

    scales: a tuple of `[outputs]`, 64 times a scale and that twice, of none (for q / 64), one or two (of 32 inputs).
    """
    pairs = tile.load(bytes_layout(BLOCKS, INPUTS))  # what is not used of it is not loaded
    if INPUTS == 128:
        low, high = _split(pairs)
        pairs = high if half == 1 else low
    low, high = _split(pairs)
    low = gl.convert_layout(low, words_layout(BLOCKS), assert_trivial=True)
    high = gl.convert_layout(high, words_layout(BLOCKS), assert_trivial=True)
    last: gl.constexpr = len(scales) - 1
    low = _unpack_plane(low, scales[:1], dtype)
    high = _unpack_plane(high, scales[last:] if last >= 0 else (), dtype)
    return operand((low, high), dtype, layout)
