"""Which tiles a product by experts has, worked out on the device: how many rows an expert has is known there alone.

A tile is as many rows of one expert as a program takes at a time, or what is left of them; an expert's last tile may
have up to TAIL rows more. An expert without rows has none. The plan is int32: the number of tiles, then, from 8 on, 8
numbers a tile: expert, first row, rows, and of the group that it belongs to the first tile and how many there are.
Programs walk the tiles of a group together, one column of outputs after the other, so that what they read of an
expert's weights is in the cache (L2) for all of them.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import empty, launch
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous

GROUP = 8
"""Tiles of a group, at most."""
CHUNK = 16
"""Tiles that one program describes."""


@triton.jit
def unit_at(plan_ptr, unit, n_tiles):
    """Expert, first row and number of rows, and which of `n_tiles` columns: of a unit of work, a tile by a column.

    Tiles of a group come in another order each time that all programs have had a unit: else one of them would always
    meet the last tile, which is the shortest, if the number of programs is a multiple of that of tiles.
    """
    near_ptr = plan_ptr + 8 + unit // n_tiles * 8  # another tile of the same group
    first, size = tl.load(near_ptr + 3), tl.load(near_ptr + 4)
    rest = unit - first * n_tiles
    turn = rest % size
    tile_ptr = plan_ptr + 8 + (first + (turn + (rest - turn) // tl.num_programs(0)) % size) * 8
    return tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), rest // size


@triton.jit
def _ends(offsets_ptr, expert, mask, S):
    """First row of an expert and that behind its last: within the S that there are, whatever the offsets say."""
    start = tl.load(offsets_ptr + expert, mask=mask, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=mask, other=0)
    start = tl.minimum(tl.maximum(start, 0), S)
    return start, tl.minimum(tl.maximum(end, start), S)


@triton.jit
def _tiles_of(rows, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """How many tiles an expert's rows are."""
    tiles = (rows + ROWS - 1) // ROWS
    if TAIL > 0:
        tiles = tl.where(rows > TAIL, (rows - TAIL + ROWS - 1) // ROWS, tl.minimum(tiles, 1))
    return tiles


@triton.jit
def describe(
    plan_ptr, start, rows, chunk, max_tiles, ROWS: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr, EXPERTS:
    tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes CHUNK tiles of the plan, from the first row of each expert and how many it has, `[EXPERTS]`."""
    expert = tl.arange(0, EXPERTS)
    tiles = _tiles_of(rows, ROWS, TAIL)  # [EXPERTS]
    until = tl.cumsum(tiles)
    tile = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = tl.sum((until[None, :] <= tile[:, None]).to(tl.int32), 1)  # [CHUNK]
    before = tl.sum(tl.where(expert[None, :] < mine[:, None], tiles[None, :], 0), 1)
    is_mine = expert[None, :] == mine[:, None]
    start = tl.sum(tl.where(is_mine, start[None, :], 0), 1)
    rows = tl.sum(tl.where(is_mine, rows[None, :], 0), 1)
    count = tl.minimum(tl.sum(tiles), max_tiles)
    exists = tile < count
    at = tile - before
    left = rows - at * ROWS
    group = at // GROUP * GROUP
    tile_ptr = plan_ptr + 8 + tile * 8
    tl.store(tile_ptr, mine, mask=exists)
    tl.store(tile_ptr + 1, start + at * ROWS, mask=exists)
    tl.store(tile_ptr + 2, tl.where(left <= ROWS + TAIL, left, ROWS), mask=exists)
    tl.store(tile_ptr + 3, before + group, mask=exists)
    tl.store(tile_ptr + 4, tl.minimum(_tiles_of(rows, ROWS, TAIL) - group, GROUP), mask=exists)
    if chunk == 0:
        tl.store(plan_ptr, count)


@triton.jit
def copy_row(
    rows_ptr,
    row_scales_ptr,
    x_ptr,
    x_scale_ptr,
    row,
    token,
    width,
    groups,
    stride_x,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Makes a token's numbers, and its scales where it has some, those of a row."""
    if x_scale_ptr is not None:
        group = tl.arange(0, GROUPS)
        scales = tl.load(x_scale_ptr + token * groups + group, mask=group < groups)
        tl.store(row_scales_ptr + row * groups + group, scales, mask=group < groups)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token.to(tl.int64) * stride_x + cols, mask=cols < width)
        tl.store(rows_ptr + row.to(tl.int64) * width + cols, x, mask=cols < width)


@triton.jit(do_not_specialize=["S", "E", "max_tiles", "chunks", "top_k"])
def _schedule_kernel(
    # Bound by memory: rows read and written once. Some programs describe tiles; each other one has a row.
    plan_ptr,
    offsets_ptr,
    rows_ptr,
    x_ptr,
    order_ptr,
    row_scales_ptr,
    x_scale_ptr,
    S,
    E,
    max_tiles,
    chunks,
    top_k,
    width,
    groups,
    stride_x,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0) - chunks
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if row < 0:
        expert = tl.arange(0, EXPERTS)
        start, end = _ends(offsets_ptr, expert, expert < E, S)
        describe(plan_ptr, start, end - start, row + chunks, max_tiles, ROWS, TAIL, GROUP, EXPERTS, CHUNK)
    elif x_ptr is not None:
        token = tl.load(order_ptr + row) // top_k
        copy_row(rows_ptr, row_scales_ptr, x_ptr, x_scale_ptr, row, token, width, groups, stride_x, BLOCK, GROUPS)
    elif (row < tl.load(offsets_ptr)) | (row >= tl.load(offsets_ptr + E)):
        for first in range(0, width, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], rows_ptr.dtype.element_ty)
            tl.store(rows_ptr + row.to(tl.int64) * width + cols, zeros, mask=cols < width)


def most_tiles(rows: int, experts: int, tile: int) -> int:
    """How many tiles there are at most: whole ones, and one of each expert that is not full."""
    return rows // tile + min(experts, rows)


def _plan(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    tile: int,
    tail: int,
    x: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    top_k: int = 1,
    row_scales: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    (count, width), experts = rows.shape, offsets.shape[0] - 1
    tiles = most_tiles(count, experts, tile)
    chunks = cdiv(tiles, CHUNK)
    groups = 1 if x_scale is None else x_scale.shape[1]
    plan = empty((8 * (1 + tiles),), torch.int32, rows.device)
    launch(
        _schedule_kernel,
        (chunks + count,),
        plan,
        offsets,
        rows,
        x,
        order,
        row_scales,
        x_scale,
        count,
        experts,
        tiles,
        chunks,
        top_k,
        width,
        groups,
        0 if x is None else x.stride(0),
        device=rows.device,
        num_warps=4,
        GROUPS=next_power_of_2(groups),
        ROWS=tile,
        TAIL=tail,
        GROUP=GROUP,
        EXPERTS=next_power_of_2(experts),
        CHUNK=CHUNK,
        BLOCK=min(next_power_of_2(width), 4096),
        CHAINED=chains(rows.device),
    )
    return plan


def gather_and_plan(
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    tile: int,
    tail: int = 0,
    x_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows of x sorted by expert, `[T · k, H]`, with their scales if x has some, and the plan of their tiles."""
    rows = empty((order.shape[0], x.shape[1]), x.dtype, x.device)
    row_scales = None if x_scale is None else empty((order.shape[0], x_scale.shape[1]), torch.float32, x.device)
    return rows, row_scales, _plan(rows, offsets, tile, tail, x, order, top_k, row_scales, x_scale)


def plan_and_clear(out: torch.Tensor, offsets: torch.Tensor, tile: int, tail: int = 0) -> torch.Tensor:
    """The plan of the tiles of a result `[S, N]`; those of its rows that are no expert's are set to 0."""
    return _plan(out, offsets, tile, tail)
