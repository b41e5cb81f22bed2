"""The smallest logit that min-p, top-k and top-p keep, found by one program without sorting the row.

Every filter keeps the tokens whose logit is at least some threshold, ties included. With C(v) tokens and the mass M(v)
at or above v, top-k's threshold is the largest v with C(v) ≥ k, and top-p's the largest v with M(v) ≥ p · M(t), where t
is the threshold of the filters before it. Both are searched for in the same way:

1. The tiles' maxima bound the threshold from below: the k-th largest of them has k tokens at or above it, and likewise
   for the mass. Tiles whose maximum is smaller are never read.
2. The tokens above the bound are gathered. Usually they are few: they are sorted and summed up, and that is the answer.
3. Where they are many (flat distributions under top-p, large k), C and M are measured at three values between the
   bounds, in one pass, until the tokens between the bounds are few or all tied. The values are a third of the way, two
   thirds, and halfway among the representable numbers, so that the search ends after 32 passes whatever the logits.
"""

import triton
import triton.language as tl

from octavo.kernels.sampling.logits import LOWEST, STAGES, edit, load_raw


@triton.jit
def _key(x):
    """An int32 that is ordered as the fp32 is; zeros of either sign have one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def listed_logits(
    list_ptr,
    start,
    listed,
    logits_ptr,
    row,
    V,
    tiles,
    stride_logits_row,
    edits,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The next tiles of the list: edited logits, token ids `[TILES, TILE]` and tile ids; -inf past the list's end."""
    at = start + tl.arange(0, TILES)
    tile = tl.load(list_ptr + at, mask=at < listed, other=tiles)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = load_raw(logits_ptr, row, token, V, stride_logits_row)
    return edit(x, row, token, 0, V, V, edits), token, tile


@triton.jit
def list_tiles(list_ptr, tile, tile_max, low):
    """Writes down, in order, which tiles hold a logit of at least `low`; returns how many."""
    needed = tile_max >= low
    at = tl.cumsum(needed.to(tl.int32), 0) - 1
    tl.store(list_ptr + at, tile, mask=needed)
    tl.debug_barrier()  # other threads read what this one wrote
    return tl.sum(needed.to(tl.int32), 0)


@triton.jit
def lower_bound(tile, tile_max, top, total, scale, floor, k, p, V):
    """A logit that the threshold is not below, and whether many tokens may lie above it, from the tiles' maxima."""
    ordered = tl.sort(tile_max, descending=True)
    if (k == 0) & (floor == LOWEST):
        # Top-p takes its share of `total`, which is known. All tokens below `tail` together hold less than half of what
        # it leaves out.
        enough = tl.cumsum(tl.exp((ordered - top) * scale), 0) >= p * total
        low = tl.max(tl.where(enough, ordered, LOWEST), 0)
        tail = top + tl.log((1.0 - tl.minimum(p, 0.9999999)) * total / V * 0.5) / scale
        loose = tail > low
        low = tl.maximum(low, tail)
    else:
        low = tl.maximum(floor, tl.max(tl.where(tile == k - 1, ordered, LOWEST), 0))
        loose = low == LOWEST
    return low, loose


@triton.jit
def find_threshold(
    list_ptr,
    candidates_ptr,
    logits_ptr,
    row,
    listed,
    low,
    loose,
    top,
    total,
    scale,
    floor,
    k,
    p,
    V,
    tiles,
    stride_logits_row,
    edits,
    CANDIDATES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The smallest logit kept, given a lower bound `low` of it; k = 0 and p = 1 are off.

    `floor` is min-p's threshold; `listed` tiles hold a logit of at least `low`; where low is `loose`, there are so many
    such logits that gathering them is not worth trying.
    """
    slot = tl.arange(0, CANDIDATES)
    threshold = floor
    counting = k > 0  # looking for top-k's threshold; then for top-p's
    searching = counting | (p < 1.0)
    share_known = (k == 0) & (floor == LOWEST)  # of what top-p takes its share
    share = total
    # What is looked for lies in [low, high); so many tokens, with so much mass, lie at or above `high`.
    low_key = _key(low)
    above_top = _key(top) + 1
    high_key = above_top
    high_count = k * 0
    high_mass = total * 0.0
    while searching:
        low, high = _value(low_key), _value(high_key)
        found = tl.where(loose, CANDIDATES + 1, 0)
        for start in tl.range(0, tl.where(loose, 0, listed), TILES, num_stages=STAGES):
            x, _, _ = listed_logits(
                list_ptr, start, listed, logits_ptr, row, V, tiles, stride_logits_row, edits, TILES, TILE
            )
            x = tl.reshape(x, [TILES * TILE])
            within = (x >= low) & (x < high)
            at = found + tl.cumsum(within.to(tl.int32), 0) - 1
            tl.store(candidates_ptr + at, x, mask=within & (at < CANDIDATES))
            found += tl.sum(within.to(tl.int32), 0)
        tl.debug_barrier()
        if (found > CANDIDATES) & (high_key.to(tl.int64) - low_key > 1):
            low_count = found + high_count
            while (low_count - high_count > CANDIDATES) & (high_key.to(tl.int64) - low_key > 1):
                low, high = _value(low_key), tl.minimum(_value(high_key), top)
                step = high * 0.33333334 - low * 0.33333334
                inner, outer = low_key + 1, high_key - 1
                a = tl.minimum(tl.maximum(_key(low + step), inner), outer)
                a = tl.where(loose | ((share_known | counting) == 0), low_key, a)  # what lies above `low` must be known
                b = tl.minimum(tl.maximum(_key(high - step), inner), outer)
                c = ((low_key.to(tl.int64) + high_key) >> 1).to(tl.int32)
                a_value, b_value, c_value = _value(a), _value(b), _value(c)
                a_counts = tl.zeros([TILES, TILE], tl.int32)
                b_counts = tl.zeros([TILES, TILE], tl.int32)
                c_counts = tl.zeros([TILES, TILE], tl.int32)
                a_masses = tl.zeros([TILES, TILE], tl.float32)
                b_masses = tl.zeros([TILES, TILE], tl.float32)
                c_masses = tl.zeros([TILES, TILE], tl.float32)
                for start in tl.range(0, listed, TILES, num_stages=STAGES):
                    x, _, _ = listed_logits(
                        list_ptr, start, listed, logits_ptr, row, V, tiles, stride_logits_row, edits, TILES, TILE
                    )
                    mass = tl.exp((x - top) * scale)
                    a_counts += (x >= a_value).to(tl.int32)
                    b_counts += (x >= b_value).to(tl.int32)
                    c_counts += (x >= c_value).to(tl.int32)
                    a_masses += tl.where(x >= a_value, mass, 0.0)
                    b_masses += tl.where(x >= b_value, mass, 0.0)
                    c_masses += tl.where(x >= c_value, mass, 0.0)
                for i in tl.static_range(3):
                    key = a if i == 0 else (b if i == 1 else c)
                    counts = a_counts if i == 0 else (b_counts if i == 1 else c_counts)
                    masses = a_masses if i == 0 else (b_masses if i == 1 else c_masses)
                    count, mass = tl.sum(tl.sum(counts, 1), 0), tl.sum(tl.sum(masses, 1), 0)
                    if i == 0:
                        share = tl.where(share_known | counting, share, mass)
                    enough = tl.where(counting, count >= k, mass >= p * share)
                    rises, falls = enough & (key >= low_key), (enough == 0) & (key < high_key)
                    low_key, low_count = tl.where(rises, key, low_key), tl.where(rises, count, low_count)
                    high_key, high_count = tl.where(falls, key, high_key), tl.where(falls, count, high_count)
                    high_mass = tl.where(falls, mass, high_mass)
                share_known = share_known | (counting == 0)
                loose = loose & (listed < 0)
        else:
            # In descending order; if more than fit, all are tied at `low`.
            x = tl.sort(tl.load(candidates_ptr + slot, mask=slot < found, other=-float("inf")), descending=True)
            if counting:
                kth = tl.max(tl.where(slot == k - high_count - 1, x, low), 0)
                threshold = tl.maximum(threshold, kth)
            complete = high_key == above_top  # then top-p's threshold is among these too
            searching = counting & (p < 1.0) & (complete == 0)
            if (p < 1.0) & (searching == 0):
                kept = x >= threshold
                mass = tl.where(kept, tl.exp((x - top) * scale), 0.0)
                share = tl.where(share_known, share, tl.sum(mass, 0))
                enough = kept & (high_mass + tl.cumsum(mass, 0) >= p * share)
                threshold = tl.maximum(threshold, tl.max(tl.where(enough, x, low), 0))
            counting = k < 0
            loose = searching & (k > CANDIDATES)
            low_key, high_key = tl.where(searching, _key(threshold), low_key), above_top
            high_count, high_mass = high_count * 0, high_mass * 0.0
    return threshold
