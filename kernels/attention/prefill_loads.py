"""The warps of the prefill kernel (`prefill.py`) that load queries, keys and values, by TMA.

A box of the copy engine is up to BLOCK_N slots of one page by 64 numbers of a head, or 128 of a float8 cache, which is
128 bytes, as many as its widest swizzle takes. Where the heads of a token lie side by side, a box has all numbers of a
head, though: in eights of slots, 64 numbers after 64 (`joined_layout`). A tile of heads of 128 takes 8 boxes of pages
of 16 slots then, not 16 of 2 KB, which were as many as the copy engine could do: 5 % faster. What lies outside of the
cache comes as zeros, so a page that is not there is given the number after the last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from octavo.kernels.attention.prefill_tiles import (
    END,
    HEAD,
    HIGH,
    LOW,
    SEQUENCE,
    START,
    TILE_START,
    VALID,
    field,
    release_entry,
    wait_for_entry,
)

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _keys_of(entries, done, block_table_ptr, stride_table_sequence):
    """Which keys an entry wants: its first head, tiles, first key and the one after the last, its sequence's pages."""
    head = field(entries, done, HEAD, 1)
    low = field(entries, done, LOW, 1)
    high = field(entries, done, HIGH, 1)
    start = field(entries, done, START, 1)
    end = field(entries, done, END, 1)
    sequence = field(entries, done, SEQUENCE, 1)
    return head, low, high, start, end, block_table_ptr + sequence.to(gl.int64) * stride_table_sequence


@gluon.jit
def _page_ids(
    table_ptr, tile, start, end, num_pages, table_width, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, ROLLING:
    gl.constexpr, BLOCK_N: gl.constexpr,
):
    """The page of each box of a tile; that after the last for boxes of no key that is there."""
    ids = ()
    for n in gl.static_range(BLOCK_N // BOX):
        key = tile * BLOCK_N + n * BOX
        entry = key // PAGE_SIZE
        if ROLLING:
            entry = entry % table_width
        page = gl.load(table_ptr + entry, mask=(key < end) & (key + BOX > start), other=-1)
        page = gl.where((page >= 0) & (page < num_pages), page, num_pages)
        ids = ids + (page,)  # type: ignore[assignment]  # noqa: RUF005  (no star in a kernel)
    return ids


@gluon.jit
def _load_tile(
    desc, boxes, full, stage, tile, kv_head, ids, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    JOINED: gl.constexpr = len(boxes.shape) == 6
    COUNT: gl.constexpr = BLOCK_N // BOX
    PARTS: gl.constexpr = BLOCK_D // boxes.shape[len(boxes.shape) - 1]
    mbarrier.expect(full, BLOCK_N * BLOCK_D * (boxes.dtype.primitive_bitwidth // 8))
    for n in gl.static_range(COUNT):
        slot = (tile * BLOCK_N + n * BOX) % PAGE_SIZE
        if JOINED:
            tma.async_copy_global_to_shared(
                desc, [ids[n], slot // 8, kv_head * PARTS, 0, 0], full, boxes.index(stage * COUNT + n)
            )
        else:
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    desc, [ids[n], kv_head, slot, part * (BLOCK_D // PARTS)], full, boxes.index(stage * PARTS * COUNT +
                    part * COUNT + n),
                )


@gluon.jit
def _zero_outside(
    values, stage, first, last, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, JOINED: gl.constexpr,
):
    """Zeroes the values of a tile but for rows `first` to `last`, 8 by 64 at a time: a warp has registers for those.

    What no sequence has written may be NaN, and a weight of zero would not silence it.
    """
    dtype: gl.constexpr = values.dtype
    COUNT: gl.constexpr = BLOCK_N // 8
    PARTS: gl.constexpr = BLOCK_D // 64
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    pieces = values._reinterpret(dtype, [values.shape[0] * PARTS * COUNT, 8, 64], shared)
    for n in range(COUNT):
        if (n * 8 < first) | (n * 8 + 8 > last):
            row = n * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, layout))
            keep = gl.expand_dims((row >= first) & (row < last), 1)
            for part in gl.static_range(PARTS):
                at = n * PARTS + part if JOINED else part * COUNT + n
                piece = pieces.index(stage * PARTS * COUNT + at)
                piece.store(gl.where(keep, piece.load(layout), gl.zeros([8, 64], dtype, layout)))


@gluon.jit
def load_queries_and_keys(
    query_desc, key_desc, query_boxes, key_boxes, queries_full, keys_full, queries_read, keys_read, entries, ring_full,
    ring_empty, wanted, block_table_ptr, num_pages, table_width, stride_table_sequence, GROUP: gl.constexpr, PACK:
    gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, ROLLING: gl.constexpr, ROWS: gl.constexpr, BLOCK_N:
    gl.constexpr, BLOCK_D: gl.constexpr, PLACES: gl.constexpr, FLOAT8: gl.constexpr, GROUPS: gl.constexpr,
):
    """What the warp does that loads queries and keys, the latter from the last tile to the first."""
    PARTS: gl.constexpr = BLOCK_D // 64
    done = 0  # tiles of queries
    step = 0  # tiles of keys
    valid = 1
    while valid == 1:
        wait_for_entry(ring_full, done)
        tile_start = field(entries, done, TILE_START, 1)
        head, low, high, start, end, table_ptr = _keys_of(entries, done, block_table_ptr, stride_table_sequence)
        valid = field(entries, done, VALID, 1)
        release_entry(ring_empty, done)
        for back in range(1, high - low + 1):
            tile = high - back
            place = step % PLACES
            ids = _page_ids(table_ptr, tile, start, end, num_pages, table_width, PAGE_SIZE, BOX, ROLLING, BLOCK_N)
            mbarrier.wait(keys_read.index(place), step // PLACES & 1 ^ 1)
            _load_tile(
                key_desc, key_boxes, keys_full.index(place), place, tile, head // GROUP, ids, PAGE_SIZE, BOX, BLOCK_N,
                BLOCK_D,
            )
            if back == 1:
                if step > 0:
                    # The queries before are read in the step before.
                    if FLOAT8:
                        mbarrier.wait(queries_read.index(0), done - 1 & 1)
                    else:
                        mbarrier.wait(keys_read.index((step - 1) % PLACES), (step - 1) // PLACES & 1)
                for group in gl.static_range(GROUPS):
                    mbarrier.expect(queries_full.index(group), ROWS * BLOCK_D * 2)
                    for part in gl.static_range(PARTS):
                        tma.async_copy_global_to_shared(
                            query_desc, [tile_start + group * (ROWS // PACK), head, part * 64],
                            queries_full.index(group), query_boxes.index(group * PARTS + part),
                        )
            step += 1
            if back == gl.maximum(high - low - 2, 1):
                mbarrier.arrive(wanted.index(0), count=1)  # three tiles are time enough to find the next queries
        done += 1


@gluon.jit
def load_values(
    value_desc, value_boxes, values, values_full, values_read, cut_off, entries, ring_full, ring_empty,
    block_table_ptr, num_pages, table_width, stride_table_sequence, GROUP: gl.constexpr, PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr, ROLLING: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, PLACES: gl.constexpr,
    FLOAT8: gl.constexpr,
):
    """What the warp does that loads values."""
    JOINED: gl.constexpr = len(value_boxes.shape) == 6
    # Products read values in the step after the one that reads the keys beside them.
    LATE: gl.constexpr = 0 if FLOAT8 else 1
    done = 0
    step = 0
    cuts = 0
    wait_for_entry(ring_full, 0)
    valid = field(entries, 0, VALID, 1)
    while valid == 1:
        head, low, high, start, end, table_ptr = _keys_of(entries, done, block_table_ptr, stride_table_sequence)
        release_entry(ring_empty, done)
        for back in range(1, high - low + 1):
            tile = high - back
            place = step % PLACES
            ids = _page_ids(table_ptr, tile, start, end, num_pages, table_width, PAGE_SIZE, BOX, ROLLING, BLOCK_N)
            mbarrier.wait(values_read.index((step + LATE) % PLACES), (step + LATE) // PLACES & 1 ^ 1)
            # Of a float8 cache, what is not there is zeroed when it is converted.
            if not FLOAT8 and ((tile + 1) * BLOCK_N > end) | (tile * BLOCK_N < start):
                full = cut_off.index(0)
                _load_tile(
                    value_desc, value_boxes, full, place, tile, head // GROUP, ids, PAGE_SIZE, BOX, BLOCK_N, BLOCK_D
                )
                mbarrier.wait(full, cuts & 1)
                cuts += 1
                _zero_outside(values, place, start - tile * BLOCK_N, end - tile * BLOCK_N, BLOCK_N, BLOCK_D, JOINED)
                fence_async_shared()
                mbarrier.arrive(values_full.index(place), count=1)
            else:
                _load_tile(
                    value_desc, value_boxes, values_full.index(place), place, tile, head // GROUP, ids, PAGE_SIZE, BOX,
                    BLOCK_N, BLOCK_D,
                )
            step += 1
        done += 1
        wait_for_entry(ring_full, done)
        valid = field(entries, done, VALID, 1)
