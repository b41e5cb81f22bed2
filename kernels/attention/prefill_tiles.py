"""Which tiles of queries the programs of the prefill kernel (`prefill.py`) take, and how its warps learn of them.

A tile is GROUPS · ROWS / PACK tokens of a sequence by PACK query heads of one KV head. Programs take tiles from a
counter, so that none waits for another: shares fixed beforehand left the last program with 1.3 times the mean for
8 × 2k. They are given out sequence by sequence, in one the last tokens first, since those see the most keys and what is
left for the end should be short. Of a long sequence, as many heads come before the others as have their keys and values
in the cache (L2) together.

One warp finds tiles, and the others read them from a ring of entries in shared memory. It takes the next only when the
keys of the last are nearly all under way: programs that took four ahead left some with one too many at the end, which
made 4 chunks of 512 tokens take 1.27 times FlashAttention-3's time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off

SLOTS = gl.constexpr(4)
"""Entries of the ring."""
FIELDS = gl.constexpr(16)

# The fields of an entry.
TILE_START = gl.constexpr(0)
"""The tile's first row of the queries."""
QUERY_END = gl.constexpr(1)
"""The row after the sequence's last; 0 in the entry after the last tile, which is of no queries."""
HEAD = gl.constexpr(2)
"""The first query head."""
POSITION = gl.constexpr(3)
"""That of the tile's first token."""
LOW = gl.constexpr(4)
"""The first tile of keys; HIGH is the one after the last, there is at least one."""
HIGH = gl.constexpr(5)
START = gl.constexpr(6)
"""The first key that is there for any row; END is the one after the last."""
END = gl.constexpr(7)
SEQUENCE = gl.constexpr(8)
VALID = gl.constexpr(9)
"""0 in the entry after the last tile."""


@gluon.jit
def field(entries, done, name: gl.constexpr, num_warps: gl.constexpr):
    """A field of the entry of tile number `done`, for a partition of so many warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    return gl.sum(entries.index(done % SLOTS * FIELDS + name).load(layout), 0)


@gluon.jit
def wait_for_entry(ring_full, done):
    mbarrier.wait(ring_full.index(done % SLOTS), done // SLOTS & 1)


@gluon.jit
def release_entry(ring_empty, done):
    mbarrier.arrive(ring_empty.index(done % SLOTS), count=1)


@gluon.jit
def _put(entries, done, name: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    entries.index(done % SLOTS * FIELDS + name).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _find_sequence(cu_seqlens_q_ptr, slot, B, BLOCK_Q: gl.constexpr):
    """`find_sequence` of `online_softmax.py`, for one warp."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    count = 0
    for start in range(0, B + 1, 128):
        b = start + gl.arange(0, 128, layout=layout)
        first = gl.load(cu_seqlens_q_ptr + b, mask=b <= B, other=0) // BLOCK_Q + b
        count += gl.sum(((first <= slot) & (b <= B)).to(gl.int32), 0)
    return gl.maximum(count - 1, 0)


@gluon.jit
def _next_tile(
    i, counter_ptr, cu_seqlens_q_ptr, seq_lens_ptr, T, B, slots, KV_HEADS: gl.constexpr, PACKS: gl.constexpr, BLOCK_Q:
    gl.constexpr, SECTION: gl.constexpr,
):
    """The first tile with queries of number `i` and those that the counter gives out after it.

    There are `slots` of PACKS tiles, one for each pack of heads. A sequence has at least as many slots as it needs.
    """
    sequence = 0
    tile_start = 0
    query_end = 0
    seq_len = 0
    pack = 0
    looking = i < slots * PACKS
    while looking:
        sequence = _find_sequence(cu_seqlens_q_ptr, i // PACKS, B, BLOCK_Q)
        # Rows after the last sequence are the padding of a captured graph: a sequence of no keys.
        query_start = gl.load(cu_seqlens_q_ptr + sequence)
        next_start = gl.load(cu_seqlens_q_ptr + sequence + 1, mask=sequence < B, other=T)
        seq_len = gl.load(seq_lens_ptr + sequence, mask=sequence < B, other=0)
        query_end = gl.minimum(next_start, T)
        first_slot = query_start // BLOCK_Q + sequence
        its_slots = gl.where(sequence < B, next_start // BLOCK_Q + sequence + 1, slots) - first_slot
        # Packs whose keys and values fit into the cache together, all tiles of them before the next.
        kv_heads = KV_HEADS
        while (kv_heads % 2 == 0) & (seq_len // SECTION * kv_heads > KV_HEADS):
            kv_heads = kv_heads // 2
        together = kv_heads * (PACKS // KV_HEADS)
        local = i - first_slot * PACKS
        section = local // (its_slots * together)
        local -= section * (its_slots * together)
        pack = section * together + local % together
        tile_start = query_start + (its_slots - 1 - local // together) * BLOCK_Q
        looking = tile_start >= query_end
        if looking:
            i = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
            looking = i < slots * PACKS
    return i, sequence, tile_start, query_end, seq_len, pack


@gluon.jit
def hand_out(
    entries, ring_full, ring_empty, wanted, counter_ptr, cu_seqlens_q_ptr, seq_lens_ptr, T, B, table_width, window,
    slots, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL:
    gl.constexpr, WINDOW: gl.constexpr, ROLLING: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, SECTION:
    gl.constexpr, GROUPS: gl.constexpr,
):
    """What the warp does that finds tiles."""
    BLOCK_Q: gl.constexpr = GROUPS * ROWS // PACK
    PACKS: gl.constexpr = KV_HEADS * GROUP // PACK
    i = gl.program_id(0)
    done = 0
    valid = 1
    while valid == 1:
        mbarrier.wait(ring_empty.index(done % SLOTS), done // SLOTS & 1 ^ 1)
        if done > 0:
            mbarrier.wait(wanted.index(0), done - 1 & 1)
            i = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        i, sequence, tile_start, query_end, seq_len, pack = _next_tile(
            i, counter_ptr, cu_seqlens_q_ptr, seq_lens_ptr, T, B, slots, KV_HEADS, PACKS, BLOCK_Q, SECTION
        )
        valid = (i < slots * PACKS).to(gl.int32)
        tile_start = gl.where(valid == 1, tile_start, 0)
        query_end = gl.where(valid == 1, query_end, 0)
        seq_len = gl.where(valid == 1, seq_len, 0)
        history = seq_len - query_end
        end = seq_len
        if not ROLLING:
            end = gl.minimum(seq_len, table_width * PAGE_SIZE)
        seen = end
        if CAUSAL:
            seen = gl.minimum(end, gl.minimum(tile_start + BLOCK_Q, query_end) + history)
        start = 0
        if WINDOW:
            start = gl.maximum(tile_start + history - window + 1, 0)
        if ROLLING:
            start = gl.maximum(start, seq_len - table_width * PAGE_SIZE)  # what is further back has been overwritten
        low = start // BLOCK_N
        _put(entries, done, TILE_START, tile_start)
        _put(entries, done, QUERY_END, query_end)
        _put(entries, done, HEAD, pack * PACK)
        _put(entries, done, POSITION, tile_start + history)
        _put(entries, done, LOW, low)
        _put(entries, done, HIGH, gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, low + 1))
        _put(entries, done, START, start)
        _put(entries, done, END, end)
        _put(entries, done, SEQUENCE, sequence)
        _put(entries, done, VALID, valid)
        mbarrier.arrive(ring_full.index(done % SLOTS), count=1)
        done += 1
