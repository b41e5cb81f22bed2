"""The second kernel of decoding: an item that was cut is put together from what its workers left, in their order.

It is there by item, where there are few, or by worker; then an item of many parts is shared out to programs by rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.attention_tiles import Tiles
from octavo.kernels.attention.online_softmax import store_result
from octavo.kernels.attention.schedule import RECORD, extent, find, lengths, load_record, rows_of
from octavo.kernels.launch import launch
from octavo.kernels.tiles import cdiv, chains, let_next_start, wait_for_previous


@triton.jit
def _merge_rows(
    out_ptr,
    lse_ptr,
    parts_ptr,
    tops_ptr,
    totals_ptr,
    sinks_ptr,
    first_n,
    rows,
    head_rows,
    tile_start,
    query_end,
    pack,
    workers,
    first_worker,
    last_worker,
    inside,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Merges ROWS of an item's rows, from `first_n`; the first worker's part lies `inside` rows into what it left."""
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    n = first_n + tl.arange(0, ROWS)
    in_head, first_row = n // head_rows * BLOCK_M, n % head_rows  # those of a head lie in a tile of their own
    d = tl.arange(0, BLOCK_D)[None, None, :]
    for further_rows in range(0, rows, head_rows):
        m = further_rows + first_row
        token, head, wanted = rows_of(in_head + m, tile_start, query_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
        wanted = wanted & (m < rows) & (n < HEADS * head_rows)
        row = in_head + m
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for further in range(first_worker, last_worker + 1, PARTS * STEPS):
            loaded = ()
            for step in tl.static_range(STEPS):
                worker = further + step * PARTS + tl.arange(0, PARTS)
                at = (pack * workers + worker) * (2 * HEADS * BLOCK_M) + tl.where(worker == first_worker, inside, 0)
                at = at[:, None] + row[None, :]
                there = (worker <= last_worker)[:, None] & wanted[None, :]  # [PARTS, ROWS]
                tops = tl.load(tops_ptr + at, mask=there, other=-float("inf"))
                totals = tl.load(totals_ptr + at, mask=there, other=0.0)
                values = tl.load(
                    parts_ptr + at[:, :, None] * D + d, mask=there[:, :, None] & (d < D), other=0.0
                )  # [PARTS, ROWS, D]
                loaded = loaded + ((tops, totals, values),)  # type: ignore[assignment]  # noqa: RUF005
            for step in tl.static_range(STEPS):
                tops, totals, values = loaded[step]
                new_top = tl.maximum(top, tl.max(tops, 0))
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                weights = tl.exp2(tops - shift[None, :])
                rescale = tl.exp2(top - shift)
                total = total * rescale + tl.sum(totals * weights, 0)
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
            KV_HEADS * GROUP,
            D,
            BLOCK_D,
            RETURN_LSE,
        )


@triton.jit(do_not_specialize=["T", "B", "table_width", "window", "workers", "least", "head_rows"])
def merge_parts_kernel(
    # Bound by latency: a few kilobytes a row. One program some rows of an item: BY_ITEM of each, else of the one in
    # which a worker's share begins.
    out_ptr,
    lse_ptr,
    parts_ptr,
    plan_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    sinks_ptr,
    T,
    B,
    table_width,
    window,
    workers,
    least,
    head_rows,
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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    BLOCK_N: tl.constexpr = GROUPS * KEYS
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    ALL_PACKS: tl.constexpr = KV_HEADS // HEADS * PACKS
    pack = tl.program_id(1)
    max_keys = 0x7FFFFFFF if ROLLING else table_width * PAGE_SIZE
    # Ahead of the wait: lengths, and a plan, were there before the kernel that this one follows had begun.
    index = tl.program_id(0) + (0 if BY_ITEM else 1)
    if plan_ptr is not None and not BY_ITEM:
        sequence, first, start, _, share, query_start, query_end, seq_len = load_record(plan_ptr + index * RECORD, T, B)
        items, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS)
        # In a plan of other lengths the share may begin outside of the sequence.
        sequence = tl.where((first <= start) & (start - first < items * tiles), sequence, B + 1)
        item = (start - first) // tiles
    else:
        sequence, items_before, first, share, _ = find(
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
        item = index - items_before if BY_ITEM else (index * share - first) // tiles
    begin = first + item * tiles
    first_worker, last_worker = begin // share, tl.minimum((begin + tiles - 1) // share, workers - 1)
    # By worker, an item has a program fewer than parts. The first merges all ROWS rows; but of many parts each of the
    # first ROWS programs merges one row, with as many more of its parts at once: 65 take 3 round trips, not 17.
    place = 0 if BY_ITEM else index - first_worker - 1
    long = False if BY_ITEM else last_worker - first_worker >= (ROWS if ROWS > 8 else 8)
    if (sequence > B) | (first_worker >= last_worker) | (place < 0) | (place >= tl.where(long, ROWS, 1)):
        last_worker = -1  # nothing to do
    tile_start = query_start + item * BLOCK_Q
    rows = tl.where(last_worker < 0, 0, tl.minimum(query_end - tile_start, BLOCK_Q) * PACK)  # of each head
    first_n = tl.program_id(2) * ROWS + place
    part_rows = 2 * ALL_PACKS * workers * (HEADS * BLOCK_M)
    tops_ptr, totals_ptr = parts_ptr + part_rows * D, parts_ptr + part_rows * (D + 1)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    # The first worker's part is in its second slot, if the item begins inside of its share.
    inside = tl.where(begin > first_worker * share, HEADS * BLOCK_M, 0)
    pointers = out_ptr, lse_ptr, parts_ptr, tops_ptr, totals_ptr, sinks_ptr
    where = first_n, rows, head_rows, tile_start, query_end, pack, workers, first_worker, last_worker, inside
    if long:
        _merge_rows(
            *pointers,
            *where,
            KV_HEADS,
            GROUP,
            PACK,
            D,
            RETURN_LSE,
            BLOCK_M,
            HEADS,
            BLOCK_D,
            ROWS=1,
            PARTS=PARTS * ROWS * STEPS,
            STEPS=1,
        )
    else:
        _merge_rows(
            *pointers,
            *where,
            KV_HEADS,
            GROUP,
            PACK,
            D,
            RETURN_LSE,
            BLOCK_M,
            HEADS,
            BLOCK_D,
            ROWS=ROWS,
            PARTS=PARTS,
            STEPS=STEPS,
        )


def merge_step(items: int, workers: int, per_sm: int, rows: int, block_d: int) -> dict[str, Any]:
    """What a program of the kernel does: ROWS of an item's `rows`, PARTS of each at once, STEPS of that after another.

    It reads 32 values a thread at once. Few items have many parts, which the program's threads share; the parts of many
    items are few, and a thread has all of its values, so that threads exchange maxima and sums alone. Of the first kind
    a multiprocessor holds two at a time: there must not be many more, since all of them wait for the decode kernel.
    (16 sequences of 1024 take 31 µs by worker on an H100, and 41 by item.)
    """
    if 8 * items <= workers and items * rows * per_sm <= 3 * workers:
        return dict(BY_ITEM=True, ROWS=1, PARTS=64, STEPS=1, num_warps=8)
    return dict(BY_ITEM=False, ROWS=max(1024 // block_d, 1), PARTS=1, STEPS=4, num_warps=4)


def merge_parts(
    out: torch.Tensor,
    lse: torch.Tensor,
    parts: torch.Tensor,
    plan: torch.Tensor | None,
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    blocks: dict[str, int],
    tiles: Tiles,
    shares: tuple[int, int],
    max_seqlen_q: int,
) -> None:
    """Launches the kernel that merges the `parts`; `args` are from seq_lens_ptr to window, `shares` of `share_out`."""
    workers, packs = shares
    pack = constexprs["PACK"]
    items = out.shape[0] // (tiles.block_m // pack) + args[0].shape[0] + 1
    head_rows = min(tiles.block_m // pack, max(max_seqlen_q, 1)) * pack
    step = merge_step(items, workers, tiles.workers, tiles.heads * head_rows, tiles.block_d)
    launch(
        merge_parts_kernel,
        (items if step["BY_ITEM"] else max(workers - 1, 0), packs, cdiv(tiles.heads * head_rows, step["ROWS"])),
        out,
        lse,
        parts,
        plan,
        *args,
        workers,
        tiles.least,
        head_rows,
        device=out.device,
        **{name: value for name, value in constexprs.items() if name != "SOFTCAP"},
        **blocks,
        **step,
        CHAINED=chains(out.device),
    )
