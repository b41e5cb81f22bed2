"""Passes over a row's tokens: how much lies above a value, or up to it, and the tokens between two written down."""

import triton
import triton.language as tl

from octavo.kernels.sampling.logits import STAGES, edit, load_raw

NOWHERE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def first_of_largest(score, token):
    """The largest score, and the lowest token (or place) among those that have it."""
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, token, NOWHERE))


@triton.jit
def list_tiles(list_ptr, tile, needed, tiles, TILES: tl.constexpr):
    """Writes down, in order, which tiles are needed, and TILES that are none; returns how many."""
    at = tl.cumsum(needed.to(tl.int32), 0) - 1
    tl.store(list_ptr + at, tile, mask=needed)
    listed = tl.sum(needed.to(tl.int32), 0)
    tl.store(list_ptr + listed + tl.arange(0, TILES), tiles)
    tl.debug_barrier()  # other threads read what this one wrote
    return listed


@triton.jit
def _join(candidates_ptr, places_ptr, counts, deepest, COLUMNS: tl.constexpr):
    """Moves the lists of all columns together, their first entries first."""
    found = deepest * 0
    for depth in range(deepest):
        tl.debug_barrier()  # what is read here may have been written by another thread, and be written over by others
        at = depth * COLUMNS + tl.arange(0, COLUMNS)
        there = depth < counts
        x = tl.load(candidates_ptr + at, mask=there, other=0.0)
        place = tl.load(places_ptr + at, mask=there, other=0)
        to = found + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.debug_barrier()
        tl.store(candidates_ptr + to, x, mask=there)
        tl.store(places_ptr + to, place, mask=there)
        found += tl.sum(there.to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def gather_from_tiles(
    list_ptr,
    listed,
    a,
    b,
    candidates_ptr,
    logits_ptr,
    row,
    V,
    stride_logits_row,
    edits,
    top,
    scale,
    CANDIDATES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads the listed tiles, and writes down the logits in [a, b) with their places.

    A token's place is that among all tokens of the listed tiles: it takes fewer registers than the token's id.

    Returns how many there is room for, -1 where one of the lists was too short; how many there are, and their mass;
    then the count and the mass of the tokens that reach `b`.
    """
    places_ptr = candidates_ptr.to(tl.pointer_type(tl.int32)) + CANDIDATES
    DEPTH: tl.constexpr = CANDIDATES // (TILES * TILE)
    column = tl.reshape(tl.arange(0, TILES * TILE), [TILES, TILE])
    # Every place of a tile makes a list of its own, so that threads need not count together in the loop.
    counts = tl.zeros([TILES, TILE], tl.int32)
    masses = tl.zeros([TILES, TILE], tl.float32)
    counts_above = tl.zeros([TILES, TILE], tl.int32)
    masses_above = tl.zeros([TILES, TILE], tl.float32)
    for start in tl.range(0, listed, TILES, num_stages=STAGES):
        tile = tl.load(list_ptr + start + tl.arange(0, TILES))
        token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = edit(load_raw(logits_ptr, row, token, V, stride_logits_row), row, token, 0, V, V, edits)
        mass = tl.exp((x - top) * scale)
        within = (x >= a) & (x < b)
        masses += tl.where(within, mass, 0.0)
        counts_above += (x >= b).to(tl.int32)
        masses_above += tl.where(x >= b, mass, 0.0)
        at = counts * (TILES * TILE) + column
        fits = within & (counts < DEPTH)
        tl.store(candidates_ptr + at, x, mask=fits)
        tl.store(places_ptr + at, start * TILE + column, mask=fits)
        counts += within.to(tl.int32)
    deepest = tl.max(counts)
    if deepest <= DEPTH:
        _join(candidates_ptr, places_ptr, tl.reshape(counts, [TILES * TILE]), deepest, TILES * TILE)
    room = tl.where(deepest <= DEPTH, CANDIDATES, -1)
    return room, tl.sum(counts), tl.sum(masses), tl.sum(counts_above), tl.sum(masses_above)


@triton.jit
def masses_up_to(
    list_ptr,
    listed,
    x,
    y,
    z,
    enough,
    logits_ptr,
    row,
    V,
    stride_logits_row,
    edits,
    top,
    scale,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The masses in the listed tiles of the tokens up to x, y and z; of a part, if up to x it is over `enough`."""
    up_to_x, up_to_y, up_to_z = top * 0.0, top * 0.0, top * 0.0
    # In quarters, after each of which it may be enough: a loop that can be left anywhere is not prefetched.
    quarter = tl.cdiv(listed, 4 * TILES) * TILES
    first = tl.minimum(listed, 0)  # a zero that the compiler can't see, so that it keeps no addresses ready for it
    while (first < listed) & (up_to_x <= enough):
        masses_x = tl.zeros([TILES, TILE], tl.float32)
        masses_y = tl.zeros([TILES, TILE], tl.float32)
        masses_z = tl.zeros([TILES, TILE], tl.float32)
        for start in tl.range(first, tl.minimum(first + quarter, listed), TILES, num_stages=STAGES):
            tile = tl.load(list_ptr + start + tl.arange(0, TILES))
            token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            value = edit(load_raw(logits_ptr, row, token, V, stride_logits_row), row, token, 0, V, V, edits)
            mass = tl.exp((value - top) * scale)
            masses_x += tl.where(value <= x, mass, 0.0)
            masses_y += tl.where(value <= y, mass, 0.0)
            masses_z += tl.where(value <= z, mass, 0.0)
        up_to_x += tl.sum(masses_x)
        up_to_y += tl.sum(masses_y)
        up_to_z += tl.sum(masses_z)
        first += quarter
    return up_to_x, up_to_y, up_to_z


@triton.jit
def gather_from_candidates(candidates_ptr, found, a, b, top, scale, CANDIDATES: tl.constexpr, SORTED: tl.constexpr):
    """The same among the `found` candidates, of which those in [a, b) are written down once more, behind the places."""
    narrowed_ptr = candidates_ptr + 2 * CANDIDATES
    within_count = found * 0
    masses = tl.zeros([SORTED], tl.float32)
    counts_above = tl.zeros([SORTED], tl.int32)
    masses_above = tl.zeros([SORTED], tl.float32)
    for start in tl.range(0, found, SORTED):
        slot = start + tl.arange(0, SORTED)
        x = tl.load(candidates_ptr + slot, mask=slot < found, other=-float("inf"))
        mass = tl.exp((x - top) * scale)
        within = (x >= a) & (x < b)
        masses += tl.where(within, mass, 0.0)
        counts_above += (x >= b).to(tl.int32)
        masses_above += tl.where(x >= b, mass, 0.0)
        at = within_count + tl.cumsum(within.to(tl.int32), 0) - 1
        tl.store(narrowed_ptr + at, x, mask=within & (at < SORTED))
        within_count += tl.sum(within.to(tl.int32), 0)
    tl.debug_barrier()
    return within_count, tl.sum(masses), tl.sum(counts_above), tl.sum(masses_above)
