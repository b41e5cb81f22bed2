"""Two values that the threshold very likely lies between, so that few tokens do: estimated, or else by dividing."""

import triton
import triton.language as tl

from octavo.kernels.sampling.logits import edit, load_raw
from octavo.kernels.sampling.sort import ascending


@triton.jit
def key_of(x):
    """An int32 that is ordered as the fp32 is; zeros of either sign have one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sample_of_tiles(
    list_ptr, listed, logits_ptr, row, V, stride_logits_row, edits, SAMPLE: tl.constexpr, TILE: tl.constexpr
):
    """Logits of the listed tiles, as many of each, at places that differ from tile to tile."""
    slot = tl.arange(0, SAMPLE)
    tile = tl.load(list_ptr + slot * listed // SAMPLE)  # no more than 1024 tiles: fits in int32
    token = tile * TILE + slot * 37 % TILE
    return edit(load_raw(logits_ptr, row, token, V, stride_logits_row), row, token, 0, V, V, edits)


@triton.jit(noinline=True)
def estimated(
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
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys of values a < b with the threshold in [a, b) but for bad luck, from SAMPLE of the logits.

    These are the `found` candidates, if `gathered`, or else those of the listed tiles.

    The threshold is the largest value below which no more than `left_out` lies, tokens if `counting`, or else mass; if
    `measured`, of what reaches `low`. What lies below is estimated rather than what lies above, since it has no large
    terms: its variance is small even if a few tokens hold most of the mass.
    """
    if gathered:
        x = tl.load(candidates_ptr + (tl.arange(0, SAMPLE).to(tl.int64) * found // SAMPLE).to(tl.int32))
    else:
        x = _sample_of_tiles(list_ptr, listed, logits_ptr, row, V, stride_logits_row, edits, SAMPLE, TILE)
    population = tl.where(gathered, found, listed * TILE)
    # A miss among the candidates costs less than a pass over more of them.
    deviations = tl.where(gathered, 2.5, 3.5)
    x = ascending(x)
    weight = tl.where(counting, 1.0, tl.exp((x - top) * scale))
    weight = tl.where((x >= value_of(low_key)) | (measured == 0), weight, 0.0)
    below = tl.cumsum(weight, 0)  # including the token itself
    # Not before the first sum is done, which the compiler can't know to be no condition: both at once take too many
    # registers.
    squares = tl.cumsum(tl.where(below >= 0.0, weight * weight, 0.0), 0)
    # Standard deviations of the sum; one term more, four times, because of a few that are no normal distribution.
    error = deviations * tl.sqrt(tl.maximum(squares - below * below * (1.0 / SAMPLE), 0.0) + 4.0 * weight * weight)
    share = left_out * (SAMPLE / population.to(tl.float32))
    a_key = key_of(tl.max(tl.where(below - weight + error <= share, x, -float("inf")), 0))
    a_key = tl.minimum(tl.maximum(a_key, low_key), high_key - 1)
    # Just above it, so that tokens tied there lie in between.
    b_key = key_of(tl.min(tl.where(below - error > share, x, float("inf")), 0))
    b_key = tl.minimum(tl.maximum(b_key, a_key) + 1, high_key)
    # Nothing is left above where there is room for all of it, with some to spare since this is an estimate.
    reach = tl.sum((x >= value_of(a_key)).to(tl.int32), 0).to(tl.float32) * (population.to(tl.float32) / SAMPLE)
    return a_key, tl.where(reach < 0.5 * room, high_key, b_key)


@triton.jit
def divided(low_key, high_key, top, tried):
    """Keys of a ≤ b that cut [low, high) in three: evenly in value, or among the representable numbers, by turns.

    The latter end the search whatever the logits.
    """
    low, high = value_of(low_key), tl.minimum(value_of(high_key), top)
    step = high * 0.33333334 - low * 0.33333334
    third = ((high_key.to(tl.int64) - low_key + 2) // 3).to(tl.int32)
    a_key = tl.where(tried % 2 == 0, low_key + third, key_of(low + step))
    b_key = tl.where(tried % 2 == 0, high_key - third, key_of(high - step))
    a_key = tl.minimum(tl.maximum(a_key, low_key + 1), high_key - 1)
    return a_key, tl.minimum(tl.maximum(b_key, a_key), high_key - 1)
