"""The online softmax over a tile of several KV heads: what `attend` is, for decode tokens.

Side by side, the heads of a token are one piece of memory, which is read faster than a head here and there; and warps
that have a head each exchange nothing inside the loop.
"""

import triton
import triton.language as tl

from octavo.kernels.attention.kv_cache import widened
from octavo.kernels.attention.online_softmax import float8_scale, load_page_ids, tanh


@triton.jit
def _load_warp_pages(
    table_ptr,
    start,
    group,
    n,
    end,
    num_pages,
    table_width,
    PAGE_SIZE: tl.constexpr,
    ROLLING: tl.constexpr,
    KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The page of each warp's keys, [1, 1] or [W, 1], or of each key, [W, N], where a warp's may lie in several."""
    if PAGE_SIZE % (KEYS * GROUPS) == 0:
        key = start + tl.zeros([1, 1], tl.int32)
    elif PAGE_SIZE % KEYS == 0:
        key = start + group * KEYS
    else:
        key = start + group * KEYS + n
    return load_page_ids(table_ptr, key, end, num_pages, table_width, PAGE_SIZE, ROLLING)


@triton.jit
def _swapped(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """x [W, N, D] with each run of OUTER · INNER elements of D read as a matrix, and turned."""
    W: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    x = tl.reshape(x, [W, N, D // (OUTER * INNER), OUTER, INNER])
    return tl.reshape(tl.permute(x, (0, 1, 2, 4, 3)), [W, N, D])


@triton.jit
def _as_fp16(q):
    """q [W, M, D] in fp16, each row in units of a power of two with which its largest number is near 2^14; the units.

    Numbers of a quantised cache are exact in fp16, and a third (float8) or two thirds (int8) of the instructions away
    that bf16 is. What of a row is too small for fp16 is 2^-29 of its largest number: it would not reach a sum in fp32
    either.
    """
    q = q.to(tl.float32)
    exponent = tl.max(tl.abs(q), 2).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    return (q * factor[:, :, None]).to(tl.float16), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def attend_by_warps(
    q,
    position,
    first,
    start,
    end,
    key_ptr,
    value_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    num_pages,
    table_width,
    window,
    score_scale,
    cap,
    stride_key_page,
    stride_key_slot,
    stride_key_head,
    stride_value_page,
    stride_value_slot,
    stride_value_head,
    stride_k_scale,
    stride_v_scale,
    stride_key_scale_page,
    stride_key_scale_slot,
    stride_key_scale_head,
    stride_value_scale_page,
    stride_value_scale_slot,
    stride_value_scale_head,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROLLING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `attend`, for q [W, M, D] of HEADS · GROUPS warps; no key before `first` is attended to. Returns [W, M, …].

    A warp has a KV head of its own, or, where there are fewer heads than warps, one of the GROUPS of keys of a head,
    with a maximum and a sum of its own: inside the loop, warps exchange nothing. Where a page has a multiple of KEYS
    slots, `start` must be one.
    """
    WARPS: tl.constexpr = HEADS * GROUPS
    n = tl.arange(0, KEYS)[None, :]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    warp = tl.arange(0, WARPS)[:, None]
    group = warp % GROUPS
    head = (warp // GROUPS).to(tl.int64)
    top = tl.full([WARPS, BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([WARPS, BLOCK_M], tl.float32)
    acc = tl.zeros([WARPS, BLOCK_M, BLOCK_D], tl.float32)
    INT8: tl.constexpr = key_scale_ptr is not None
    BYTES: tl.constexpr = INT8 and BLOCK_D >= 32
    TURNED: tl.constexpr = value_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16
    # Weights of int8 values are in units of the values' scales, for which fp16 has too few exponents.
    VALUES: tl.constexpr = tl.float16 if TURNED and not INT8 else q.dtype
    if TURNED:
        q, unit = _as_fp16(q)
        score_scale *= unit[:, :, None]  # [W, M, 1]
    if k_scale_ptr is not None:
        score_scale *= float8_scale(k_scale_ptr + head * stride_k_scale)[:, :, None]  # [W, 1, 1]
    page = _load_warp_pages(table_ptr, start, group, n, end, num_pages, table_width, PAGE_SIZE, ROLLING, KEYS, GROUPS)
    for tile_start in range(start, end, GROUPS * KEYS):
        key = tile_start + group * KEYS + n  # [W, N]
        page64 = tl.maximum(page, 0).to(tl.int64)  # page 0 stands in for what is not there; its scores are masked
        if PAGE_SIZE % KEYS == 0:
            # What the keys and elements of a tile add to this stays the same in the loop.
            first_slot = ((tile_start + group * KEYS) % PAGE_SIZE).to(tl.int64)
            slot = n.to(tl.int64)
        else:
            first_slot = 0
            slot = (key % PAGE_SIZE).to(tl.int64)
        k_at = page64 * stride_key_page + first_slot * stride_key_slot
        v_at = page64 * stride_value_page + first_slot * stride_value_slot
        k_at = k_at + (head * stride_key_head + slot * stride_key_slot)
        v_at = v_at + (head * stride_value_head + slot * stride_value_slot)
        present = (page >= 0) & (key >= first) & (key < end)
        k = tl.load(key_ptr + k_at[:, :, None] + d, mask=d < D, other=0.0)  # [W, N, D]
        # A slot that no sequence has written may hold NaN, and a weight of zero would not silence it.
        v = tl.load(value_ptr + v_at[:, :, None] + d, mask=present[:, :, None] & (d < D), other=0.0)
        if INT8:
            k_at = page64 * stride_key_scale_page + first_slot * stride_key_scale_slot
            v_at = page64 * stride_value_scale_page + first_slot * stride_value_scale_slot
            k_at = k_at + (head * stride_key_scale_head + slot * stride_key_scale_slot)
            v_at = v_at + (head * stride_value_scale_head + slot * stride_value_scale_slot)
            k_scales = tl.load(key_scale_ptr + k_at, mask=present, other=0.0)
            v_scales = tl.load(value_scale_ptr + v_at, mask=present, other=0.0)
        page = _load_warp_pages(
            table_ptr,
            tile_start + GROUPS * KEYS,
            group,
            n,
            end,
            num_pages,
            table_width,
            PAGE_SIZE,
            ROLLING,
            KEYS,
            GROUPS,
        )

        scores = (
            tl.dot(q, tl.permute(widened(k, q.dtype), (0, 2, 1)), input_precision="ieee") * score_scale
        )  # [W, M, N]
        if INT8:
            scores *= k_scales[:, None, :]
        if SOFTCAP:
            scores = cap * tanh(scores, q.dtype == tl.float32)
        seen = present[:, None, :]
        if CAUSAL:
            seen = seen & (key[:, None, :] <= position[None, :, None])
        if WINDOW:
            seen = seen & (key[:, None, :] > position[None, :, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 2))
        # A row that has seen no key yet: subtract 0, not -inf.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, :, None])
        total = total * rescale + tl.sum(weights, 2)
        if INT8:
            weights *= v_scales[:, None, :]
        v = widened(v, VALUES)
        if BYTES:
            # The tensor core takes values of one element and successive keys, which lie apart. With the elements in
            # this order a thread has four that are side by side, and reads them at once, not byte by byte. (For float8,
            # the permutations that follow take longer than reading bytes; for int8, they are there anyway.)
            v = _swapped(v, 8, 4)
        if v.dtype == tl.float32:
            acc = tl.fma(acc, rescale[:, :, None], tl.dot(weights, v, input_precision="ieee"))
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, :, None])
        top = new_top
    if BYTES:
        acc = _swapped(acc, 4, 8)
    if v_scale_ptr is not None:
        # A row that has seen no key is zero, whatever the scale is.
        scales = float8_scale(v_scale_ptr + head * stride_v_scale)  # [W, 1]
        acc *= tl.where(total == 0.0, 0.0, scales)[:, :, None]
    if GROUPS == 1:
        return acc, top, total
    else:
        # The groups of a head are made one.
        top = tl.reshape(top, [HEADS, GROUPS, BLOCK_M])
        best = tl.max(top, 1)  # [HEADS, M]
        factor = tl.exp2(top - tl.where(best == -float("inf"), 0.0, best)[:, None, :])
        total = tl.sum(tl.reshape(total, [HEADS, GROUPS, BLOCK_M]) * factor, 1)
        acc = tl.reshape(acc, [HEADS, GROUPS, BLOCK_M, BLOCK_D]) * factor[:, :, :, None]
        return tl.sum(acc, 1), best, total
