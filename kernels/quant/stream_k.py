"""A product of matrices whose work is shared out evenly ("stream-K"), where it has few tiles.

The work, in steps of BLOCK_K inputs, is dealt out in equal shares, which begin and end within tiles. Whoever comes last
to a tile adds up its parts, in the order of the programs, so that results have the same bits from run to run. Osama et
al., "Stream-K" (2023), https://arxiv.org/abs/2301.03598. They share out the last wave of many tiles as well: on an H100
that took longer than leaving multiprocessors without work in it.

The counters of those who came to a tile lie in memory that nobody has cleared: `arrive` says how.
"""

import triton
import triton.language as tl

from octavo.kernels.tiles import cdiv

SCALE_BLOCK = tl.constexpr(128)
"""Inputs, and outputs, of a block of weights that has a scale of its own."""
_ARRIVED = tl.constexpr(0x6F63_7461_766F_0000)


def share_out(tiles: int, steps: int, slots: int, least: int) -> tuple[int, int]:
    """Programs, and the steps of each one's share, for tiles of `steps` and at least as many slots, the
    programs that run at a time.

    None has less than `least` steps, unless a tile has fewer. Where a tile is cut, its parts cost a way through memory:
    so a share is rounded up to end with a tile where that makes it at most 4 % longer.
    """
    share = max(cdiv(tiles * steps, slots), min(least, steps))
    even = next(size for size in range(share, steps + 1) if steps % size == 0)
    if even <= 1.04 * share:
        share = even
    return cdiv(tiles * steps, share), share


@triton.jit
def tile_at(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows at a time, column by column."""
    width = GROUP * n_tiles
    first = tile // width * GROUP
    rows = tl.minimum(m_tiles - first, GROUP)
    return first + tile % width % rows, tile % width // rows


@triton.jit
def arrive(counter_ptr, count):
    """Whether this is the last of `count` arrivals at a counter, behind all that the others have written.

    The counter needs no clearing beforehand: what it holds counts for arrivals only beside a mark of 48 bits, and the
    last takes the mark away. So a workspace that is allocated for each call will do, on any stream and in any graph.
    """
    tl.debug_barrier()  # all of this program's threads have written
    seen = tl.atomic_add(counter_ptr, 0, sem="relaxed")
    waiting = True
    last = False
    while waiting:
        before = seen - _ARRIVED
        before = tl.where((before > 0) & (before < count), before, 0)
        last = before == count - 1
        found = tl.atomic_cas(counter_ptr, seen, tl.where(last, 0, before + 1 + _ARRIVED), sem="acq_rel")
        waiting = found != seen
        seen = found
    return last


@triton.jit
def is_last(workspace_ptr, tile, steps, share):
    """Whether this program is the last to have left its part of a tile; all who have one ask."""
    others = (tile * steps + steps - 1) // share - tile * steps // share
    return arrive(workspace_ptr + tile, tl.cast(others + 1, tl.int64))


@triton.jit
def _parts(workspace_ptr, tiles, program, begins_tile, SUM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the part `[ROWS, COLS]` of a program starts, the counters lying ahead of them all.

    It has at most two: one of the tile in which its share begins, and one of that in which it ends.
    """
    parts_ptr = (workspace_ptr + tiles).to(tl.pointer_type(SUM), bitcast=True)
    return parts_ptr + tl.cast(program * 2 + begins_tile, tl.int64) * (ROWS * COLS)


@triton.jit
def store_part(acc, workspace_ptr, begins_tile, tiles):
    """Leaves this program's part of a tile; `begins_tile`: 1 where it has the tile's first step, else 0."""
    ROWS: tl.constexpr = acc.shape[0]
    COLS: tl.constexpr = acc.shape[1]
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    part_ptr = _parts(workspace_ptr, tiles, tl.program_id(0), begins_tile, acc.dtype, ROWS, COLS)
    tl.store(part_ptr + at, acc)


@triton.jit
def sum_parts(
    workspace_ptr, tile, tiles, steps, share, col, SUM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of all parts of a tile, WIDTH columns of it from `col` on, in the order of the programs."""
    at = tl.arange(0, ROWS)[:, None] * COLS + col + tl.arange(0, WIDTH)[None, :]
    first, last = tile * steps // share, (tile * steps + steps - 1) // share
    total = tl.load(_parts(workspace_ptr, tiles, first, 1, SUM, ROWS, COLS) + at, cache_modifier=".cg")
    for program in range(first + 1, last + 1):
        total += tl.load(_parts(workspace_ptr, tiles, program, 0, SUM, ROWS, COLS) + at, cache_modifier=".cg")
    return total
