"""The warpgroups of the prefill kernel (`prefill.py`) that compute, each ROWS rows of a tile of queries.

A step issues the scores of one tile of keys and, behind them, the sum over the values of the tile before; the softmax
of the former runs while the tensor cores are at the latter (FlashAttention-3, Shah et al. 2024,
https://arxiv.org/abs/2407.08608). The first step of a tile of queries sums up the last values of the tile before. The
warpgroups take turns by themselves: barriers that make them (its ping-pong) made no difference.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from octavo.kernels.attention.prefill_softmax import (
    packed,
    rows_times,
    rows_times_if_any,
    softmax,
    sums_of_lanes,
    unpacked,
)
from octavo.kernels.attention.prefill_tiles import (
    END,
    HEAD,
    HIGH,
    LOW,
    POSITION,
    QUERY_END,
    START,
    TILE_START,
    VALID,
    field,
    release_entry,
    wait_for_entry,
)
from octavo.kernels.gluon_layouts import wide_layout

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _tile_scale(score_scale, k_scale_ptr, stride_k_scale, entries, done, GROUP: gl.constexpr):
    """What a tile's products are to be multiplied by, a positive number.

    Of a scale below zero, the keys have the sign; where one is no number, `_store` writes NaN.
    """
    if k_scale_ptr is not None:
        size = gl.abs(gl.load(k_scale_ptr + field(entries, done, HEAD, 4) // GROUP * stride_k_scale))
        score_scale = gl.where(size < float("inf"), gl.maximum(score_scale * size, 1e-37), 1.0)
    return score_scale


@gluon.jit
def _products(query, keys, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begins the scores of a tile of keys; of the padding of heads of 65 to 96, only what is below 96 is multiplied."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    if D > 64 and D <= 96:
        first = keys.slice(0, 64, dim=1).permute((1, 0))
        scores = warpgroup_mma(query.slice(0, 64, dim=1), first, scores, use_acc=False, is_async=True)
        rest = keys.slice(64, 32, dim=1).permute((1, 0))
        return warpgroup_mma(query.slice(64, 32, dim=1), rest, scores, is_async=True)
    else:
        return warpgroup_mma(query, keys.permute((1, 0)), scores, use_acc=False, is_async=True)


@gluon.jit
def _nothing(D: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Sums of no values: of heads of 65 to 96 in two blocks, since widths are powers of two."""
    if D > 64 and D <= 96:
        first: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        return gl.zeros([ROWS, 64], gl.float32, first), gl.zeros([ROWS, 32], gl.float32, rest)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        return (gl.zeros([ROWS, BLOCK_D], gl.float32, layout),)


@gluon.jit
def _add_to(acc, weights, values, START: gl.constexpr):
    layout: gl.constexpr = acc.type.layout
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, layout, 2))
    return warpgroup_mma(weights, values.slice(START, acc.shape[1], dim=1), acc, is_async=True)


@gluon.jit
def _add(acc, weights, values):
    """Begins to add a tile of values."""
    sums = ()
    for i in gl.static_range(len(acc)):
        sums = sums + (_add_to(acc[i], weights, values, 64 * i),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@gluon.jit
def _times(acc, factor, LAZY: gl.constexpr):
    """Sums with each row multiplied by a number, which, LAZY, is seldom another than 1."""
    TIMES: gl.constexpr = rows_times_if_any if LAZY else rows_times
    sums = ()
    for i in gl.static_range(len(acc)):
        sums = sums + (TIMES(acc[i], factor),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@gluon.jit
def _step(
    acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile, entries,
    done, row, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, FROM:
    gl.constexpr, SOFTCAP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_N:
    gl.constexpr, STAGES: gl.constexpr, LAZY: gl.constexpr,
):
    """Adds the values of the step before, and returns the weights of `tile`, to go with `top` and `total`."""
    stage = step % STAGES
    before = (step + STAGES - 1) % STAGES
    before_phase = (step - 1) // STAGES & 1
    mbarrier.wait(keys_full.index(stage), step // STAGES & 1)
    scores = _products(query, keys.index(stage), D, ROWS, BLOCK_N)
    mbarrier.wait(values_full.index(before), before_phase)
    CARRIED: gl.constexpr = weights.dtype
    PACKED: gl.constexpr = weights.dtype == gl.int32
    if PACKED:
        weights = unpacked(weights, values.dtype)
    else:
        weights = weights.to(values.dtype)
    acc = _add(acc, weights, values.index(before))
    COUNT: gl.constexpr = len(acc)
    scores = warpgroup_mma_wait(COUNT, deps=[scores])
    # Not with the values below: the next queries may come while this step goes on, if it is the last of a tile.
    mbarrier.arrive(keys_read.index(stage), count=1)
    new, top, total, rescale = softmax(
        scores, top, total, tile, entries, done, row, window, score_scale, cap, EDGE, CAUSAL, WINDOW, FROM, SOFTCAP,
        PACK, BLOCK_N, LAZY,
    )
    if not PACKED:
        new = new.to(CARRIED)
        # They have come already. ptxas would move the softmax down past the wait below; past this wait's loop it does
        # not. Where three warpgroups compute, others are at the tensor cores then.
        mbarrier.wait(values_full.index(before), before_phase)
    ready = warpgroup_mma_wait(0, deps=acc + (weights, new, total))  # noqa: RUF005  (no star in a kernel)
    acc = ready[:COUNT]
    new = ready[COUNT + 1]
    total = ready[COUNT + 2]
    if PACKED:
        new = packed(new, values.dtype)
    mbarrier.arrive(values_read.index(stage), count=1)
    return acc, new, top, total, rescale


@gluon.jit
def _sweep(
    until, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile,
    entries, done, row, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    FROM: gl.constexpr, SOFTCAP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_N:
    gl.constexpr, STAGES: gl.constexpr, LAZY: gl.constexpr,
):
    """Steps from `tile` down to `until`, none if it lies above; returns the next step and tile too."""
    for _ in range(gl.maximum(tile + 1 - until, 0)):
        acc, weights, top, total, rescale = _step(
            acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile,
            entries, done, row, window, score_scale, cap, EDGE, CAUSAL, WINDOW, FROM, SOFTCAP, PACK, D, ROWS,
            BLOCK_N, STAGES, LAZY,
        )
        acc = _times(acc, rescale, LAZY)
        step += 1
        tile -= 1
    return acc, weights, top, total, step, tile


@gluon.jit
def _store_part(
    out, out_ptr, tile_start, query_end, first_head, group: gl.constexpr, START: gl.constexpr, HEADS: gl.constexpr,
    PACK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
):
    """Writes the numbers of the heads from START on, 64 bytes of a row by four lanes."""
    WIDTH: gl.constexpr = out.shape[1]
    # As the product leaves it, a warp would write 16 bytes of each of eight rows: 7 % of the time of 8 × 2k.
    wide: gl.constexpr = wide_layout(ROWS, WIDTH)
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), wide)
    row = gl.expand_dims(group * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide)), 1)
    d = gl.expand_dims(START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, wide)), 0)
    mask = tile_start + row // PACK < query_end
    if D < START + WIDTH:
        mask = mask & (d < D)
    at = (tile_start + row // PACK).to(gl.int64) * HEADS + first_head + row % PACK
    gl.store(out_ptr + at * D + d, out, mask=mask)


@gluon.jit
def _store(
    acc, top, total, out_ptr, lse_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale, tile_start,
    query_end, first_head, row, group: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, RETURN_LSE: gl.constexpr,
):
    """Writes what a warpgroup has computed."""
    HEADS: gl.constexpr = KV_HEADS * GROUP
    # Where a scale is no number, infinity included, results are NaN, but for rows that have seen no key.
    v_scale = 1.0
    if v_scale_ptr is not None:
        scale = gl.load(v_scale_ptr + first_head // GROUP * stride_v_scale)
        v_scale = gl.where(total == 0.0, 0.0, scale + (scale - scale))
    if k_scale_ptr is not None:
        scale = gl.load(k_scale_ptr + first_head // GROUP * stride_k_scale)
        total = gl.where(total == 0.0, 0.0, total + (scale - scale))
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + first_head + row % PACK).to(gl.float32) * LOG2_E
        new_top = gl.maximum(top, sink)
        shift = gl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = gl.exp2(top - shift)
        acc = _times(acc, rescale, False)
        total = total * rescale + gl.exp2(sink - shift)
        top = new_top
    total = gl.where(total == 0.0, 1.0, total)  # nothing attended to: zeros, and a log-sum-exp of -inf
    if RETURN_LSE:
        at = (tile_start + row // PACK).to(gl.int64) * HEADS + first_head + row % PACK
        gl.store(lse_ptr + at, (top + gl.log2(total)) * LN_2, mask=tile_start + row // PACK < query_end)
    acc = _times(acc, v_scale / total, False)
    for i in gl.static_range(len(acc)):
        _store_part(acc[i], out_ptr, tile_start, query_end, first_head, group, 64 * i, HEADS, PACK, D, ROWS)


@gluon.jit
def compute(
    group: gl.constexpr, out_ptr, lse_ptr, sinks_ptr, queries, keys, values, queries_full, keys_full, values_full,
    keys_read, values_read, entries, ring_full, ring_empty, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale,
    window, score_scale, cap, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, CAUSAL:
    gl.constexpr, WINDOW: gl.constexpr, ROLLING: gl.constexpr, SOFTCAP: gl.constexpr, RETURN_LSE: gl.constexpr, ROWS:
    gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, FLOAT8: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """What warpgroup number `group` does."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    BLOCK_Q: gl.constexpr = GROUPS * ROWS // PACK
    FROM: gl.constexpr = WINDOW or ROLLING
    LAZY: gl.constexpr = GROUPS == 2
    query = queries.index(group)
    row = group * ROWS + gl.arange(0, ROWS, layout=rows)
    none = gl.full([ROWS], -float("inf"), gl.float32, rows)
    zero = sums_of_lanes(gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout))

    # The first tile's first scores have no values to be summed beside them.
    wait_for_entry(ring_full, 0)
    first_position = field(entries, 0, POSITION, 4)
    low = field(entries, 0, LOW, 4) if FROM else 0
    high = field(entries, 0, HIGH, 4)
    start = field(entries, 0, START, 4) if FROM else 0
    end = field(entries, 0, END, 4)
    valid = field(entries, 0, VALID, 4)
    scale = _tile_scale(score_scale, k_scale_ptr, stride_k_scale, entries, 0, GROUP)
    mbarrier.wait(queries_full.index(group), 0)
    mbarrier.wait(keys_full.index(0), 0)
    scores = _products(query, keys.index(0), D, ROWS, BLOCK_N)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys_read.index(0), count=1)
    mbarrier.arrive(values_read.index(0), count=1)
    weights, top, total, _ = softmax(
        scores, none, zero, high - 1, entries, 0, row, window, scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP,
        PACK, BLOCK_N, LAZY,
    )
    # From step to step in fp32: rounded, pairs of 16 bits would be turned over twice in each of them, and moved. But
    # beside a partition that converts, or a third one that computes, there are not the registers for it.
    if GROUPS == 3:
        weights = packed(weights, values.dtype)
    elif FLOAT8:
        weights = weights.to(values.dtype)
    acc = _nothing(D, ROWS, BLOCK_D)
    done = 0
    step = 1
    while valid == 1:
        # Tiles from `right` on, and those below `left`, have keys that not every row sees.
        right = end // BLOCK_N
        if CAUSAL:
            right = gl.minimum(right, (first_position + 1) // BLOCK_N)
        right = gl.maximum(right, low)
        left = low
        if FROM:
            left = (start + BLOCK_N - 1) // BLOCK_N
            if WINDOW:
                left = gl.maximum(left, (first_position + BLOCK_Q - window + BLOCK_N - 1) // BLOCK_N)
            left = gl.minimum(gl.maximum(left, low), right)
        tile = high - 2
        for part in range(2 if FROM else 1):  # code once, and fewer registers: from the right end, then at the left
            # Not carried from part to part: of a number that is but a bound of inner loops, the compiler (Triton 3.6
            # and 3.7) takes the first value for all.
            until = right
            if FROM:
                until = gl.where(part == 0, right, field(entries, done, LOW, 4))
            acc, weights, top, total, step, tile = _sweep(
                until, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read,
                step, tile, entries, done, row, window, scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP, PACK, D, ROWS,
                BLOCK_N, STAGES, LAZY,
            )
            acc, weights, top, total, step, tile = _sweep(
                left, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read,
                step, tile, entries, done, row, window, scale, cap, False, CAUSAL, WINDOW, FROM, SOFTCAP, PACK, D, ROWS,
                BLOCK_N, STAGES, LAZY,
            )

        # The next tile's first scores, beside the last of this one's values.
        done += 1
        wait_for_entry(ring_full, done)
        first_position = field(entries, done, POSITION, 4)
        if FROM:
            low = field(entries, done, LOW, 4)
            start = field(entries, done, START, 4)
        high = field(entries, done, HIGH, 4)
        end = field(entries, done, END, 4)
        valid = field(entries, done, VALID, 4)
        scale = _tile_scale(score_scale, k_scale_ptr, stride_k_scale, entries, done, GROUP)
        mbarrier.wait(queries_full.index(group), done & 1)
        acc, weights, next_top, next_total, _ = _step(
            acc, weights, none, zero, query, keys, values, keys_full, values_full, keys_read, values_read, step,
            high - 1, entries, done, row, window, scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP, PACK, D, ROWS,
            BLOCK_N, STAGES, LAZY,
        )
        step += 1
        tile_start = field(entries, done - 1, TILE_START, 4)
        query_end = field(entries, done - 1, QUERY_END, 4)
        first_head = field(entries, done - 1, HEAD, 4)
        release_entry(ring_empty, done - 1)
        total = gl.convert_layout(gl.sum(total, 1), rows)
        _store(
            acc, top, total, out_ptr, lse_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale,
            tile_start, query_end, first_head, row, group, KV_HEADS, GROUP, PACK, D, ROWS, BLOCK_D, RETURN_LSE,
        )
        acc = _nothing(D, ROWS, BLOCK_D)
        top = next_top
        total = next_total
