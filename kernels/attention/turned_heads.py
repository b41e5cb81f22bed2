"""Heads of a query or key on their way through norm and rotation: jit helpers of `rotary_embedding_write_kv`.

A tile of ROWS heads is held as its pairs, a and b, and the rest: what partial rotation leaves in place. `ptr` is
[ROWS, 1], the heads' first elements, and `mask` says which of them there are.
"""

import triton
import triton.language as tl

from octavo.kernels.attention.kv_cache import fp8_scale, int8_scale, largest_bits, quantize


@triton.jit
def _load_pairs(ptr, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of each pair in fp32, [ROWS, BLOCK_HALF]; 0 for none."""
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(HALF)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(ptr + cols, mask=mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ptr.shape[0], BLOCK_HALF, 2)))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, :]
        a = tl.load(ptr + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        b = tl.load(ptr + HALF + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _load_rest(ptr, mask, D: tl.constexpr, HALF: tl.constexpr):
    """The rest in fp32, [ROWS, BLOCK_REST]; 0 for none."""
    cols = 2 * HALF + tl.arange(0, triton.next_power_of_2(D - 2 * HALF))[None, :]
    return tl.load(ptr + cols, mask=mask & (cols < D), other=0.0).to(tl.float32)


@triton.jit
def _store_heads(
    ptr, mask, a, b, rest, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WITH_REST: tl.constexpr
):
    """Stores pairs, and the rest where it is asked for."""
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(HALF)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        tl.store(ptr + cols, tl.interleave(a, b), mask=mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, :]
        tl.store(ptr + cols, a, mask=mask & (cols < HALF))
        tl.store(ptr + HALF + cols, b, mask=mask & (cols < HALF))
    if WITH_REST:
        cols = 2 * HALF + tl.arange(0, triton.next_power_of_2(D - 2 * HALF))[None, :]
        tl.store(ptr + cols, rest, mask=mask & (cols < D))


@triton.jit
def _norm_and_turn(
    ptr,
    mask,
    weight_ptr,
    eps,
    weight_offset,
    table_row_ptr,
    inside,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WITH_REST: tl.constexpr,
):
    """Heads in fp32, normalised where there is a weight, turned by the table's row if the position is inside of it.

    Returns a, b and the rest, which means nothing unless it is asked for.
    """
    # All loads come first, those that wait for the position last: no other chain is longer than position, table, store.
    # Weight and table are read as tiles of ROWS equal rows, so that each thread loads what it needs, where a single row
    # would be exchanged through shared memory.
    a, b = _load_pairs(ptr, mask, HALF, INTERLEAVED)
    rest = _load_rest(ptr, mask, D, HALF) if WITH_REST else a
    same = tl.zeros([ptr.shape[0], 1], tl.int32)
    if weight_ptr is not None:
        weight_a, weight_b = _load_pairs(weight_ptr + same, same == 0, HALF, INTERLEAVED)
        weight_rest = _load_rest(weight_ptr + same, same == 0, D, HALF) if WITH_REST else weight_a
    pair = same + tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    cos = tl.load(table_row_ptr + pair, mask=inside & (pair < HALF), other=1.0).to(tl.float32)
    sin = tl.load(table_row_ptr + HALF + pair, mask=inside & (pair < HALF), other=0.0).to(tl.float32)
    if weight_ptr is not None:
        total = tl.sum(a * a + b * b, 1)
        if WITH_REST:
            total += tl.sum(rest * rest, 1)
        inv = tl.rsqrt(total / D + eps)[:, None]
        a = a * inv * (weight_a + weight_offset)
        b = b * inv * (weight_b + weight_offset)
        if WITH_REST:
            rest = rest * inv * (weight_rest + weight_offset)
    return a * cos - b * sin, b * cos + a * sin, rest


@triton.jit
def turn_in_place(
    ptr,
    mask,
    weight_ptr,
    eps,
    weight_offset,
    table_row_ptr,
    inside,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Normalises and turns heads where they lie."""
    # Without a norm the rest stays as it is.
    WITH_REST: tl.constexpr = weight_ptr is not None and D > 2 * HALF
    dtype: tl.constexpr = ptr.dtype.element_ty
    a, b, rest = _norm_and_turn(
        ptr, mask, weight_ptr, eps, weight_offset, table_row_ptr, inside, D, HALF, INTERLEAVED, WITH_REST
    )
    # Where a tile is smaller than its threads, some hold copies of an element, and all must have loaded it before one
    # of them stores over it.
    tl.debug_barrier()
    _store_heads(ptr, mask, a.to(dtype), b.to(dtype), rest.to(dtype), D, HALF, INTERLEAVED, WITH_REST)


@triton.jit
def turn_and_write(
    ptr,
    there,
    weight_ptr,
    eps,
    weight_offset,
    table_row_ptr,
    inside,
    cache_ptr,
    scale_cache_ptr,
    scale_ptr,
    to_offsets,
    scale_offsets,
    head,
    stride_scale,
    wanted,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Normalises and turns heads into a cache, in its format; other arguments are those of `write_rows`."""
    WITH_REST: tl.constexpr = D > 2 * HALF
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    SCALED: tl.constexpr = dtype == tl.int8 or scale_ptr is not None
    given_scale = fp8_scale(scale_ptr, head, stride_scale, there)
    a, b, rest = _norm_and_turn(
        ptr, there[:, None], weight_ptr, eps, weight_offset, table_row_ptr, inside, D, HALF, INTERLEAVED, WITH_REST
    )
    if dtype == tl.int8:
        largest = tl.maximum(largest_bits(a), largest_bits(b))
        if WITH_REST:
            largest = tl.maximum(largest, largest_bits(rest))
        row_scale = int8_scale(largest)
        tl.store(scale_cache_ptr + scale_offsets, row_scale, mask=wanted)
        scale = row_scale[:, None]
    else:
        scale = given_scale
    a = quantize(a, scale, SCALED, dtype, NATIVE_FP8)
    b = quantize(b, scale, SCALED, dtype, NATIVE_FP8)
    rest = quantize(rest, scale, SCALED, dtype, NATIVE_FP8)
    _store_heads(cache_ptr + to_offsets[:, None], wanted[:, None], a, b, rest, D, HALF, INTERLEAVED, WITH_REST)
