"""The warpgroups of the prefill kernel (`prefill.py`) that compute, each ROWS rows of a tile of queries.

A step issues the scores of one tile of keys and, behind them, the sum over the values of the tile before; the softmax
of the former runs while the tensor cores are at the latter (FlashAttention-3, Shah et al. 2024,
https://arxiv.org/abs/2407.08608). The first step of a tile of queries sums up the last values of the tile before. The
two warpgroups take turns by themselves: barriers that make them (its ping-pong) made no difference.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

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
def _along(x, layout: gl.constexpr):
    """A number for each row, as a column beside a block of that layout."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def _softmax(
    scores, top, total, tile, position, start, end, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, FROM: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_N: gl.constexpr,
):
    """Weights of a tile, in base 2, and by what the sums so far are to be multiplied.

    EDGE: not every row sees every key. FROM: the first keys may be out of sight.
    """
    layout: gl.constexpr = scores.type.layout
    if SOFTCAP:
        x = scores * score_scale
        t = gl.exp2(-gl.maximum(x, -x))
        scores = cap * gl.where(x < 0, t - 1.0, 1.0 - t) / (1.0 + t)
        score_scale = 1.0
    if EDGE:
        key = gl.expand_dims(tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout)), 0)
        at = gl.expand_dims(position, 1)
        seen = key < end
        if FROM:
            seen = seen & (key >= start)
        if CAUSAL:
            seen = seen & (key <= at)
        if WINDOW:
            seen = seen & (key > at - window)
        scores = gl.where(seen, scores, -float("inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    shift = new_top
    if EDGE:
        shift = gl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
    rescale = gl.exp2(top - shift)
    weights = gl.exp2(scores * score_scale - gl.expand_dims(shift, 1))
    return weights, new_top, total * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _step(
    acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile, position,
    start, end, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, FROM:
    gl.constexpr, SOFTCAP: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """Adds the values of the step before, and returns the weights of `tile`, to go with `top` and `total`."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = step % STAGES
    before = (step + STAGES - 1) % STAGES
    before_phase = (step - 1) // STAGES & 1
    mbarrier.wait(keys_full.index(stage), step // STAGES & 1)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(values_full.index(before), before_phase)
    acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # Not with the values below: the next queries may come while this step goes on, if it is the last of a tile.
    mbarrier.arrive(keys_read.index(stage), count=1)
    new, top, total, rescale = _softmax(
        scores, top, total, tile, position, start, end, window, score_scale, cap, EDGE, CAUSAL, WINDOW, FROM, SOFTCAP,
        BLOCK_N,
    )
    new = gl.convert_layout(new.to(values.dtype), weights.type.layout)
    # They have come already. ptxas would move the softmax down past the wait below; past this wait's loop it does not.
    mbarrier.wait(values_full.index(before), before_phase)
    acc, weights, new, total = warpgroup_mma_wait(0, deps=[acc, weights, new, total])
    mbarrier.arrive(values_read.index(stage), count=1)
    return acc, new, top, total, rescale


@gluon.jit
def _sweep(
    until, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile,
    position, start, end, window, score_scale, cap, EDGE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    FROM: gl.constexpr, SOFTCAP: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """Steps from `tile` down to `until`, none if it lies above; returns the next step and tile too."""
    layout: gl.constexpr = acc.type.layout
    for _ in range(gl.maximum(tile + 1 - until, 0)):
        acc, weights, top, total, rescale = _step(
            acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step, tile,
            position, start, end, window, score_scale, cap, EDGE, CAUSAL, WINDOW, FROM, SOFTCAP, ROWS, BLOCK_N, STAGES,
        )
        acc = acc * _along(rescale, layout)
        step += 1
        tile -= 1
    return acc, weights, top, total, step, tile


@gluon.jit
def _store(
    acc, top, total, out_ptr, lse_ptr, sinks_ptr, tile_start, query_end, first_head, row, group: gl.constexpr, HEADS:
    gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, RETURN_LSE:
    gl.constexpr,
):
    """Writes what a warpgroup has computed, 64 bytes of a row by four lanes."""
    layout: gl.constexpr = acc.type.layout
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + first_head + row % PACK).to(gl.float32) * LOG2_E
        new_top = gl.maximum(top, sink)
        shift = gl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = gl.exp2(top - shift)
        acc = acc * _along(rescale, layout)
        total = total * rescale + gl.exp2(sink - shift)
        top = new_top
    total = gl.where(total == 0.0, 1.0, total)  # nothing attended to: zeros, and a log-sum-exp of -inf
    if RETURN_LSE:
        at = (tile_start + row // PACK).to(gl.int64) * HEADS + first_head + row % PACK
        gl.store(lse_ptr + at, (top + gl.log2(total)) * LN_2, mask=tile_start + row // PACK < query_end)
    out = (acc * _along(1.0 / total, layout)).to(out_ptr.dtype.element_ty)
    # As the product leaves it, a warp would write 16 bytes of each of eight rows: 7 % of the time of 8 × 2k.
    wide: gl.constexpr = wide_layout(ROWS, BLOCK_D)
    out = gl.convert_layout(out, wide)
    row = gl.expand_dims(group * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide)), 1)
    d = gl.expand_dims(gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, wide)), 0)
    mask = tile_start + row // PACK < query_end
    if D < BLOCK_D:
        mask = mask & (d < D)
    at = (tile_start + row // PACK).to(gl.int64) * HEADS + first_head + row % PACK
    gl.store(out_ptr + at * D + d, out, mask=mask)


@gluon.jit
def compute(
    group: gl.constexpr, out_ptr, lse_ptr, sinks_ptr, queries, keys, values, queries_full, keys_full, values_full,
    keys_read, values_read, entries, ring_full, ring_empty, window, score_scale, cap, HEADS: gl.constexpr, PACK:
    gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, ROLLING: gl.constexpr, SOFTCAP:
    gl.constexpr, RETURN_LSE: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES:
    gl.constexpr,
):
    """What warpgroup number `group` does."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    BLOCK_Q: gl.constexpr = 2 * ROWS // PACK
    FROM: gl.constexpr = WINDOW or ROLLING
    query = queries.index(group)
    row = group * ROWS + gl.arange(0, ROWS, layout=rows)
    none = gl.full([ROWS], -float("inf"), gl.float32, rows)
    zero = gl.full([ROWS], 0.0, gl.float32, rows)
    nothing = gl.zeros([ROWS, BLOCK_D], gl.float32, out_layout)

    # The first tile's first scores have no values to be summed beside them.
    wait_for_entry(ring_full, 0)
    first_position = field(entries, 0, POSITION, 4)
    low = field(entries, 0, LOW, 4) if FROM else 0
    high = field(entries, 0, HIGH, 4)
    start = field(entries, 0, START, 4) if FROM else 0
    end = field(entries, 0, END, 4)
    valid = field(entries, 0, VALID, 4)
    position = first_position + row // PACK
    mbarrier.wait(queries_full.index(group), 0)
    mbarrier.wait(keys_full.index(0), 0)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout)
    scores = warpgroup_mma(query, keys.index(0).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys_read.index(0), count=1)
    mbarrier.arrive(values_read.index(0), count=1)
    weights, top, total, _ = _softmax(
        scores, none, zero, high - 1, position, start, end, window, score_scale, cap, True, CAUSAL, WINDOW, FROM,
        SOFTCAP, BLOCK_N,
    )
    weights = gl.convert_layout(weights.to(values.dtype), weights_layout)
    acc = nothing
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
        acc, weights, top, total, step, tile = _sweep(
            right, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step,
            tile, position, start, end, window, score_scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP, ROWS, BLOCK_N,
            STAGES,
        )
        acc, weights, top, total, step, tile = _sweep(
            left, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read, step,
            tile, position, start, end, window, score_scale, cap, False, CAUSAL, WINDOW, FROM, SOFTCAP, ROWS, BLOCK_N,
            STAGES,
        )
        if FROM:
            # Read again, so that the loop above has the registers.
            low = field(entries, done, LOW, 4)
            start = field(entries, done, START, 4)
            end = field(entries, done, END, 4)
            position = field(entries, done, POSITION, 4) + row // PACK
            acc, weights, top, total, step, tile = _sweep(
                low, acc, weights, top, total, query, keys, values, keys_full, values_full, keys_read, values_read,
                step, tile, position, start, end, window, score_scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP, ROWS,
                BLOCK_N, STAGES,
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
        position = first_position + row // PACK
        mbarrier.wait(queries_full.index(group), done & 1)
        acc, weights, next_top, next_total, _ = _step(
            acc, weights, none, zero, query, keys, values, keys_full, values_full, keys_read, values_read, step,
            high - 1, position, start, end, window, score_scale, cap, True, CAUSAL, WINDOW, FROM, SOFTCAP, ROWS,
            BLOCK_N, STAGES,
        )
        step += 1
        tile_start = field(entries, done - 1, TILE_START, 4)
        query_end = field(entries, done - 1, QUERY_END, 4)
        first_head = field(entries, done - 1, HEAD, 4)
        release_entry(ring_empty, done - 1)
        _store(
            acc, top, total, out_ptr, lse_ptr, sinks_ptr, tile_start, query_end, first_head, row, group, HEADS, PACK,
            D, ROWS, BLOCK_D, RETURN_LSE,
        )
        acc = nothing
        top = next_top
        total = next_total
