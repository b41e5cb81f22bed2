"""Attention of this step's queries over a paged KV cache: decode tokens and prefill chunks in one launch.

    out[i] = sum_j softmax_j(cap(scale · query[i] · key[j])) · value[j]    over the keys j that query i sees

The queries of a sequence are the last positions of its keys: query i of n stands at position seq_len - n + i, and sees
the keys up to its own position (causal) and not further back than the window. Keys and values lie in pages: position j
in slot j % page_size of page block_table[sequence, j // page_size], or of page j // page_size % max_pages of a rolling
buffer, whose oldest positions the newest replace (Mistral 7B, https://arxiv.org/abs/2310.06825).

A program owns BLOCK_M rows of one KV head: row m is token m // PACK of the tile and query head m % PACK of the group,
so that the heads that share a KV head share its loads, and a decode token fills the tensor core's rows. The softmax is
the online one of FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), in base 2. Paging after Kwon et
al. 2023, https://arxiv.org/abs/2309.06180.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.attention_tiles import choose_tiles
from octavo.kernels.attention.decode import decode
from octavo.kernels.attention.kv_cache import check_supported, scale_stride, strides_of
from octavo.kernels.attention.online_softmax import attend, find_sequence, of_heads, store_result
from octavo.kernels.attention.prefill import prefill, takes
from octavo.kernels.attention.shares import check_plan_shape, plan_shape
from octavo.kernels.launch import empty, launch
from octavo.kernels.tiles import cdiv, chains, device_properties, let_next_start, wait_for_previous

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["T", "B", "table_width", "num_pages", "window", "stride_table_sequence"])
def _paged_attention_kernel(
    # Decode is bound by reading the cache once, long prefill by the tensor cores. One program a query tile and KV head.
    out_ptr,
    lse_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    # Later tiles of a causal prefill have more keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // PACKS
    sequence, first_tile = find_sequence(cu_seqlens_q_ptr, tile, B, BLOCK_Q)
    # Rows after the last sequence are the padding of a captured graph: a sequence of no keys.
    query_start = tl.load(cu_seqlens_q_ptr + sequence)
    query_end = tl.minimum(tl.load(cu_seqlens_q_ptr + sequence + 1, mask=sequence < B, other=T), T)
    seq_len = tl.load(seq_lens_ptr + sequence, mask=sequence < B, other=0)
    tile_start = query_start + (tile - first_tile) * BLOCK_Q
    if tile_start >= query_end:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = tile_start + m // PACK  # [M]
    group_head = tl.program_id(1) % PACKS * PACK + m % PACK
    wanted = (m < BLOCK_Q * PACK) & (token < query_end) & (group_head < GROUP)
    head = kv_head * GROUP + group_head
    token64 = token.to(tl.int64)
    q_at = token64 * stride_query_token + head.to(tl.int64) * stride_query_head
    q = tl.load(query_ptr + q_at[:, None] + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0.0)  # [M, D]

    history = seq_len - query_end
    position = token + history
    last_position = tl.minimum(tile_start + BLOCK_Q, query_end) - 1 + history
    start = 0
    end = seq_len if ROLLING else tl.minimum(seq_len, table_width * PAGE_SIZE)
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
    if WINDOW:
        start = tl.maximum(tile_start + history - window + 1, 0)
    if ROLLING:
        start = tl.maximum(start, seq_len - table_width * PAGE_SIZE)  # what is further back has been overwritten
    first = None
    if BATCH_INVARIANT:
        first = start
        start = start // BLOCK_N * BLOCK_N  # a key lies in the same tile for every row that sees it

    kv_head64 = kv_head.to(tl.int64)
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head64 * stride_k_scale
    if v_scale_ptr is not None:
        v_scale_ptr += kv_head64 * stride_v_scale
    if key_scale_cache_ptr is not None:
        key_scale_cache_ptr += kv_head64 * stride_key_scale_head
        value_scale_cache_ptr += kv_head64 * stride_value_scale_head
    slope = alibi_slopes_ptr
    if slope is not None:
        slope = of_heads(alibi_slopes_ptr, head, wanted)
    acc, top, total = attend(
        q,
        position,
        slope,
        start,
        end,
        key_cache_ptr + kv_head64 * stride_key_head,
        value_cache_ptr + kv_head64 * stride_value_head,
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
        first,
    )

    store_result(
        out_ptr,
        lse_ptr,
        sinks_ptr,
        acc,
        top,
        total,
        token64,
        head,
        wanted,
        KV_HEADS * GROUP,
        D,
        BLOCK_D,
        RETURN_LSE,
    )


def outputs(query: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = empty(query.shape, query.dtype, query.device)
    lse = empty(query.shape[:2] if return_lse else (0,), torch.float32, query.device)
    return out, lse


def _paged_attention_cuda(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    causal: bool,
    window_size: int | None,
    softcap: float,
    return_lse: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    rolling: bool,
    batch_invariant: bool,
    plan: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_supported(key_cache)
    out, lse = outputs(query, return_lse)
    tokens, heads, head_size = query.shape
    sequences, kv_heads = seq_lens.shape[0], key_cache.shape[2]
    group = heads // kv_heads
    if plan is not None and not plan.numel():
        plan = None  # where no kernel would use it, there is none
    tiles = choose_tiles(
        head_size,
        kv_heads,
        group,
        tokens,
        max_seqlen_q,
        query.dtype,
        device_properties(query.device),
        quantised=key_cache.element_size() == 1,
        plain=alibi_slopes is None,
        batch_invariant=batch_invariant,
    )
    if plan is not None:
        check_plan_shape(plan, plan_shape(tiles, kv_heads, group, tokens, query.device))
    pack = min(group, tiles.block_m)
    window = min(window_size or 0, 2**30)  # so that what the kernels add to it stays below 2³¹
    score_scale = 2 * LOG2_E * scale / softcap if softcap else LOG2_E * scale
    cap = LOG2_E * softcap
    args = (
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        k_scale,
        v_scale,
        key_scale_cache,
        value_scale_cache,
        sinks,
        alibi_slopes,
        tokens,
        sequences,
        key_cache.shape[0],
        block_table.shape[1],
        window,
        score_scale,
        cap,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        scale_stride(k_scale),
        scale_stride(v_scale),
        *strides_of(key_scale_cache),
        *strides_of(value_scale_cache),
    )
    options = dict(
        CAUSAL=causal,
        WINDOW=window_size is not None,
        ROLLING=rolling,
        SOFTCAP=softcap > 0,
        RETURN_LSE=return_lse,
    )
    properties = device_properties(query.device)
    if not tiles.workers and takes(query, key_cache, value_cache, alibi_slopes, scale, batch_invariant, properties):
        tables, numbers = (block_table, seq_lens, cu_seqlens_q), (window, score_scale, cap)
        prefill(out, lse, query, key_cache, value_cache, tables, (k_scale, v_scale), sinks, numbers, options)
        return out, lse
    constexprs = dict(KV_HEADS=kv_heads, GROUP=group, PACK=pack, D=head_size, PAGE_SIZE=key_cache.shape[1], **options)
    if tiles.workers:
        merge_args = seq_lens, cu_seqlens_q, sinks, tokens, sequences, block_table.shape[1], window
        decode(out, lse, plan, args, merge_args, constexprs, tiles, max_seqlen_q)
        return out, lse
    # Σ ceil(query length / BLOCK_Q) ≤ T // BLOCK_Q + B over the sequences, and one more part for the padding.
    num_tiles = tokens // (tiles.block_m // pack) + sequences + 1 if tokens else 0
    launch(
        _paged_attention_kernel,
        (num_tiles, kv_heads * cdiv(group, pack)),
        out,
        lse,
        *args,
        device=query.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constexprs,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=tiles.block_d,
        BATCH_INVARIANT=batch_invariant,
        CHAINED=chains(query.device),
    )
    return out, lse
