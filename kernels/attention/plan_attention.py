"""How the keys of one step are shared out over the workers of the decode kernel, computed once for all layers.

A plan has a record for each piece of the row of tiles (`schedule.py`): where it begins and ends, and the sequence that
is there with its lengths. So a worker finds its place in one round trip to memory instead of two and a scan, and can go
on with pieces that are left over: a counter for each pack of heads says which is next.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.attention.attention_tiles import Tiles, choose_tiles
from octavo.kernels.attention.paged_check import check_heads, check_lengths, check_rolling, check_tables
from octavo.kernels.attention.schedule import DIVIDED, LEVELS, RECORD, begin_of, find, lengths, store_record
from octavo.kernels.attention.shares import keys_of_group, plan_shape, share_out
from octavo.kernels.checks import check_device
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import OPS, register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import chains, device_properties, let_next_start, next_power_of_2, wait_for_previous
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
    PACKS: tl.constexpr,
    BLOCK_PACKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    workers = tl.num_programs(0) // LEVELS
    level, worker = tl.program_id(0) // workers, tl.program_id(0) % workers
    sequence, _, first, share, total = find(
        worker,
        level,
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
    query_start, query_end, seq_len = lengths(sequence, seq_lens_ptr, cu_seqlens_q_ptr, T, B)
    begin, stop = worker * share, (worker + 1) * share
    if share >= DIVIDED:
        stop = begin + begin_of(share, level + 1)
        begin += begin_of(share, level)
    elif level > 0:
        stop = begin
    record_ptr = plan_ptr + tl.program_id(0) * RECORD
    stop = tl.minimum(stop, total)
    store_record(record_ptr, sequence, first, begin, stop, share, query_start, query_end, seq_len)
    if tl.program_id(0) == 0:
        pack = tl.arange(0, BLOCK_PACKS)
        tl.store(plan_ptr + LEVELS * workers * RECORD + pack, tl.zeros([BLOCK_PACKS], tl.int32), mask=pack < PACKS)


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
    workers, packs = share_out(tiles, kv_heads, group, tokens, query.device)
    plan = empty(plan_shape(tiles, kv_heads, group, tokens, query.device), torch.int32, query.device)
    launch(
        _plan_attention_kernel,
        (workers * LEVELS.value,),
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
        PACKS=packs,
        BLOCK_PACKS=next_power_of_2(packs),
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
    their work then, and take over work from those that are slower: of an H100's multiprocessors some read 20 % faster
    than others. The sums are the same whoever does them, so that the same inputs give the same bits; without a plan the
    bits may differ.

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
        int32, rows of 32 bytes, or `[0, 0]` where `paged_attention` does not share out keys (prefill) and on devices
        without Triton; it takes that as well. The shape depends on the shapes and options and the GPU, and on no
        length.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride, device or option that does not fit.

    A plan belongs to these lengths and options: with others, results are wrong, and may stay so until it is made anew,
    but nothing outside of the tensors is read or written. It holds counters, which `paged_attention` leaves at zero:
    one stream at a time may use it, as often as it likes. No host synchronisation; safe in a CUDA graph, which may be
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
