"""How the keys of one step are shared out over the workers of the decode kernel, computed once for all layers.

A plan has a row a worker of that kernel (`schedule.py`): where its share begins and ends, and the sequence that is
there with its lengths. So a worker finds its place in one round trip to memory instead of two and a scan.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.attention_tiles import Tiles, choose_tiles
from octavo.kernels.attention.paged_check import check_heads, check_lengths, check_rolling, check_tables
from octavo.kernels.attention.schedule import RECORD, find, lengths, store_record
from octavo.kernels.attention.shares import keys_of_group, plan_shape
from octavo.kernels.checks import check_device
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import OPS, register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import chains, device_properties, let_next_start, wait_for_previous
from octavo.reference import attention as reference


@triton.jit(do_not_specialize=["T", "B", "max_keys", "window", "least"])
def _plan_attention_kernel(
    # Bound by latency: a round trip for 255 sequences. One program a worker.
    plan_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    T,
    B,
    max_keys,
    window,
    least,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    worker = tl.program_id(0)
    sequence, _, first, share, total = find(
        worker,
        seq_lens_ptr,
        cu_seqlens_q_ptr,
        T,
        B,
        max_keys,
        window,
        tl.num_programs(0),
        least,
        False,
        CAUSAL,
        WINDOW,
        BLOCK_Q,
        BLOCK_N,
        KEYS,
        BLOCK_B,
    )
    query_start, query_end, seq_len = lengths(sequence, seq_lens_ptr, cu_seqlens_q_ptr, T, B)
    begin = worker * share
    stop = tl.minimum(begin + share, total)
    store_record(plan_ptr + worker * RECORD, sequence, first, begin, stop, share, query_start, query_end, seq_len)


def _tiles(query: torch.Tensor, key_cache: torch.Tensor, max_seqlen_q: int, alibi: bool) -> Tiles:
    tokens, heads, head_size = query.shape
    return choose_tiles(
        head_size,
        key_cache.shape[2],
        heads // key_cache.shape[2],
        tokens,
        max_seqlen_q,
        query.dtype,
        device_properties(query.device),
        quantised=key_cache.element_size() == 1,
        plain=not alibi,
    )


def shape_of(query: torch.Tensor, key_cache: torch.Tensor, max_seqlen_q: int, alibi: bool) -> tuple[int, int]:
    """The shape of the plan of a call with these."""
    (tokens, heads, _), kv_heads = query.shape, key_cache.shape[2]
    tiles = _tiles(query, key_cache, max_seqlen_q, alibi)
    return plan_shape(tiles, kv_heads, heads // kv_heads, tokens, query.device)


def _plan_attention_cuda(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    causal: bool,
    window_size: int | None,
    rolling: bool,
    alibi: bool,
) -> torch.Tensor:
    (tokens, heads, _), kv_heads = query.shape, key_cache.shape[2]
    group = heads // kv_heads
    tiles = _tiles(query, key_cache, max_seqlen_q, alibi)
    shape = plan_shape(tiles, kv_heads, group, tokens, query.device)
    plan = empty(shape, torch.int32, query.device)
    launch(
        _plan_attention_kernel,
        shape[:1],
        plan,
        seq_lens,
        cu_seqlens_q,
        tokens,
        seq_lens.shape[0],
        2**31 - 1 if rolling else min(block_table.shape[1] * key_cache.shape[1], 2**31 - 1),
        min(window_size or 0, 2**30),
        tiles.least,
        device=query.device,
        num_warps=4,
        CAUSAL=causal,
        WINDOW=window_size is not None,
        BLOCK_B=256,
        BLOCK_Q=tiles.block_m // min(group, tiles.block_m),
        BLOCK_N=tiles.block_n,
        KEYS=keys_of_group(tiles),
        CHAINED=chains(query.device),
    )
    return plan


def _plan_attention_fake(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    causal: bool,
    window_size: int | None,
    rolling: bool,
    alibi: bool,
) -> torch.Tensor:
    if OPS["plan_attention"].backend(query.device) == "reference":
        return query.new_empty((0, 0), dtype=torch.int32)
    return query.new_empty(shape_of(query, key_cache, max_seqlen_q, alibi), dtype=torch.int32)


_plan_attention = register(
    "plan_attention(Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, "
    "SymInt max_seqlen_q, bool causal, int? window_size, bool rolling, bool alibi) -> Tensor",
    reference=reference.plan_attention,
    launcher=_plan_attention_cuda,
    fake=_plan_attention_fake,
)


@replayed
def plan_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int,
    causal: bool = True,
    window_size: int | None = None,
    rolling: bool = False,
    alibi: bool = False,
) -> torch.Tensor:
    """How `paged_attention` shares out the keys of one step, computed on the device, once for all layers.

    `plan = plan_attention(...)`, then in each layer `paged_attention(..., plan=plan)`, whose programs need not look for
    their work then: 1 µs on an H100. The result has the same bits as without.

    Args:
        query: that of any layer, of which its shape, dtype and device count; it may be that of a later call.
        key_cache: likewise; so is it with its page size.
        block_table: `[sequences, max_pages]` int32, of which its shape counts, too.
        seq_lens: `[sequences]` int32, as for `paged_attention`.
        cu_seqlens_q: `[sequences + 1]` int32, as for `paged_attention`.
        max_seqlen_q: as for `paged_attention`; so are causal, window_size and rolling.
        causal: whether a query sees no key after its own position.
        window_size: how far back a query sees, or None.
        rolling: whether rows of block_table are rings.
        alibi: whether `alibi_slopes` will be given.

    Returns:
        int32, a row of 32 bytes for each worker, or `[0, 0]` where `paged_attention` does not share out keys (prefill)
        and on devices without Triton; it takes that as well. The shape depends on the shapes and options and the GPU,
        and on no length.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride, device or option that does not fit.

    A plan belongs to these lengths and options: with others, results are wrong, but nothing outside of the tensors is
    read or written. `paged_attention` does not change it. No host synchronisation; safe in a CUDA graph, which may be
    replayed with other lengths if the plan is made inside.
    Stream-K: https://arxiv.org/abs/2301.03598
    """
    check_heads(query, key_cache)
    check_device("key_cache", key_cache, "query", query)
    check_tables(query, block_table, seq_lens, cu_seqlens_q)
    check_lengths(max_seqlen_q, window_size)
    if rolling:
        check_rolling(block_table, key_cache.shape[1], window_size, max_seqlen_q)
    return _plan_attention(
        query,
        key_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        causal,
        window_size,
        rolling,
        alibi,
    )
