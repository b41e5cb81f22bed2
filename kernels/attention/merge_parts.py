"""An item that was cut is put together from what its workers left, in their order.

A second kernel does it, or, where decoding has a plan, the last of the workers.
"""

import triton
import triton.language as tl

from octavo.kernels.attention.online_softmax import store_result
from octavo.kernels.attention.schedule import RECORD, extent, find, lengths, load_record, rows_of
from octavo.kernels.tiles import let_next_start, wait_for_previous


@triton.jit
def merge_rows(
    out_ptr,
    lse_ptr,
    sinks_ptr,
    parts_ptr,
    sums_ptr,
    slots,
    first_worker,
    last_worker,
    begins_inside,
    r,
    token,
    head,
    wanted,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Merges and writes the rows `r` of an item, of PART_ROWS, which `rows_of` describes; PARTS at a time.

    Worker w left its part in slot `slots + 2 · w`, or in the one after that if it is the first and the item
    `begins_inside` its piece.
    """
    ROWS: tl.constexpr = r.shape[0]
    d = tl.arange(0, BLOCK_D)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first_worker, last_worker + 1, PARTS):
        w = start + tl.arange(0, PARTS)
        slot = slots + 2 * w + tl.where((w == first_worker) & begins_inside, 1, 0)
        there = (w <= last_worker)[:, None] & wanted[None, :]  # [PARTS, ROWS]
        at = slot[:, None] * PART_ROWS + r[None, :]
        sums = tl.load(sums_ptr + at, mask=there, other=-float("inf"), cache_modifier=CACHE)
        values = tl.load(
            parts_ptr + at[:, :, None] * D + d[None, None, :],
            mask=there[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=CACHE,
        )  # [PARTS, ROWS, D]
        new_top = tl.maximum(top, tl.max(sums, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(sums - shift[None, :])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    store_result(
        out_ptr,
        lse_ptr,
        sinks_ptr,
        acc,
        top,
        total,
        token,
        head,
        wanted,
        QUERY_HEADS,
        D,
        BLOCK_D,
        RETURN_LSE,
    )


@triton.jit
def merge_cut_items(
    out_ptr,
    lse_ptr,
    sinks_ptr,
    parts_ptr,
    record_ptr,
    T,
    B,
    max_keys,
    window,
    worker,
    workers,
    pack,
    last_begin,
    last_end,
    last_tile_start,
    last_query_end,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What a worker does with a plan when it has left its parts: it says so, and merges where it is the last to.

    `last_…` are the bounds of its last item. Those of its first, and more, are in its record: to keep them would take
    registers from the loop over keys.
    """
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    _, first, begin, stop, piece, query_start, query_end, seq_len = load_record(record_ptr, T, B)
    _, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, GROUPS * KEYS, KEYS)
    item = (begin - first) // tiles
    first_begin = first + item * tiles
    tl.debug_barrier()  # every thread has stored its part of the parts
    for is_last in range(2):
        item_begin = tl.where(is_last == 1, last_begin, first_begin)
        item_end = tl.where(is_last == 1, last_end, first_begin + tiles)
        is_cut = (item_begin < begin) | (item_end > stop)
        if is_cut & ((is_last == 0) | (last_begin != first_begin)):
            first_worker = tl.minimum(item_begin // piece, workers - 1)
            last_worker = tl.minimum((item_end - 1) // piece, workers - 1)
            counter_ptr = record_ptr + (first_worker - worker) * (RECORD + KV_HEADS // HEADS * PACKS) + RECORD + pack
            others = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if others == last_worker - first_worker:
                tl.store(counter_ptr, 0)
                tile_start = tl.where(is_last == 1, last_tile_start, query_start + item * BLOCK_Q)
                tile_end = tl.minimum(tl.where(is_last == 1, last_query_end, query_end), tile_start + BLOCK_Q)
                rows_of_head = (tile_end - tile_start) * PACK
                sums_ptr = parts_ptr + 2 * (KV_HEADS // HEADS * PACKS) * workers * (HEADS * BLOCK_M) * D
                for start in range(0, HEADS * rows_of_head, ROWS):
                    n = start + tl.arange(0, ROWS)
                    r = n // rows_of_head * BLOCK_M + n % rows_of_head
                    token, head, wanted = rows_of(r, tile_start, tile_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
                    merge_rows(
                        out_ptr,
                        lse_ptr,
                        sinks_ptr,
                        parts_ptr,
                        sums_ptr,
                        2 * pack * workers,
                        first_worker,
                        last_worker,
                        item_begin > first_worker * piece,
                        r,
                        token,
                        head,
                        wanted & (n < HEADS * rows_of_head),
                        KV_HEADS * GROUP,
                        D,
                        BLOCK_D,
                        RETURN_LSE,
                        HEADS * BLOCK_M,
                        PARTS,
                        ".cg",  # from L2, as this multiprocessor's L1 may hold what was there before
                    )


@triton.jit(do_not_specialize=["T", "B", "table_width", "window", "workers", "least", "rows_of_head"])
def merge_parts_kernel(
    # Bound by latency: a few kilobytes a row. One program some rows of an item (BY_ITEM: of each; else of the one in
    # which a worker's piece begins, if it is that item's second).
    out_ptr,
    lse_ptr,
    parts_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    sinks_ptr,
    T,
    B,
    table_width,
    window,
    workers,
    least,
    rows_of_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROLLING: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BY_ITEM: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    BLOCK_N: tl.constexpr = GROUPS * KEYS
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    ALL_PACKS: tl.constexpr = KV_HEADS // HEADS * PACKS
    ROWS: tl.constexpr = 1 if BY_ITEM else min(HEADS * BLOCK_M, 4096 // BLOCK_D)  # what registers hold
    pack = tl.program_id(1)
    max_keys = 0x7FFFFFFF if ROLLING else table_width * PAGE_SIZE
    # Ahead of the wait: lengths were there before the kernel that this one follows had begun.
    index = tl.program_id(0) + (0 if BY_ITEM else 1)
    sequence, items_before, tiles_before, piece, _ = find(
        index,
        seq_lens_ptr,
        cu_seqlens_q_ptr,
        T,
        B,
        max_keys,
        window,
        workers,
        least,
        BY_ITEM,
        CAUSAL,
        WINDOW,
        BLOCK_Q,
        BLOCK_N,
        KEYS,
        BLOCK_B,
    )
    query_start, query_end, seq_len = lengths(sequence, seq_lens_ptr, cu_seqlens_q_ptr, T, B)
    _, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS)
    item = index - items_before if BY_ITEM else (index * piece - tiles_before) // tiles
    begin = tiles_before + item * tiles
    first_worker, last_worker = begin // piece, (begin + tiles - 1) // piece
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if (sequence > B) | (first_worker == last_worker) | ((first_worker + 1 != index) & (not BY_ITEM)):
        return
    tile_start = query_start + item * BLOCK_Q
    sums_ptr = parts_ptr + 2 * ALL_PACKS * workers * (HEADS * BLOCK_M) * D
    first, step, rows = 0, ROWS, HEADS * BLOCK_M
    if BY_ITEM:
        first, step = tl.program_id(2) % rows_of_head, rows_of_head
        rows = tl.minimum(query_end - tile_start, BLOCK_Q) * PACK
    for m in range(first, rows, step):
        r = m + tl.arange(0, ROWS)
        if BY_ITEM:
            r += tl.program_id(2) // rows_of_head * BLOCK_M
        token, head, wanted = rows_of(r, tile_start, query_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
        merge_rows(
            out_ptr,
            lse_ptr,
            sinks_ptr,
            parts_ptr,
            sums_ptr,
            2 * pack * workers,
            first_worker,
            last_worker,
            begin > first_worker * piece,
            r,
            token,
            head,
            wanted,
            KV_HEADS * GROUP,
            D,
            BLOCK_D,
            RETURN_LSE,
            HEADS * BLOCK_M,
            PARTS,
            "",
        )
