"""Sorting the pairs of a token and one of its experts by expert: what permutations and grouped products start from.

The order is stable: pairs of an expert stand by token, then by the place of the expert among the token's. A pair's
place is the number of pairs that come before it, and that is what is counted. Of few pairs, each is compared with all
others, by as many programs as it takes: one kernel. Of many, blocks of pairs are counted by expert, the counts are
summed over the blocks before each, and each block puts its pairs into place: three kernels. Counts do not depend on the
order of counting, so neither does the result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    INTS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
)
from octavo.kernels.debug import assert_ids
from octavo.kernels.launch import empty, launch
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous

MAX_EXPERTS = 512
"""Of a layer, on one device: a program counts them all at once."""

MOST_COMPARED = 4096
"""Pairs that are each compared with all others: 4096 of them are 17 million comparisons, some 2 µs of an H100's SMs."""


@dataclass(frozen=True)
class _Tiles:
    queries: int
    """Pairs that a program puts into place."""
    block: int
    """Pairs that it compares them with at once."""
    num_warps: int


def choose_tiles(pairs: int) -> _Tiles:
    """Comparisons held in registers, 16 to 64 a thread; few queries a program where all are compared with all.

    Then pairs are read a thousand at a time, where there are as many: each reading waits for the memory.
    """
    if pairs <= MOST_COMPARED:
        return _Tiles(16, 256 if pairs <= 256 else 1024, 8)
    return _Tiles(256, 32, 8)


@triton.jit
def expert_of(
    topk_ids_ptr, expert_map_ptr, at, inside, top_k, num_experts, map_size, stride_ids_token, DENSE: tl.constexpr
):
    """Expert on this device of the pairs `at`, as int32; num_experts for those that have none, and past the end."""
    if DENSE:
        topk_ids_ptr += at
    else:
        token = at // top_k
        topk_ids_ptr += token.to(tl.int64) * stride_ids_token + (at - token * top_k)
    ids = tl.load(topk_ids_ptr, mask=inside, other=-1)
    if expert_map_ptr is not None:
        known = (ids >= 0) & (ids < map_size)
        ids = tl.load(expert_map_ptr + tl.where(known, ids, 0), mask=known, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def place_of(experts, other, pair):
    """A pair's expert, and where its row comes in a stable sort, of the experts `[OTHERS]` of all pairs `other`."""
    mine = tl.sum(tl.where(other == pair, experts, 0))
    return mine, tl.sum(((experts < mine) | ((experts == mine) & (other < pair))).to(tl.int32))


@triton.jit
def _put(order_ptr, positions_ptr, at, place, expert, inside, num_experts):
    tl.store(order_ptr + place, at, mask=inside)
    tl.store(positions_ptr + at, tl.where(expert < num_experts, place, -1), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def _sort_few_kernel(
    # Bound by latency, and by comparisons with thousands of pairs; queries are pairs, then the offsets of the experts.
    order_ptr,
    offsets_ptr,
    positions_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    pairs,
    top_k,
    num_experts,
    map_size,
    stride_ids_token,
    DENSE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    is_pair = at < pairs
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    expert = expert_of(
        topk_ids_ptr, expert_map_ptr, at, is_pair, top_k, num_experts, map_size, stride_ids_token, DENSE
    )  # [QUERIES]
    key = tl.where(is_pair, expert * pairs + at, (at - pairs) * pairs)
    before = tl.zeros([QUERIES, BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        other = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = other < pairs
        other_expert = expert_of(
            topk_ids_ptr, expert_map_ptr, other, inside, top_k, num_experts, map_size, stride_ids_token, DENSE
        )
        other_key = tl.where(inside, other_expert * pairs + other, 0x7FFFFFFF)
        # 1 where the other's is less: two instructions, where a comparison makes three.
        before += ((other_key[None, :] - key[:, None]).to(tl.uint32) >> 31).to(tl.int32)
    place = tl.sum(before, 1)  # [QUERIES]
    _put(order_ptr, positions_ptr, at, place, expert, is_pair, num_experts)
    tl.store(offsets_ptr + (at - pairs), place, mask=(at >= pairs) & (at - pairs <= num_experts))


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    # Bound by latency: a block of pairs is read, and its count of each expert, and of none, is written.
    counts_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    pairs,
    top_k,
    num_experts,
    map_size,
    stride_ids_token,
    DENSE: tl.constexpr,
    QUERIES: tl.constexpr,
    BINS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    inside = at < pairs
    bins = tl.arange(0, BINS)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    expert = expert_of(topk_ids_ptr, expert_map_ptr, at, inside, top_k, num_experts, map_size, stride_ids_token, DENSE)
    # What is past the end counts as pairs without an expert, which nothing comes after.
    counts_ptr += tl.program_id(0).to(tl.int64) * (num_experts + 1)
    tl.store(counts_ptr + bins, tl.histogram(expert, BINS), mask=bins <= num_experts)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(
    # Bound by latency: the counts are read, and overwritten with the sums of those of the blocks before.
    counts_ptr,
    totals_ptr,
    blocks,
    num_experts,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    bins = tl.program_id(0) * BINS + tl.arange(0, BINS)
    used = bins <= num_experts
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block.to(tl.int64)[:, None] * (num_experts + 1) + bins[None, :]  # [BLOCKS, BINS]
        mask = (block < blocks)[:, None] & used[None, :]
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        tl.store(counts_ptr + at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + bins, total, mask=used)


@triton.jit(do_not_specialize=["pairs"])
def _place_kernel(
    # Bound by comparisons: each pair of a block with the others of the block.
    order_ptr,
    offsets_ptr,
    positions_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    counts_ptr,
    totals_ptr,
    pairs,
    top_k,
    num_experts,
    map_size,
    stride_ids_token,
    DENSE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    first = tl.program_id(0) * QUERIES
    at = first + tl.arange(0, QUERIES)  # [QUERIES]
    inside = at < pairs
    bins = tl.arange(0, BINS)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    expert = expert_of(topk_ids_ptr, expert_map_ptr, at, inside, top_k, num_experts, map_size, stride_ids_token, DENSE)
    earlier = tl.zeros([QUERIES, BLOCK], tl.int32)
    for start in range(first, first + QUERIES, BLOCK):
        other = start + tl.arange(0, BLOCK)  # [BLOCK]
        other_expert = expert_of(
            topk_ids_ptr, expert_map_ptr, other, other < pairs, top_k, num_experts, map_size, stride_ids_token, DENSE
        )
        earlier += ((other_expert[None, :] == expert[:, None]) & (other[None, :] < at[:, None])).to(tl.int32)
    totals = tl.load(totals_ptr + bins, mask=bins <= num_experts, other=0)
    offsets = tl.cumsum(totals, 0) - totals  # [BINS]
    counts_ptr += tl.program_id(0).to(tl.int64) * (num_experts + 1)
    place = tl.gather(offsets, expert, 0) + tl.load(counts_ptr + expert) + tl.sum(earlier, 1)
    _put(order_ptr, positions_ptr, at, place, expert, inside, num_experts)
    tl.store(offsets_ptr + bins, offsets, mask=(tl.program_id(0) == 0) & (bins <= num_experts))


def sort_by_expert(
    topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts pairs by expert, inside a launcher: one kernel or three.

    Args:
        topk_ids: `[tokens, top_k]` int32 or int64, as `check_pairs` accepts them.
        num_experts: how many experts are on this device, up to `MAX_EXPERTS`.
        expert_map: `[all experts]` int32: the number on this device of each, or -1.

    Returns:
        `order` `[tokens · top_k]` int32, the pair `token · top_k + j` of each sorted row; pairs that have no expert
        here come last. `offsets` `[num_experts + 1]` int32, where the rows of each expert begin, and where the last
        end. `positions` `[tokens, top_k]` int32, the row of each pair, or -1 where it has no expert here.
    """
    tokens, top_k = topk_ids.shape
    device, pairs = topk_ids.device, tokens * top_k
    order = empty((pairs,), torch.int32, device)
    offsets = empty((num_experts + 1,), torch.int32, device)
    positions = empty((tokens, top_k), torch.int32, device)
    map_size = 0 if expert_map is None else expert_map.shape[0]
    dense = topk_ids.stride(0) == top_k
    sizes = pairs, top_k, num_experts, map_size, topk_ids.stride(0)
    tiles = choose_tiles(pairs)
    if pairs <= MOST_COMPARED:
        launch(
            _sort_few_kernel,
            (cdiv(pairs + num_experts + 1, tiles.queries),),
            order,
            offsets,
            positions,
            topk_ids,
            expert_map,
            *sizes,
            device=device,
            num_warps=tiles.num_warps,
            DENSE=dense,
            QUERIES=tiles.queries,
            BLOCK=tiles.block,
            CHAINED=chains(device),
        )
        return order, offsets, positions
    blocks, bins = cdiv(pairs, tiles.queries), next_power_of_2(num_experts + 1)
    counts = empty((blocks, num_experts + 1), torch.int32, device)
    totals = empty((num_experts + 1,), torch.int32, device)
    launch(
        _count_kernel,
        (blocks,),
        counts,
        topk_ids,
        expert_map,
        *sizes,
        device=device,
        DENSE=dense,
        QUERIES=tiles.queries,
        BINS=max(bins, 32),  # as many as a warp has threads, at least
        CHAINED=chains(device),
    )
    launch(
        _scan_kernel,
        (cdiv(num_experts + 1, 16),),
        counts,
        totals,
        blocks,
        num_experts,
        device=device,
        BLOCKS=128,
        BINS=16,
        CHAINED=chains(device),
    )
    launch(
        _place_kernel,
        (blocks,),
        order,
        offsets,
        positions,
        topk_ids,
        expert_map,
        counts,
        totals,
        *sizes,
        device=device,
        num_warps=tiles.num_warps,
        DENSE=dense,
        QUERIES=tiles.queries,
        BLOCK=tiles.block,
        BINS=bins,
        CHAINED=chains(device),
    )
    return order, offsets, positions


def check_pairs(topk_ids: torch.Tensor, x: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> None:
    """Raises TypeError or ValueError unless `topk_ids` are experts of the tokens of `x`, `num_experts` of them here.

    Their values are looked at by `octavo.kernels.debug` alone.
    """
    check_dtype("topk_ids", topk_ids, INTS)
    check_ndim("topk_ids", topk_ids, 2, "[tokens, top_k]")
    check_last_dim_contiguous("topk_ids", topk_ids)
    check_device("topk_ids", topk_ids, "x", x)
    if topk_ids.shape[0] != x.shape[0] or topk_ids.shape[1] < 1:
        raise ValueError(
            f"topk_ids: shape {tuple(topk_ids.shape)}; expected ({x.shape[0]}, top_k): for each token of x at least one"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: {num_experts}; expected 1 to {MAX_EXPERTS}")
    if expert_map is not None:
        check_dtype("expert_map", expert_map, (torch.int32,))
        check_ndim("expert_map", expert_map, 1, "[all experts]: the number of each on this device, or -1")
        check_contiguous("expert_map", expert_map)
        check_device("expert_map", expert_map, "x", x)
        if expert_map.shape[0] == 0:
            raise ValueError("expert_map: no experts; expected the number on this device of each expert, or -1")
        assert_ids("expert_map", expert_map, num_experts, "the experts on this device")
    known = num_experts if expert_map is None else expert_map.shape[0]
    assert_ids("topk_ids", topk_ids, known, "all experts" if expert_map is not None else "the experts of this device")
