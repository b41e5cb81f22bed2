"""The attention of few queries a sequence over a paged cache: every multiprocessor reads an equal share of the keys.

All keys that the step reads of a head, or of some heads side by side, stand in one row of tiles, sequence after
sequence. A fixed number of programs, the workers, take equal shares of that row (stream-K: Osama et al. 2023,
https://arxiv.org/abs/2301.03598), whatever the lengths are. A share begins and ends anywhere: where an item (a query
tile and KV head) is cut, its workers leave partial results, and a second kernel merges them in order (flash decoding,
https://pytorch.org/blog/flash-decoding). Lengths with a power of two in common are cut less often (`share_of`).

Heads side by side are read at the same time: on an H100 that is 7 % faster than at different times, since a token's
heads are one piece of memory. Each program finds its place in the row by a scan over the lengths, which for up to 255
sequences is one round trip to memory; then nothing has to be kept from one call to the next. Or a plan says where it is
(`plan_attention`). The grid depends on the GPU and the heads alone, so a CUDA graph serves any lengths.

Tried on an H100, and slower: one loop over all of a worker's tiles, which does not end where an item does (its epilogue
inside the loop takes registers and instructions: 8 % at 64 × 4096); page ids carried for three tiles, which Triton does
not pipeline; prefetching the block table into L1 (no difference where memory is busy); a merge by the last of an item's
workers, with counters in the plan (its serial tail takes 5 to 10 µs, the second kernel 2 to 3); cutting a fifth of each
share into pieces that workers take by an atomic counter as they come free (multiprocessors differ by 18 % in speed, but
each piece empties and fills the pipeline: 2 to 8 % slower).
"""

import triton
import triton.language as tl


@triton.jit
def lengths(b, seq_lens_ptr, cu_seqlens_q_ptr, T, B):
    """Where the queries of the sequences `b` start and end, and how many keys each has.

    Rows after the last sequence are the padding of a captured graph: a sequence of no keys, number B.
    """
    query_start = tl.load(cu_seqlens_q_ptr + b, mask=b <= B, other=0)
    query_end = tl.minimum(tl.load(cu_seqlens_q_ptr + b + 1, mask=b < B, other=T), T)
    return query_start, query_end, tl.load(seq_lens_ptr + b, mask=b < B, other=0)


@triton.jit
def extent(
    query_start,
    query_end,
    seq_len,
    max_keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Of sequences of these lengths: the items, and how many tiles of keys each of them is given; both at least 1."""
    queries = tl.maximum(query_end - query_start, 0)
    keys = tl.minimum(seq_len, max_keys)
    if WINDOW:
        # Without causal, every query sees all that follows it.
        keys = tl.minimum(keys, window - 1 + (tl.minimum(queries, BLOCK_Q) if CAUSAL else queries) + KEYS - 1)
    return tl.maximum(tl.cdiv(queries, BLOCK_Q), 1), tl.maximum(tl.cdiv(keys, BLOCK_N), 1)


@triton.jit
def _extents(
    b,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    T,
    B,
    max_keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The `extent` of the sequences `b`; 0 from B + 1."""
    query_start, query_end, seq_len = lengths(b, seq_lens_ptr, cu_seqlens_q_ptr, T, B)
    items, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS)
    return tl.where(b <= B, items, 0), tl.where(b <= B, tiles, 0)


@triton.jit
def share_of(total, common, workers, least):
    """How many of the `total` tiles each of the `workers` takes; `common`, a power of two, divides every sequence's.

    As few as there must be, or up to a 15th more where that makes it a multiple of `common`, or half or a quarter of
    it: then shares end where sequences end and there is less to merge; the last workers are idle. On an H100, 256
    sequences of 1024 keys have shares of 128 tiles, not 125, and take 359 µs instead of 369, since none is cut; 63 of
    them beside one of 65,536 have 64, not 62, and take 186 instead of 191, since that one alone is cut. Sequences of
    any lengths have little in common, long ones are cut into many parts anyway: their shares stay as even as can be.
    """
    share = tl.maximum(tl.cdiv(total, workers), least)
    power = share - 1
    for i in tl.static_range(5):
        power |= power >> (1 << i)
    step = tl.minimum(power + 1, common)  # the next power of two, if sequences have that in common
    whole = tl.cdiv(share, step) * step
    return tl.where((whole - share <= share // 15) & (common // 4 <= whole), whole, share)


@triton.jit
def find(
    index,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    T,
    B,
    max_keys,
    window,
    workers,
    least,
    BY_ITEM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Where item `index` is, or share `index` begins.

    Returns (sequence, the items before it, the tiles before it, tiles of a share, tiles in all).
    """
    total = 0
    common = MOST
    for start in range(0, B + 1, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        items, tiles = _extents(
            b, seq_lens_ptr, cu_seqlens_q_ptr, T, B, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS
        )
        total += tl.sum(items * tiles, 0)
        # Not that of the padding, which is last.
        common = tl.minimum(common, tl.min(tl.where(b < B, tiles & -tiles, MOST), 0))
    share = share_of(total, common, workers, least)
    at = index if BY_ITEM else index * share
    sequence, items_before, tiles_before, counted = 0, 0, 0, 0
    for start in range(0, B + 1, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        items, tiles = _extents(
            b, seq_lens_ptr, cu_seqlens_q_ptr, T, B, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS
        )
        counts = items if BY_ITEM else items * tiles
        passed = (counted + tl.cumsum(counts, 0) <= at) & (b <= B)
        sequence += tl.sum(passed.to(tl.int32), 0)
        items_before += tl.sum(tl.where(passed, items, 0), 0)
        tiles_before += tl.sum(tl.where(passed, items * tiles, 0), 0)
        counted += tl.sum(counts, 0)
    return sequence, items_before, tiles_before, share, total


# A worker's record in a plan; what `plan_attention` stores is what the decode kernel loads.
RECORD = tl.constexpr(8)
MOST = tl.constexpr(2**30)


@triton.jit
def store_record(record_ptr, sequence, first, begin, stop, share, query_start, query_end, seq_len):
    tl.store(record_ptr, sequence)
    tl.store(record_ptr + 1, first)
    tl.store(record_ptr + 2, begin)
    tl.store(record_ptr + 3, stop)
    tl.store(record_ptr + 4, share)
    tl.store(record_ptr + 5, query_start)
    tl.store(record_ptr + 6, query_end)
    tl.store(record_ptr + 7, seq_len)


@triton.jit
def load_record(record_ptr, T, B):
    """What `store_record` stored, within bounds: whatever a record holds, nothing outside of a tensor is touched.

    The sequence is one that there is, or the padding, which has no keys; its queries are among the T; counts of tiles
    and keys are small enough for sums of them.
    """
    sequence = tl.minimum(tl.maximum(tl.load(record_ptr), 0), B)
    first = tl.minimum(tl.maximum(tl.load(record_ptr + 1), 0), MOST)
    begin = tl.minimum(tl.maximum(tl.load(record_ptr + 2), 0), MOST)
    stop = tl.minimum(tl.load(record_ptr + 3), MOST)
    share = tl.maximum(tl.load(record_ptr + 4), 1)
    query_start = tl.minimum(tl.maximum(tl.load(record_ptr + 5), 0), T)
    query_end = tl.minimum(tl.maximum(tl.load(record_ptr + 6), 0), T)
    seq_len = tl.where(sequence < B, tl.minimum(tl.load(record_ptr + 7), 0x70000000), 0)
    return sequence, first, begin, stop, share, query_start, query_end, seq_len


@triton.jit
def rows_of(
    r,
    tile_start,
    query_end,
    pack,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    PACKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Token and query head of the rows `r`, HEADS · BLOCK_M of an item, and which of them there are."""
    m = r % BLOCK_M
    token = tile_start + m // PACK
    group_head = pack % PACKS * PACK + m % PACK
    wanted = (m < BLOCK_M // PACK * PACK) & (token < query_end) & (group_head < GROUP)
    return token.to(tl.int64), (pack // PACKS * HEADS + r // BLOCK_M) * GROUP + group_head, wanted
