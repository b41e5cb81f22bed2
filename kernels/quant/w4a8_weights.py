"""Int4 weights on their way to the tensor cores as int8: `octavo.kernels.quant.w4a8`'s part that knows their layout.

A weight becomes 16 · (q - 8), which is its nibble in the upper half of a byte with the highest bit turned. So four of
them take three instructions at most, of which one is shared by two planes.
"""

import triton
import triton.language as tl


@triton.jit
def _prefetch(ptrs, BYTES: tl.constexpr):
    """Has the L2 cache fetch from each pointer: 4096 bytes, or a line. A hint: it may come before they are written."""
    ask: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 4096;" if BYTES == 4096 else "prefetch.global.L2 [$1];"
    asm: tl.constexpr = ask + " mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(
    packed_ptr, scale_ptr, stride_scale_group, first_n, first_step, last_step, steps, N, units_of_group,
    BLOCK_N: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Four steps' packed tiles, and the scales of 32 steps, as far as there are any."""
    i = tl.arange(0, BLOCK_N // 16)
    row = tl.minimum(first_n // 64 + i // 4, (N - 1) // 64).to(tl.int64)
    _prefetch(packed_ptr + (row * steps + tl.minimum(first_step + i % 4, steps - 1)) * 2048, 4096)
    if SCALES:
        group = tl.minimum(first_step + tl.arange(0, 32), last_step - 1) // units_of_group
        _prefetch(scale_ptr + group.to(tl.int64) * stride_scale_group + first_n, 128)


@triton.jit
def _plane(words, PLANE: tl.constexpr, PTX: tl.constexpr):
    """16 · (q - 8) of a nibble plane of packed words, as int8."""
    if PTX:
        # Four words are two registers, of which a byte each is taken: the lower ones for planes 0 and 1.
        take: tl.constexpr = "prmt.b32 $0, $1, $2, 0x6420; " if PLANE < 2 else "prmt.b32 $0, $1, $2, 0x7531; "
        up: tl.constexpr = "shl.b32 $0, $0, 4; " if PLANE % 2 == 0 else ""
        turn: tl.constexpr = "lop3.b32 $0, $0, 0xF0F0F0F0, 0x80808080, 0x6A;"  # ($0 & …) ^ …
        asm: tl.constexpr = take + up + turn
        return tl.inline_asm_elementwise(asm, "=r,r,r", [words], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((((words >> (4 * PLANE)) & 15) - 8) * 16).to(tl.int8)


@triton.jit
def unpacked(words, FIRST: tl.constexpr, PLANES: tl.constexpr, PTX: tl.constexpr):
    """PLANES planes of packed words `[outputs, 32]` from FIRST on, side by side: `[outputs, 32 · PLANES]`."""
    if PLANES == 1:
        return _plane(words, FIRST, PTX)
    elif PLANES == 2:
        pair = tl.join(_plane(words, FIRST, PTX), _plane(words, FIRST + 1, PTX))
        return pair.permute(0, 2, 1).reshape(words.shape[0], 64)
    else:
        even = tl.join(_plane(words, 0, PTX), _plane(words, 2, PTX))
        odd = tl.join(_plane(words, 1, PTX), _plane(words, 3, PTX))
        # [outputs, 32, 2, 2], whose last dimension is the lower bit of the plane's number.
        return tl.join(even, odd).permute(0, 2, 3, 1).reshape(words.shape[0], 128)
