"""The ways in which a row's token is drawn, once it is known which tokens its filters keep.

By tiles: a tile is drawn by the mass that the first kernel summed up, then a token in it; a token that the filters
leave out is drawn again, with other noise. Each time one tile is read. As long as the filters keep a fair share of the
mass, that takes a few times; noise for all tokens would take longer than reading them.

Where top-p is the only filter, its threshold is not even looked for. A token is kept if those above it hold less than
top-p's share, for which one pass over the tiles that have such tokens is enough, often a part of it or none: tokens up
to it that hold more than the rest settle it, and so may the tiles' numbers.

From the candidates: where filters keep less (top-k of a flat distribution), what they keep has been gathered, and the
largest perturbed logit among that is the draw. Should there have been no room for all of it, the listed tiles are read
once more; logits must be contrived for that.
"""

import triton
import triton.language as tl

from octavo.kernels.sampling.gather import first_of_largest, list_tiles, masses_up_to
from octavo.kernels.sampling.logits import edit, load_raw
from octavo.kernels.sampling.noise import gumbel, gumbel_of
from octavo.kernels.sampling.tile_stats import MAX, PLANES, SUM
from octavo.reference import sampling as reference

SHARE = tl.constexpr(reference.SHARE)  # of the mass: rows that keep as much draw by tiles


@triton.jit
def _draw(whole, greedy, seed, position, use, SEEDED: tl.constexpr, ALL_TILES: tl.constexpr, TILE: tl.constexpr):
    """A token of the whole row with the noise of `use` and the next one, and its logit; the largest if greedy."""
    row_stats_ptr, logits_ptr, row, V, tiles, stride_logits_row, edits, top, scale = whole
    tile = tl.arange(0, ALL_TILES)
    tile_max = tl.load(row_stats_ptr + MAX * tiles + tile, mask=tile < tiles, other=-float("inf"))
    score = tile_max
    if SEEDED:
        tile_sum = tl.load(row_stats_ptr + SUM * tiles + tile, mask=tile < tiles, other=0.0)
        tile_mass = (tile_max - top) * scale + tl.log(tile_sum)
        score = tl.where(greedy, tile_max, tile_mass + gumbel(seed, position, use, 0, ALL_TILES))
    first = tl.argmax(score, 0) * TILE
    within = first + tl.arange(0, TILE)
    x = edit(load_raw(logits_ptr, row, within, V, stride_logits_row), row, within, 0, V, V, edits)
    score = x
    if SEEDED:
        score = tl.where(greedy, x, (x - top) * scale + gumbel(seed, position, use + 1, first, TILE))
    _, token = first_of_largest(score, within)
    return token, tl.max(tl.where(within == token, x, -float("inf")), 0)


@triton.jit(noinline=True)
def _draw_apart(whole, greedy, seed, position, use, SEEDED: tl.constexpr, ALL_TILES: tl.constexpr, TILE: tl.constexpr):
    """The same as a function of its own, where more than one place needs it."""
    return _draw(whole, greedy, seed, position, use, SEEDED, ALL_TILES, TILE)


@triton.jit
def _measure(
    x,
    inside,
    outside,
    goal,
    whole,
    greedy,
    seed,
    position,
    use,
    SEEDED: tl.constexpr,
    ALL_TILES: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Moves `inside` and `outside` until x is not between them: it is kept if the tokens above hold less than `goal`.

    The two that would be drawn next, from `use` on, are measured along: one pass in place of up to three.
    """
    row_stats_ptr, logits_ptr, row, V, tiles, stride_logits_row, edits, top, scale = whole
    if (x > outside) & (x < inside):
        tile = tl.arange(0, ALL_TILES)
        tile_max = tl.load(row_stats_ptr + MAX * tiles + tile, mask=tile < tiles, other=-float("inf"))
        tile_sum = tl.load(row_stats_ptr + SUM * tiles + tile, mask=tile < tiles, other=0.0)
        above = tile_max > x
        largest = tl.where(above, tl.exp((tile_max - top) * scale), 0.0)
        # All tokens above x are in these tiles, and hold less than `goal` if what else is there is more than `spare`.
        spare = tl.sum(tile_sum * largest, 0) - goal
        y, z = x, x
        up_to_x, up_to_y, up_to_z = spare * 0.0, spare * 0.0, spare * 0.0
        # Their numbers tell if all that they hold is less, or the largest of each are enough: so where there are peaks.
        if (spare >= 0.0) & (tl.sum(largest, 0) < goal):
            list_ptr = (row_stats_ptr + PLANES * tiles).to(tl.pointer_type(tl.int32))
            listed = list_tiles(list_ptr, tile, above, tiles, MANY)
            for i in range(2):
                _, other = _draw_apart(whole, greedy, seed, position, use + 2 * i, SEEDED, ALL_TILES, TILE)
                y, z = tl.maximum(other, x), y  # what is below x is left out with it, or not drawn at all
            up_to_x, up_to_y, up_to_z = masses_up_to(
                list_ptr,
                listed,
                x,
                y,
                z,
                spare,
                logits_ptr,
                row,
                V,
                stride_logits_row,
                edits,
                top,
                scale,
                MANY,
                TILE,
            )
        inside = tl.minimum(inside, tl.where(up_to_y > spare, y, inside))
        inside = tl.minimum(inside, tl.where(up_to_z > spare, z, inside))
        inside = tl.minimum(inside, tl.where(up_to_x > spare, x, inside))
        outside = tl.maximum(outside, tl.where(up_to_y > spare, outside, y))
        outside = tl.maximum(outside, tl.where(up_to_z > spare, outside, z))
        outside = tl.maximum(outside, tl.where(up_to_x > spare, outside, x))
    return inside, outside


@triton.jit
def draw_by_tiles(
    whole,
    greedy,
    inside,
    outside,
    goal,
    seeds_ptr,
    positions_ptr,
    MEASURED: tl.constexpr,
    ALL_TILES: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    """A token that the filters keep; the largest if greedy, and of equals the first.

    `whole` is what is known of the row: its tiles' numbers, its logits and how they are edited, the largest, the scale.
    Logits from `inside` on are known to be kept, those up to `outside` not to be. There are others only if MEASURED.
    """
    row = whole[2]
    seed, position = row.to(tl.int64), row.to(tl.int64)
    SEEDED: tl.constexpr = seeds_ptr is not None
    if SEEDED:
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    token = tl.full([], -1, tl.int32)
    use = tl.full([], 0, tl.int32)
    DRAW: tl.constexpr = _draw_apart if MEASURED else _draw
    while token < 0:
        drawn, x = DRAW(whole, greedy, seed, position, use, SEEDED, ALL_TILES, TILE)
        use += 2
        if MEASURED:
            inside, outside = _measure(
                x, inside, outside, goal, whole, greedy, seed, position, use, SEEDED, ALL_TILES, MANY, TILE
            )
        token = tl.where(x >= inside, drawn, token)
    return token


@triton.jit(noinline=True)
def draw_by_tiles_apart(
    whole,
    greedy,
    inside,
    outside,
    goal,
    seeds_ptr,
    positions_ptr,
    MEASURED: tl.constexpr,
    ALL_TILES: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same as a function of its own, for rows that are searched and those that are not."""
    return draw_by_tiles(
        whole, greedy, inside, outside, goal, seeds_ptr, positions_ptr, MEASURED, ALL_TILES, MANY, TILE
    )


@triton.jit
def mass_of_candidates(candidates_ptr, found, threshold, top, scale, SORTED: tl.constexpr):
    """Of those that reach the threshold."""
    masses = tl.zeros([SORTED], tl.float32)
    for start in tl.range(0, found, SORTED):
        slot = start + tl.arange(0, SORTED)
        x = tl.load(candidates_ptr + slot, mask=slot < found, other=-float("inf"))
        masses += tl.where(x >= threshold, tl.exp((x - top) * scale), 0.0)
    return tl.sum(masses, 0)


@triton.jit(noinline=True)
def draw_from_candidates(
    list_ptr,
    candidates_ptr,
    found,
    threshold,
    top,
    scale,
    seed,
    position,
    CANDIDATES: tl.constexpr,
    SORTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token whose logit with its noise is the largest of those that reach the threshold."""
    places_ptr = candidates_ptr.to(tl.pointer_type(tl.int32)) + CANDIDATES
    best = tl.full([SORTED], -float("inf"), tl.float32)
    best_token = tl.full([SORTED], 0, tl.int32)
    for start in tl.range(0, found, SORTED):
        slot = start + tl.arange(0, SORTED)
        x = tl.load(candidates_ptr + slot, mask=slot < found, other=-float("inf"))
        place = tl.load(places_ptr + slot, mask=slot < found, other=0)
        token = tl.load(list_ptr + place // TILE) * TILE + place % TILE
        score = tl.where(x >= threshold, (x - top) * scale + gumbel_of(seed, position, 1, token), -float("inf"))
        better = (score > best) | ((score == best) & (token < best_token))
        best, best_token = tl.where(better, score, best), tl.where(better, token, best_token)
    return first_of_largest(best, best_token)[1]


@triton.jit(noinline=True)
def draw_from_tiles(
    list_ptr,
    listed,
    logits_ptr,
    row,
    V,
    stride_logits_row,
    edits,
    threshold,
    top,
    scale,
    seed,
    position,
    TILE: tl.constexpr,
):
    """The same among all tokens of the listed tiles."""
    best = tl.full([TILE], -float("inf"), tl.float32)
    best_token = tl.full([TILE], 0, tl.int32)
    for i in tl.range(0, listed):
        first = tl.load(list_ptr + i) * TILE
        token = first + tl.arange(0, TILE)
        x = edit(load_raw(logits_ptr, row, token, V, stride_logits_row), row, token, 0, V, V, edits)
        score = tl.where(x >= threshold, (x - top) * scale + gumbel(seed, position, 1, first, TILE), -float("inf"))
        better = score > best
        best, best_token = tl.where(better, score, best), tl.where(better, token, best_token)
    return first_of_largest(best, best_token)[1]
