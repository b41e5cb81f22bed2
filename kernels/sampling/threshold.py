"""The smallest logit that min-p, top-k and top-p keep, found by one program without sorting the row.

Every filter keeps the tokens whose logit is at least some threshold, ties included. With C(v) tokens and the mass M(v)
at or above v, top-k's threshold is the largest v with C(v) ≥ k, and top-p's the largest v with M(v) ≥ p · M(t), where t
is the threshold of the filters before it. Both are searched for in the same way:

1. The tiles' maxima bound the threshold from below: the k-th largest of them has k tokens at or above it, and likewise
   for the mass. Tiles whose maximum is smaller are never read.
2. If these are few, the tokens above the bound are gathered. If they are many (flat distributions under top-p, large
   k), a sample of their tokens, a few of each tile, is sorted, and says which [a, b) the threshold is in but for bad
   luck. One pass over the tiles gathers the tokens in [a, b), and finds C and M at both, so that bad luck is noticed.
   All tokens that reach b are kept: the same pass draws among them.
3. Among the tokens gathered the search goes on in the same way, until they are few enough to be sorted and summed up.
   That is the answer.
4. After bad luck, or if [a, b) holds more than there is room for, its ends are known for a smaller interval to search
   in, which is divided in three until there is room. An interval of one value is the answer too, however many tokens
   have it.

Where top-p alone is to be obeyed, drawing mostly does without the threshold (`draw.py`).
"""

import triton
import triton.language as tl

from octavo.kernels.sampling.bracket import divided, estimated, key_of, value_of
from octavo.kernels.sampling.gather import gather_from_candidates, gather_from_tiles, list_tiles
from octavo.kernels.sampling.logits import LOWEST
from octavo.kernels.sampling.sort import ascending
from octavo.kernels.sampling.tile_stats import MAX, SUM


@triton.jit(noinline=True)
def list_possible_tiles(
    list_ptr,
    row_stats_ptr,
    tiles,
    top,
    total,
    scale,
    floor,
    k,
    p,
    V,
    ALL_TILES: tl.constexpr,
    TILES: tl.constexpr,
):
    """A logit that the threshold is not below, from the tiles' maxima; the tiles that reach it are written down.

    Returns with it how many these are, and the mass in them.
    """
    tile = tl.arange(0, ALL_TILES)
    tile_max = tl.load(row_stats_ptr + MAX * tiles + tile, mask=tile < tiles, other=-float("inf"))
    tile_sum = tl.load(row_stats_ptr + SUM * tiles + tile, mask=tile < tiles, other=0.0)
    ordered = -ascending(-tile_max)
    if (k == 0) & (floor == LOWEST):
        # Top-p takes its share of `total`, which is known. All tokens below `tail` together hold less than half of what
        # it leaves out.
        enough = tl.cumsum(tl.exp((ordered - top) * scale), 0) >= p * total
        tail = top + tl.log((1.0 - tl.minimum(p, 0.9999999)) * total / V * 0.5) / scale
        low = tl.maximum(tl.max(tl.where(enough, ordered, LOWEST), 0), tail)
    else:
        low = tl.maximum(floor, tl.max(tl.where(tile == k - 1, ordered, LOWEST), 0))
    listed = list_tiles(list_ptr, tile, tile_max >= low, tiles, TILES)
    listed_mass = tl.sum(tl.where(tile_max >= low, tile_sum * tl.exp((tile_max - top) * scale), 0.0), 0)
    return low, listed, listed_mass


@triton.jit(noinline=True)
def _smallest_kept(
    list_ptr,
    within,
    above,
    above_mass,
    threshold,
    least,
    goal,
    k,
    p,
    counting,
    top,
    scale,
    SORTED: tl.constexpr,
):
    """The threshold among the `within` logits written down, above which are others, and which is at least `least`.

    Returns with it whether it is top-p's, too, where top-k's was looked for.
    """
    slot = tl.arange(0, SORTED)
    # In descending order, from the highest that fits.
    x = tl.load(list_ptr + slot, mask=slot < within, other=-float("inf"))
    x = -ascending(-x)
    masses = tl.exp((x - top) * scale)
    enough = tl.where(counting, above + slot + 1 >= k, above_mass + tl.cumsum(masses, 0) >= goal)
    answer = tl.max(tl.where(enough & (slot < within), x, least), 0)
    complete = counting & (p < 1.0) & (above == 0)
    if complete:
        kept = x >= tl.maximum(threshold, answer)
        masses = tl.where(kept, masses, 0.0)
        goal = tl.maximum(p, 1e-30) * tl.sum(masses, 0)
        enough = kept & (tl.cumsum(masses, 0) >= goal)
        answer = tl.max(tl.where(enough, x, answer), 0)
    return answer, complete


@triton.jit(noinline=True)
def find_threshold(
    list_ptr,
    candidates_ptr,
    logits_ptr,
    row,
    listed,
    listed_mass,
    low,
    top,
    total,
    scale,
    floor,
    k,
    p,
    V,
    stride_logits_row,
    edits,
    CANDIDATES: tl.constexpr,
    SORTED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The smallest logit kept, given a lower bound `low` of it; k = 0 and p = 1 are off, `floor` is min-p's threshold.

    Returns with it how many candidates there are, the tokens gathered, which may be kept or not; and the count and the
    mass of the others that are kept.
    """
    counting = k > 0  # looking for top-k's threshold; then for top-p's
    known = (counting == 0) & (p >= 1.0)  # the threshold is found; what is left to do is to gather
    threshold = floor
    share, share_known = total, (k == 0) & (floor == LOWEST)  # of what top-p takes its share
    # What is looked for lies in [low, high). So many tokens, with so much mass, reach either; until they are `measured`
    # those of `low` are all that the tiles hold.
    low_key, high_key = key_of(low), key_of(top) + 1
    low_count, low_mass = listed * TILE, listed_mass
    high_count = listed * 0
    measured = k < 0
    # Tokens in [low, edge) are `found` and gathered, or else those in the tiles are searched; these reach `edge`:
    gathered = k < 0
    found, edge_key = listed * 0, high_key
    edge_count, edge_mass = listed * 0, total * 0.0
    tried = k * 0
    crowded = k < 0  # the last interval's tokens are few enough, but did not fit into their lists
    searching = k == k
    while searching:
        above_top = key_of(top) + 1
        room = tl.where(gathered, SORTED, CANDIDATES)
        a_key, b_key = low_key, high_key
        if known:
            a_key, b_key = key_of(threshold), above_top
        elif ((low_count - high_count > room) | crowded) & (counting | share_known):
            if tried == 0:
                left_out = tl.where(counting, (low_count - k).to(tl.float32), low_mass - p * share)
                a_key, b_key = estimated(
                    candidates_ptr,
                    found,
                    list_ptr,
                    listed,
                    logits_ptr,
                    row,
                    V,
                    stride_logits_row,
                    edits,
                    gathered,
                    room,
                    low_key,
                    high_key,
                    measured,
                    counting,
                    left_out,
                    top,
                    scale,
                    SORTED,
                    TILE,
                )
            else:
                a_key, b_key = divided(low_key, high_key, top, tried)
        a, b = value_of(a_key), value_of(b_key)
        if gathered:
            within, within_mass, above, above_mass = gather_from_candidates(
                candidates_ptr, found, a, b, top, scale, CANDIDATES, SORTED
            )
            above += edge_count
            above_mass += edge_mass
        else:
            room, found, within_mass, above, above_mass = gather_from_tiles(
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
                CANDIDATES,
                TILES,
                TILE,
            )
            within, edge_key, edge_count, edge_mass = found, b_key, above, above_mass
        crowded = room < 0
        if known:
            searching = k != k
            if found > room:
                found, edge_count, edge_mass = found * 0, within, within_mass
        else:
            count, mass = above + within, above_mass + within_mass
            tried = tl.where(counting | share_known, tried + 1, 0)  # to find out the share was no try
            share = tl.where(counting | share_known, share, mass)
            share_known = share_known | (counting == 0)
            goal = tl.maximum(p, 1e-30) * share
            a_enough = tl.where(counting, count >= k, mass >= goal)
            b_enough = tl.where(counting, above >= k, above_mass >= goal)
            fits = a_enough & (b_enough == 0) & (within <= room)
            # Fewer than k tokens reach min-p's threshold, say: then that is it.
            answered = (a_enough == 0) & (a_key == low_key)
            beyond = b_enough & (b_key == high_key)
            if b_enough:
                low_key, low_count, low_mass = b_key, above, above_mass
            elif a_enough:
                low_key, low_count, low_mass = a_key, count, mass
                high_key, high_count = b_key, above
            elif answered == 0:
                high_key, high_count = a_key, count
            measured = measured | a_enough | b_enough
            if beyond:
                # Of those gathered all are too small. The tiles have the rest.
                gathered = k < 0
                high_key, high_count = above_top, high_count * 0
                tried = tried * 0
            # An interval of one value is the answer, too.
            answered = answered | ((beyond == 0) & (high_key.to(tl.int64) - low_key == 1))
            answer = value_of(low_key)
            complete = k < 0  # top-p's threshold is found with top-k's
            if fits:
                if within <= SORTED:
                    answer, complete = _smallest_kept(
                        candidates_ptr + tl.where(gathered, 2 * CANDIDATES, 0),
                        within,
                        above,
                        above_mass,
                        threshold,
                        answer,
                        goal,
                        k,
                        p,
                        counting,
                        top,
                        scale,
                        SORTED,
                    )
                    answered = fits
                if gathered == 0:
                    gathered = fits
                    tried = tried * 0
            if answered:
                threshold = tl.maximum(threshold, answer)
                if counting & (p < 1.0) & (complete == 0):
                    counting = k < 0
                    measured = k < 0
                    low_key, high_key = key_of(threshold), tl.where(gathered, edge_key, above_top)
                    low_count = tl.where(gathered, edge_count + found, listed * TILE)
                    high_count = tl.where(gathered, edge_count, 0)
                    tried = tried * 0
                else:
                    known = answered
                    searching = gathered == 0
    return threshold, found, edge_count, edge_mass
