"""Attention of this step's queries over a paged KV cache: decode tokens and prefill chunks in one launch.

    out[i] = sum_j softmax_j(cap(scale · query[i] · key[j])) · value[j]    over the keys j that query i sees

The queries of a sequence are the last positions of its keys: query i of n stands at position seq_len - n + i, and sees
the keys up to its own position (causal) and not further back than the window. Keys and values lie in pages: position j
in slot j % page_size of page block_table[sequence, j // page_size].

A program owns BLOCK_M rows of one KV head: row m is token m // PACK of the tile and query head m % PACK of the group,
so that the heads that share a KV head share its loads, and a decode token fills the tensor core's rows. The softmax is
the online one of FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), in base 2. Paging after Kwon et
al. 2023, https://arxiv.org/abs/2309.06180.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.online_softmax import attend, find_sequence
from octavo.kernels.attention.paged_check import check_paged_attention
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    wait_for_previous,
)
from octavo.reference import attention as reference

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Tiles:
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_tiles(
    head_size: int, group: int, max_seqlen_q: int, dtype: torch.dtype, properties: DeviceProperties
) -> _Tiles:
    """Rows (tokens × query heads of a group) and keys of a tile; as many stages as shared memory holds, up to four.

    A decode token has one tile of 16 rows, a longer chunk 64 or 128. What bounds a tile is registers: before Hopper the
    queries live in them too, so the tile has fewer keys, and above head size 128 a row needs twice the warps.
    """
    block_d = max(next_power_of_2(head_size), 16)
    if dtype == torch.float32:
        # No tensor cores: a thread holds whole rows of both operands.
        block_m, block_n, num_warps = 16, 16, 8
    else:
        rows = group * max_seqlen_q
        block_m = 16 if rows <= 16 else 64 if rows <= 64 or block_d > 128 else 128
        if block_m == 16:
            block_n, num_warps = 64 if block_d <= 128 else 32, 2 if block_d <= 64 else 4
        else:
            block_n = 64 if block_d <= 64 or (block_d == 128 and properties.capability >= (9, 0)) else 32
            num_warps = 8 if block_m == 128 or block_d > 128 else 4
    free = properties.shared_memory - block_m * block_d * dtype.itemsize - 8192
    # Triton keeps one tile fewer than stages, except where wgmma may still be reading the last one.
    wgmma = properties.capability >= (9, 0) and block_m >= 64
    stages = free // (2 * block_n * block_d * dtype.itemsize) + (not wgmma)
    return _Tiles(block_m, block_n, block_d, num_warps, min(max(stages, 1), 4))


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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    end = tl.minimum(seq_len, table_width * PAGE_SIZE)
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
    if WINDOW:
        start = tl.maximum(tile_start + history - window + 1, 0)

    acc, top, total = attend(
        q,
        position,
        start,
        end,
        key_cache_ptr + kv_head.to(tl.int64) * stride_key_head,
        value_cache_ptr + kv_head.to(tl.int64) * stride_value_head,
        block_table_ptr + sequence.to(tl.int64) * stride_table_sequence,
        num_pages,
        window,
        score_scale,
        cap,
        stride_key_page,
        stride_key_slot,
        stride_value_page,
        stride_value_slot,
        D,
        PAGE_SIZE,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )

    total = tl.where(total == 0.0, 1.0, total)  # nothing attended to: zeros, and a log-sum-exp of -inf
    out = acc / total[:, None]
    row = token64 * (KV_HEADS * GROUP) + head
    out_at = out_ptr + row[:, None] * D + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & (d < D)[None, :])
    if RETURN_LSE:
        # In this form one fused multiply-add rounds the large term once.
        ln2 = 0.6931471805599453
        tl.store(lse_ptr + row, top * ln2 + tl.log2(total) * ln2, mask=wanted)


def _outputs(query: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
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
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(query, return_lse)
    tokens, heads, head_size = query.shape
    sequences, kv_heads = seq_lens.shape[0], key_cache.shape[2]
    group = heads // kv_heads
    tiles = choose_tiles(head_size, group, max_seqlen_q, query.dtype, device_properties(query.device))
    pack = min(group, tiles.block_m)
    # Σ ceil(query length / BLOCK_Q) ≤ T // BLOCK_Q + B over the sequences, and one more part for the padding.
    num_tiles = tokens // (tiles.block_m // pack) + sequences + 1 if tokens else 0
    launch(
        _paged_attention_kernel,
        (num_tiles, kv_heads * cdiv(group, pack)),
        out,
        lse,
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        tokens,
        sequences,
        key_cache.shape[0],
        block_table.shape[1],
        window_size or 0,
        2 * LOG2_E * scale / softcap if softcap else LOG2_E * scale,
        LOG2_E * softcap,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        device=query.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        KV_HEADS=kv_heads,
        GROUP=group,
        PACK=pack,
        D=head_size,
        PAGE_SIZE=key_cache.shape[1],
        CAUSAL=causal,
        WINDOW=window_size is not None,
        SOFTCAP=softcap > 0,
        RETURN_LSE=return_lse,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=tiles.block_d,
        CHAINED=chains(query.device),
    )
    return out, lse


def _paged_attention_fake(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(query, return_lse)


_paged_attention = register(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, SymInt max_seqlen_q, float scale, bool causal, int? window_size, float softcap, "
    "bool return_lse) -> (Tensor, Tensor)",
    reference=reference.paged_attention,
    launcher=_paged_attention_cuda,
    fake=_paged_attention_fake,
)


@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@replayed
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a paged KV cache that holds their keys and values already (`write_kv`).

    `out[i] = Σ_j softmax_j(score(i, j)) · value[j]`, with `score = scale · query[i] · key[j]`, capped to
    `softcap · tanh(score / softcap)` where softcap is not 0. Any mix of decode tokens and prefill chunks.

    Args:
        query: `[tokens, heads, head_size]`, fp16, bf16 or fp32; last dimension contiguous, the others of any stride;
            head_size a multiple of 8 up to 256. Sequence b owns rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]`: the
            last positions of its `seq_lens[b]` keys.
        key_cache: `[pages, page_size, kv_heads, head_size]`, query's dtype; last dimension contiguous, the others of
            any stride. heads is a multiple of kv_heads; heads `h·group` to `(h+1)·group` use KV head h.
        value_cache: as key_cache; its strides may differ.
        block_table: `[sequences, max_pages]` int32, the page ids of each sequence in order; rows of any stride. Entries
            past the sequence's end, or wholly before the window of its first query, are never read.
        seq_lens: `[sequences]` int32, keys of each sequence, this step's included; 0 for a padding entry.
        cu_seqlens_q: `[sequences + 1]` int32, starts at 0; rows from its last value on are padding.
        max_seqlen_q: upper bound of queries a sequence; it guides the tile choice only, so a wrong one costs speed.
        scale: of the scores; `head_size ** -0.5` if None.
        causal: whether a query sees no key after its own position; else it sees all of its sequence's.
        window_size: a query sees its own position and the `window_size - 1` before it (Hugging Face's sliding_window);
            None for no limit. Without causal it limits the past alone.
        softcap: in units of the scores (Gemma 2 has 50.0); 0.0 for none.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `[tokens, heads, head_size]`, contiguous, in query's dtype; with return_lse also `[tokens, heads]` fp32, natural
        logarithm. Rows with nothing to attend to (padding, a sequence of no keys) are 0, with a log-sum-exp of -inf.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride, device or option that does not fit; on the CPU, a page id outside of the cache or
            lengths that contradict each other. A GPU kernel leaves out the keys of such pages, since it can't raise
            without a synchronisation.

    Sums, softmax and scores are fp32. Safe in a CUDA graph, which may be replayed with other lengths and pages.
    https://arxiv.org/abs/2309.06180, https://arxiv.org/abs/2205.14135
    """
    check_paged_attention(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q)
    if max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q: {max_seqlen_q}; expected at least 0")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size: {window_size}; expected at least 1 (the token itself), or None for no window")
    if softcap < 0:
        raise ValueError(f"softcap: {softcap}; expected a positive number, or 0.0 for none")
    if scale is None:
        scale = query.shape[2] ** -0.5
    out, lse = _paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
        causal,
        window_size,
        softcap,
        return_lse,
    )
    return (out, lse) if return_lse else out
