"""The attention of few queries a sequence over a paged cache; `schedule.py` says which program does what."""

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.attention_tiles import Tiles
from octavo.kernels.attention.by_warps import attend_by_warps
from octavo.kernels.attention.merge_parts import merge_parts
from octavo.kernels.attention.online_softmax import attend, of_heads, store_result
from octavo.kernels.attention.schedule import RECORD, extent, find, lengths, load_record, rows_of
from octavo.kernels.attention.shares import keys_of_group, registers_of, share_out
from octavo.kernels.launch import empty, launch
from octavo.kernels.tiles import chains, let_next_start, wait_for_previous


@triton.jit(do_not_specialize=["T", "B", "table_width", "num_pages", "window", "least", "stride_table_sequence"])
def _decode_kernel(
    # Bound by reading the cache once. One program a worker.
    out_ptr,
    lse_ptr,
    parts_ptr,
    plan_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_scale_cache_ptr,
    value_scale_cache_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    T,
    B,
    num_pages,
    table_width,
    window,
    score_scale,
    cap,
    stride_query_token,
    stride_query_head,
    stride_key_page,
    stride_key_slot,
    stride_key_head,
    stride_value_page,
    stride_value_slot,
    stride_value_head,
    stride_table_sequence,
    stride_k_scale,
    stride_v_scale,
    stride_key_scale_page,
    stride_key_scale_slot,
    stride_key_scale_head,
    stride_value_scale_page,
    stride_value_scale_slot,
    stride_value_scale_head,
    least,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROLLING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BY_WARPS: tl.constexpr,
    REGISTERS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    BLOCK_N: tl.constexpr = GROUPS * KEYS
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    ALL_PACKS: tl.constexpr = KV_HEADS // HEADS * PACKS
    pack = tl.program_id(0) % ALL_PACKS  # heads side by side, so that they read the same pages at the same time
    worker, workers = tl.program_id(0) // ALL_PACKS, tl.num_programs(0) // ALL_PACKS
    # A ring has the tiles that the full cache would have, so that the results have the same bits.
    max_keys = 0x7FFFFFFF if ROLLING else table_width * PAGE_SIZE
    if plan_ptr is not None:
        sequence, first, begin, stop, _, query_start, query_end, seq_len = load_record(plan_ptr + worker * RECORD, T, B)
        items, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS)
        # In a plan of other lengths the share may begin outside of the sequence.
        stop = tl.where((first <= begin) & (begin - first < items * tiles), stop, begin)
    else:
        sequence, _, first, share, total_tiles = find(
            worker,
            seq_lens_ptr,
            cu_seqlens_q_ptr,
            T,
            B,
            max_keys,
            window,
            workers,
            least,
            False,
            CAUSAL,
            WINDOW,
            BLOCK_Q,
            BLOCK_N,
            KEYS,
            BLOCK_B,
        )
        begin = worker * share
        stop = tl.minimum(begin + share, total_tiles)
    if begin >= stop:
        return
    r = tl.arange(0, HEADS * BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    kv_head = (pack // PACKS * HEADS).to(tl.int64)
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * stride_k_scale
    if v_scale_ptr is not None:
        v_scale_ptr += kv_head * stride_v_scale
    if key_scale_cache_ptr is not None:
        key_scale_cache_ptr += kv_head * stride_key_scale_head
        value_scale_cache_ptr += kv_head * stride_value_scale_head
    at = begin
    while (at < stop) & (sequence <= B):
        if plan_ptr is None:
            query_start, query_end, seq_len = lengths(sequence, seq_lens_ptr, cu_seqlens_q_ptr, T, B)
        items, tiles = extent(query_start, query_end, seq_len, max_keys, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_N, KEYS)
        item = (at - first) // tiles
        item_begin = first + item * tiles
        last = tl.minimum(item_begin + tiles, stop)
        tile_start = query_start + item * BLOCK_Q
        position = tile_start + seq_len - query_end
        start = 0
        end = tl.minimum(seq_len, max_keys)
        if CAUSAL:
            end = tl.minimum(end, position + BLOCK_Q)
        if WINDOW:
            start = tl.maximum(position - window + 1, 0)
        if ROLLING:
            start = tl.maximum(start, seq_len - table_width * PAGE_SIZE)  # what is further back has been overwritten
        if BY_WARPS:
            aligned = start // KEYS * KEYS if PAGE_SIZE % KEYS == 0 else start  # so that a warp's keys are in one page
            warp_row = (tl.arange(0, HEADS * GROUPS) // GROUPS * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]
            token, head, wanted = rows_of(warp_row, tile_start, query_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
            q_at = token * stride_query_token + head.to(tl.int64) * stride_query_head
            q = tl.load(
                query_ptr + q_at[:, :, None] + d[None, :, :], mask=wanted[:, :, None] & (d < D)[None, :, :], other=0.0
            )  # [W, M, D]
            by_head, top_of_head, total_of_head = attend_by_warps(
                q,
                position + tl.arange(0, BLOCK_M) // PACK,
                start,
                aligned + (at - item_begin) * BLOCK_N,
                tl.minimum(end, aligned + (last - item_begin) * BLOCK_N),
                key_cache_ptr + kv_head * stride_key_head,
                value_cache_ptr + kv_head * stride_value_head,
                k_scale_ptr,
                v_scale_ptr,
                key_scale_cache_ptr,
                value_scale_cache_ptr,
                block_table_ptr + sequence.to(tl.int64) * stride_table_sequence,
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
                D,
                PAGE_SIZE,
                CAUSAL,
                WINDOW,
                ROLLING,
                SOFTCAP,
                HEADS,
                GROUPS,
                BLOCK_M,
                KEYS,
                BLOCK_D,
            )
            out = tl.reshape(by_head, [HEADS * BLOCK_M, BLOCK_D])
            top, total = tl.reshape(top_of_head, [HEADS * BLOCK_M]), tl.reshape(total_of_head, [HEADS * BLOCK_M])
        else:
            token, head, wanted = rows_of(r, tile_start, query_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
            q_at = token * stride_query_token + head.to(tl.int64) * stride_query_head
            q = tl.load(query_ptr + q_at[:, None] + d, mask=wanted[:, None] & (d < D), other=0.0)  # [M, D]
            slope = alibi_slopes_ptr
            if slope is not None:
                slope = of_heads(alibi_slopes_ptr, head, wanted)
            out, top, total = attend(
                q,
                position + r // PACK,
                slope,
                start + (at - item_begin) * BLOCK_N,
                tl.minimum(end, start + (last - item_begin) * BLOCK_N),
                key_cache_ptr + kv_head * stride_key_head,
                value_cache_ptr + kv_head * stride_value_head,
                k_scale_ptr,
                v_scale_ptr,
                key_scale_cache_ptr,
                value_scale_cache_ptr,
                block_table_ptr + sequence.to(tl.int64) * stride_table_sequence,
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
                D,
                PAGE_SIZE,
                CAUSAL,
                WINDOW,
                ROLLING,
                SOFTCAP,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
        token, head, wanted = rows_of(r, tile_start, query_end, pack, GROUP, PACK, PACKS, HEADS, BLOCK_M)
        if (item_begin >= begin) & (last == item_begin + tiles):
            store_result(
                out_ptr,
                lse_ptr,
                sinks_ptr,
                out,
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
        else:
            # A worker leaves at most two: of the item in which its share begins, and of that in which it ends.
            part_row = ((pack * workers + worker) * 2 + tl.where(item_begin > begin, 1, 0)) * (HEADS * BLOCK_M) + r
            tl.store(parts_ptr + part_row[:, None] * D + d, out, mask=wanted[:, None] & (d < D))
            # Apart, since the rounding of a logarithm would be a factor of the whole part.
            part_rows = 2 * ALL_PACKS * workers * (HEADS * BLOCK_M)
            tl.store(parts_ptr + part_rows * D + part_row, top, mask=wanted)
            tl.store(parts_ptr + part_rows * (D + 1) + part_row, total, mask=wanted)
        at = last
        if at == first + items * tiles:
            first = at
            sequence += 1
            if plan_ptr is not None:
                query_start, query_end, seq_len = lengths(sequence, seq_lens_ptr, cu_seqlens_q_ptr, T, B)


def decode(
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: torch.Tensor | None,
    args: tuple[Any, ...],
    merge_args: tuple[Any, ...],
    constexprs: dict[str, Any],
    tiles: Tiles,
    max_seqlen_q: int,
) -> None:
    """Launches the decode kernel and the one that merges its results.

    Args:
        args: the first kernel's arguments from query_ptr to the strides.
        merge_args: the second one's from seq_lens_ptr to window.
        constexprs: what the call has by way of constexprs, whatever the tiles are.
    """
    device = out.device
    workers, packs = share_out(tiles, constexprs["KV_HEADS"], constexprs["GROUP"], out.shape[0], device)
    parts = empty((2 * packs * workers * tiles.heads * tiles.block_m, out.shape[2] + 2), torch.float32, device)
    keys = keys_of_group(tiles)
    blocks = dict(
        BLOCK_B=256,
        BLOCK_M=tiles.block_m,
        KEYS=keys,
        HEADS=tiles.heads,
        GROUPS=tiles.block_n // keys,
        BLOCK_D=tiles.block_d,
    )
    launch(
        _decode_kernel,
        (workers * packs,),
        out,
        lse,
        parts,
        plan,
        *args,
        tiles.least,
        device=device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constexprs,
        **blocks,
        BY_WARPS=tiles.by_warps,
        REGISTERS=registers_of(tiles),
        CHAINED=chains(device),
    )
    merge_parts(out, lse, parts, plan, merge_args, constexprs, blocks, tiles, (workers, packs), max_seqlen_q)
