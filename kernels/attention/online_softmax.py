"""Parts of attention kernels over a paged cache: which sequence a query tile belongs to, and the softmax over its keys.

The softmax is the online one of FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), in base 2.
"""

import triton
import triton.language as tl

from octavo.kernels.attention.kv_cache import widened

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def with_sink(acc, top, total, sink):
    """Adds a key of the score `sink` [M], which is none of base 2, and a value of zeros to what `attend` returned.

    Once a row, where the result is normalised: partial results that are to be merged have no sink in them.
    """
    sink *= LOG2_E
    new_top = tl.maximum(top, sink)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    rescale = tl.exp2(top - shift)
    return acc * rescale[:, None], new_top, total * rescale + tl.exp2(sink - shift)


@triton.jit
def of_heads(ptr, head, mask):
    """The numbers of the heads `head` [M] as fp32."""
    return tl.load(ptr + head, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_result(
    out_ptr,
    lse_ptr,
    sinks_ptr,
    acc,
    top,
    total,
    token,
    head,
    wanted,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Writes the rows [M] that are `wanted`, of one query head of one token (int64) each: all keys were attended to."""
    d = tl.arange(0, BLOCK_D)[None, :]
    if sinks_ptr is not None:
        acc, top, total = with_sink(acc, top, total, of_heads(sinks_ptr, head, wanted))
    total = tl.where(total == 0.0, 1.0, total)  # nothing attended to: zeros, and a log-sum-exp of -inf
    out = acc / total[:, None]
    row = token * HEADS + head
    tl.store(out_ptr + row[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & (d < D))
    if RETURN_LSE:
        # Fused, the large term is rounded once, and always alike: a compiler may fuse a product and a sum or not.
        lse = tl.fma(top, tl.full(top.shape, LN_2, tl.float32), tl.log2(total) * LN_2)
        tl.store(lse_ptr + row, lse, mask=wanted)


@triton.jit
def tanh(x2, FINE: tl.constexpr):
    """tanh(x) of `x2` = 2·log2(e)·x; the exponent is never positive, so nothing overflows.

    FINE, for fp32: small x by a series, since a GPU's exp2 is two units off, of which 1 - t leaves many times as many.
    """
    t = tl.exp2(-tl.abs(x2))
    y = tl.where(x2 < 0, t - 1.0, 1.0 - t) / (1.0 + t)
    if FINE:
        x = x2 * (0.5 * LN_2)
        s = x * x
        s = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * (-1382 / 155925)))))
        y = tl.where(tl.abs(x2) < 1.0, s, y)
    return y


@triton.jit
def find_sequence(cu_seqlens_q_ptr, tile, B, BLOCK_Q: tl.constexpr):
    """The sequence that `tile` belongs to, and the number of its first tile.

    Sequence b may use the tiles from cu_seqlens_q[b] // BLOCK_Q + b, which leaves it at least as many as it needs and
    depends on no other sequence's length but through cu_seqlens_q. Counting the sequences that start at or before the
    tile takes one round trip to memory for 128 of them, where a bisection takes seven. Number B is the padding.
    """
    count = 0
    for start in range(0, B + 1, 128):
        b = start + tl.arange(0, 128)
        first = tl.load(cu_seqlens_q_ptr + b, mask=b <= B, other=0) // BLOCK_Q + b
        count += tl.sum(((first <= tile) & (b <= B)).to(tl.int32), 0)
    sequence = tl.maximum(count - 1, 0)
    return sequence, tl.load(cu_seqlens_q_ptr + sequence) // BLOCK_Q + sequence


@triton.jit
def load_page_ids(
    table_ptr, key, end, num_pages, table_width, PAGE_SIZE: tl.constexpr, ROLLING: tl.constexpr, first=None
):
    """The page of each key position; -1 for ids out of range, and where the table may hold anything: before `first`,
    if it is given, and from `end` on.
    """
    entry = key // PAGE_SIZE
    if ROLLING:
        entry %= table_width
    there = key < end
    if first is not None:
        there = there & (key >= first)
    page = tl.load(table_ptr + entry, mask=there, other=-1)  # [N]
    return tl.where((page >= 0) & (page < num_pages), page, -1)


@triton.jit
def float8_scale(scale_ptr):
    """Scales of heads of a float8 cache; NaN if infinite, so that no row takes it for a masked score."""
    scale = tl.load(scale_ptr)
    return scale + (scale - scale)


@triton.jit
def _largest(scales):
    """The largest of the scales that are numbers; 1 where none is more than 0."""
    size = tl.abs(scales)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 0)
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def _largest_of_rows(scales, seen, otherwise):
    """The largest of the scales [N] that are numbers, of those that each row sees; `otherwise` [M] if it is near 0."""
    size = tl.abs(scales)
    size = tl.where(size < float("inf"), size, 0.0)
    largest = tl.max(tl.where(seen, size[None, :], 0.0), 1)
    return tl.where(largest > 1e-37, largest, otherwise)


@triton.jit
def _scores(q, k, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """The products of q [M, D] and k [N, D], as [M, N]."""
    if q.dtype == tl.float32 and D >= 32:
        # Two chains of additions, not one over all of D: half-way along it the sum is as large as at its end, and each
        # rounding is an error of the weight.
        q0, q1 = tl.split(tl.permute(tl.reshape(q, [M, 2, D // 2]), (0, 2, 1)))
        k0, k1 = tl.split(tl.permute(tl.reshape(k, [N, 2, D // 2]), (0, 2, 1)))
        first = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        # Added by an fma, since Triton would fold a plus into one chain.
        return tl.fma(first, tl.full([M, N], 1.0, tl.float32), tl.dot(q1, tl.trans(k1), input_precision="ieee"))
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def attend(
    q,
    position,
    slope,
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
    stride_value_page,
    stride_value_slot,
    stride_key_scale_page,
    stride_key_scale_slot,
    stride_value_scale_page,
    stride_value_scale_slot,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROLLING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    first=None,
):
    """Attends q [M, D] to the keys start to end: the unnormalised sum of values [M, D], the maximum and the sum [M].

    `position` [M] is that of each row, `slope` [M] its ALiBi slope or None. Pointers to caches and scales are those of
    the rows' KV head. The maximum is that of log2(e) · the scores. All scales are in the results, and no sink, so that
    the results over other keys can be merged with them.

    With `first`, keys before it are left out, and a row's bits depend on the keys that it sees and on start % BLOCK_N
    alone, not on those that other rows of the tile see: a tile of which it sees nothing changes no bit of it.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    INT8: tl.constexpr = key_scale_ptr is not None
    if k_scale_ptr is not None:
        score_scale *= float8_scale(k_scale_ptr)
    # Small fp16 numbers are coarse. There acc is in units of a tile's largest scale of values, so that the products of
    # weights and scales are as large as the weights.
    UNITS: tl.constexpr = INT8 and q.dtype == tl.float16
    ROW_UNITS: tl.constexpr = UNITS and first is not None
    if ROW_UNITS:
        acc_unit = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        acc_unit = 1.0
    # The next tile's page ids are loaded while this tile is used: a K load that waited for its page id inside the loop
    # would halve the depth of the software pipeline.
    page = load_page_ids(table_ptr, start + n, end, num_pages, table_width, PAGE_SIZE, ROLLING, first)
    for tile_start in range(start, end, BLOCK_N):
        key = tile_start + n
        slot = (key % PAGE_SIZE).to(tl.int64)
        present = page >= 0
        page64 = tl.maximum(page, 0).to(tl.int64)  # page 0 stands in for what is not there; its scores are masked
        k_at = page64 * stride_key_page + slot * stride_key_slot
        k = tl.load(key_ptr + k_at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)  # [N, D]
        v_at = page64 * stride_value_page + slot * stride_value_slot
        # A slot that no sequence has written may hold NaN, and a weight of zero would not silence it.
        v_mask = present[:, None] & (d < D)[None, :]
        v = tl.load(value_ptr + v_at[:, None] + d[None, :], mask=v_mask, other=0.0)  # [N, D]
        if INT8:
            k_scales_at = page64 * stride_key_scale_page + slot * stride_key_scale_slot
            k_scales = tl.load(key_scale_ptr + k_scales_at, mask=present, other=0.0)  # [N]
            v_scales_at = page64 * stride_value_scale_page + slot * stride_value_scale_slot
            v_scales = tl.load(value_scale_ptr + v_scales_at, mask=present, other=0.0)  # [N]
        page = load_page_ids(table_ptr, key + BLOCK_N, end, num_pages, table_width, PAGE_SIZE, ROLLING, first)

        k, v = widened(k, q.dtype), widened(v, q.dtype)
        scores = _scores(q, k, BLOCK_M, BLOCK_N, BLOCK_D)  # [M, N]
        if INT8:
            scores *= (k_scales * score_scale)[None, :]
        else:
            scores *= score_scale
        if SOFTCAP:
            scores = cap * tanh(scores, q.dtype == tl.float32)
        if slope is not None:
            distance = tl.abs(position[:, None] - key[None, :]).to(tl.float32)
            scores -= (slope * LOG2_E)[:, None] * distance
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet: subtract 0, not -inf.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])  # [M, N]
        total = total * rescale + tl.sum(weights, 1)
        if INT8:
            if UNITS and not ROW_UNITS:
                unit = _largest(v_scales)
                rescale *= acc_unit / unit
                acc_unit = unit
                v_scales /= unit
            weights *= v_scales[None, :]
            if first is not None:
                weights = tl.where(seen, weights, 0.0)  # a bad scale reaches those who see it
            if ROW_UNITS:
                unit = _largest_of_rows(v_scales, seen, acc_unit)
                inverse = 1.0 / unit
                rescale *= tl.where(unit == acc_unit, 1.0, acc_unit * inverse)
                acc_unit = unit
                weights *= inverse[:, None]
        if v.dtype == tl.float32:
            # A sum for each tile, then an fma, which Triton does not fold into the product as it would a plus: one
            # chain of additions over thousands of keys would cost fp32 its last digit.
            acc = tl.fma(acc, rescale[:, None], tl.dot(weights, v, input_precision="ieee"))
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
        top = new_top
    if ROW_UNITS:
        acc *= acc_unit[:, None]
    elif UNITS:
        acc *= acc_unit
    if v_scale_ptr is not None:
        # A row that has seen no key is zero, whatever the scale is.
        acc *= tl.where(total == 0.0, 0.0, float8_scale(v_scale_ptr))[:, None]
    return acc, top, total
