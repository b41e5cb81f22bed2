"""What comes ahead of the products of few tokens, in one kernel: rows sorted by expert, and the plan of their tiles.

Each program finds out by itself where its row belongs, by comparing the row's expert with those of all: with few pairs
of a token and an expert that takes less than starting a kernel that sorts, whose result is the same (`sort.py`,
`schedule.py`).
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import empty, launch
from octavo.kernels.moe.schedule import CHUNK, GROUP, copy_row, describe, most_tiles
from octavo.kernels.moe.sort import expert_of, place_of
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous

MOST_PAIRS = 512
"""A program reads them all."""


@triton.jit(do_not_specialize=["pairs", "max_tiles", "chunks", "top_k"])
def _arrange_kernel(
    # Bound by latency: ids are read, then a row is written. Some programs describe tiles; each other one has a row.
    plan_ptr,
    positions_ptr,
    rows_ptr,
    row_scales_ptr,
    x_ptr,
    x_scale_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    pairs,
    num_experts,
    map_size,
    max_tiles,
    chunks,
    top_k,
    width,
    groups,
    stride_x,
    stride_ids_token,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    pair = tl.program_id(0) - chunks
    other = tl.arange(0, OTHERS)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    experts = expert_of(
        topk_ids_ptr, expert_map_ptr, other, other < pairs, top_k, num_experts, map_size, stride_ids_token, False
    )  # [OTHERS]
    if pair < 0:
        bins = tl.arange(0, EXPERTS)
        rows = tl.where(bins < num_experts, tl.histogram(experts, EXPERTS), 0)
        describe(plan_ptr, tl.cumsum(rows) - rows, rows, pair + chunks, max_tiles, ROWS, TAIL, GROUP, EXPERTS, CHUNK)
    else:
        token = pair // top_k
        mine, row = place_of(experts, other, pair)
        tl.store(positions_ptr + pair, tl.where(mine < num_experts, row, -1))
        copy_row(rows_ptr, row_scales_ptr, x_ptr, x_scale_ptr, row, token, width, groups, stride_x, BLOCK, GROUPS)


def arrange(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
    tile: int,
    tail: int,
    most: int,
    x_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """What `gather_and_plan` returns, and positions. `most`: pairs that there may be, of which the kernel depends."""
    (tokens, top_k), device, width = topk_ids.shape, x.device, x.shape[1]
    pairs = tokens * top_k
    tiles = most_tiles(pairs, num_experts, tile)
    chunks = cdiv(tiles, CHUNK)
    groups = 1 if x_scale is None else x_scale.shape[1]
    plan = empty((8 * (1 + tiles),), torch.int32, device)
    positions = empty((tokens, top_k), torch.int32, device)
    rows = empty((pairs, width), x.dtype, device)
    row_scales = None if x_scale is None else empty((pairs, groups), torch.float32, device)
    launch(
        _arrange_kernel,
        (chunks + pairs,),
        plan,
        positions,
        rows,
        row_scales,
        x,
        x_scale,
        topk_ids,
        expert_map,
        pairs,
        num_experts,
        0 if expert_map is None else expert_map.shape[0],
        tiles,
        chunks,
        top_k,
        width,
        groups,
        x.stride(0),
        topk_ids.stride(0),
        device=device,
        num_warps=4,
        GROUPS=next_power_of_2(groups),
        ROWS=tile,
        TAIL=tail,
        GROUP=GROUP,
        EXPERTS=max(next_power_of_2(num_experts + 1), 32),  # as many as a warp has threads, at least
        CHUNK=CHUNK,
        OTHERS=64 if most <= 64 else MOST_PAIRS,
        BLOCK=min(next_power_of_2(width), 4096),
        CHAINED=chains(device),
    )
    return rows, row_scales, plan, positions
